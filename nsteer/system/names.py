"""Turns labels and places into names: of a model's folder, on every system, and of a chunk's file."""

from __future__ import annotations

import re
from collections.abc import Sequence

from nsteer.errors import StoreError

# Lower case: zarr 3.1 loses the arrays of sibling groups whose names differ only in case.
COMPONENT = re.compile(r"[a-z0-9][a-z0-9._-]*")


def slug(label: str) -> str:
    """The path component of a model: 'Org/Name-2B' -> 'org--name-2b'.

    Raises StoreError for a label that can not be a file name on every system.
    """
    component = label.replace("/", "--").lower() if isinstance(label, str) else ""
    if not COMPONENT.fullmatch(component) or ".." in component or len(component) > 200:
        raise StoreError(
            f"{label!r} can not name a group of the store: use letters, digits, '.', '_', '-' and '/', "
            "beginning with a letter or digit, at most 200 characters"
        )
    return component


def chunk_name(index: Sequence[int]) -> str:
    """(0, 3, 0) -> 'c.0.3.0'."""
    return ".".join(map(str, ("c", *index)))


def chunk_index(key: str) -> tuple[int, ...] | None:
    """'c.0.3.0' -> (0, 3, 0); None for what is no chunk, such as the remains of a killed write."""
    head, *numbers = key.split(".")
    return tuple(map(int, numbers)) if head == "c" and numbers and all(map(str.isdecimal, numbers)) else None
