"""Turns vectors of a store into files that other programs read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsteer import __version__
from nsteer.errors import ExchangeError
from nsteer.models import facts as models
from nsteer.plan import layers as naming
from nsteer.plan.schema import DIRECTION_SOURCES, Model
from nsteer.program.ops import DIRECTIONAL, in_unit
from nsteer.report import contrasts
from nsteer.science.presets import NEUTRAL
from nsteer.stages.keys import SampleChunk
from nsteer.store import results, slug
from nsteer.store.results import Results
from nsteer.system.files import aside
from nsteer.vectors.exchange import easysteer, llama, tensors, torches
from nsteer.vectors.exchange.contents import Outgoing, no_label

KINDS = {
    ".safetensors": "safetensors with JSON metadata",
    ".npz": "numpy's arrays with JSON metadata",
    ".gguf": "a control vector of llama.cpp, repeng, EasySteer",
    ".json": "a payload of EasySteer",
    ".pt": "a config of lm-eval's model type `steered`",
}
"""Ending of a file -> what is written."""

SCALES = ("raw", "unit", "reference_norm")
"""Units that a file can hold: `stream_norm` is known only while a model runs."""

ACTIONS = ("add", "clamp")
"""Ops that lm-eval's `steered` has; all other files hold what is to be added."""


TOGETHER = (".safetensors", ".npz")
"""Kinds of files that hold several vectors."""

WRITERS: dict[str, Callable[[Path, Sequence[Outgoing]], None]] = {
    ".safetensors": tensors.write,
    ".npz": tensors.write_npz,
    ".gguf": llama.write,
    ".json": easysteer.write,
}
"""Ending of a file -> who writes it; `.pt` is written for an op and names of modules besides."""

UNSAFE = set('/\\:*?"<>|{}')
"""Characters that the name of a file has on no system."""


@dataclass(frozen=True)
class Strength:
    """What is written into a file: the op it is for, the strength and its unit."""

    op: str = "add"
    scale: str = "raw"
    strength: float = 1.0


def export(
    store: str | os.PathLike | Results,
    output: str,
    *,
    model: str | None = None,
    methods: Sequence[str] = (),
    emotions: Sequence[str] = (),
    layers: Any = None,
    op: str = "add",
    scale: str = "raw",
    strength: float = 1.0,
) -> tuple[list[Path], list[str]]:
    """Writes vectors of one model to files, of the kind that the ending of `output` says. Returns files and notes.

    methods, emotions : all when left out; `{method}` and `{emotion}` (`{concept}` where the axis is called so) in
        `output` give every vector a file of its own
    layers : a layer specification; when left out all that the store knows, but for block 0 in GGUF
    scale, strength : what the vectors are multiplied by; `clamp` (lm-eval alone) sets the projection to as much
    Raises ExchangeError for what a kind of file can not hold, LabelError for a label that the store lacks, InputError
    for a cell that does not hold what was committed.
    """
    kind, how = Path(output).suffix.lower(), Strength(op, scale, float(strength))
    _check(kind, output, how)
    opened = store if isinstance(store, Results) else results.open(store)
    label = model_named(opened, model)
    vectors, notes = outgoing(opened, label, methods, emotions, layers, kind, how)
    if kind == ".gguf" and layers is None:
        notes.append("block 0 is left out: llama.cpp's control vectors have no slot for it")
    return _write(output, kind, vectors, how, known_of(opened, label), opened.axis), notes


def outgoing(
    opened: Results,
    label: str,
    methods: Sequence[str],
    emotions: Sequence[str],
    layers: Any,
    kind: str,
    how: Strength,
) -> tuple[list[Outgoing], list[str]]:
    """Finished vectors of a model on their way to a file of a kind, and notes on what is left out; see `export`."""
    known = opened["vectors", label]
    chosen = {
        "model": label,
        "method": list(methods) or known.method.values.tolist(),
        opened.axis: list(emotions) or known[opened.axis].values.tolist(),
    }
    results.select(known, chosen, where=f"vectors of {label}")  # raises for a label that is not there
    wanted = _layers(layers, known.layer.values.tolist(), kind)
    path = f"vectors/{slug(label)}"
    finished = opened.store.committed(path)
    vectors, notes = [], []
    for method in chosen["method"]:
        for emotion in chosen[opened.axis]:
            cell = (label, method, emotion)
            if cell not in finished:
                notes.append(f"{method} / {emotion}: not in the store, left out")
                continue
            vectors.append(_outgoing(opened, cell, opened.whole(path, cell), wanted, layers is not None, how))
    return vectors, notes


def _check(kind: str, output: str, how: Strength) -> None:
    if kind not in KINDS:
        known = ", ".join(f"{ending} ({what})" for ending, what in KINDS.items())
        raise ExchangeError(f"{output}: expected a name that ends in one of {known}")
    if not Path(output).parent.is_dir():
        raise ExchangeError(f"can not write {output}: no such folder; make it, or name another file with -o")
    if how.scale not in SCALES:
        raise ExchangeError(f"scale {how.scale!r}: a file can hold {', '.join(SCALES)}")
    if how.op not in ACTIONS or (how.op != "add" and kind != ".pt"):
        raise ExchangeError(f"op {how.op!r} in {kind}: expected add (.pt also clamp)")
    if not math.isfinite(how.strength) or (how.strength == 0 and how.op == "add"):
        raise ExchangeError(f"strength {how.strength}: expected a finite number other than 0")


def model_named(opened: Results, model: str | None) -> str:
    """The model named, or the only one that has vectors."""
    have = [label for path in opened if path.startswith("vectors/") for label in opened[path].model.values.tolist()]
    if model is None and len(have) != 1:
        raise ExchangeError(f"{opened.name} has vectors of {', '.join(have) or 'no model'}: name one with --model")
    return model if model is not None else have[0]


def _layers(spec: Any, known: list[int], kind: str) -> list[int]:
    if spec is None:
        return [layer for layer in known if layer or kind != ".gguf"]
    try:
        return list(naming.resolve(spec, len(known)))
    except LookupError as error:
        raise ExchangeError(str(error.args[0])) from error


def _outgoing(
    opened: Results, cell: tuple[str, str, str], data: Any, wanted: list[int], named: bool, how: Strength
) -> Outgoing:
    """One vector under a strength. Layers at which it is a missing value are left out, unless they were named."""
    label, method, emotion = cell
    values = {layer: data.vector.sel({"layer": layer}).values.astype(np.float32) for layer in wanted}
    absent = [layer for layer, vector in values.items() if not np.isfinite(vector).all() or not vector.any()]
    if absent and (named or len(absent) == len(wanted)):
        raise ExchangeError(f"{method} / {emotion} of {label} has no vector at layer {absent[0]}")
    kept = [layer for layer in wanted if layer not in absent]
    norms = reference_norms(opened, label, method, kept) if how.scale == "reference_norm" else {}
    vectors, units, amounts = {}, {}, {}
    for layer in kept:
        length = float(np.linalg.norm(values[layer]))
        units[layer] = values[layer] / length
        vector_of_op, amounts[layer] = in_unit(how.op, how.scale, units[layer], length, how.strength, norms.get(layer))
        whole = how.scale == "raw" and how.op not in DIRECTIONAL  # to the last bit as the store has it
        vectors[layer] = np.float32(amounts[layer]) * (values[layer] if whole else vector_of_op)
    about = {**_about(opened, cell, data, kept), **vars(how), "site": "resid_post"}
    about["norms"] = {str(layer): float(np.linalg.norm(vector)) for layer, vector in vectors.items()}
    about |= {"reference_norms": {str(k): v for k, v in norms.items()}} if norms else {}
    return Outgoing(method, emotion, vectors, units, amounts, about, opened.axis)


def reference_norms(opened: Results, label: str, method: str, layers: Sequence[int]) -> dict[int, float]:
    """Layer -> mean norm of the streams of a method's neutral samples, as `scale: reference_norm` has it."""
    try:
        kept = json.loads(opened["methods"].protocol.sel({"method": method}).item())
        count = kept["samples"] if kept["neutral_samples"] is None else kept["neutral_samples"]
        path = f"activations/{slug(label)}"
        every = [SampleChunk(*key) for key in opened.store.committed(path)]
        blocks = [key for key in every if (key.model, key.method, key.emotion) == (label, method, NEUTRAL)]
        each = xr.concat([opened.whole(path, key).token_norm for key in blocks], "sample")
        norms = each.sel({"sample": list(range(count))}).mean("sample")
        by_layer = {layer: float(norms.sel({"layer": layer})) for layer in layers}
    except (LookupError, ValueError) as error:  # InputError passes: a sample is damaged, not absent
        raise ExchangeError(f"reference_norm: the store has no neutral samples of {method!r}: {error}") from error
    if lost := [layer for layer, norm in by_layer.items() if not math.isfinite(norm)]:
        raise ExchangeError(f"reference_norm: the store has no neutral samples of {method!r} at layer {lost[0]}")
    return by_layer


def _about(opened: Results, cell: tuple[str, str, str], data: Any, layers: Sequence[int]) -> dict[str, Any]:
    """Where a vector comes from, as JSON data."""
    label, method, name = cell
    record = opened.store.committed(f"vectors/{slug(label)}")[cell]
    about: dict[str, Any] = {
        "model": known_of(opened, label),
        "layers_are": "block-index",
        "norms_before_unit_norm": {str(k): _number(data.norm.sel({"layer": k})) for k in layers},
        "n_samples": int(data.n_samples),
        "n_distinct": int(data.n_distinct),
        "store": {
            "name": opened.name,
            "fingerprint": f"{record.fingerprint:013x}",
            "content": f"{record.content:013x}",
        },
        "nsteer": __version__,
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if "methods" in opened and method in opened["methods"].method.values:
        about["protocol"] = json.loads(opened["methods"].protocol.sel({"method": method}).item() or "{}")
    if method in DIRECTION_SOURCES and "directions" in opened and (name,) in opened.store.committed("directions"):
        about["direction"] = json.loads(opened["directions"].settings.sel({"direction": name}).item() or "{}")
        answers = [count.data() for count in contrasts.counted(opened, [label]) if count.direction == name]
        about |= {"answers": answers} if answers else {}
    if "imports" in opened and cell in opened.store.committed("imports"):
        kept = opened["imports"].provenance.sel(dict(zip(("model", "method", opened.axis), cell, strict=True)))
        about["imported"] = json.loads(kept.item())
    return about


def known_of(opened: Results, label: str) -> dict[str, Any]:
    """What the store knows of a model; of one that no run met, what its files tell."""
    names = ("id", "revision", "identity", "model_type", "dtype", "quantization", "tokenizer", "gguf")
    if "models" in opened and (label,) in opened.store.committed("models"):
        kept = opened["models"].sel({"model": label})
        return {"label": label, **{name: str(kept[name].item()) for name in names}}
    facts = models.facts(Model(id=label))
    return {"label": label, **{name: getattr(facts, name, None) or "" for name in names}}


def _number(value: Any) -> float | None:
    return float(value) if math.isfinite(float(value)) else None


def _write(
    output: str, kind: str, vectors: list[Outgoing], how: Strength, model: Mapping[str, Any], axis: str
) -> list[Path]:
    """The files of all vectors: one, or one a vector where the name has places for its labels."""
    files: dict[Path, list[Outgoing]] = {}
    for vector in vectors:
        for label in (vector.method, vector.emotion) * ("{" in output):
            if no_label("emotion", label) or set(label) & UNSAFE or label.startswith("."):
                raise ExchangeError(
                    f"{label!r} can not be a part of a file's name: export it alone, under another name"
                )
        name = output.replace("{method}", vector.method).replace(f"{{{axis}}}", vector.emotion)
        files.setdefault(Path(name), []).append(vector)
    many = next((len(few) for few in files.values() if len(few) > 1), 0)
    if not vectors or (many and kind not in TOGETHER):
        hint = f"name --method and --{axis}, or put {{method}} and {{{axis}}} into the name"
        raise ExchangeError(f"{len(vectors)} vectors for a {kind} file, which holds one: {hint}")
    blocks = hookpoint(model) if kind == ".pt" else ""
    for path, few in files.items():
        try:
            with aside(path) as temporary:
                if kind == ".pt":
                    torches.write(temporary, few[0], how.op, blocks)
                else:
                    WRITERS[kind](temporary, few)
        except OSError as error:
            raise ExchangeError(f"can not write {path}: {error.strerror or error}") from error
    return list(files)


def hookpoint(model: Mapping[str, Any]) -> str:
    """The name of a model's blocks under its base model, as lm-eval's hookpoints count: `layers`, `h`.

    Builds the model without weights. Raises ModelError, AnatomyError.
    """
    from nsteer.executors import skeleton
    from nsteer.program import anatomy

    facts = models.facts(Model(id=model["id"], revision=model["revision"] or None, gguf=_on_hub(model)))
    settings = {"revision": facts.revision, "trust_remote_code": False}
    with models.unchanged(facts):
        module = skeleton.build(facts.name_or_path, None, None, settings)[0]._module
    return anatomy.find(module).blocks.removeprefix(f"{module.base_model_prefix}.")


def _on_hub(model: Mapping[str, Any]) -> str | None:
    """The name of a model's GGUF file beside the id of its repository; None where the id is all."""
    return model["gguf"] if model.get("gguf") and model["revision"] else None
