"""Stages `unsteered` and `steering`: continuations with and without edits, and their receipts, into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import EditError
from nsteer.plan.check import also_rests_on, labels_under, rests_on
from nsteer.plan.prompts import Encoded, asked_prompts
from nsteer.plan.schema import Also, Calibrated, Continuing, Steer
from nsteer.program.form import Row
from nsteer.runner.editing import GridMaker, numbers, usable
from nsteer.runner.model import ModelRun
from nsteer.runner.prompting import encoded, prompts_of
from nsteer.runner.runs import Clock
from nsteer.runner.sources import assured_vectors, vectors_of
from nsteer.runner.writing import decoding
from nsteer.stages import arrays, cells, counting, forms
from nsteer.stages.keys import Condition, Edited, EditSearch, Prompted, Read, TextRow, Unsteered, Vector
from nsteer.stages.table import BY_NAME

K = TypeVar("K", bound=tuple)
C = TypeVar("C", Condition, Edited, EditSearch, Read)

UNSTEERED, ASKED, STEERED = "unsteered", "prompted", "steering"
GROUPS = ("steering", "generations")
"""Where a cell of the grid is kept; it is done when it is in the last."""


def steer(model: ModelRun) -> None:
    """Fills the missing cells of `generations` and `steering` for the current model."""
    todo, derived = model.missing(STEERED), Derived(model)
    for entry in model.plan.steer:
        for layer_set, layers in model.job.layer_sets(entry).items():
            mine = {k: fp for k, fp in todo.items() if (k.op, k.layer_set) == (entry.label, layer_set)}
            mine = derived.ready(STEERED, GROUPS[-1], mine, partial(vectors_needed, model, entry))
            strengths = calibrated(model, entry, mine)
            mine = {key: mine[key] for key in strengths}
            if mine:
                steer_cells(model, entry, layers, mine, strengths)


def leave(model: ModelRun) -> None:
    """Fills the missing cells of `unsteered` for the current model."""
    todo, derived = model.missing(UNSTEERED), Derived(model)
    for entry in model.plan.steer:
        mine = {key: fp for key, fp in todo.items() if key.op == entry.label}
        if entry.project:
            mine = derived.ready(UNSTEERED, UNSTEERED, mine, partial(projected_on, model, entry))
        for wave in model.run.waves(UNSTEERED, UNSTEERED, mine):
            for key in wave:
                with model.run.guarded(UNSTEERED, UNSTEERED, key, mine[key]):
                    continue_unedited(model, entry, UNSTEERED, key, encoded(model, entry), mine[key])


def calibrated(
    model: ModelRun, entry: Steer, todo: Mapping[Condition, int], at: tuple[str, str] = (STEERED, GROUPS[-1])
) -> dict[Condition, float]:
    """The strength of every cell: its label, or what was found for it. Cells for which there is none wait or fail.

    at : stage and group of the cells
    """
    if not isinstance(entry.strengths, Calibrated):
        return {key: key.strength for key in todo}
    by = {key: cells.calibrated_by(entry, key) for key in todo}
    return strengths_found(model, at, "calibration", by, todo)


def strengths_found(
    model: ModelRun, at: tuple[str, str], product: str, by: Mapping[C, tuple], todo: Mapping[C, int]
) -> dict[C, float]:
    """The strength of every cell that was found for it, under the key `by` that it has among the searches.

    at : stage and group of the cells; product : "calibration", or "calibration_edits"
    """
    wanted = model.wanted(BY_NAME[product].cells) if todo else {}
    gone, strengths = model.run.lacking(product, wanted) if todo else (), dict[C, float]()
    for key, number in todo.items():
        if by[key] in gone:
            model.run.wait_for(*at, key, number, product, by[key])
            continue
        with model.run.guarded(*at, key, number):
            derived = model.kept_input(product, by[key], wanted[by[key]])
            if np.isfinite(derived.found):
                strengths[key] = float(derived.found)
            else:
                model.run.fail(*at, key, number, f"no strength for {key.strength:g}: {derived.reason.item()}")
    return strengths


def projected_on(model: ModelRun, entry: Steer, key: Unsteered) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that the streams of an unsteered cell are projected on."""
    return vectors_of_methods(model, cells.steered_methods(model.plan, entry))


def vectors_needed(model: ModelRun, entry: Steer, key: Condition) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that a cell of the grid rests on."""
    method = key.method
    gate = [(method, entry.when.direction)] if entry.when is not None and entry.when.direction is not None else []
    own = rests_on(model.plan, entry, method, key.emotion)
    further = also_rests_on(model.plan, entry, method)
    shuffled = cells.draw_of(key.control)[0] == "shuffled"  # labels are permuted among all of a method
    every = dict.fromkeys(made_by for made_by, _ in own if made_by in model.plan.methods) if shuffled else ()
    return [
        *own,
        *further,
        *gate,
        *vectors_of_methods(model, list(every)),
        *(vectors_of_methods(model, [method]) if entry.project else []),
    ]


def vectors_of_methods(model: ModelRun, methods: Sequence[str]) -> list[tuple[str, str]]:
    return [(method, label) for method in methods for label in labels_under(model.plan, method)]


class Derived:
    """Which vectors of the current model are in the store as the plan wants them, and which can be used."""

    def __init__(self, model: ModelRun):
        self.model = model
        self.path = model.path("vectors")
        self.gone = model.run.lacking(self.path, model.wanted(cells.vectors))

    def ready(
        self, stage: str, path: str, todo: Mapping[K, int], rests_on: Callable[[K], list[tuple[str, str]]]
    ) -> dict[K, int]:
        """The cells whose vectors are all there; the others wait."""
        ready_cells = {}
        for key, fp in todo.items():
            absent = [
                vector for vector in (Vector(self.model.label, *pair) for pair in rests_on(key)) if vector in self.gone
            ]
            if absent:
                self.model.run.wait_for(stage, path, key, fp, self.path, absent[0])
            else:
                ready_cells[key] = fp
        return ready_cells


def edits_of(entry: Steer) -> list[Steer | Also]:
    return [entry, *entry.also]


def ask(model: ModelRun) -> None:
    """Fills the missing cells of `prompted` for the current model: no edit, the emotion asked for in words."""
    todo = model.missing(ASKED)
    for label, entry in model.job.steer_entries.items():
        mine = {key: fp for key, fp in todo.items() if key.op == label}
        for wave in model.run.waves(ASKED, ASKED, mine, lambda key: counting.text_rows(model.job, key)):
            for key in wave:
                with model.run.guarded(ASKED, ASKED, key, mine[key]):
                    shown = asked_prompts(entry, model.study.texts, key.emotion, key.asked)
                    bare = entry.model_copy(update={"project": False})
                    prompts = encoded(model, bare.model_copy(update={"prompts": shown}))
                    continue_unedited(model, bare, ASKED, key, prompts, mine[key])


def continue_unedited(
    model: ModelRun,
    entry: Steer,
    stage: str,
    key: Unsteered | Prompted,
    prompts: Mapping[str, Encoded],
    fingerprint: int,
) -> None:
    """One cell of `unsteered` or `prompted`: every prompt and seed, no edit."""
    clock, form = Clock(), forms.unsteered(entry, model.job.layers, decoding(model, entry.generate))
    rows = [
        Row(TextRow(key, label, seed), prompt.tokens, uniform=numbers(model, entry, label, seed))
        for label, prompt in prompts.items()
        for seed in entry.seeds
    ]
    results = model.execute(stage, form, rows)
    if not model.run.came_back(stage, stage, key, fingerprint, [row.key for row in rows], results):
        return
    readouts = {(row.prompt, row.seed): with_text(model, result) for row, result in results.readouts.items()}
    data = arrays.texts_data(list(prompts), entry.seeds, readouts)
    if entry.project and isinstance(key, Unsteered):
        projected = on_all(model, cells.steered_methods(model.plan, entry), entry, readouts)
        model.run.commit("projections_unsteered", key, projected, fingerprint, 0.0)
    model.run.commit(stage, key, data, fingerprint, clock.share(1))
    model.run.finished(stage, key)


def projections(
    vectors: xr.DataArray, layers: Sequence[int], rows: Mapping[tuple, Mapping[str, Any]], continuing: Continuing
) -> Any:
    """Projections of rows' streams on every target's unit vector: DataArray (prompt, seed, where, layer, target)."""
    prompts = list(dict.fromkeys(label for label, _ in rows))
    dims = ("prompt", "seed", "where", "layer", "d_model")
    streams = np.array(
        [[[rows[label, seed][name] for name in arrays.WHERE] for seed in continuing.seeds] for label in prompts]
    )
    labels = {"prompt": prompts, "seed": continuing.seeds, "where": list(arrays.WHERE), "layer": list(layers)}
    stream = xr.DataArray(streams, dims=dims, coords=labels)
    vector = vectors.sel({"layer": list(layers)}).drop_vars(["d_model", "depth"], errors="ignore").astype(np.float64)
    unit = vector / np.sqrt((vector**2).sum("d_model"))
    projection = xr.dot(stream, unit.rename(emotion="target"), dim="d_model").astype(np.float32)
    keep = [dim for dim in ("method", *dims[:-1], "target") if dim in projection.dims]
    return projection.transpose(*keep).reset_coords(drop=True).to_dataset(name="projection")


def on_all(model: ModelRun, methods: Sequence[str], texts: Continuing, rows: Mapping[tuple, Mapping[str, Any]]) -> Any:
    """The projections of rows on every vector of these methods, over (method, ...). Raises InputError."""
    labels = {method: labels_under(model.plan, method) for method in methods}
    vectors_by_method = [
        assured_vectors(model, method, vectors_of(model, method), mine).sel({"emotion": mine})
        for method, mine in labels.items()
    ]
    vectors = xr.concat(vectors_by_method, xr.Variable("method", list(labels)), join="outer")
    return projections(vectors, model.job.layers, rows, texts)


def with_text(model: ModelRun, result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "text": model.executor.tokenizer.decode(result["tokens"], skip_special_tokens=True)}


def steer_cells(
    model: ModelRun,
    entry: Steer,
    layers: Sequence[int],
    todo: Mapping[Condition, int],
    strengths: Mapping[Condition, float],
) -> None:
    """The missing cells of one entry and layer set. All their rows share one form, so they travel together."""
    form = forms.steer(entry, layers, model.job.layers, decoding(model, entry.generate), model.facts.n_layers)
    prompts = prompts_of(model, entry, edits_of(entry), STEERED, GROUPS[-1], todo)
    if prompts is None:
        return
    methods = {key.method for key in todo}
    makers = {method: GridMaker(model, entry, layers, method, strengths) for method in methods}
    clock = Clock()
    for wave in model.run.waves(STEERED, GROUPS, todo, lambda key: len(prompts) * len(entry.seeds)):
        good = [key for key in wave if usable(makers[key.method], STEERED, GROUPS[-1], key, todo[key])]
        results = model.execute(STEERED, form, [row for key in good for row in makers[key.method].rows(key, prompts)])
        share = clock.share(len(wave))
        for key in good:
            names = [TextRow(key, label, seed) for label in prompts for seed in entry.seeds]
            if not model.run.came_back(STEERED, GROUPS[-1], key, todo[key], names, results):
                continue
            mine = {(name.prompt, name.seed): with_text(model, results.readouts[name]) for name in names}
            keep(makers[key.method], key, mine, list(prompts), todo[key], share)


def keep(
    maker: GridMaker,
    key: Condition,
    rows: Mapping[tuple, Mapping[str, Any]],
    prompts: list[str],
    fingerprint: int,
    seconds: float,
) -> None:
    """Commits one cell: its receipts and its texts. An edit that did nothing is a failure, not a result."""
    model, entry = maker.model, maker.entry
    try:
        maker.check(key, rows)
    except EditError as error:
        model.run.fail(STEERED, GROUPS[-1], key, fingerprint, str(error))
        return
    if entry.project:
        projected = projections(maker.vectors, model.job.layers, rows, entry)
        model.run.commit("projections", key, projected, fingerprint, 0.0)
    receipts = np.array([[rows[label, seed]["receipts"] for seed in entry.seeds] for label in prompts])
    number = [number for _, _, number in maker.flat]
    if entry.also:
        further = arrays.further_data(receipts, number, prompts, entry.seeds)
        model.run.commit("steering_also", key, further, fingerprint, 0.0)
    values = arrays.receipt_values(receipts[:, :, [i for i, place in enumerate(number) if place == forms.OWN]])
    dims = ("prompt", "seed", "layer")
    numbers = arrays.dataset(
        {"prompt": prompts, "seed": entry.seeds, "layer": maker.layers},
        {name: (dims, values[..., i].astype(np.float32)) for i, name in enumerate(arrays.RECEIPT)},
    )
    model.run.commit(STEERED, key, numbers, fingerprint, seconds)
    model.run.commit("generations", key, arrays.texts_data(prompts, entry.seeds, rows), fingerprint, seconds)
    model.run.finished(STEERED, key)
