"""Refuses to make room for what a document declares and the files beside it can not hold, before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def values(place: Place, path: str, document: Mapping[str, Any], count: int, share: int = 1) -> None:
    """Raises RoomError for more values of an array, read at once, than its files hold a part of or the machine has
    room for.

    path : of the array; share : into how many arrays what may be read without a question is divided
    """
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
    if count > MANY and count > 2 * (found := len(place.names(path))):
        raise StoreError(
            f"{place.name}/{path} is damaged: it declares {count:,} files and has {found:,}; see nsteer verify"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
