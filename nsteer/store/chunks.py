"""Turns a committed cell into its files, its values and its labels, as its record tells them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.store import room
from nsteer.store.leaf import Leaf
from nsteer.store.records import Cell
from nsteer.system.names import chunk_name


@dataclass(frozen=True)
class Chunk:
    """One file of a cell: its name from the root, its variable, and the slice of each dim that it holds."""

    name: str
    variable: str
    within: Mapping[str, slice]


def structure_of(leaf: Leaf, record: Cell) -> dict[str, Any]:
    """What a cell held when it was committed. StoreError for a record that names none that the group tells of."""
    if not 0 <= record.structure < len(leaf.structures):
        raise StoreError(f"{leaf.path}: a commit record does not tell what its cell holds; see nsteer verify")
    return leaf.structures[record.structure]


def extent(leaf: Leaf, position: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, slice]:
    """The slice of every dim that a cell holds, when its inner dims have these sizes."""
    slices = {dim: slice(0, size) for dim, size in sizes.items()}
    for axis, (dim, size), at in zip(leaf.cell, leaf.cut.items(), position, strict=True):
        stop = at + 1 if axis == dim else min(sizes.get(dim, leaf.dims[dim]), (at + 1) * size)
        slices[dim] = slice(at * size, stop)
    return slices


def of_cell(leaf: Leaf, position: tuple[int, ...], structure: Mapping[str, Any]) -> Iterator[Chunk]:
    """The files that a cell of this structure consists of, its record left out."""
    slices = extent(leaf, position, structure["sizes"])
    for name in structure["variables"]:
        yield from of_slices(leaf, name, slices)


def position(leaf: Leaf, name: str, index: tuple[int, ...]) -> tuple[int, ...] | None:
    """The cell that a chunk of an array is of; None for an array that no cell owns."""
    document = leaf.arrays[name]
    dims, shape = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
    if len(index) != len(dims) or not set(leaf.cut) <= set(dims):
        return None
    start = {dim: i * n for dim, i, n in zip(dims, index, shape, strict=True)}
    return tuple(start[dim] // size for dim, size in leaf.cut.items())


def values(leaf: Leaf, position: tuple[int, ...], structure: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of a cell with this structure: variable -> array, in published order of labels."""
    slices = extent(leaf, position, structure["sizes"])
    for name in structure["variables"]:
        count = math.prod(slices[dim].stop - slices[dim].start for dim in leaf.arrays[name]["dimension_names"])
        leaf.room(name, count, math.prod(map(len, _ranges(leaf, name, slices))))
    dims = {name: leaf.arrays[name]["dimension_names"] for name in structure["variables"]}
    return leaf.handles.read({name: tuple(slices[dim] for dim in own) for name, own in dims.items()})


def of_slices(leaf: Leaf, name: str, slices: Mapping[str, slice]) -> Iterator[Chunk]:
    """The files of one array that hold these slices of it. StoreError for many that are not there."""
    document = leaf.arrays[name]
    dims, shape = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
    ranges = _ranges(leaf, name, slices)
    room.files(leaf.place, f"{leaf.path}/{name}", math.prod(map(len, ranges)))
    for index in itertools.product(*ranges):
        within = {
            d: slice(max(slices[d].start, i * n), min(slices[d].stop, (i + 1) * n))
            for d, i, n in zip(dims, index, shape, strict=True)
        }
        yield Chunk(f"{leaf.path}/{name}/{chunk_name(index)}", name, within)


def _ranges(leaf: Leaf, name: str, slices: Mapping[str, slice]) -> list[range]:
    """Which files of an array hold these slices of it: by dim, by their numbers."""
    document = leaf.arrays[name]
    dims, shape = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
    return [range(slices[d].start // n, -(-slices[d].stop // n)) for d, n in zip(dims, shape, strict=True)]


def whole_chunks(leaf: Leaf, name: str) -> Iterator[Chunk]:
    """All files of an array of labels, or of an auxiliary one."""
    document = leaf.arrays[name]
    sizes = zip(document["dimension_names"], document["shape"], strict=True)
    return of_slices(leaf, name, {dim: slice(0, size) for dim, size in sizes})


def cell_name(leaf: Leaf, position: tuple[int, ...]) -> dict[str, Any]:
    """A cell by its labels."""
    return dict(zip(leaf.cell, leaf.cell_labels(position), strict=True))


def labels_within(leaf: Leaf, chunk: Chunk) -> dict[str, Any]:
    """What a chunk holds of a variable, by the labels of its inner dims; of several the first and the last."""
    inner_labels: dict[str, Any] = {}
    for dim, within in chunk.within.items():
        if dim in leaf.cell or within.stop - within.start == leaf.dims[dim]:
            continue
        labels = leaf.labels[dim][within]
        inner_labels[dim] = labels[0] if len(labels) == 1 else [labels[0], labels[-1]]
    return inner_labels
