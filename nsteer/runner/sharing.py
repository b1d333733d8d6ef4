"""Cells that hold the same as another cell: one of each fingerprint is computed, the others are copied in the store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock
from nsteer.stages import cells
from nsteer.stages.counting import samples_of
from nsteer.stages.keys import SampleChunk

Copies = dict[SampleChunk, SampleChunk]
"""Cell -> the cell that it is a copy of."""


def parted(model: ModelRun, path: str, todo: Mapping[SampleChunk, int]) -> tuple[dict[SampleChunk, int], Copies]:
    """The cells to compute, and those to copy, each with the cell that it is a copy of.

    A finished cell of equal fingerprint is preferred, unless it is known to hold a missing value.
    """
    committed = [(SampleChunk(*key), record) for key, record in model.run.store.committed(path).items()]
    finished = {
        record.fingerprint: key
        for key, record in reversed(committed)
        if model.run.book.open(path, key) is None and todo.get(key) != record.fingerprint
    }
    first = {**cells.leaders(todo), **finished}
    own = {key: number for key, number in todo.items() if first[number] == key}
    return own, {key: first[number] for key, number in todo.items() if key not in own}


def copy(model: ModelRun, stage: str, path: str, todo: Mapping[SampleChunk, int], copies: Copies) -> None:
    """Fills cells from those that they are copies of. One that failed fails its copies for its reason; so with its
    NaN."""
    if not copies:
        return
    for wave in model.run.waves(
        stage, path, {key: todo[key] for key in copies}, lambda key: len(samples_of(model.job, key))
    ):
        clock, gone = Clock(), model.run.lacking(path, {copies[key]: todo[key] for key in wave})
        for key in wave:
            original, entry = copies[key], model.run.book.open(path, copies[key])
            if original not in gone or entry is None:
                with model.run.guarded(stage, path, key, todo[key]):
                    data = copied_data(model, path, original, key, todo[key])
                    model.run.commit(path, key, data, todo[key], clock.share(1))
                    model.run.finished(stage, key)
            if entry is not None:
                model.run.fail(stage, path, key, todo[key], entry.failure.reason, entry.failure.kind)


def copied_data(model: ModelRun, path: str, original: SampleChunk, key: SampleChunk, number: int) -> xr.Dataset:
    """What the cell `original` of a group by samples holds, under the sample numbers of the cell `key`."""
    own, first = samples_of(model.job, key), original.sample_chunk * cells.CHUNK
    samples = list(range(first, first + len(own)))  # as many as here: their fingerprints are equal
    data = model.run.inputs(path, {original: number})[original].sel({"sample": samples})
    return data.assign_coords(sample=np.array(own))
