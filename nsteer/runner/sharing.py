"""Cells that hold the same as another cell: one of each fingerprint is computed, the others are copied in the store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.runner.session import Clock, Session
from nsteer.stages import cells


def numbers(session: Session, key: tuple) -> range:
    """The sample numbers of a cell of samples or activations."""
    method = session.study.plan.methods[key[1]]
    return cells.blocks(cells.counts(session.study, method)[key[2]])[key[3]]


def parted(session: Session, path: str, todo: Mapping[tuple, int]) -> tuple[dict[tuple, int], dict[tuple, tuple]]:
    """The cells to compute, and those to copy, each with the cell that it is a copy of.

    A finished cell of equal fingerprint is preferred, unless it is known to hold a hole.
    """
    finished = {
        record.fingerprint: key
        for key, record in reversed(session.store.committed(path).items())
        if session.book.open(path, key) is None and todo.get(key) != record.fingerprint
    }
    first = {**cells.leaders(todo), **finished}
    own = {key: number for key, number in todo.items() if first[number] == key}
    return own, {key: first[number] for key, number in todo.items() if key not in own}


def copy(session: Session, stage: str, path: str, todo: Mapping[tuple, int], copies: Mapping[tuple, tuple]) -> None:
    """Fills cells with what their twins hold. A twin that failed fails them for its reason; its hole is theirs too."""
    if not copies:
        return
    for wave in session.waves(stage, path, {key: todo[key] for key in copies}, lambda key: len(numbers(session, key))):
        clock, gone = Clock(), session.lacking(path, {copies[key]: todo[key] for key in wave})
        for key in wave:
            twin, entry = copies[key], session.book.open(path, copies[key])
            if twin not in gone or entry is None:
                with session.guarded(stage, path, key, todo[key]):
                    data = held(session, path, twin, key, todo[key])
                    session.commit(stage, path, key, data, todo[key], clock.share(1))
                    session.finished(stage, key)
            if entry is not None:
                session.fail(stage, path, key, todo[key], entry.failure.reason, entry.failure.kind)


def held(session: Session, path: str, twin: tuple, key: tuple, number: int) -> xr.Dataset:
    """What the cell `twin` of a group by samples holds, under the sample numbers of the cell `key`."""
    own, first = numbers(session, key), twin[3] * cells.BLOCK
    samples = list(range(first, first + len(own)))  # as many as here: their fingerprints are equal
    data = session.inputs(path, {twin: number})[twin].sel({"sample": samples})
    return data.assign_coords(sample=np.array(own))
