"""Refuses to make room for what a document declares and the files beside it can not hold, before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nsteer.errors import RoomError, StoreError
from nsteer.store import schema
from nsteer.store.places import Place
from nsteer.system.machine import free_memory

PLENTY = 2**30
"""Bytes of a group that are read at once without a question."""

TIMES = 64
"""How many times more than its files hold an array may take: of a large grid, one cell in so many is done."""

MANY = 4096
"""Files of one array that are asked for by name without a look at how many there are."""

MAX_FILES = 8192
"""Of a cell: each takes some 0.4 ms to write, and one to read."""


def cell(place: Place, path: str, arrays: Mapping[str, Any], names: Iterable[str], cut: Mapping[str, int]) -> None:
    """Raises RoomError for cells that would be cut into a great many files, before one is written.

    arrays : documents of a group; names : its variables; cut : data dims along which cells are cut -> labels in a cell

    Files are as large as the group was when it was begun: one of 1 seed, grown to 20,000, has a file a seed.
    """
    counts = {name: _files(arrays[name], cut) for name in names}
    if sum(counts.values()) > MAX_FILES:
        name, total = max(counts, key=counts.__getitem__), sum(counts.values())
        raise RoomError(
            f"{place.name}: a cell of {path!r} would be {total:,} files, most of them of {name!r}, since "
            f"the group was begun with fewer labels; at most {MAX_FILES:,} are written. Name another store, or delete "
            f"the folder {path!r} in this one to compute it again"
        )


def _files(document: Mapping[str, Any], cut: Mapping[str, int]) -> int:
    """Files of one array that hold a cell."""
    each = document["chunk_grid"]["configuration"]["chunk_shape"]
    sizes = [cut.get(dim, size) for dim, size in zip(document["dimension_names"], document["shape"], strict=True)]
    return math.prod(-(-size // n) for size, n in zip(sizes, each, strict=True))


def values(
    place: Place, path: str, document: Mapping[str, Any], count: int, share: int = 1, files: int | None = None
) -> None:
    """Raises RoomError for more values of an array, read at once, than its files hold a part of or the machine has
    room for.

    path : of the array; share : into how many arrays what may be read without a question is divided
    files : from how many files they come, where one may hold few of them
    """
    if files is not None and files > MANY and files > TIMES * (n_files := len(place.names(path))):
        raise RoomError(
            f"{place.name}/{path}: {files:,} files are asked for, and it has {n_files:,}; ask for a part of it, or see "
            "nsteer verify"
        )
    size = schema.TYPES[document["data_type"]]
    wanted = count * size
    if wanted <= PLENTY // share:
        return
    chunk = size * math.prod(document["chunk_grid"]["configuration"]["chunk_shape"])
    if wanted > TIMES * chunk * len(place.names(path)):
        raise RoomError(
            f"{place.name}/{path}: {_gib(wanted)} are asked for, more than {TIMES} times what its files can hold; "
            "ask for a part of it, or see nsteer verify"
        )
    if wanted > (free := free_memory()):
        raise RoomError(
            f"{place.name}/{path}: {_gib(wanted)} are asked for, {_gib(free)} of memory are free; ask for a part of it"
        )


def files(place: Place, path: str, count: int) -> None:
    """Raises StoreError where an array should have many more files than there are."""
    if count > MANY and count > 2 * (n_files := len(place.names(path))):
        raise StoreError(
            f"{place.name}/{path} is damaged: it declares {count:,} files and has {n_files:,}; see nsteer verify"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
