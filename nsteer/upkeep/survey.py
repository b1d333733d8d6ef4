"""Turns a store as it lies into the files that it must hold, by group and cell, and what lies there besides."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.store import Store
from nsteer.store.documents import FILE, file_of, members, parse, read_document
from nsteer.store.leaf import CELL_ATTR, Leaf, leaf_of
from nsteer.store.names import chunk_index, chunk_name
from nsteer.store.places import PARTIAL, Place
from nsteer.store.records import Cell, kept_file

LEFTOVERS = {
    "temporary": "a write that was killed",
    "orphan": "a chunk of no finished cell",
    "unpublished": "structure that a killed process did not publish",
    "unknown": "not nsteer's; left alone",
}


@dataclass(frozen=True)
class Chunk:
    """One file of a cell: its name from the root, its variable, and the part of each dim that it holds."""

    name: str
    variable: str
    part: Mapping[str, slice]


@dataclass(frozen=True)
class Leftover:
    """A file that no finished cell and no published structure needs; harmless."""

    kind: str
    name: str
    bytes: int


def root_document(store: Store) -> tuple[dict | None, str]:
    """The root document, and what is wrong with it ("" for nothing). StoreError where there is no store at all.

    Raises StoreVersionError for another layout.
    """
    raw = store.place.read(FILE)
    try:
        if raw is None or parse(store.place, "", raw) is None:
            if not any(True for _ in leaf_paths(store.place)):
                store.check_version()
            return None, f"{FILE} of the root is gone"
    except StoreError as error:
        if not any(True for _ in leaf_paths(store.place)):
            raise
        return None, str(error)
    store.check_version()
    return read_document(store.place, ""), ""


def leaf_paths(place: Place) -> Iterator[str]:
    """The groups of results that lie there, published or not, whose documents can be read."""
    for name, _ in place.walk():
        path = name.removesuffix(f"/{FILE}")
        if path == name:
            continue
        try:
            document = read_document(place, path)
        except StoreError:
            continue
        if document and CELL_ATTR in document.get("attributes", {}):
            yield path


def published(document: Mapping | None) -> list[str]:
    """The groups of results that the root publishes, sorted."""
    return sorted(p for p, doc in members(document).items() if CELL_ATTR in doc.get("attributes", {}))


def leaf_from_root(place: Place, root: Mapping | None, path: str) -> Leaf | None:
    """The group as the root tells of it: what its own document said when it was published last."""
    below = members(root)
    if path not in below:
        return None
    arrays = {name[len(path) + 1 :]: doc for name, doc in below.items() if name.startswith(f"{path}/")}
    consolidated = {"kind": "inline", "must_understand": False, "metadata": arrays}
    return leaf_of(place, path, {**below[path], "consolidated_metadata": consolidated})


def structure_of(leaf: Leaf, record: Cell) -> dict[str, Any]:
    """What a cell held when it was committed. StoreError for a record that names none that the group tells of."""
    if not 0 <= record.structure < len(leaf.structures):
        raise StoreError(f"{leaf.path}: a commit record does not tell what its cell holds; see nsteer verify")
    return leaf.structures[record.structure]


def extent(leaf: Leaf, position: tuple[int, ...], sizes: Mapping[str, int]) -> dict[str, slice]:
    """The part of every dim that a cell holds, when its inner dims have these sizes."""
    parts = {dim: slice(0, size) for dim, size in sizes.items()}
    for axis, (dim, size), at in zip(leaf.cell, leaf.cut.items(), position, strict=True):
        stop = at + 1 if axis == dim else min(sizes.get(dim, leaf.dims[dim]), (at + 1) * size)
        parts[dim] = slice(at * size, stop)
    return parts


def chunks(leaf: Leaf, position: tuple[int, ...], structure: Mapping[str, Any]) -> Iterator[Chunk]:
    """The files that a cell of this structure consists of, its record left out."""
    parts = extent(leaf, position, structure["sizes"])
    for name in structure["variables"]:
        yield from chunks_of(leaf, name, parts)


def values(leaf: Leaf, position: tuple[int, ...], structure: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of a cell with this structure: variable -> array, in published order of labels."""
    parts = extent(leaf, position, structure["sizes"])
    return {
        name: np.asarray(leaf.handles[name][tuple(parts[dim] for dim in leaf.arrays[name]["dimension_names"])])
        for name in structure["variables"]
    }


def chunks_of(leaf: Leaf, name: str, parts: Mapping[str, slice]) -> Iterator[Chunk]:
    """The files of one array that hold a part of it."""
    document = leaf.arrays[name]
    dims, shape = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
    ranges = [range(parts[d].start // n, -(-parts[d].stop // n)) for d, n in zip(dims, shape, strict=True)]
    for index in itertools.product(*ranges):
        part = {
            d: slice(max(parts[d].start, i * n), min(parts[d].stop, (i + 1) * n))
            for d, i, n in zip(dims, index, shape, strict=True)
        }
        yield Chunk(f"{leaf.path}/{name}/{chunk_name(index)}", name, part)


def whole(leaf: Leaf, name: str) -> Iterator[Chunk]:
    """All files of an array of labels, or of an auxiliary one."""
    document = leaf.arrays[name]
    sizes = zip(document["dimension_names"], document["shape"], strict=True)
    return chunks_of(leaf, name, {dim: slice(0, size) for dim, size in sizes})


def ancestors(path: str) -> list[str]:
    """The groups above a path, the root left out."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def needed(leaf: Leaf) -> set[str]:
    """Every file that a group needs besides those of its cells: documents, labels, auxiliary arrays."""
    found = {file_of(path) for path in [*ancestors(leaf.path), leaf.path]} | {kept_file(leaf.path)}
    found |= {file_of(f"{leaf.path}/{name}") for name in leaf.arrays}
    return found | {chunk.name for name in [*leaf.dims, *leaf.auxiliary] for chunk in whole(leaf, name)}


def leftovers(store: Store, leaves: Mapping[str, Leaf], owned: set[str]) -> list[Leftover]:
    """What lies in a store and is neither structure nor part of a finished cell."""
    found = []
    for name, size in store.place.walk():
        if name not in owned and name != FILE:
            found.append(Leftover(_kind(leaves, name), name, size))
    return sorted(found, key=lambda one: (one.kind, one.name))


def _kind(leaves: Mapping[str, Leaf], name: str) -> str:
    if name.endswith(PARTIAL):
        return "temporary"
    folder, _, file = name.rpartition("/")
    path, _, array = folder.rpartition("/")
    if path in leaves and array in leaves[path].arrays:
        return "orphan" if chunk_index(file) else "unknown"
    return "unpublished" if file == FILE or chunk_index(file) else "unknown"


def cell_name(leaf: Leaf, position: tuple[int, ...]) -> dict[str, Any]:
    """A cell by its labels."""
    return dict(zip(leaf.cell, leaf.cell_labels(position), strict=True))


def part_name(leaf: Leaf, chunk: Chunk) -> dict[str, Any]:
    """A part of a variable by the labels of its inner dims; the first and the last where there are several."""
    found: dict[str, Any] = {}
    for dim, part in chunk.part.items():
        if dim in leaf.cell or part.stop - part.start == leaf.dims[dim]:
            continue
        labels = leaf.labels[dim][part]
        found[dim] = labels[0] if len(labels) == 1 else [labels[0], labels[-1]]
    return found
