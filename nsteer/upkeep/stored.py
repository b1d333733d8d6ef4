"""A finished cell as one store holds it: its values, its labels, and whether another store holds the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import StoreError
from nsteer.store import Cell, Store, chunks, inputs
from nsteer.store.leaf import Leaf


@dataclass(frozen=True)
class StoredCell:
    """A cell as one store holds it."""

    store: Store
    leaf: Leaf
    at: tuple[int, ...]
    record: Cell

    @property
    def structure(self) -> Mapping[str, Any]:
        """What it held when it was committed."""
        return chunks.structure_of(self.leaf, self.record)

    def values(self) -> dict[str, np.ndarray]:
        """Its values. DamagedError when they are damaged, or not those that were committed."""
        return inputs.values(self.leaf, self.at, self.record)

    @property
    def sound(self) -> bool:
        """Whether it holds what was committed: its values are read."""
        try:
            self.values()
        except StoreError:
            return False
        return True

    def labels(self) -> dict[str, list]:
        """The labels of what it holds, by dim."""
        return inputs.labels(self.leaf, self.at, self.record)

    def data(self) -> xr.Dataset:
        """It as it is committed: over the dims that do not make cells, with their labels."""
        return inputs.dataset(self.leaf, self.at, self.record, self.values())


def committed_cells(store: Store, path: str) -> Iterator[tuple[tuple, StoredCell]]:
    """Labels of every finished cell of a group -> the cell as this store holds it."""
    if leaf := store.leaf(path):
        for at, record, _ in leaf.records():
            yield leaf.cell_labels(at), StoredCell(store, leaf, at, record)


def one_axis(stores: Iterable[Store]) -> None:
    """Raises StoreError for stores that call the axis of emotions by two names: no cell of one is a cell of another."""
    named = {name: store for store in stores if (name := store.published_axis())}
    if len(named) > 1:
        (first, a), (second, b) = named.items()
        raise StoreError(f"{a.path} has the axis {first!r}, {b.path} the axis {second!r}: they have no cell in common")


def equal(a: StoredCell, b: StoredCell) -> bool:
    """Whether two cells hold the same values under the same labels; what one does not hold counts as fill."""
    if alike(a, b):
        return True
    return all(left.dtype == right.dtype and equal_arrays(left, right) for _, left, right, _ in pairs(a, b))


def alike(a: StoredCell, b: StoredCell) -> bool:
    """Whether two cells are the same by their records and labels alone, without reading."""
    return a.record.content == b.record.content >= 0 and a.labels() == b.labels()


def pairs(a: StoredCell, b: StoredCell) -> Iterator[tuple[str, np.ndarray, np.ndarray, dict[str, list]]]:
    """Every variable of two cells over the labels of both, fill where one holds none: name, values, values, labels."""
    first, second = a.values(), b.values()
    for name in dict.fromkeys([*first, *second]):
        dims = (a if name in first else b).leaf.arrays[name]["dimension_names"]
        union = {dim: list(dict.fromkeys([*a.labels().get(dim, []), *b.labels().get(dim, [])])) for dim in dims}
        left, right = (_spread(cell, arrays.get(name), name, union) for cell, arrays in ((a, first), (b, second)))
        if left is None or right is None:  # a variable that one of them has not
            given, cell = (right, b) if left is None else (left, a)
            assert given is not None
            empty = np.full(given.shape, cell.leaf.handles[name].metadata.fill_value, given.dtype)
            left, right = (empty, given) if left is None else (given, empty)
        yield name, left, right, union


def equal_arrays(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in every element; NaN equals NaN."""
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _spread(cell: StoredCell, array: np.ndarray | None, name: str, union: Mapping[str, list]) -> np.ndarray | None:
    """A variable of a cell over more labels than it holds, the fill elsewhere."""
    if array is None:
        return None
    labels = cell.labels()
    where = [[union[dim].index(label) for label in labels[dim]] for dim in union]
    wide = np.full([len(labels) for labels in union.values()], cell.leaf.handles[name].metadata.fill_value, array.dtype)
    wide[np.ix_(*where)] = array
    return wide
