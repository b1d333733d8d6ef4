"""Turns declared groups into published structure, by renames that readers see whole or not at all.

Everything here runs under the lock of the store. A kill at any point leaves bytes beyond the published shapes,
which the next prepare overwrites; readers switch to the new structure in one rename for each document.
"""

from __future__ import annotations

import datetime
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import zarr
from zarr.storage import MemoryStore, StorePath

from nsteer import __version__
from nsteer.errors import StoreError, StoreVersionError
from nsteer.store import declare, documents, room
from nsteer.store.group import CELL, Group, cell_dims
from nsteer.store.leaf import CELL_ATTR, Leaf, leaf_of
from nsteer.store.places import Changed, Place
from nsteer.system.names import chunk_index

MARK = "nsteer_store"  # the attribute of the root that holds the layout
LAYOUT = 4  # to be raised when an older nsteer could not read what is written, or would write what is not read


_UNPACK = "A store is a folder: unpack it, and name what comes out"
_LABELLED = "A netCDF file is one group, or a copy of all: read it by xarray.open_dataset, or xarray.open_datatree"
PACKED = {
    **dict.fromkeys((".zip", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".7z"), _UNPACK),
    **dict.fromkeys((".nc", ".nc4", ".h5", ".hdf5"), _LABELLED),
}
"""Ending of a file that a user may take for a store -> what to do."""


def check_root(place: Place) -> dict | None:
    """The root document, None where nothing is. StoreError for foreign data, StoreVersionError for another layout."""
    return root_of(place, place.read(documents.file_of("")))


def root_of(place: Place, raw: bytes | None) -> dict | None:
    """`check_root` of what its file holds."""
    document = documents.parse(place, "", raw)
    if document is None:
        if place.occupied():
            # another process may have made the root since it was looked for: it does so before anything else
            if (raw := place.read(documents.file_of(""))) is not None:
                return root_of(place, raw)
            hint = next((said for ending, said in PACKED.items() if place.name.lower().endswith(ending)), "")
            raise StoreError(
                f"{place.name} exists and is not an nsteer store; nothing was written. {hint or 'Name another path'}"
            )
        return None
    layout = document.get("attributes", {}).get(MARK)
    if layout is None:
        raise StoreError(
            f"{place.name} is a zarr store, but not an nsteer store; nothing was written. Name another path"
        )
    if layout != LAYOUT:
        older = isinstance(layout, str) or (isinstance(layout, int) and layout < LAYOUT)
        advice = (
            "run the plan again into a new store"
            if older
            else "upgrade nsteer (pip install -U nsteer), or name another store"
        )
        raise StoreVersionError(f"{place.name}: store layout {layout}, this nsteer reads layout {LAYOUT}; {advice}")
    return document


def make_root(place: Place) -> None:
    """An empty, consolidated root, so that no reader ever lists a half-made store."""
    documents.write_document(place, "", _root())


def restore(place: Place, paths: Sequence[str]) -> None:
    """Makes a lost root again from the groups that it published: whole, in one rename."""
    _publish(place, _root(), {}, set(paths), over=None)


def _root() -> dict:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    attrs = {
        MARK: LAYOUT,
        "creation_library": "nsteer",
        "creation_library_version": __version__,
        "created_at": now,
        "Conventions": "nsteer-1",
    }
    return documents.group_document(attrs)


def examine(place: Place, groups: Sequence[Group], leaves: Sequence[Leaf | None]) -> None:
    """Raises StoreError for the first group that the store could not hold, before anything is written."""
    present = documents.members(documents.read_document(place, ""))
    taken = {path for path, doc in present.items() if doc["node_type"] == "group"} | {g.path for g in groups}
    results = {path for path in taken if CELL_ATTR in present.get(path, {}).get("attributes", {})}
    results |= {group.path for group in groups}
    for group, leaf in zip(groups, leaves, strict=True):
        if above := results.intersection(_ancestors(group.path)):
            raise StoreError(f"{group.path}: {above.pop()!r} holds results and so no groups; name another path")
        if any(path.startswith(f"{group.path}/") for path in taken):
            raise StoreError(f"{group.path}: the store holds groups below this path; name another path")
        if leaf:
            declare.check_same(leaf, group)
        arrays = declare.array_documents(leaf, group, declare.union(leaf, group))
        variables = dict.fromkeys([*group.variables, *(leaf.variables if leaf else ())])
        room.cell(place, group.path, arrays, variables, cell_dims(group.cell, group.chunks))


def ordered(group: Group, leader: Leaf | None) -> Group:
    """A group whose chunks count labels in the order of another, its leader; as published, None where it is not."""
    if leader is None:
        return group
    first = {dim: [*dict.fromkeys([*leader.along(dim), *group.coords[dim]])] for dim in group.chunks}
    return replace(group, coords={**group.coords, **first})


def grow(place: Place, group: Group, leaf: Leaf | None) -> None:
    """Creates the group or appends its new labels, and publishes it, its ancestors and the root excepted.

    `leaf` is the group as published, None where it is new.
    """
    if leaf:
        declare.check_same(leaf, group)
    labels = declare.union(leaf, group)
    arrays = declare.array_documents(leaf, group, labels)
    contents = {**declare.new_labels(leaf, labels), **declare.new_auxiliary(leaf, group, labels)}
    for ancestor in _ancestors(group.path):
        if documents.read_document(place, ancestor) is None:
            documents.write_document(place, ancestor, documents.group_document({}))
    if leaf is None:
        documents.write_document(place, group.path, documents.group_document({}))  # readers see it empty, not half made
    there = documents.read_all(place, [f"{group.path}/{name}" for name in arrays])
    grown = {f"{group.path}/{n}": values for n, values in arrays.items() if there.get(f"{group.path}/{n}") != values}
    files = {
        f"{group.path}/{name}/{chunk}": content
        for name, values in contents.items()
        for chunk, content in encoded(arrays[name], values).items()
    }
    seen = {name: place.versioned(name)[1] for name in [*map(documents.file_of, grown), *files]}
    place.assure()  # so what was seen is of before anybody else's turn, and nothing is put over what comes in later
    for path, document in grown.items():
        documents.write_document(place, path, document, seen=seen[documents.file_of(path)])
    for name, content in files.items():
        try:
            place.write(name, content, over=seen[name])
        except Changed:
            raise documents.lock_lost(f"{place.name}/{name}") from None
    document = documents.group_document(declare.attributes(leaf, group, arrays, labels), arrays)
    if leaf is not None:
        _drop_beyond(place, leaf, Leaf(place, group.path, document))
    documents.write_document(place, group.path, document, over=leaf.document if leaf else documents.group_document({}))


def _drop_beyond(place: Place, leaf: Leaf, grown: Leaf) -> None:
    """Drops records that lie beyond what is published and are about to be taken in: of a newer store, over which an old
    copy was put. One that was made for the labels which come to its place now is kept.

    Only where the lock is taken from nobody who lives: elsewhere they could be another's, and are none by their labels.
    """
    if not place.guarded or all(grown.dims[axis] == leaf.dims[axis] for axis in leaf.cell):
        return
    for name in place.names(f"{leaf.path}/{CELL}"):
        at = (chunk_index(name) or ())[:-1]
        if len(at) != len(leaf.cell) or any(i >= grown.dims[axis] for i, axis in zip(at, leaf.cell, strict=True)):
            continue
        if any(i >= leaf.dims[axis] for i, axis in zip(at, leaf.cell, strict=True)) and not _own(grown, at):
            place.delete(leaf.record_file(at))


def _own(leaf: Leaf, at: tuple[int, ...]) -> bool:
    """Whether a record is whole, and was made for the labels at its place."""
    try:
        return leaf.record(at) is not None
    except StoreError:
        return False


def fill(place: Place, path: str, values: np.ndarray) -> None:
    """Writes a whole array, chunks of nothing but fill included: a chunk that is absent was removed."""
    for chunk, content in encoded(documents.document_at(place, path), values).items():
        place.write(f"{path}/{chunk}", content)


def encoded(document: Mapping, values: np.ndarray) -> dict[str, bytes]:
    """The files of a whole array by their names, as zarr writes them; those of nothing but fill, too."""
    memory: dict[str, Any] = {}
    array: Any = zarr.Array.from_dict(StorePath(MemoryStore(memory)), dict(document))
    array.with_config({"write_empty_chunks": True})[...] = values
    return {name: buffer.to_bytes() for name, buffer in memory.items()}


def publish(place: Place, paths: Sequence[str]) -> None:
    """Brings ancestors and root up to what their leaves publish: never to the shapes on disk."""
    document = documents.document_at(place, "")
    before = documents.members(document)
    leaves = {path for path, doc in before.items() if CELL_ATTR in doc.get("attributes", {})} | set(paths)
    below = {path: doc for path, doc in before.items() if leaves.isdisjoint([path, *_ancestors(path)])}
    _publish(place, document, below, leaves, over=document)


def republish(place: Place, paths: Sequence[str]) -> None:
    """Publishes these groups and no others, whatever was published before."""
    document = documents.document_at(place, "")
    _publish(place, document, {}, set(paths), over=document)


def retire(place: Place, gone: Collection[str], stay: Collection[str]) -> None:
    """Publishes the groups that stay, then removes those that go, and what was above them alone."""
    republish(place, sorted(stay))
    kept = {ancestor for path in stay for ancestor in [*_ancestors(path), path]}
    for path in gone:
        place.remove(next(above for above in [*_ancestors(path), path] if above not in kept))


def _publish(place: Place, document: dict, below: dict[str, dict], leaves: set[str], over: dict | None) -> None:
    there = documents.read_all(place, sorted(leaves), strict=True)
    for path in sorted(leaves):
        if leaf := leaf_of(place, path, there.get(path)):
            below[path] = documents.group_document(leaf.attrs)
            below |= {f"{path}/{name}": array for name, array in leaf.arrays.items()}
    for ancestor in sorted({a for path in leaves for a in _ancestors(path)}, reverse=True):
        attrs = (documents.read_document(place, ancestor) or documents.group_document({}))["attributes"]
        inner = {path[len(ancestor) + 1 :]: doc for path, doc in below.items() if path.startswith(f"{ancestor}/")}
        below[ancestor] = documents.group_document(attrs)
        documents.write_document(place, ancestor, documents.group_document(attrs, inner))
    documents.write_document(place, "", documents.group_document(document["attributes"], below), over=over)


def _ancestors(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[:n]) for n in range(1, len(names))]


def folders(paths: Sequence[str]) -> list[str]:
    """The folders whose documents a prepare of these groups may write; "" is the root."""
    return ["", *(p for path in paths for p in [*_ancestors(path), path])]
