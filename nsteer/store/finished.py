"""Turns a published group into a lazy Dataset in which only committed cells show."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from nsteer.errors import StoreError
from nsteer.store.declare import array_of
from nsteer.store.group import CELL, CELL_FIELD, CELL_FIELDS
from nsteer.store.leaf import Leaf


def finished(leaf: Leaf) -> xr.Dataset:
    """The group as it stands now: structure, records and mask are of one moment, values are read when asked for.

    Cells that are not committed hold the fill. Reading a cell that was computed anew since raises StoreError.
    """
    sizes = [leaf.dims[axis] for axis in leaf.cell]
    records, changed = np.full([*sizes, len(CELL_FIELDS)], math.nan), np.zeros(sizes, dtype=np.int64)
    found = leaf.records()
    at = tuple(found.positions.T)
    records[at], changed[at] = found.fields, found.stamps
    labels = {**leaf.labels, CELL_FIELD: list(CELL_FIELDS)}
    coords: dict = {dim: (dim, array_of(values), _attrs(leaf, dim)) for dim, values in labels.items()}
    for name in leaf.auxiliary:
        coords[name] = (_dims(leaf, name), leaf.handles[name][...], _attrs(leaf, name))
    arrays = {
        name: xr.Variable(
            _dims(leaf, name), indexing.LazilyIndexedArray(_Finished(leaf, name, changed)), _attrs(leaf, name)
        )
        for name in leaf.variables
    }
    arrays[CELL] = xr.Variable(_dims(leaf, CELL), records, _attrs(leaf, CELL))
    attrs = {key: value for key, value in leaf.attrs.items() if key != "coordinates"}
    return xr.Dataset(arrays, coords, attrs)


def _dims(leaf: Leaf, name: str) -> list[str]:
    return leaf.arrays[name]["dimension_names"]


def _attrs(leaf: Leaf, name: str) -> dict:
    return dict(leaf.arrays[name]["attributes"])


class _Finished(BackendArray):
    """One variable, in which cells without a record hold the fill. `changed`: stamps of records, 0 for none."""

    def __init__(self, leaf: Leaf, name: str, changed: np.ndarray):
        self.leaf, self.handle, self.dims = leaf, leaf.handles[name], _dims(leaf, name)
        self.shape, self.dtype = self.handle.shape, np.dtype(self.handle.dtype)
        axes = list(leaf.cut)
        self.cut = [dim for dim in self.dims if dim in axes]
        self.changed, self.order = changed, [axes.index(dim) for dim in self.cut]

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        with self.leaf.reading():
            values = np.require(self.handle.oindex[key], self.dtype, "W")
        by_dim = dict(zip(self.dims, key, strict=True))
        cells = {dim: self._cells(dim, by_dim[dim]) for dim in self.cut}
        self._check_unchanged([np.unique(cells[dim]) for dim in self.leaf.cut])
        done = self.changed.transpose(self.order)[np.ix_(*cells.values())] > 0
        if done.all():
            return values  # the usual case, and values may be large
        shape = [cells[dim].size if dim in cells else 1 for dim in self.dims if np.ndim(_array(by_dim[dim]))]
        values[~np.broadcast_to(done.reshape(shape), values.shape)] = self.handle.metadata.fill_value
        return values

    def _cells(self, dim: str, key: int | slice | np.ndarray) -> np.ndarray:
        """Positions on the cell axis that belong to a key into a data dim."""
        return np.atleast_1d(np.arange(self.leaf.dims[dim])[key]) // self.leaf.cut[dim]

    def _check_unchanged(self, positions: list[np.ndarray]) -> None:
        there = np.argwhere(self.changed[np.ix_(*positions)])
        done = [tuple(int(axis[i]) for axis, i in zip(positions, at, strict=True)) for at in there]
        for position, stamp in zip(done, self.leaf.changed(done), strict=True):
            if stamp != self.changed[position]:
                cell = self.leaf.cell_labels(position)
                raise StoreError(
                    f"{self.leaf.path}: cell {cell} was computed anew after this was opened; open it again"
                )


def _array(key: int | slice | np.ndarray) -> np.ndarray:
    return np.empty(1) if isinstance(key, slice) else np.asarray(key)
