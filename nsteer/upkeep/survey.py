"""Turns a store as it lies into the files that it must hold, by group and cell, and what lies there besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nsteer.errors import StoreError
from nsteer.store import Store
from nsteer.store.chunks import whole_chunks
from nsteer.store.documents import FILE, file_of, members, parse, read_document
from nsteer.store.leaf import CELL_ATTR, Leaf, leaf_of
from nsteer.store.places import PARTIAL, Place
from nsteer.store.records import kept_file
from nsteer.system.names import chunk_index

LEFTOVERS = {
    "temporary": "a write that was killed",
    "orphan": "a chunk of no finished cell",
    "unpublished": "structure that a killed process did not publish",
    "unknown": "not nsteer's; left alone",
}


@dataclass(frozen=True)
class Leftover:
    """A file that no finished cell and no published structure needs; harmless.

    stamp : of it as it was seen
    group : whose array it lies in, "" for none
    """

    kind: str
    name: str
    bytes: int
    stamp: int
    group: str


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


def ancestors(path: str) -> list[str]:
    """The groups above a path, the root left out."""
    names = path.split("/")
    return ["/".join(names[:n]) for n in range(1, len(names))]


def needed_files(leaf: Leaf) -> set[str]:
    """Every file that a group needs besides those of its cells: documents, labels, auxiliary arrays."""
    files = {file_of(path) for path in [*ancestors(leaf.path), leaf.path]} | {kept_file(leaf.path)}
    files |= {file_of(f"{leaf.path}/{name}") for name in leaf.arrays}
    return files | {chunk.name for name in [*leaf.dims, *leaf.auxiliary] for chunk in whole_chunks(leaf, name)}


def leftovers(store: Store, leaves: Mapping[str, Leaf], owned: set[str], files: Mapping[str, int]) -> list[Leftover]:
    """What lies in a store, of all its files, and is neither structure nor part of a finished cell."""
    candidates = [(name, size) for name, size in files.items() if name not in owned and name != FILE]
    stamps = store.place.stamps([name for name, _ in candidates])
    leftover_files = [
        Leftover(_kind(leaves, name), name, size, at, group if (group := _folder(name)) in leaves else "")
        for (name, size), at in zip(candidates, stamps, strict=True)
    ]
    return sorted(
        (leftover for leftover in leftover_files if leftover.stamp), key=lambda leftover: (leftover.kind, leftover.name)
    )


def _folder(name: str) -> str:
    """The group of an array's file."""
    return name.rpartition("/")[0].rpartition("/")[0]


def _kind(leaves: Mapping[str, Leaf], name: str) -> str:
    if name.endswith(PARTIAL):
        return "temporary"
    folder, _, file = name.rpartition("/")
    path, _, array = folder.rpartition("/")
    if path in leaves and array in leaves[path].arrays:
        return "orphan" if chunk_index(file) else "unknown"
    return "unpublished" if file == FILE or chunk_index(file) else "unknown"
