"""Turns JSON data into a fingerprint: equal data give the same number, other data another."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

DIGITS = 13
"""Hex digits kept: 52 bits, which a float64 holds exactly, so a fingerprint survives every xarray operation."""


def fingerprint(value: Any) -> int:
    """The first 52 bits of the SHA-256 of the canonical JSON of `value`.

    The order of keys is irrelevant, a tuple is a list; 1, 1.0 and True are three values.
    Raises TypeError on what is not JSON data: other types, NaN, infinities, keys that are not text.
    """
    if not _surely_json(value):
        _check_json(value, "value")
    return int(hashlib.sha256(_CANONICAL(value).encode()).hexdigest()[:DIGITS], 16)


_CANONICAL = json.JSONEncoder(sort_keys=True, allow_nan=False, separators=(",", ":")).encode


def _surely_json(value: Any) -> bool:
    """Whether a value is JSON data for sure: quick, since a plan may have 100,000 cells. `_check_json` says why not."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str and _surely_json(item) for key, item in value.items())
    if kind is list or kind is tuple:
        return all(map(_surely_json, value))
    return kind is str or kind is int or kind is bool or value is None or (kind is float and math.isfinite(value))


def _check_json(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not text, so it can not be fingerprinted")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{where}: {value} is not a number that can be fingerprinted")
    elif value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where}: {type(value).__name__} is not JSON data, so it can not be fingerprinted")
