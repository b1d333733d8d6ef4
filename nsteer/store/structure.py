"""Turns declared groups into published structure, by renames that readers see whole or not at all.

Everything here runs under the lock of the store. A kill at any point leaves bytes beyond the published shapes,
which the next prepare overwrites; readers switch to the new structure in one rename for each document.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

import zarr

from nsteer import __version__
from nsteer.errors import StoreError, StoreVersionError
from nsteer.store import declare, documents
from nsteer.store.group import Group
from nsteer.store.leaf import CELL_ATTR, Leaf, read

MARK = "nsteer_store"  # the attribute of the root that holds the layout
LAYOUT = 1  # to be raised when an older nsteer could not read what is written


def check_root(root: Path) -> dict | None:
    """The root document, None where nothing is. StoreError for foreign data, StoreVersionError for another layout."""
    document = documents.read_document(root)
    if document is None:
        if root.exists() and not (root.is_dir() and all(_debris(entry) for entry in root.iterdir())):
            raise StoreError(f"{root} exists and is not an nsteer store; nothing was written. Name another path")
        return None
    found = document.get("attributes", {}).get(MARK)
    if found is None:
        raise StoreError(f"{root} is a zarr store, but not an nsteer store; nothing was written. Name another path")
    if found != LAYOUT:
        raise StoreVersionError(
            f"{root}: store layout {found}, this nsteer reads layout {LAYOUT}; "
            "upgrade nsteer (pip install -U nsteer), or name another store"
        )
    return document


def _debris(entry: Path) -> bool:
    return entry.name.startswith("zarr.") and entry.name.endswith(".partial")


def make_root(root: Path) -> None:
    """An empty, consolidated root, so that no reader ever lists a half-made store."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    attrs = {
        MARK: LAYOUT,
        "creation_library": "nsteer",
        "creation_library_version": __version__,
        "created_at": now,
        "Conventions": "nsteer-1",
    }
    documents.write_document(root, documents.group_document(attrs))


def examine(root: Path, groups: Sequence[Group], leaves: Sequence[Leaf | None]) -> None:
    """Raises StoreError for the first group that the store could not hold, before anything is written."""
    present = documents.members(documents.read_document(root))
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
        declare.union(leaf, group)


def grow(root: Path, group: Group, leaf: Leaf | None) -> None:
    """Creates the group or appends its new labels, and publishes it, its ancestors and the root excepted.

    `leaf` is the group as published, None where it is new.
    """
    if leaf:
        declare.check_same(leaf, group)
    labels = declare.union(leaf, group)
    arrays = declare.array_documents(leaf, group, labels)
    contents = {**declare.new_labels(leaf, labels), **declare.new_auxiliary(leaf, group, labels)}
    folder = root / group.path
    for ancestor in _ancestors(group.path):
        if documents.read_document(root / ancestor) is None:
            documents.write_document(root / ancestor, documents.group_document({}))
    if leaf is None:
        documents.write_document(folder, documents.group_document({}))  # readers see it empty, not half made
    for name, document in arrays.items():
        documents.write_document(folder / name, document)
    for name, values in contents.items():
        zarr.open_array(str(folder / name), mode="r+")[...] = values
    documents.write_document(folder, documents.group_document(declare.attributes(leaf, group), arrays))


def publish(root: Path, paths: Sequence[str]) -> None:
    """Brings ancestors and root up to what their leaves publish: never to the shapes on disk."""
    document = documents.document_at(root)
    before = documents.members(document)
    leaves = {path for path, doc in before.items() if CELL_ATTR in doc.get("attributes", {})} | set(paths)
    below = {path: doc for path, doc in before.items() if not any(_within(path, leaf) for leaf in leaves)}
    for path in sorted(leaves):
        if leaf := read(root, path):
            below[path] = documents.group_document(leaf.attrs)
            below |= {f"{path}/{name}": array for name, array in leaf.arrays.items()}
    for ancestor in sorted({a for path in leaves for a in _ancestors(path)}, reverse=True):
        attrs = (documents.read_document(root / ancestor) or documents.group_document({}))["attributes"]
        inner = {path[len(ancestor) + 1 :]: doc for path, doc in below.items() if path.startswith(f"{ancestor}/")}
        below[ancestor] = documents.group_document(attrs)
        documents.write_document(root / ancestor, documents.group_document(attrs, inner))
    documents.write_document(root, documents.group_document(document["attributes"], below))


def _within(path: str, leaf: str) -> bool:
    return path == leaf or path.startswith(f"{leaf}/")


def _ancestors(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def folders(root: Path, paths: Sequence[str]) -> list[Path]:
    """The folders whose documents a prepare of these groups may write."""
    return [root, *(root / p for path in paths for p in [*_ancestors(path), path])]
