"""Turns a vector into hooks on a plain transformers model: the edits of compiled programs, for a notebook.

The ops and the arithmetic are those of `ops.py` and `kernel.py`, which compiled programs embed: one truth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from nsteer import anatomy, kernel
from nsteer import layers as naming
from nsteer.errors import EditError, SteerError, did_you_mean
from nsteer.ops import ACTING_AT_ZERO, OPS, REFERENCED, SCALES, UNSCALED, in_unit
from nsteer.positions import WORDS

__all__ = ["Steering", "steer"]


@contextmanager
def steer(
    model: Any,
    vector: Any,
    layers: Any = None,
    *,
    strength: Any,
    op: str = "add",
    scale: str = "stream_norm",
    positions: str = "all",
    vector_layer: Any = "same",
    norm_skip: int = 0,
    mean: Any = None,
    norm: Any = None,
) -> Iterator[Steering]:
    """Edits a model's residual stream after its blocks, as `steer:` of a plan does, until the `with` block ends.

    model : a causal language model of transformers; called, or generating with its cache
    vector : a labelled array (layer, d_model) whose labels say which block gets which vector, or one layer of it; or
        a tensor [d_model]. One more dim, the first of a tensor, gives every row of the batch a vector of its own
    layers : the steered layers, as in plans; all that a labelled vector has when left out
    strength : in the unit of `scale`; a number, or one a row
    positions : `prompt` (what goes in without a cache), `generated` (what comes after), `all`, or `last` of the prompt
    vector_layer : `same`, or the one layer whose vector is used at all layers
    norm_skip : leading positions left out of the live norm of `stream_norm`
    mean : for `set_mean` and `affine`, the reference mean: an array (layer, d_model), or a tensor [d_model]
    norm : for `reference_norm`, the mean norm of the reference streams: an array (layer), or a number

    Rows are those of the batch; where several are generated of one prompt, they share its vector and strength.
    Padding, on either side, is known by the attention mask and never edited. Contexts nest: at one block the outer
    edits first. Yields a Steering, which tells what was done. Raises SteerError for what does not fit, AnatomyError
    where the blocks can not be found, EditError at the end when the model ran and nothing was edited.
    """
    made = Steering(op, scale, positions, norm_skip)
    if not hasattr(model, "get_output_embeddings"):
        raise SteerError(f"{type(model).__name__} is no causal language model of transformers")
    found = anatomy.find(model)
    source, chosen = _placed(vector, layers, vector_layer, found.n_layers)
    for layer, place in chosen.items():
        given = _given(mean, layer, op in REFERENCED, "mean", op), _given(norm, layer, made.by_norm, "norm", scale)
        made.edits[layer] = _edit(made, source(place), np.atleast_1d(_numbers(strength)), found.d_model, *given)
    with ExitStack() as hooks:
        decoder = model.get_submodule(found.blocks.rpartition(".")[0])
        hooks.callback(decoder.register_forward_pre_hook(made.begin, with_kwargs=True).remove)
        for layer in made.edits:
            block = model.get_submodule(f"{found.blocks}.{layer}")
            hooks.callback(block.register_forward_hook(made.hook(layer)).remove)
        yield made
    made.check()


@dataclass(frozen=True)
class Edit:
    """One layer's edit: vectors [row, d_model], amount [row], and where the op has one the reference mean's [row]."""

    vectors: torch.Tensor
    amount: torch.Tensor
    reference: torch.Tensor | None


@dataclass
class Steering:
    """What `steer` does while its context lasts, and what it has done.

    `receipts`: layer -> how many positions were edited, and the means over them of ‖Δ‖/‖h‖, of the cosine of the stream
    before and after, and of ‖Δ‖; rows that had ended and are carried along in a batch are counted too.
    """

    op: str
    scale: str
    positions: str
    norm_skip: int = 0
    edits: dict[int, Edit] = field(default_factory=dict)
    _sums: dict[int, torch.Tensor] = field(default_factory=dict)
    _first: bool = True
    _real: torch.Tensor | None = None

    def __post_init__(self) -> None:
        known = {"op": list(OPS), "scale": list(SCALES), "positions": list(WORDS)}
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise SteerError(f"{name} {getattr(self, name)!r}: {did_you_mean(getattr(self, name), words)}")

    @property
    def by_norm(self) -> bool:
        """Whether strengths are multiples of a reference norm."""
        return self.scale == "reference_norm" and self.op not in UNSCALED

    @property
    def live(self) -> bool:
        """Whether strengths are multiples of the stream's norm as it passes."""
        return self.scale == "stream_norm" and self.op not in UNSCALED

    @property
    def receipts(self) -> dict[int, dict[str, float]]:
        found = {}
        for layer, sums in self._sums.items():
            touched, *totals = sums.tolist()
            names = ("relative_change", "cosine", "injected")
            means = {name: total / touched if touched else float("nan") for name, total in zip(names, totals)}
            found[layer] = {"touched": touched, **means}
        return found

    def check(self) -> None:
        """Raises EditError when the model ran and no position was edited, or none moved."""
        for layer, one in self.receipts.items():
            acts = self.op in ACTING_AT_ZERO or bool((self.edits[layer].amount != 0).any())
            if acts and not one["touched"]:
                raise EditError(f"layer {layer}: no position was edited (positions {self.positions!r})")
            if acts and one["injected"] == 0:
                raise EditError(f"layer {layer}: the edit moved nothing")

    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A pass begins: which of its positions are tokens, and whether anything went before them."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {"input_ids": next(iter(args), None), **given, **given.get("kwargs", {})}  # some hide their signature
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            raise SteerError("a pass without input_ids or inputs_embeds")
        rows, new = tokens.shape[:2]
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if mask is None:
            past = 0 if cache is None else cache.get_seq_length()
            self._real = torch.ones(rows, new, dtype=torch.bool, device=tokens.device)
        elif isinstance(mask, torch.Tensor) and mask.ndim == 2:
            past = mask.shape[1] - new
            self._real = mask[:, past:].bool()
        else:
            raise SteerError("an attention mask that is not [row, position]: padding is read from it (a static cache?)")
        self._first = past == 0

    def hook(self, layer: int) -> Callable:
        """The forward hook of a block."""

        def after(module: Any, inputs: Any, output: Any) -> Any:
            stream = self.edited(layer, output[0] if isinstance(output, tuple | list) else output)
            return (stream, *output[1:]) if isinstance(output, tuple | list) else stream

        return after

    def edited(self, layer: int, before: torch.Tensor) -> torch.Tensor:
        """A block's output [row, position, d_model], edited; a copy, so that gradients may flow through both."""
        edit, stream = self.edits[layer], before.clone()
        assert self._real is not None, "the decoder runs before its blocks"
        mask, weights = masks(self._real.to(stream.device), self._first, self.positions, self.norm_skip)
        vectors, amount = over(edit.vectors, len(stream)), over(edit.amount, len(stream))
        more = () if edit.reference is None else (over(edit.reference, len(stream)),)
        # a prompt has one norm a row; after it every token has its own, also where several come at once
        parts = [slice(None)] if self._first else [slice(i, i + 1) for i in range(stream.shape[1])]
        for part in parts:
            norm = kernel.mean_norm(before[:, part], weights[:, part]) if self.live else None
            factor = amount if norm is None else amount.to(stream.device) * norm
            receipt = kernel.edit(stream[:, part], OPS[self.op], vectors, factor, mask[:, part], *more).detach().sum(0)
            self._sums[layer] = self._sums[layer] + receipt if layer in self._sums else receipt
        return stream


def masks(real: torch.Tensor, first: bool, positions: str, skip: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions of a pass are edited, and the weights of their live norm: both [row, position].

    real : which positions are tokens. first : whether the pass is the prompt
    """
    if not first:
        return real & (positions in ("all", "generated")), torch.ones_like(real, dtype=torch.float32)
    place, total = real.cumsum(1) - 1, real.sum(1, keepdim=True)
    touched = {"all": real, "prompt": real, "last": real & (place == total - 1)}.get(positions, torch.zeros_like(real))
    left_out = torch.minimum(torch.full_like(total, skip), (total - 1).clamp(min=0))
    return touched, (real & (place >= left_out)).float() / (total - left_out).clamp(min=1)


def over(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Values a row as values of `rows` rows: the same for all, or each for the rows generated of one prompt."""
    if rows % len(values):
        raise SteerError(f"a batch of {rows} rows, steered by {len(values)} vectors or strengths")
    return values.repeat_interleave(rows // len(values), 0)


# ---- what is asked for -------------------------------------------------------------------------------------------


def _edit(made: Steering, vectors: np.ndarray, strengths: np.ndarray, width: int, mean: Any, norm: Any) -> Edit:
    """The vectors [row, d_model] of one layer, in the unit that the op expects; row by row, as a plan has them."""
    if vectors.shape[-1] != width:
        raise SteerError(f"a vector of width {vectors.shape[-1]} for a model with d_model {width}")
    rows = max(len(vectors), len(strengths))
    if {len(vectors), len(strengths)} - {1, rows} or strengths.ndim != 1:
        raise SteerError(f"{len(vectors)} vectors and strengths {strengths.shape}: expected one each, or one a row")
    if not np.isfinite(strengths).all():
        raise SteerError(f"strength {strengths[~np.isfinite(strengths)][0]}: expected a finite number")
    found = []
    for row in range(rows):
        vector, strength = vectors[row % len(vectors)], float(strengths[row % len(strengths)])
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length) or length == 0:
            raise SteerError("a vector that is zero, or a hole, at a steered layer")
        one, amount = in_unit(made.op, made.scale, vector / length, length, strength, norm)
        found.append((one, amount, 0.0 if mean is None else float(mean @ one)))
    amounts, along = (torch.tensor([one[i] for one in found], dtype=torch.float32) for i in (1, 2))
    made_of = torch.from_numpy(np.stack([one[0] for one in found]).astype(np.float32))
    return Edit(made_of, amounts, along if made.op in REFERENCED else None)


def _placed(
    vector: Any, layers: Any, vector_layer: Any, n_layers: int
) -> tuple[Callable[[int], np.ndarray], dict[int, int]]:
    """The vectors [row, d_model] of a layer, and each steered layer with the layer whose vectors it gets."""
    known, source = _source(vector)
    if layers is None and known is None:
        raise SteerError("a vector without layers: name those to be steered, layers=...")
    chosen = known if layers is None else _resolved(layers, n_layers)
    assert chosen is not None
    same = isinstance(vector_layer, str) and vector_layer == "same"
    if same and layers is None:
        chosen = [layer for layer in chosen if np.isfinite(source(layer)).all()] or chosen
    single = None if same else _resolved(vector_layer, n_layers)
    if single is not None and len(single) != 1:
        raise SteerError(f"vector_layer {vector_layer!r}: expected one layer, or 'same'")
    places = {layer: layer if single is None else single[0] for layer in chosen}
    alone = known is not None and "layer" not in vector.dims  # one layer of an array may be put anywhere
    for layer, place in places.items():
        if known is not None and not alone and place not in known:
            raise SteerError(f"layer {place}: the vector has layers {', '.join(map(str, known))}")
        if not 0 <= layer < n_layers:
            raise SteerError(f"layer {layer} of a model with {n_layers} layers (0 to {n_layers - 1})")
    return source, places


def _source(vector: Any) -> tuple[list[int] | None, Callable[[int], np.ndarray]]:
    """The layers that a vector has, None where it names none; and the vectors [row, d_model] of a layer."""
    if not _labelled(vector):
        values = _numbers(vector)
        if values.ndim not in (1, 2):
            raise SteerError(f"a tensor {values.shape}: expected [d_model], or [row, d_model]")
        return None, lambda layer: np.atleast_2d(values).astype(np.float32)
    rows = [dim for dim in vector.dims if dim not in ("layer", "d_model")]
    if "d_model" not in vector.dims or len(rows) > 1:
        raise SteerError(f"an array over {vector.dims}: expected (layer, d_model), and at most one dim of rows; select")
    labels = np.atleast_1d(np.asarray(vector.coords["layer"])).tolist() if "layer" in vector.coords else None
    if "layer" not in vector.dims:
        values = np.atleast_2d(np.asarray(vector.transpose(*rows, "d_model"))).astype(np.float32)
        return labels, lambda layer: values
    if labels is None:
        raise SteerError("an array whose dim 'layer' has no labels: they say which block gets which vector")
    by_layer = np.asarray(vector.transpose("layer", *rows, "d_model")).astype(np.float32)
    found = {layer: np.atleast_2d(values) for layer, values in zip(labels, by_layer, strict=True)}
    return labels, lambda layer: found[layer]


def _given(value: Any, layer: int, needed: bool, name: str, why: str) -> Any:
    """The reference mean [d_model] or norm of a layer; None where there is none and none is needed."""
    if not needed or value is None:
        if needed or value is not None:
            raise SteerError(f"{name}: {why!r} needs it" if needed else f"{name}: {why!r} has no use for it")
        return None
    if _labelled(value) and "layer" in value.dims:
        if layer not in np.asarray(value.coords["layer"]).tolist():
            raise SteerError(f"{name} has no layer {layer}")
        value = value.sel({"layer": layer})
    found = _numbers(value)
    if found.ndim != (1 if name == "mean" else 0) or not np.isfinite(found).all():
        raise SteerError(f"{name} at layer {layer}: expected {'[d_model]' if name == 'mean' else 'a number'}")
    return found.astype(np.float32) if name == "mean" else float(found)


def _resolved(layers: Any, n_layers: int) -> list[int]:
    plain = layers.tolist() if hasattr(layers, "tolist") else layers
    plain = list(plain) if isinstance(plain, tuple | range) else plain
    if why := naming.problem_of(plain):
        raise SteerError(f"layers {layers!r}: {why}: expected {naming.FORMS}")
    try:
        return list(naming.resolve(plain, n_layers))
    except LookupError as error:
        raise SteerError(str(error.args[0])) from error


def _labelled(value: Any) -> bool:
    """Whether a value is an xarray DataArray, by what it can do: this side imports no labels."""
    return all(hasattr(value, name) for name in ("dims", "coords", "transpose", "sel"))


def _numbers(value: Any) -> np.ndarray:
    try:
        return np.asarray(value.detach().float().cpu() if isinstance(value, torch.Tensor) else value, np.float64)
    except (TypeError, ValueError) as error:
        raise SteerError(f"{type(value).__name__} is no number, tensor or labelled array of them") from error
