"""Turns a labelled Dataset into the arrays of one cell, placed by label."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import StoreError, did_you_mean
from nsteer.store.leaf import Leaf


def align(leaf: Leaf, cell: tuple, data: xr.Dataset, required: Collection[str]) -> dict[str, np.ndarray]:
    """Every published variable -> its values over the whole cell, in published order of labels.

    Labels absent from `data` hold the fill, and so do published variables that are not required. StoreError for
    a variable or label the store does not know, a required variable that is missing, and types that would lose.
    """
    if unknown := [str(name) for name in data.data_vars if name not in leaf.variables]:
        raise StoreError(
            f"{leaf.path}: {unknown[0]!r} is no variable of this group; {did_you_mean(unknown[0], leaf.variables)}"
        )
    if lacking := [name for name in required if name not in data.data_vars]:
        raise StoreError(f"{leaf.path}: the data of cell {cell!r} lack the variables {sorted(lacking)}")
    extent = leaf.extent(cell)
    for axis, label in zip(leaf.cell, cell, strict=True):  # a contradicting coordinate is a mix-up of results
        if axis in data.coords and not data[axis].dims and data[axis].item() != label:
            raise StoreError(f"{leaf.path}: the data are of {axis} {data[axis].item()!r}, the cell is {cell!r}")
    at = {dim: _positions(leaf, data, str(dim), extent) for dim in data.dims if dim in leaf.dims}
    return {name: _place(leaf, name, data, extent, at) for name in leaf.variables}


def _positions(leaf: Leaf, data: xr.Dataset, dim: str, extent: Mapping[str, slice]) -> np.ndarray:
    """Where the labels of a dim of `data` lie within the slice of the axis that the cell covers."""
    if dim not in data.coords:
        raise StoreError(f"{leaf.path}: dim {dim!r} of the data has no labels; give it a coordinate of that name")
    covered = extent.get(dim, slice(0, leaf.dims[dim]))
    at = leaf.indexer(dim, data.indexes[dim])
    outside = (at < covered.start) | (at >= covered.stop)
    if outside.any():
        label = leaf.labels[dim][at[int(np.argmax(outside))]]
        raise StoreError(f"{leaf.path}: {dim} {label!r} belongs to another cell")
    if not data.indexes[dim].is_unique:
        raise StoreError(f"{leaf.path}: the data have a label of {dim!r} twice")
    return at - covered.start


def _place(
    leaf: Leaf, name: str, data: xr.Dataset, extent: Mapping[str, slice], at: Mapping[str, np.ndarray]
) -> np.ndarray:
    """One variable over the whole cell."""
    handle, dims = leaf.handles[name], leaf.arrays[name]["dimension_names"]
    slices = {dim: extent.get(dim, slice(0, leaf.dims[dim])) for dim in dims}
    shape = [covered.stop - covered.start for covered in slices.values()]
    if name not in data.data_vars:
        return np.full(shape, handle.metadata.fill_value, dtype=handle.dtype)
    array = data[name]
    if extra := [dim for dim in array.dims if dim not in dims]:
        raise StoreError(f"{leaf.path}: {name!r} has dim {extra[0]!r}; in the store it is over {dims}")
    where = [at[dim] if dim in array.dims else _single(leaf, name, array, dim, slices[dim]) for dim in dims]
    values = array.transpose(*(dim for dim in dims if dim in array.dims)).values.reshape(list(map(len, where)))
    values = _cast(leaf, name, values, handle.dtype)
    if all(len(a) == n and np.array_equal(a, np.arange(n)) for a, n in zip(where, shape, strict=True)):
        return values
    whole = np.full(shape, handle.metadata.fill_value, dtype=handle.dtype)
    whole[np.ix_(*where)] = values
    return whole


def _single(leaf: Leaf, name: str, array: xr.DataArray, dim: str, covered: slice) -> np.ndarray:
    """The one position along a dim that `array` has not: a cell dim, a scalar coordinate, an axis of one label."""
    if dim in array.coords and dim not in leaf.cell:
        return leaf.indexer(dim, [array[dim].item()]) - covered.start
    if covered.stop - covered.start > 1:
        size = covered.stop - covered.start
        raise StoreError(f"{leaf.path}: {name!r} lacks dim {dim!r}, which has {size} labels in this cell")
    return np.zeros(1, dtype=int)


def _cast(leaf: Leaf, name: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """Values in the dtype of the store. StoreError where that would change their kind or overflow."""
    if values.dtype == dtype:
        return values
    if dtype.kind == "T":
        if values.dtype.kind == "U" or all(isinstance(value, str) for value in values.flat):
            return values.astype(dtype)
        raise StoreError(f"{leaf.path}: {name!r} holds text in the store; found something else (missing text is '')")
    if values.dtype.kind not in "biuf" or not np.can_cast(values.dtype, dtype, "same_kind"):
        raise StoreError(f"{leaf.path}: {name!r} is {dtype} in the store; {values.dtype} does not fit")
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    lost = np.isfinite(values) & ~np.isfinite(cast) if dtype.kind == "f" else cast != values
    if lost.any():
        raise StoreError(f"{leaf.path}: {name!r} is {dtype} in the store; {values[lost][0]} does not fit")
    return cast
