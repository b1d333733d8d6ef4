"""Common studies as functions: each writes a plan, runs it as `nsteer run` does, and gives what the store then holds.

Without `store` it lies in a folder of its own that goes when Python ends; with one, a second call does only what is
missing, as any run of a plan.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsteer import __version__
from nsteer.errors import ExecutionError, PlanError, Problem, SteerError, StoreWarning
from nsteer.models.facts import Facts
from nsteer.plan import layers as naming
from nsteer.plan.check import Study, load
from nsteer.runner import Summary, run
from nsteer.science import axis
from nsteer.stages import imported
from nsteer.store import Store, slug
from nsteer.store.results import Results, open

__all__ = ["capture", "contrast", "page", "sweep"]

GIVEN = "given"
"""The label on the axis `method` of the imported vectors that `sweep` was given."""


def contrast(
    model: str | os.PathLike | Mapping[str, Any],
    positive: Sequence[str] | Mapping[str, Any],
    negative: Sequence[str] | Mapping[str, Any],
    *,
    layers: Any = "all",
    pooling: str | Mapping[str, Any] = "last",
    chat: str = "never",
    name: str = "contrast",
    store: str | os.PathLike | None = None,
    **plan: Any,
) -> xr.DataArray:
    """The mean of the pooled streams of some texts minus that of others: a vector (layer, d_model) of a model.

        honest = nsteer.contrast("zoo/llama", honest_texts, dishonest_texts, layers="0.25:0.75")
        with nsteer.steer(model, honest, strength=0.1): ...

    model : hub id, folder, GGUF file or zoo/NAME; or an entry of a plan's `models`, as {"id": ..., "dtype": ...}
    positive, negative : texts, or what `directions: {...: {contrast: ...}}` of a plan takes besides
    layers : the layers it is given at, as in plans
    pooling : which positions of a text are averaged, as in plans: `last`, `mean`, {"kind": ..., ...}
    chat : whether texts go through the model's chat template: `never`, `auto`, `always`
    name : its label on the axis `concept`
    store : where it is kept
    plan : further fields of the plan, such as `executor`, `batch`, `threads`

    Its attributes say where it comes from: the model and its identity, the plan, the fingerprint of the cell.
    Raises PlanError with every problem, ExecutionError when the model can not be loaded or read.
    """
    made_of = {"positive": _texts(positive), "negative": _texts(negative), "pooling": pooling, "chat": chat}
    fields = {"name": "contrast", "directions": {name: {"contrast": made_of}}}
    study = _study(model, store, fields, plan)
    kept = _layers(layers, study.facts[0])
    _all(study, run(study, trust_remote_code=_trusted(model)))
    results, label = open(study.plan.store), study.facts[0].label
    vector = results.sel(**{"model": label, "method": "contrast", results.axis: name})
    assert isinstance(vector, xr.DataArray)
    vector = vector.sel({"layer": kept}).load()
    record = results.store.committed(f"vectors/{slug(label)}")[label, "contrast", name]
    return vector.assign_attrs(_about(study, record.fingerprint))


def sweep(
    model: str | os.PathLike | Mapping[str, Any],
    vector: xr.DataArray | Mapping[str, xr.DataArray] | Any,
    strengths: float | Sequence[float] | Mapping[str, Any],
    prompts: str | Sequence[str] | Mapping[str, Any],
    *,
    layers: Any = None,
    op: str = "add",
    scale: str = "stream_norm",
    positions: Any = "all",
    controls: Sequence[str] = ("zero", "random"),
    judge: Any = None,
    generate: Mapping[str, Any] | None = None,
    chat: str = "never",
    name: str = "vector",
    store: str | os.PathLike | None = None,
    **plan: Any,
) -> Results:
    """Steers a model by a vector over a grid: strength x layer set x control x prompt, judged where a judge is named.

        found = nsteer.sweep("zoo/llama", honest, [0.05, 0.1], ["tom walked to the"], judge="zoo/judge")
        found["steering"], found["generations"], found.to_dataframe("judged")

    model : as in `contrast`
    vector : a labelled array (layer, d_model), as `contrast` gives; several as {label: array}; or of one layer a
        tensor [d_model], with `layers`
    strengths : numbers, in units of `scale`; or what they are to do, {"kl": [0.1, 0.3]}
    prompts : as in plans: the name of a prompt set, a list, label: prompt
    layers : the steered layers or layer sets, as in plans; all that the vector has when left out
    op, scale, positions, controls, judge, generate, chat : as in plans (docs/plan.md)
    name : the label of a vector that has none. It stands on the axis `concept`, or `emotion` where the vector has that
        coordinate or the store that axis; its `method` is `store`
    store : where results are kept
    plan : further fields of the plan, such as `judges`, `measure`, `seed`, `batch`

    Raises PlanError with every problem, SteerError for a vector that does not fit the model. Cells that fail are in
    the group `failures`, and warned of.
    """
    given = dict(vector) if isinstance(vector, Mapping) else {_name(vector, name): vector}
    facts = _facts(model)
    by_label = {label: _blocks(vector, layers, facts) for label, vector in given.items()}
    kept = store if store is not None else _scratch("sweep")
    into = Store(kept)
    if not into.published_axis():
        into = Store(kept, axis=axis.EMOTION if any(map(_of_emotion, given.values())) else axis.CONCEPT)
    with into.adding():
        for label, blocks in by_label.items():
            origin: dict[str, Any] = {
                "file": "",
                "kind": "an array in Python",
                "layers_are": "block-index",
                "nsteer": __version__,
            }
            origin |= {"about": _json_attrs(getattr(given[label], "attrs", {})), "notes": _other(given[label], facts)}
            imported.commit(into, facts, {(GIVEN, label): blocks}, origin)
    has = sorted(set.intersection(*(set(blocks) for blocks in by_label.values()))) if by_label else []
    steer = {
        "op": op,
        "layers": has if layers is None else layers,
        "scale": scale,
        "positions": positions,
        "strengths": [strengths] if isinstance(strengths, int | float) else strengths,
        "controls": controls,
        "prompts": prompts,
        "chat": chat,
        **({} if generate is None else {"generate": generate}),
    }
    borrowed = {"path": str(kept), "method": GIVEN}
    fields = {"name": "sweep", "directions": {label: {"store": {**borrowed, into.axis: label}} for label in by_label}}
    fields |= {"steer": steer, **({} if judge is None else {"judge": judge})}
    study = _study(model, kept, fields, plan)
    summary = run(study, trust_remote_code=_trusted(model))
    if not any(summary.done.get(stage, 0) + summary.skipped.get(stage, 0) for stage in ("steering", "unsteered")):
        _all(study, summary)
    for text in _reasons(summary):
        warnings.warn(text, StoreWarning, stacklevel=2)
    return open(kept)


def capture(
    model: str | os.PathLike | Mapping[str, Any],
    texts: str | Sequence[str] | Mapping[str, Any],
    *,
    layers: Any = "all",
    site: str = "resid_post",
    pooling: str | Mapping[str, Any] | None = None,
    positions: Any = "all",
    chat: str = "never",
    store: str | os.PathLike | None = None,
    **plan: Any,
) -> xr.DataArray:
    """The residual streams of a model over texts, (prompt, layer, d_model); without `pooling` every position of each.

        nsteer.capture("zoo/llama", ["tom walked", "anna sang"], layers=[5, 2], pooling="last")

    model : as in `contrast`
    texts : a text, several, or label: text. Their labels on the dim `prompt` are those, else 0, 1, ...; each text is
        the coordinate `text`
    layers : the layers that are read, as in plans
    site : what is read: `resid_post` (a block's output), `resid_pre`, `attn_out`, `mlp_out`
    pooling : one vector a text, as in plans: `last`, `mean`, {"kind": ..., ...}; every position when left out, NaN
        beyond a text's end
    positions : without `pooling`, the positions that are kept
    chat : whether texts go through the model's chat template: `never`, `auto`, `always`
    store : where it is kept, under `reads` or `streams`
    plan : further fields of the plan

    Raises PlanError with every problem, ExecutionError when the model can not be loaded or read.
    """
    labelled = isinstance(texts, Mapping)
    words = _texts([texts] if isinstance(texts, str) else texts)
    prompts = words if labelled else {str(i): text for i, text in enumerate(words)}
    read = {"site": site, "layers": layers, "positions": positions}
    read |= {} if pooling is None else {"pooling": pooling}
    study = _study(model, store, {"name": "capture", "prompts": prompts, "chat": chat, "reads": {"read": read}}, plan)
    _all(study, run(study, trust_remote_code=_trusted(model)))
    product, label = "reads" if pooling is not None else "streams", study.facts[0].label
    there = list(prompts)
    stream = open(study.plan.store).sel(
        product, "stream", model=label, read="read", edit="none", strength=0, prompt=there
    )
    assert isinstance(stream, xr.DataArray)
    stream = stream.sel({"layer": list(naming.resolve(layers, study.facts[0].n_layers))}).load()
    if "position" in stream.dims:
        stream = stream.dropna("position", how="all")
    stream = stream.drop_vars(["read", "edit", "strength"]).assign_coords({"text": ("prompt", list(prompts.values()))})
    stream = stream if labelled else stream.assign_coords({"prompt": list(range(len(there)))})
    return stream.assign_attrs(_about(study, None))


def page(store: str | os.PathLike | Results, output: str | os.PathLike) -> Path:
    """The report of a store as one page, which opens without a network, as `nsteer report -o` writes it. Its path.

    store : as `sweep` gives it, or its path
    output : the file to write; an older one is replaced when the new one is whole

    Loads no model. Raises StoreError for a store that can not be read and a file that can not be written.
    """
    from nsteer.report import overview, reporting
    from nsteer.report import page as pages

    opened = store if isinstance(store, Results) else open(store)
    evidence = reporting.evidence(opened)
    report = reporting.report(opened, evidence) if overview.of_the_paper(evidence) else None
    pages.write(str(output), evidence, report, overview.overview_of(evidence, opened.name), evidence.ratings[0] or None)
    return Path(output)


# ---- what they share ---------------------------------------------------------------------------------------------


def _study(model: Any, store: Any, fields: dict[str, Any], more: Mapping[str, Any]) -> Study:
    """The checked study of a plan of one model. Raises PlanError with every problem."""
    if both := sorted(set(more) & {*fields, "models", "store"}):
        raise PlanError([Problem(name, "it a second time", "it where it has an argument of its own") for name in both])
    kept = store if store is not None else _scratch(fields["name"])
    entry = dict(model) if isinstance(model, Mapping) else _entry(model)
    return load({**fields, "models": [entry], **more, "store": kept}, allow_outside=True)


def _entry(model: Any) -> Any:
    """A model as plans name it. Raises SteerError for one that is loaded: its weights may be others than its files'."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    raise SteerError(
        f"{type(model).__name__} is no hub id, folder, GGUF file or zoo/NAME: a study loads its model itself, so that "
        "it knows its weights (a loaded one is steered by nsteer.steer)"
    )


def _facts(model: Any) -> Facts:
    """What is known of a model without its weights. Raises PlanError for one that can not be found or read."""
    entry = dict(model) if isinstance(model, Mapping) else {"id": _entry(model)}
    study = load({"name": "model", "models": [entry], "directions": {"d": {"random": 0}}, "store": "unused.zarr"})
    return study.facts[0]


def _trusted(model: Any) -> bool:
    """Who writes a model's entry in Python is who runs it: its `trust_remote_code` is confirmed."""
    return bool(isinstance(model, Mapping) and model.get("trust_remote_code"))


def _texts(texts: Any) -> Any:
    """Texts as a list; what a plan has besides as it is."""
    return texts if isinstance(texts, Mapping | str) else list(texts)


def _layers(spec: Any, facts: Facts) -> list[int]:
    if why := naming.problem_of(spec):
        raise PlanError([Problem("layers", why, naming.FORMS)])
    try:
        return list(naming.resolve(spec, facts.n_layers))
    except LookupError as error:
        raise PlanError([Problem("layers", str(error.args[0]), f"layers of {facts.label}")]) from error


def _all(study: Study, summary: Summary) -> None:
    """Raises ExecutionError where a cell is missing, with the reasons."""
    if reasons := _reasons(summary):
        raise ExecutionError("\n".join(reasons))


def _reasons(summary: Summary) -> list[str]:
    return list(
        dict.fromkeys(f"{failure.stage}: {failure.reason}" for failure in (*summary.failures, *summary.failed_before))
    )


def _about(study: Study, fingerprint: int | None) -> dict[str, str]:
    """Where an array comes from, in words."""
    facts = study.facts[0]
    origin = {"model": facts.label, "identity": facts.identity, "revision": facts.revision or ""}
    origin |= {"layers_are": "block-index", "plan": study.document.text, "nsteer": __version__}
    return origin if fingerprint is None else {**origin, "fingerprint": f"{fingerprint:013x}"}


def _name(vector: Any, name: str) -> str:
    """The label of a vector: its own on the axis `concept` or `emotion`, where it has one."""
    coords = getattr(axis.inward(vector), "coords", {})
    return str(coords["emotion"].item()) if "emotion" in coords and coords["emotion"].ndim == 0 else name


def _of_emotion(vector: Any) -> bool:
    """Whether a vector says which emotion it is of."""
    return axis.EMOTION in getattr(vector, "coords", {})


def _blocks(vector: Any, layers: Any, facts: Facts) -> dict[int, np.ndarray]:
    """Block -> vector [d_model] float32, of those at which it is a number. Raises SteerError for what does not fit."""
    if isinstance(vector, xr.DataArray) and "layer" in vector.coords:
        extra = [dim for dim in vector.dims if dim not in ("layer", "d_model")]
        if extra or "d_model" not in vector.dims:
            raise SteerError(f"a vector over {vector.dims}: expected (layer, d_model); select one, or give several")
        each = vector if "layer" in vector.dims else vector.expand_dims("layer")
        rows = {int(layer): each.sel({"layer": layer}).values for layer in each.layer.values}
    else:
        if layers is None or isinstance(layers, Mapping):
            raise SteerError("a vector without layers: name those to be steered, layers=[...]")
        values = np.asarray(vector.detach().float().cpu() if hasattr(vector, "detach") else vector)
        if values.ndim != 1:
            raise SteerError(f"an array {list(values.shape)} without labels: expected [d_model], or labelled layers")
        rows = dict.fromkeys(_layers(layers, facts), values)
    vectors = {layer: np.asarray(row, np.float32) for layer, row in rows.items() if np.isfinite(row).all()}
    if not vectors:
        raise SteerError("a vector that is a missing value at every layer")
    for layer, row in vectors.items():
        if row.shape != (facts.d_model,) or not 0 <= layer < facts.n_layers:
            raise SteerError(
                f"a vector {list(row.shape)} at layer {layer}: {facts.label} has {facts.n_layers} layers of width "
                f"{facts.d_model}"
            )
    return vectors


def _other(vector: Any, facts: Facts) -> list[str]:
    """What a vector says of its model that does not fit the one it steers; also a warning."""
    identity = getattr(vector, "attrs", {}).get("identity", facts.identity)
    if identity == facts.identity:
        return []
    note = f"the vector was made with other weights ({str(identity)[:80]}) than those of {facts.label}"
    warnings.warn(note, StoreWarning, stacklevel=3)
    return [note]


def _json_attrs(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """The attributes of an array that JSON holds."""
    return {str(name): value for name, value in attrs.items() if isinstance(value, str | int | float | bool)}


@cache
def _folder() -> Path:
    """A folder that goes when Python ends."""
    folder = Path(tempfile.mkdtemp(prefix="nsteer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _scratch(name: str) -> str:
    return str(Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_folder())) / f"{name}.zarr")
