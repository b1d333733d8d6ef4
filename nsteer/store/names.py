"""Turns plain values into the numbers and names under which the store knows them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any

from nsteer.errors import StoreError

COMPONENT = re.compile(
    r"[a-z0-9][a-z0-9._-]*"
)  # lower case: zarr 3.1 loses siblings that differ only in case


def fingerprint(value: Any) -> int:
    """The first 52 bits of sha256 over the canonical JSON of `value`: exact in a float64.

    The order of keys is irrelevant, a tuple is a list; 1, 1.0 and True are three values.
    Raises TypeError on what is not plain data: other types, NaN, infinities, keys that are not text.
    """
    _plain(value, "value")
    text = json.dumps(value, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16)


def _plain(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not text, so it can not be fingerprinted")
            _plain(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _plain(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where}: {value} is not a number that can be fingerprinted")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where}: {type(value).__name__} is not plain data, so it can not be fingerprinted")


def slug(label: str) -> str:
    """The path component of a model: 'Org/Name-2B' -> 'org--name-2b'.

    Raises StoreError for a label that can not be a file name on every system.
    """
    made = label.replace("/", "--").lower() if isinstance(label, str) else ""
    if not COMPONENT.fullmatch(made) or ".." in made or len(made) > 200:
        raise StoreError(
            f"{label!r} can not name a group of the store: use letters, digits, '.', '_', '-' and '/', "
            "beginning with a letter or digit, at most 200 characters"
        )
    return made
