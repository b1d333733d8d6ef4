"""Turns finished cells into values to compute from: those that their fingerprints stand for, whole, or an error.

Whoever computes from stored cells reads them here, by the fingerprints that they must have. What is in memory then
stays right, whatever becomes of the store: another run may replace a cell, a disk may lose one of its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import ChangedError, DamagedError, RoomError, StoreError
from nsteer.store import chunks
from nsteer.store.content import content
from nsteer.store.declare import array_of
from nsteer.store.leaf import Leaf
from nsteer.store.records import Cell

if TYPE_CHECKING:
    from nsteer.store.store import Store

TRIES = 3
"""Times that a cell is read while others put it again."""


K = TypeVar("K", bound=tuple)


def read_whole(store: Store, path: str, wanted: Mapping[K, int]) -> dict[K, xr.Dataset]:
    """Finished cells, each over the dims that do not make cells, with their labels; a chunk over its samples.

    wanted : labels of a cell -> the fingerprint that it must have

    Raises ChangedError for a cell that is gone or was made with other settings, DamagedError for one that does not
    hold what was committed: a file of it is lost, cut off, or another's.
    """
    return {cell: _whole(store, path, cell, number) for cell, number in wanted.items()}


def _whole(store: Store, path: str, cell: tuple, number: int) -> xr.Dataset:
    for _ in range(TRIES):
        leaf = store.leaf(path)
        if leaf is None:
            break
        at = leaf.position(cell)
        record = leaf.record(at)
        if record is None or record.fingerprint != number:
            break
        try:
            return dataset(leaf, at, record, values(leaf, at, record))
        except DamagedError:
            if leaf.record(at) == record:
                raise  # it was not put again while it was read
    raise ChangedError(
        f"{path} {cell_text(cell)} is not there any more as this plan wants it: another run with other settings "
        "writes the same cells of this store. Run again when it has ended, or name another store"
    )


def cell_text(cell: tuple) -> str:
    """A cell as messages name it."""
    return " / ".join(map(str, cell))


def values(leaf: Leaf, at: tuple[int, ...], record: Cell) -> dict[str, np.ndarray]:
    """The values of a cell: variable -> array, in published order of labels. Raises DamagedError for others than were
    committed."""
    try:
        with leaf.reading():
            arrays = chunks.values(leaf, at, chunks.structure_of(leaf, record))
    except RoomError:
        raise
    except (StoreError, ValueError, RuntimeError) as error:  # the latter two: what codecs raise for bytes cut off
        raise _damaged(leaf, at, record, str(error)) from error
    if record.content >= 0 and content(arrays) != record.content:
        raise _damaged(leaf, at, record, "it does not hold what was committed")
    return arrays


def _damaged(leaf: Leaf, at: tuple[int, ...], record: Cell, why: str) -> DamagedError:
    lost = missing_files(leaf, at, record)
    why = f"a file of it is gone ({lost[0]})" if lost else why
    return DamagedError(
        f"{leaf.path} {cell_text(leaf.cell_labels(at))} is damaged: {why}. "
        f"`nsteer verify --repair {leaf.place.name}` has it computed again"
    )


def missing_files(leaf: Leaf, at: tuple[int, ...], record: Cell, variable: str | None = None) -> list[str]:
    """The files that a cell must have and has not; of one variable where it is named."""
    due = chunks.of_cell(leaf, at, chunks.structure_of(leaf, record))
    names = [chunk.name for chunk in due if variable in (None, chunk.variable)]
    return [name for name, stamp in zip(names, leaf.place.stamps(names), strict=True) if not stamp]


def labels(leaf: Leaf, at: tuple[int, ...], record: Cell) -> dict[str, list]:
    """The labels of what a cell holds, by dim."""
    slices = chunks.extent(leaf, at, chunks.structure_of(leaf, record)["sizes"])
    return {dim: leaf.labels[dim][span] for dim, span in slices.items()}


def dataset(leaf: Leaf, at: tuple[int, ...], record: Cell, arrays: Mapping[str, np.ndarray]) -> xr.Dataset:
    """The values of a cell as it is committed: over the dims that do not make cells, with their labels."""
    named, cut = labels(leaf, at, record), [dim for dim in leaf.cut if dim in leaf.cell]
    variables = {}
    for name, array in arrays.items():
        dims = leaf.arrays[name]["dimension_names"]
        index = tuple(0 if dim in cut else slice(None) for dim in dims)
        variables[name] = xr.Variable([dim for dim in dims if dim not in cut], array[index])
    used = {dim for variable in variables.values() for dim in variable.dims}
    return xr.Dataset(variables, {dim: (dim, array_of(named[str(dim)])) for dim in used})
