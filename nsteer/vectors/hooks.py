"""Turns a vector into hooks on a plain transformers model: the edits of compiled programs, for a notebook.

The ops and the arithmetic are those of `ops.py` and `kernel.py`, which compiled programs embed: one truth.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np
import torch

from nsteer.errors import AnatomyError, EditError, SteerError
from nsteer.plan import editing, positions, prompts
from nsteer.plan import layers as naming
from nsteer.plan.check.python import Asked, edit_of
from nsteer.program import anatomy, kernel
from nsteer.program.ops import OPS, UNSCALED
from nsteer.system import markup

__all__ = ["Steering", "steer"]


@contextmanager
def steer(
    model: Any,
    vector: Any,
    layers: Any = None,
    *,
    strength: Any,
    op: str = "add",
    scale: str | None = None,
    positions: Any = "all",
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
    op, scale : as in plans; `stream_norm` when left out
    positions : `prompt` (what goes in without a cache), `generated` (what comes after), `all`, or `last` of the prompt;
        or, as in plans, positions of the prompt by number or by token id, and all generated ones or none
    vector_layer : `same`, or the one layer whose vector is used at all layers
    norm_skip : leading positions left out of the live norm of `stream_norm`
    mean : for `set_mean` and `affine`, the reference mean: an array (layer, d_model), or a tensor [d_model]
    norm : for `reference_norm`, the mean norm of the reference streams: an array (layer), or a number

    Rows are those of the batch; where several are generated of one prompt, they share its vector and strength.
    Padding, on either side, is known by the attention mask and never edited. Contexts nest: at one block the outer
    edits first. Yields a Steering, which tells what was done. Raises SteerError for what does not fit, and in its words
    for what a plan's check refuses; AnatomyError where the blocks can not be found, or give no [row, position,
    d_model]; EditError at the end when the model ran and in some row nothing was edited, or the edited stream is not
    finite.

    Within `generate` a prompt is what it was given: with a cache or without one (`use_cache=False`), under beams,
    samples, a static cache or an assistant, the same positions are edited by the same amounts. A prompt that is read in
    several passes (`prefill_chunk_size`, a cache filled before) is refused, unless all positions are edited alike.
    """
    asked = {"op": op, "scale": scale, "positions": positions, "norm_skip": norm_skip}
    steering = Steering(edit_of(**asked, layers=listed(layers), vector_layer=listed(vector_layer)))
    if not hasattr(model, "get_output_embeddings"):
        raise SteerError(f"{type(model).__name__} is no causal language model of transformers")
    model_anatomy = anatomy.find(model)
    steering.plan((model_anatomy.n_layers, model_anatomy.d_model), vector, layers, strength, mean, norm)
    with ExitStack() as hooks:
        hooks.enter_context(_wrapped(model, steering))
        for whole in _around(model, model_anatomy.blocks):  # whichever of them is called: the outermost begins the pass
            hooks.callback(whole.register_forward_pre_hook(steering.begin, with_kwargs=True).remove)
            hooks.callback(whole.register_forward_hook(steering.end, always_call=True).remove)
        for layer in steering.edits:
            block = model.get_submodule(f"{model_anatomy.blocks}.{layer}")
            hooks.callback(block.register_forward_hook(steering.hook(layer)).remove)
        yield steering
    steering.check()


def _around(model: Any, blocks: str) -> list[Any]:
    """The model and what of it holds the blocks, from the outside in."""
    names = blocks.split(".")[:-1]
    return [model, *(model.get_submodule(".".join(names[: i + 1])) for i in range(len(names)))]


@contextmanager
def _wrapped(model: Any, steering: Steering) -> Iterator[None]:
    """`model.generate` tells `steering` its prompt while the context lasts."""
    generate, own = getattr(model, "generate", None), "generate" in vars(model)
    if generate is None:
        yield
        return

    @wraps(generate)
    def told(*args: Any, **kwargs: Any) -> Any:
        with steering.generating(args, kwargs):
            return generate(*args, **kwargs)

    model.generate = told
    try:
        yield
    finally:
        if own:
            model.generate = generate
        else:
            del model.generate


@dataclass
class Call:
    """A `generate` at work: how many positions its prompt has, its mask [row, position], and how far the model read."""

    prompt: int
    mask: torch.Tensor | None
    read: int = 0


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

    edit: Asked
    edits: dict[int, Edit] = field(default_factory=dict)
    width: int = 0
    _sums: dict[int, dict[int, torch.Tensor]] = field(default_factory=dict)  # layer -> rows -> receipts [row, 4]
    _call: Call | None = None
    _depth: int = 0  # modules around the blocks that are running
    _ran: set[int] = field(default_factory=set)
    _real: torch.Tensor | None = None  # of the pass: which positions are tokens
    _of_prompt: tuple[torch.Tensor, torch.Tensor] | None = None  # of its prompt: which are edited, weights of the norm
    _prompt: int = 0  # how many of them are of the prompt
    _wrote: bool = False  # whether anything but the prompt of a `generate` was read
    _known: int = 0  # how many were read before, and are read again without a cache

    def __post_init__(self) -> None:
        where = self.edit.positions
        if positions.sought(where):
            raise SteerError("positions: expected numbers or token ids, found text or a role: a batch has none")
        if positions.bounded(where):
            raise SteerError("positions: expected all generated tokens or none, found some: a call does not count them")

    def plan(
        self,
        size: tuple[int, int],
        vector: Any,
        layers: Any = None,
        strength: Any = 1.0,
        mean: Any = None,
        norm: Any = None,
    ) -> None:
        """Makes the edits of a model of `size` (blocks, d_model), which need not be loaded. Raises SteerError."""
        self.width = size[1]
        vectors_of, chosen = _placed(vector, layers, self.edit.vector_layer, size[0])
        for layer, place in chosen.items():
            references = (
                _given(mean, layer, editing.needs_mean(self.edit), "mean", self.edit.op),
                _given(norm, layer, editing.needs_norm(self.edit), "norm", self.edit.scale),
            )
            self.edits[layer] = _edit(
                self, layer, vectors_of(place), np.atleast_1d(_numbers(strength)), size[1], *references
            )

    @property
    def anywhere(self) -> bool:
        """Whether every position is edited alike, whatever of the text went before."""
        return self.edit.positions == "all" and not editing.live(self.edit)

    @property
    def receipts(self) -> dict[int, dict[str, float]]:
        receipts = {}
        for layer, by_rows in self._sums.items():
            touched, *totals = torch.stack([sums.sum(0) for sums in by_rows.values()]).sum(0).tolist()
            names = ("relative_change", "cosine", "injected")
            means = {name: total / touched if touched else float("nan") for name, total in zip(names, totals)}
            receipts[layer] = {"touched": touched, **means}
        return receipts

    def _repr_html_(self) -> str:
        receipts = self.receipts
        shown = [(layer, *(f"{receipt[name]:.4g}" for name in receipt)) for layer, receipt in sorted(receipts.items())]
        head = ("layer", "positions edited", "‖Δ‖/‖h‖", "cosine before and after", "‖Δ‖")
        unit = "" if self.edit.op in UNSCALED else f" in {self.edit.scale}"
        where = "certain" if positions.may_miss(self.edit.positions) else self.edit.positions
        title = f"{self.edit.op}{unit} at {where} positions of layers {', '.join(map(str, sorted(self.edits)))}"
        return markup.table(title if receipts else f"{title}: the model has not run", shown, head)

    def check(self) -> None:
        """Raises EditError when the model ran and in some row no position was edited, none moved, or one overflowed."""
        for layer, by_rows in self._sums.items():
            for rows, sums in by_rows.items():
                amounts = over(self.edits[layer].amount, rows).tolist()
                names = [f"row {row}" if rows > 1 else "" for row in range(rows)]
                editing.check(self.edit, amounts, [layer], sums[:, None].numpy(), names, [self._wrote] * rows)

    @contextmanager
    def generating(self, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
        """A `generate` with these arguments is at work."""
        if self._call is not None:
            raise SteerError("a model that calls its own `generate` (assistant_early_exit) is not steered")
        ids = next(
            (tokens for tokens in (*args[:1], kwargs.get("inputs"), kwargs.get("input_ids")) if tokens is not None),
            None,
        )
        tokens = ids if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        self._call = Call(1 if tokens is None else tokens.shape[1], kwargs.get("attention_mask"))
        try:
            yield
        finally:
            self._call = None

    def begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """A pass begins: which of its positions are tokens, and which of those the prompt's."""
        self._depth += 1
        if self._depth > 1:
            return
        self._ran.clear()
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        given = {"input_ids": next(iter(args), None), **given, **given.get("kwargs", {})}  # some hide their signature
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            raise SteerError("a pass without input_ids or inputs_embeds")
        rows, new = tokens.shape[:2]
        mask, call = given.get("attention_mask"), self._call
        caches = (given.get(name) for name in ("past_key_values", "cache_params"))
        cache = next((cache for cache in caches if cache is not None), None)
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            past = mask.shape[1] - new
            self._real = mask[:, past:].bool()
        else:
            past = call.read if call and call.read and new == 1 else 0 if cache is None else int(cache.get_seq_length())
            self._real = self._tokens(mask, rows, past, new, tokens.device)
        self._prompt = new if past == 0 else 0
        self._known = 0
        self._wrote = self._wrote or call is None or past + new > call.prompt
        if call is not None:
            self._prompt = min(max(call.prompt - past, 0), new)
            self._known, call.read = max(call.read - past, 0), max(call.read, past + new)
        if past and (self._prompt or (call is None and new > 1)) and not self.anywhere:
            raise SteerError(
                f"{new} positions after {past} that the model has read: a prompt in several passes "
                "(prefill_chunk_size, a cache filled before) has no one norm and no last position. Give it at once, or "
                "edit all positions in a unit other than stream_norm"
            )
        self._of_prompt = self._masks(tokens) if self._prompt else None

    def _masks(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which positions of a prompt are edited, and the weights of its live norm: both [row, position].

        tokens : the ids of a pass [row, position], or what is embedded in their place, of which nobody knows the ids
        """
        assert self._real is not None, "a pass has begun"
        where, named = self.edit.positions, tokens.ndim == 2
        if not named and any("ids" in given for _, given in positions.said(where)):
            raise SteerError("positions: expected input_ids, in which ids are looked for, found inputs_embeds")
        real = self._real[:, : self._prompt].cpu().numpy()
        ids = tokens.cpu().numpy() if named else np.zeros(tokens.shape[:2], int)
        touched, weights = np.zeros_like(real), np.zeros(real.shape, np.float32)
        for row, there in enumerate(real):
            if there.any():
                touched[row, there] = positions.of_prompt(where, ids[row, : self._prompt][there], (), "", ())
                weights[row, there] = prompts.norm_weights(int(there.sum()), self.edit.norm_skip)
        return torch.from_numpy(touched), torch.from_numpy(weights)

    def _tokens(self, mask: Any, rows: int, past: int, new: int, device: Any) -> torch.Tensor:
        """Which positions of a pass are tokens, where its mask does not say: none, or one made for attention."""
        real = torch.ones(rows, new, dtype=torch.bool, device=device)
        if mask is None:
            return real
        if self._call is None or not isinstance(self._call.mask, torch.Tensor) or self._call.mask.ndim != 2:
            raise SteerError(
                "an attention mask that is not [row, position] (a static cache?): padding is read from it. Give "
                "`generate` an attention_mask, or call the model with such a one"
            )
        told = over(self._call.mask.bool().to(device), rows)[:, past : past + new]
        return torch.cat([told, real[:, told.shape[1] :]], 1)

    def end(self, module: Any, args: Any, output: Any) -> None:
        """A module around the blocks has run, or failed."""
        self._depth = max(0, self._depth - 1)

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
        if why := anatomy.other_layout(tuple(before.shape), (*self._real.shape, self.width)):
            raise AnatomyError(f"layer {layer} {why}")
        first_time, running = layer not in self._ran, self._depth > 0  # not where a backward pass computes it again
        if running and not first_time:
            raise AnatomyError(f"layer {layer} runs more than once in a pass")
        self._ran.add(layer)
        real = self._real.to(stream.device)
        vectors, amount = over(edit.vectors, len(stream)), over(edit.amount, len(stream))
        more = () if edit.reference is None else (over(edit.reference, len(stream)),)
        # a prompt has one norm a row; after it every token has its own, also where several come at once
        windows = [slice(0, self._prompt)] * bool(self._prompt)
        for window in [*windows, *(slice(i, i + 1) for i in range(self._prompt, stream.shape[1]))]:
            if window.start < self._prompt and self._of_prompt is not None:
                mask, weights = (mask.to(stream.device) for mask in self._of_prompt)
            else:
                mask = real[:, window] & positions.written(self.edit.positions)
                weights = torch.ones_like(mask, dtype=torch.float32)
            norm = kernel.mean_norm(before[:, window], weights) if editing.live(self.edit) else None
            factor = amount if norm is None else amount.to(stream.device) * norm
            receipt = kernel.edit(stream[:, window], OPS[self.edit.op], vectors, factor, mask, *more).detach().cpu()
            if running and window.stop > self._known:
                kept = self._sums.setdefault(layer, {})
                kept[len(stream)] = kept[len(stream)] + receipt if len(stream) in kept else receipt
        return stream


def over(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Values a row as values of `rows` rows: the same for all, or each for the rows generated of one prompt."""
    if rows % len(values):
        raise SteerError(f"a batch of {rows} rows, steered by {len(values)} vectors or strengths")
    return values.repeat_interleave(rows // len(values), 0)


# ---- what is asked for -------------------------------------------------------------------------------------------


def _edit(
    steering: Steering, layer: int, vectors: np.ndarray, strengths: np.ndarray, width: int, mean: Any, norm: Any
) -> Edit:
    """The vectors [row, d_model] of one layer, in the unit that the op expects; row by row, as a plan has them."""
    if vectors.shape[-1] != width:
        raise SteerError(f"a vector of width {vectors.shape[-1]} for a model with d_model {width}")
    rows = max(len(vectors), len(strengths))
    if {len(vectors), len(strengths)} - {1, rows} or strengths.ndim != 1:
        raise SteerError(f"{len(vectors)} vectors and strengths {strengths.shape}: expected one each, or one a row")
    if not np.isfinite(strengths).all():
        raise SteerError(f"strength: expected a number, found {strengths[~np.isfinite(strengths)][0]}")
    edits = []
    for row in range(rows):
        vector, strength = vectors[row % len(vectors)], float(strengths[row % len(strengths)])
        try:
            compiled = editing.compiled_edit(steering.edit, layer, vector, strength, norm=norm, mean=mean)
        except EditError as error:
            raise SteerError(str(error)) from None
        edits.append((compiled.vector, compiled.amount, compiled.reference))
    amounts, along = (torch.tensor([rows[i] for rows in edits], dtype=torch.float32) for i in (1, 2))
    made_of = torch.from_numpy(np.stack([rows[0] for rows in edits]).astype(np.float32))
    return Edit(made_of, amounts, along if editing.needs_mean(steering.edit) else None)


def _placed(
    vector: Any, layers: Any, vector_layer: Any, n_layers: int
) -> tuple[Callable[[int], np.ndarray], dict[int, int]]:
    """The vectors [row, d_model] of a layer, and each steered layer with the layer whose vectors it gets."""
    known, vectors_of = _vectors_of(vector)
    if layers is None and known is None:
        raise SteerError("a vector without layers: name those to be steered, layers=...")
    chosen = known if layers is None else resolved(layers, n_layers)
    assert chosen is not None
    same = isinstance(vector_layer, str) and vector_layer == "same"
    if same and layers is None:
        chosen = [layer for layer in chosen if np.isfinite(vectors_of(layer)).all()] or chosen
    single = None if same else resolved(vector_layer, n_layers)
    places = {layer: layer if single is None else single[0] for layer in chosen}
    alone = known is not None and "layer" not in vector.dims  # one layer of an array may be put anywhere
    for layer, place in places.items():
        if known is not None and not alone and place not in known:
            raise SteerError(f"layer {place}: the vector has layers {', '.join(map(str, known))}")
        if not 0 <= layer < n_layers:
            raise SteerError(f"layer {layer} of a model with {n_layers} layers (0 to {n_layers - 1})")
    return vectors_of, places


def _vectors_of(vector: Any) -> tuple[list[int] | None, Callable[[int], np.ndarray]]:
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
    vectors = {layer: np.atleast_2d(values) for layer, values in zip(labels, by_layer, strict=True)}
    return labels, lambda layer: vectors[layer]


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
    reference = _numbers(value)
    if reference.ndim != (1 if name == "mean" else 0) or not np.isfinite(reference).all():
        raise SteerError(f"{name} at layer {layer}: expected {'[d_model]' if name == 'mean' else 'a number'}")
    return reference.astype(np.float32) if name == "mean" else float(reference)


def listed(layers: Any) -> Any:
    """Layers as a plan has them: arrays, tuples and ranges as lists."""
    layers = layers.tolist() if hasattr(layers, "tolist") else layers
    return list(layers) if isinstance(layers, tuple | range) else layers


def resolved(layers: Any, n_layers: int) -> list[int]:
    """The blocks that a specification names in a model of so many. SteerError for none."""
    given = listed(layers)
    if why := naming.problem_of(given):
        raise SteerError(f"layers: expected {naming.FORMS}, found {why}")
    try:
        return list(naming.resolve(given, n_layers))
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
