"""Stages `embeddings` and `swapped`: samples as bags of embeddings, and texts behind other emotions' instructions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from nsteer.plan.schema import Pooling
from nsteer.program.anatomy import unknown
from nsteer.program.form import Form, Row
from nsteer.runner import sharing
from nsteer.runner.capturing import as_read, not_finite, pooled_of, pooled_row
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock
from nsteer.stages import arrays, cells, forms
from nsteer.stages.counting import samples_of
from nsteer.stages.keys import SampleChunk, SampleRow
from nsteer.stages.table import BY_NAME

BAG, SWAPPED = "embeddings", "swapped"
BAG_OF = Pooling(kind="mean")
"""How a bag of embeddings is read, whatever positions a method reads."""


class SwapRow(NamedTuple):
    """A row that is a text behind another instruction: of which cell, its number, and which of its instructions."""

    cell: SampleChunk
    sample: int
    swap: int


def embed(model: ModelRun) -> None:
    """Fills the missing cells of `embeddings` for the current model."""
    path, every = model.path(BAG), model.missing(BAG)
    ready = _with_texts(model, BAG, every, lambda key: [key])
    todo, copies = sharing.parted(model, path, ready)
    if todo and (why := unknown(model.executor.anatomy, forms.entering().sites)):
        model.warn(f"no bag of embeddings: {why}")
        for key in todo:
            blank = np.full((len(samples_of(model.job, key)), model.facts.d_model), np.nan, np.float32)
            model.run.commit(path, key, _bag_data(model, key, blank, np.zeros(len(blank), int)), todo[key], 0.0)
        todo = {}

    def rows(key: SampleChunk, texts: Mapping[SampleChunk, xr.Dataset]) -> list[Row]:
        method, pooled_rows = model.plan.methods[key.method], []
        for k in samples_of(model.job, key):
            sample = texts[key].sel({"sample": k})
            pooled_rows.append(pooled_row(SampleRow(key, k), method, *as_read(model, method, sample, sample), BAG_OF))
        return pooled_rows

    def keep(key: SampleChunk, mine: Sequence[Row], readouts: Mapping[Any, Any]) -> tuple[xr.Dataset, str]:
        pooled, positions, _ = pooled_of(mine, readouts)
        return _bag_data(model, key, pooled[:, 0], positions), ""

    _read(model, BAG, todo, forms.entering(), rows, keep, lambda key: [key])
    sharing.copy(model, BAG, path, ready, copies)


def _bag_data(model: ModelRun, key: SampleChunk, pooled: np.ndarray, positions: np.ndarray) -> xr.Dataset:
    dims = {"sample": list(samples_of(model.job, key)), "d_model": range(model.facts.d_model)}
    return arrays.dataset(dims, {"pooled": (tuple(dims), pooled), "positions": (("sample",), positions)})


def swap(model: ModelRun) -> None:
    """Fills the missing cells of `swapped` for the current model."""
    layers = list(model.job.layers)

    def asked(key: SampleChunk) -> dict[tuple[int, int], str]:
        samples = samples_of(model.job, key)
        return {(k, i): e for k in samples for i, e in enumerate(cells.swaps(model.plan, key.emotion, k))}

    def needs(key: SampleChunk) -> list[SampleChunk]:
        return [key, *(key._replace(emotion=e) for e in dict.fromkeys(asked(key).values()))]

    def rows(key: SampleChunk, texts: Mapping[SampleChunk, xr.Dataset]) -> list[Row]:
        method, pooled_rows = model.plan.methods[key.method], []
        for (k, i), emotion in asked(key).items():
            behind, told = (texts[cell].sel({"sample": k}) for cell in (key._replace(emotion=emotion), key))
            pooled_rows.append(pooled_row(SwapRow(key, k, i), method, *as_read(model, method, behind, told)))
        return pooled_rows

    def keep(key: SampleChunk, mine: Sequence[Row], readouts: Mapping[Any, Any]) -> tuple[xr.Dataset, str]:
        pooled, positions, broken = pooled_of(mine, readouts)
        which = asked(key)
        samples, count = list(samples_of(model.job, key)), len(which) // len(samples_of(model.job, key))
        dims = {"sample": samples, "swap": range(count), "layer": layers, "d_model": range(pooled.shape[-1])}
        shape = (len(samples), count)
        own = ("sample", "swap")
        data = arrays.dataset(
            dims,
            {
                "asked": (own, np.array(list(which.values()), object).reshape(shape)),
                "pooled": (tuple(dims), pooled.reshape(*shape, *pooled.shape[1:])),
                "positions": (own, positions.reshape(shape)),
            },
        )
        lost = {row.key.sample: [layers[i] for i in np.flatnonzero(bad)] for row, bad in zip(mine, broken, strict=True)}
        return data, not_finite(model, {k: places for k, places in lost.items() if places}) if broken.any() else ""

    ready = _with_texts(model, SWAPPED, model.missing(SWAPPED), needs)
    _read(model, SWAPPED, ready, forms.capture(layers), rows, keep, needs)


Needs = Callable[[SampleChunk], list[SampleChunk]]


def _with_texts(model: ModelRun, stage: str, todo: Mapping[SampleChunk, int], needs: Needs) -> dict[SampleChunk, int]:
    """The cells whose samples are all there; the others wait."""
    if not todo:
        return {}
    path, written = model.path(stage), model.path("samples")
    gone, ready = model.run.lacking(written, model.wanted(cells.samples)), {}
    for key, number in todo.items():
        absent = [need for need in needs(key) if need in gone]
        if absent:
            model.run.wait_for(stage, path, key, number, written, absent[0])
        else:
            ready[key] = number
    return ready


def _read(
    model: ModelRun,
    stage: str,
    todo: Mapping[SampleChunk, int],
    form: Form,
    rows: Callable[[SampleChunk, Mapping[SampleChunk, xr.Dataset]], list[Row]],
    keep: Callable[[SampleChunk, Sequence[Row], Mapping[Any, Any]], tuple[xr.Dataset, str]],
    needs: Needs,
) -> None:
    """Puts the rows of cells through the model and commits what comes of each, and what of it is a missing value."""
    path, written, samples = model.path(stage), model.path("samples"), model.wanted(cells.samples)
    clock = Clock()
    for wave in model.run.waves(stage, path, todo, lambda key: BY_NAME[stage].rows(model.job, key)):
        rows_by_cell: dict[SampleChunk, list[Row]] = {}
        for key in wave:
            with model.run.guarded(stage, path, key, todo[key]):
                rows_by_cell[key] = rows(key, model.run.inputs(written, {cell: samples[cell] for cell in needs(key)}))
        results = model.execute(stage, form, [row for mine in rows_by_cell.values() for row in mine])
        share = clock.share(len(wave))
        for key, mine in rows_by_cell.items():
            if not model.run.came_back(stage, path, key, todo[key], [row.key for row in mine], results):
                continue
            data, lost = keep(key, mine, results.readouts)
            model.run.commit(path, key, data, todo[key], share)
            model.run.finished(stage, key)
            if lost:
                model.run.fail(stage, path, key, todo[key], lost)
