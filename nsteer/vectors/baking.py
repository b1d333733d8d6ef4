"""Turns an edit by a vector of a store into weights: a folder of a model that is steered whoever loads it.

Only edits that weights hold exactly are baked: what is the same linear map, or the same constant, at every position of
every text. The folder gets its name once the logits of what lies in it were seen to be those of the steered model.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nsteer import __version__
from nsteer.errors import BakeError, did_you_mean
from nsteer.executors.local import load, pick_device
from nsteer.models import facts as models
from nsteer.models import loading
from nsteer.models.facts import Facts
from nsteer.plan import layers as naming
from nsteer.plan.schema import Model
from nsteer.program import anatomy
from nsteer.program.anatomy import Anatomy
from nsteer.program.sublayers import Sublayer
from nsteer.store import results, slug
from nsteer.vectors import hooks
from nsteer.vectors.exchange import leaving

OPS = ("project_out", "add")
"""Ops that weights can hold."""

UNITS = ("raw", "unit")
"""Units of a constant; the others depend on the text."""

ERRORS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""How far the baked logits may be off, relative to the steered ones (L2), by what the weights are rounded to."""

OF_THE_EDIT = 0.25
"""The largest part of the edit's own effect that they may be off by."""

PROMPTS = (
    "The old man walked to the market and",
    "I think that",
    "Here is what she wrote in her letter to him , and why it was never sent :",
)
"""What the proof reads, where its user gives nothing else."""

ABOUT = "nsteer.json"
"""The file of the folder that says what was baked."""


@dataclass(frozen=True)
class Baked:
    """A folder of baked weights.

    error, effect : ‖baked - steered‖ and ‖steered - unsteered‖ of the logits, each over ‖steered‖, the worst and the
    least of the prompts. notes : what a user must know about it
    """

    folder: Path
    error: float
    effect: float
    notes: list[str]


@dataclass(frozen=True)
class Edit:
    """What is baked: `vectors`, by block; of `project_out` the one direction of length 1 under every block."""

    op: str
    vectors: Mapping[int, torch.Tensor]
    strength: float
    said: Mapping[str, Any]


def bake(
    store: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    method: str,
    emotion: str,
    model: str | None = None,
    op: str = "project_out",
    layers: Any = None,
    strength: float = 1.0,
    scale: str = "raw",
    dtype: str = "float32",
    device: str = "auto",
    prompts: Sequence[str] = PROMPTS,
) -> Baked:
    """Writes the model of a vector with an edit by it in its weights, a folder that transformers loads like any other.

    op : `project_out` takes the vector of the one layer that `layers` names out of all that is written into the
        residual stream: embeddings, what attention and MLP of every block add. It is what the edits of a plan do at
        `resid_pre` of layer 0 and at `attn_out` and `mlp_out` of all layers. `add` adds each layer's vector to the
        stream after that block, at every position, where its MLP ends in a bias
    strength : of `project_out` the fraction taken out; of `add` in units of `scale`, `raw` or `unit`
    dtype : what the weights are saved as; float32 rounds nothing
    prompts : texts on which the folder is compared with the steered model

    Raises BakeError, in one line, for what weights can not hold exactly or what the proof did not find equal, and for a
    folder that is there; ModelError, StoreError.
    """
    target = Path(folder)
    _check(target, op, strength, scale, dtype)
    opened = results.open(store)
    label = leaving.model_named(opened, model)
    labels = {"model": label, "method": method, opened.axis: emotion}
    results.select(opened["vectors", label], labels, f"vectors of {label}")
    path = f"vectors/{slug(label)}"
    vector = opened.whole(path, (label, method, emotion)).vector
    facts = _facts(leaving.known_of(opened, label))
    edit = _edit(vector, facts, op, layers, strength, scale)
    content = opened.store.committed(path)[label, method, emotion].content
    about = {
        "baked": edit.said,
        "model": {"id": facts.id, "revision": facts.revision or "", "identity": facts.identity},
        "vector": {"store": opened.name, "method": method, opened.axis: emotion, "content": f"{content:013x}"},
        "dtype": dtype,
        "nsteer": __version__,
    }
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with models.unchanged(facts):
            module, tokenizer = load(
                facts.name_or_path, "float32", {}, {"revision": facts.revision, "trust_remote_code": False}
            )
        module = module.to(pick_device(device)).eval()
        _unquantised(module)
        model_anatomy = anatomy.prove(module)
        unsteered = [_logits(module, tokenizer, text) for text in prompts]
        writers = _writers(module, model_anatomy, edit)
        with _steered(module, model_anatomy, edit):
            steered = [_logits(module, tokenizer, text) for text in prompts]
        module = _edited(
            module, model_anatomy, edit, writers, [tokenizer(text, return_tensors="pt") for text in prompts]
        )
        with loading.quiet():
            module.to(dtype=getattr(torch, dtype)).save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        (temporary / ABOUT).write_text(json.dumps(about, indent=1), encoding="utf-8")
        del module
        baked, _ = load(str(temporary), "float32", {}, {"trust_remote_code": False})
        logits = [_logits(baked.to(pick_device(device)).eval(), tokenizer, text) for text in prompts]
        error, effect = _held(logits, steered, unsteered, dtype)
        os.rename(temporary, target)
    except OSError as problem:
        raise BakeError(f"can not write {target}: {problem.strerror or problem}") from problem
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    notes = ["the model was a GGUF file: the folder has its weights dequantised"] if facts.gguf else []
    return Baked(target, error, effect, notes)


def _check(target: Path, op: str, strength: float, scale: str, dtype: str) -> None:
    """Raises BakeError for what is known to be wrong before a model loads."""
    if os.path.lexists(target):
        raise BakeError(f"{target} is there: name a folder that is not")
    if not target.parent.is_dir():
        raise BakeError(f"can not write {target}: no such folder as {target.parent}")
    for name, value, known in (("op", op, OPS), ("scale", scale, UNITS), ("dtype", dtype, tuple(ERRORS))):
        if value not in known:
            why = {
                "op": "weights hold no other edit exactly",
                "scale": "an amount that depends on the text is in no weight",
            }
            raise BakeError(f"{name} {value!r}: {why.get(name, did_you_mean(value, known))}; one of {', '.join(known)}")
    if not np.isfinite(strength) or strength == 0:
        raise BakeError(f"strength {strength}: expected a finite number other than 0")


def _facts(known: Mapping[str, Any]) -> Facts:
    """The model of a store, as its files are now. Raises BakeError where they are not those that the vector is of."""
    on_hub = known["gguf"] if known.get("gguf") and known["revision"] else None
    facts = models.facts(Model(id=known["id"], revision=known["revision"] or None, gguf=on_hub))
    if facts.identity != known["identity"]:
        raise BakeError(f"{known['id']}: its files are not those that the vector was made of, or imported for")
    if facts.adapter:
        raise BakeError(f"{known['id']} is an adapter: merge it into its model first")
    return facts


def _edit(vector: Any, facts: Facts, op: str, layers: Any, strength: float, scale: str) -> Edit:
    """The edit, its vectors by block. Raises BakeError for layers at which there is no vector."""
    known = [int(layer) for layer in vector.layer.values[vector.notnull().all("d_model").values]]
    if layers is None and len(known) > 1:
        need = "the one whose vector it is" if op == "project_out" else "those that are steered"
        raise BakeError(f"name layers, {need}: the vector has {', '.join(map(str, known))}")
    try:
        chosen = known if layers is None else list(naming.resolve(layers, facts.n_layers))
    except LookupError as error:
        raise BakeError(f"layers: {error.args[0]}") from error
    if lost := [layer for layer in chosen if layer not in known]:
        raise BakeError(f"the vector has no layer {lost[0]}; it has {', '.join(map(str, known)) or 'none'}")
    if op == "project_out" and len(chosen) != 1:
        raise BakeError(f"{len(chosen)} layers: one direction is taken out of the whole stream; name its layer")
    values = {layer: torch.from_numpy(np.array(vector.sel({"layer": layer}).values, np.float64)) for layer in chosen}
    units = {layer: vector / vector.norm() for layer, vector in values.items()}
    said = {"op": op, "strength": strength, "layers": chosen}
    if op == "project_out":
        return Edit(op, dict.fromkeys(range(facts.n_layers), units[chosen[0]]), strength, said)
    return Edit(op, values if scale == "raw" else units, strength, {**said, "scale": scale})


def _unquantised(model: nn.Module) -> None:
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        raise BakeError("the model's weights are quantised: a baked one would be rounded again. Bake its full weights")


# ---- which weights write into the stream -------------------------------------------------------------------------


def _writers(model: nn.Module, model_anatomy: Anatomy, edit: Edit) -> dict[tuple[int, str], nn.Module]:
    """(block, site) -> the linear layer whose output is what the block adds there.

    Raises BakeError where there is none: a norm or a sum of experts lies between.
    """
    sites = (
        {"mlp_out": model_anatomy.mlp}
        if edit.op == "add"
        else {"attn_out": model_anatomy.attention, "mlp_out": model_anatomy.mlp}
    )
    if not model_anatomy.proved:
        raise BakeError(
            f"{type(model).__name__}: its blocks' outputs are not known to be sums, so that no weights can be named "
            "that write into the stream"
        )
    kept: dict[str, list[torch.Tensor]] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, module in model.get_submodule(model_anatomy.blocks).named_modules(prefix=model_anatomy.blocks):
            stack.callback(module.register_forward_hook(_keeping(kept, name)).remove)
        ids = torch.arange(6, device=anatomy.entry(model)).reshape(2, 3) % model_anatomy.vocab
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    writers = {}
    for layer in sorted(edit.vectors):
        for site, sublayer in sites.items():
            assert sublayer is not None
            name = f"{model_anatomy.blocks}.{layer}.{sublayer.at(layer)[0]}"
            writers[layer, site] = _writer(model, name, kept, layer, site)
    return writers


def _keeping(kept: dict[str, list[torch.Tensor]], name: str) -> Any:
    def keep(module: Any, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, torch.Tensor):
            kept.setdefault(name, []).append(first.detach().clone())

    return keep


def _writer(model: nn.Module, name: str, kept: Mapping[str, list[torch.Tensor]], layer: int, site: str) -> nn.Module:
    """The linear layer in a sublayer, or itself, that gave what the sublayer gave."""
    (given,) = kept[name]
    shared = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for path, module in model.get_submodule(name).named_modules(prefix=name):
        own = kept.get(path, [])
        if type(module).__name__ not in ("Linear", "Conv1D") or len(own) != 1 or own[0].shape[-1:] != given.shape[-1:]:
            continue
        if own[0].numel() == given.numel() and torch.equal(own[0].reshape(given.shape), given):
            if shared.count(id(module.weight)) > 1:
                raise BakeError(f"{path}: its weight is another module's too")
            return module
    raise BakeError(
        f"{site} of layer {layer} comes from no linear layer but from {type(model.get_submodule(name)).__name__} (a "
        "norm after the sublayer, a sum of experts?), which lets no edit through as it is: not in weights exactly"
    )


def _into(module: nn.Module) -> torch.Tensor:
    """A linear layer's weight as [out, in], a view: transformers' Conv1D keeps it as [in, out]."""
    weight: Any = module.weight
    return weight.data.T if type(module).__name__ == "Conv1D" else weight.data


# ---- the edit, by hooks and in weights ---------------------------------------------------------------------------


@contextmanager
def _steered(model: nn.Module, model_anatomy: Anatomy, edit: Edit) -> Iterator[None]:
    """The model steered by hooks, as a plan steers it."""
    device = anatomy.entry(model)
    if edit.op == "add":
        import xarray as xr

        layers = sorted(edit.vectors)
        stacked = torch.stack([edit.vectors[layer] for layer in layers]).numpy()
        vector = xr.DataArray(stacked, {"layer": layers}, ("layer", "d_model"))
        with hooks.steer(model, vector, strength=edit.strength, scale="raw"):
            yield
        return

    def without(stream: torch.Tensor, layer: int) -> torch.Tensor:
        unit = edit.vectors[layer].to(device, torch.float32)
        return stream - edit.strength * (stream @ unit)[..., None] * unit

    def entering(module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if args:
            return (without(args[0], 0), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: without(kwargs[name], 0)}

    def leaving_at(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            many = isinstance(output, tuple | list)
            stream = without(output[0] if many else output, layer)
            return (stream, *output[1:]) if many else stream

        return hook

    blocks: Any = model.get_submodule(model_anatomy.blocks)
    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
        for layer, block in enumerate(blocks):
            for sublayer in (model_anatomy.attention, model_anatomy.mlp):
                assert isinstance(sublayer, Sublayer)
                module = block.get_submodule(sublayer.at(layer)[0])
                stack.callback(module.register_forward_hook(leaving_at(layer)).remove)
        yield


def _edited(
    model: Any, model_anatomy: Anatomy, edit: Edit, writers: Mapping[tuple[int, str], nn.Module], texts: Sequence[Any]
) -> Any:
    """The model with the edit in its weights."""
    if edit.op == "add":
        return _with_biases(model, model_anatomy, edit, writers)
    unit = edit.vectors[0].to(anatomy.entry(model))
    before = _entering(model, model_anatomy, texts)
    _untied(model)
    inside = {id(inner) for inner in model.get_submodule(model_anatomy.blocks).modules()}
    head = model.get_submodule(model_anatomy.head)
    with torch.no_grad():
        for module in model.modules():
            fits = isinstance(module, nn.Embedding) and module.embedding_dim == model_anatomy.d_model
            if fits and id(module) not in inside and module is not head:
                _orthogonal(module.weight.data.T, None, unit, edit.strength)
        for (layer, _), module in writers.items():
            along = edit.vectors[layer].to(unit.device)
            _orthogonal(_into(module), getattr(module, "bias", None), along, edit.strength)
    for was, now in zip(before, _entering(model, model_anatomy, texts), strict=True):
        along = edit.strength * (was.double() @ unit)[..., None] * unit
        if not torch.allclose(now.double(), was.double() - along, atol=1e-4 * float(was.abs().max())):
            raise BakeError(
                "what enters the first block is not the sum of embeddings alone (a norm or a projection after them?): "
                "no weight holds the edit exactly"
            )
    return model


def _orthogonal(into: torch.Tensor, bias: Any, unit: torch.Tensor, strength: float) -> None:
    """Takes a direction, or a fraction of it, out of what a weight [out, in] writes, in float64, in place."""
    exact = into.double()
    into.copy_(exact - strength * torch.outer(unit, unit @ exact))
    if bias is not None:
        bias.data.copy_(bias.data.double() - strength * (unit @ bias.data.double()) * unit)


def _with_biases(model: Any, model_anatomy: Anatomy, edit: Edit, writers: Mapping[tuple[int, str], nn.Module]) -> Any:
    """A constant after a block is one more in the bias with which its MLP ends."""
    assert model_anatomy.mlp is not None
    if model_anatomy.mlp.factor != 1:
        raise BakeError(
            f"its blocks multiply what the MLP adds by {model_anatomy.mlp.factor:g}: no bias is exactly the vector"
        )
    for (layer, _), module in writers.items():
        bias: Any = getattr(module, "bias", None)
        if bias is None:
            raise BakeError(
                f"the MLP of layer {layer} of {type(model).__name__} ends in no bias: none of its weights holds a "
                "constant (project_out needs none)"
            )
        bias.data += (edit.strength * edit.vectors[layer]).to(bias.device, bias.dtype)
    return model


def _entering(model: Any, model_anatomy: Anatomy, texts: Sequence[Any]) -> list[torch.Tensor]:
    """What enters the first block, [row, position, d_model] of each text."""
    kept: list[torch.Tensor] = []

    def hook(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        kept.append((args[0] if args else next(iter(kwargs.values()))).detach().clone())

    handle = model.get_submodule(model_anatomy.blocks)[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for text in texts:
                model(input_ids=text["input_ids"].to(anatomy.entry(model)))
    finally:
        handle.remove()
    return kept


def _untied(model: Any) -> None:
    """Gives the head a weight of its own where it had the embeddings': they change, and it must not."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    for config in {id(config): config for config in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False


# ---- the proof ---------------------------------------------------------------------------------------------------


def _logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """[position, token] of a text, float64 on the CPU."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(anatomy.entry(model))
    with torch.no_grad():
        return model(input_ids=ids).logits[0].double().cpu()


def _held(
    baked: Sequence[torch.Tensor], steered: Sequence[torch.Tensor], unsteered: Sequence[torch.Tensor], dtype: str
) -> tuple[float, float]:
    """How far the baked logits are from the steered ones, and these from the unsteered. Raises BakeError if too far."""
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(baked, steered, strict=True))
    effect = min(float((a - b).norm() / b.norm()) for a, b in zip(unsteered, steered, strict=True))
    said = f"logits off by {error:.2g} of their length, where the edit moves them by {effect:.2g}"
    if not np.isfinite([error, effect]).all():
        raise BakeError("logits that are not finite: nothing is written")
    if error > ERRORS[dtype]:
        raise BakeError(f"the baked weights do not do what the edit does ({said}): nothing is written")
    if error > OF_THE_EDIT * effect:
        raise BakeError(
            f"rounding to {dtype} hides the edit ({said}): nothing is written; --dtype float32, or stronger"
        )
    return error, effect
