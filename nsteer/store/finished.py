"""Turns a published group into a lazy Dataset in which only committed cells show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from nsteer.errors import DamagedError, StoreError
from nsteer.store.chunks import extent, of_cell
from nsteer.store.declare import array_of
from nsteer.store.group import CELL, CELL_FIELD, CELL_FIELDS
from nsteer.store.leaf import MARKS, Leaf
from nsteer.store.records import Records


def finished(leaf: Leaf, cell_records: Records | None = None) -> xr.Dataset:
    """The group as it stands now: structure, records and mask are of one moment, values are read when asked for.

    cell_records : its records, where the caller has them

    Cells that are not committed hold the fill. Reading a cell that was computed again since raises StoreError.
    """
    sizes = [leaf.dims[axis] for axis in leaf.cell]
    records, changed = np.full([*sizes, len(CELL_FIELDS)], math.nan), np.zeros(sizes, dtype=np.int64)
    cell_records = leaf.records() if cell_records is None else cell_records
    at = tuple(cell_records.positions.T)
    records[at], changed[at] = cell_records.fields, cell_records.stamps
    structure = np.nan_to_num(records[..., CELL_FIELDS.index("structure")], nan=-1).astype(int)
    labels = {**leaf.labels, CELL_FIELD: list(CELL_FIELDS)}
    coords: dict = {dim: (dim, array_of(values), _attrs(leaf, dim)) for dim, values in labels.items()}
    for name in leaf.auxiliary:
        coords[name] = (_dims(leaf, name), leaf.beside(name), _attrs(leaf, name))
    arrays = {
        name: xr.Variable(
            _dims(leaf, name),
            indexing.LazilyIndexedArray(_Finished(leaf, name, changed, structure)),
            _attrs(leaf, name),
        )
        for name in leaf.variables
    }
    arrays[CELL] = xr.Variable(_dims(leaf, CELL), records, _attrs(leaf, CELL))
    marks = ("coordinates", MARKS)  # how the store is laid out: no reader's, and nothing that netCDF could hold
    attrs = {key: value for key, value in leaf.attrs.items() if not key.startswith(marks)}
    return xr.Dataset(arrays, coords, attrs)


def index_of_finished(leaf: Leaf, data: xr.Dataset, dims: Sequence[str]) -> xr.DataArray:
    """Where in a group, over these dims (all that make cells among them), finished cells hold values.

    data : the group as `finished` gives it
    """
    records = data[CELL].values[..., CELL_FIELDS.index("structure")]
    mask = np.zeros([data.sizes[dim] for dim in dims], bool)
    for at in map(tuple, np.argwhere(~np.isnan(records)).tolist()):
        slices = extent(leaf, at, leaf.structures[int(records[at])]["sizes"])
        mask[tuple(slices[dim] for dim in dims)] = True
    return xr.DataArray(mask, {dim: data[dim] for dim in dims if dim in data.coords}, dims)


def is_fill(leaf: Leaf, data: xr.DataArray) -> xr.DataArray:
    """Where a variable of a group holds what stands where nothing was written."""
    return data.copy(data=_is_fill(data.values, leaf.handles[str(data.name)].metadata.fill_value))


def _dims(leaf: Leaf, name: str) -> list[str]:
    return leaf.arrays[name]["dimension_names"]


def _attrs(leaf: Leaf, name: str) -> dict:
    return dict(leaf.arrays[name]["attributes"])


class _Finished(BackendArray):
    """One variable, in which cells without a record hold the fill.

    changed : stamps of records, 0 for none; structure : which structure each tells of
    """

    def __init__(self, leaf: Leaf, name: str, changed: np.ndarray, structure: np.ndarray):
        self.leaf, self.name, self.structure = leaf, name, structure
        self.handle, self.dims = leaf.handles[name], _dims(leaf, name)
        self.shape, self.dtype = self.handle.shape, np.dtype(self.handle.dtype)
        self._sizes = list(zip(self.dims, self.shape, strict=True))
        self.chunk = dict(zip(self.dims, self.handle.chunks, strict=True))
        self.single = all(self.chunk[dim] >= n for dim, n in self._sizes if dim not in leaf.cut)  # a file a cell
        axes = list(leaf.cut)
        self.cut = [dim for dim in self.dims if dim in axes]
        self.changed, self.order = changed, [axes.index(dim) for dim in self.cut]

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.OUTER, self._read)

    def _read(self, key: tuple) -> np.ndarray:
        by_dim = dict(zip(self.dims, key, strict=True))
        cells = {dim: self._cells(dim, by_dim[dim]) for dim in self.cut}
        done = self.changed.transpose(self.order)[np.ix_(*cells.values())] > 0
        with self.leaf.reading():
            asked = {dim: np.size(_array(by_dim[dim], n)) for dim, n in self._sizes}
            inner = [min(asked[dim], -(-n // self.chunk[dim])) for dim, n in self._sizes if dim not in self.cut]
            self.leaf.room(self.name, math.prod(asked.values()), int(done.sum()) * math.prod(inner))
            if done.all():  # the usual case, and values may be large
                values = np.require(self.handle.oindex[key], self.dtype, "W")
            else:
                values = self._done_alone(by_dim, done)
        self._check_unchanged([np.unique(cells[dim]) for dim in self.leaf.cut])
        self._check_whole(values.reshape([np.size(_array(by_dim[dim], n)) for dim, n in self._sizes]), cells, done)
        return values

    def _done_alone(self, by_dim: dict, done: np.ndarray) -> np.ndarray:
        """The values under a key, fill where cells are not finished: what lies there of those is not opened."""
        index = {dim: np.atleast_1d(_array(by_dim[dim], n)) for dim, n in self._sizes}
        values = np.full([len(positions) for positions in index.values()], self.handle.metadata.fill_value, self.dtype)
        for box in _boxes(done):
            here = {
                **{dim: np.arange(len(positions)) for dim, positions in index.items()},
                **dict(zip(self.cut, box, strict=True)),
            }
            values[np.ix_(*here.values())] = self.handle.oindex[tuple(index[dim][at] for dim, at in here.items())]
        return values.squeeze(
            tuple(
                i for i, dim in enumerate(self.dims) if np.ndim(by_dim[dim]) == 0 and not isinstance(by_dim[dim], slice)
            )
        )

    def _cells(self, dim: str, key: int | slice | np.ndarray) -> np.ndarray:
        """Positions on the cell axis that belong to a key into a data dim."""
        return np.atleast_1d(np.arange(self.leaf.dims[dim])[key]) // self.leaf.cut[dim]

    def _check_whole(self, values: np.ndarray, cells: dict[str, np.ndarray], done: np.ndarray) -> None:
        """A file that is gone reads as fill: of a cell that may hold one, all files that its record tells of must be
        there."""
        inner = tuple(i for i, dim in enumerate(self.dims) if dim not in self.cut)
        fill = _is_fill(values, self.handle.metadata.fill_value)
        suspect = np.argwhere((fill.all(inner) if self.single else fill.any(inner)) & done)
        columns = dict(zip(self.cut, suspect.T, strict=True))
        places = np.stack([cells[dim][columns[dim]] for dim in self.leaf.cut], -1)
        due = [
            (chunk.name, at)
            for at in dict.fromkeys(map(tuple, places.tolist()))
            for chunk in of_cell(self.leaf, at, self.leaf.structures[self.structure[at]])
            if chunk.variable == self.name
        ]
        for (name, at), stamp in zip(due, self.leaf.place.stamps([name for name, _ in due]), strict=True):
            if not stamp:
                cell = " / ".join(map(str, self.leaf.cell_labels(at)))
                raise DamagedError(
                    f"{self.leaf.path} {cell} is damaged: a file of it is gone ({name}). "
                    f"`nsteer verify --repair {self.leaf.place.name}` has it computed again"
                )

    def _check_unchanged(self, positions: list[np.ndarray]) -> None:
        there = np.argwhere(self.changed[np.ix_(*positions)])
        done = [tuple(int(axis[i]) for axis, i in zip(positions, at, strict=True)) for at in there]
        for position, stamp in zip(done, self.leaf.changed(done), strict=True):
            if stamp != self.changed[position]:
                cell = self.leaf.cell_labels(position)
                raise StoreError(
                    f"{self.leaf.path}: cell {cell} was computed again after this was opened; open it again"
                )


def _boxes(done: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Index arrays, one a dim, of boxes that cover what is True, each place once; few where it is regular."""
    if done.all():
        yield tuple(np.arange(n) for n in done.shape)
    elif done.any():
        rows, which = np.unique(done.reshape(len(done), -1), axis=0, return_inverse=True)
        for i, row in enumerate(rows):
            for rest in _boxes(row.reshape(done.shape[1:])):
                yield np.flatnonzero(which.ravel() == i), *rest


def _is_fill(values: np.ndarray, fill: Any) -> np.ndarray:
    return np.isnan(values) if values.dtype.kind == "f" and np.isnan(fill) else np.asarray(values == fill)


def _array(key: int | slice | np.ndarray, size: int) -> np.ndarray:
    """A key into a dim of a size, as positions; without a dim for a single one."""
    return np.asarray(np.arange(size)[key])
