"""Turns the labels that a cell holds into one number, by which its record is held to them and not to its place alone.

A place tells a label only by what stands on the axis today: after an old copy was restored over a newer store, the
same place may belong to another label.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BITS = np.uint64(12)  # 52 are kept: a float64 holds them exactly


def labels_number(labels: Sequence) -> str:
    """13 hex digits of the labels of an axis: text, whole numbers and fractions are told apart."""
    return f"{_hash(list(labels)) >> 12:013x}"


def inner(structure: Mapping[str, Any], labels: Mapping[str, Sequence], cut: Mapping[str, int]) -> int:
    """A number for what every cell of a structure holds alike: its variables, and the labels of dims that are not cut.

    structure : the variables, and the sizes of the dims that do not make cells
    cut : data dims along which cells are cut -> labels of that dim in one cell
    """
    sizes = structure["sizes"]
    held = {dim: list(labels.get(dim, [])[:size]) for dim, size in sizes.items() if dim not in cut}
    return _hash([sorted(structure["variables"]), held])


def bound(
    common: int, sizes: Mapping[str, int], labels: Mapping[str, Sequence], cut: Mapping[str, int], positions: np.ndarray
) -> np.ndarray:
    """A number of 52 bits for the labels of each cell [cell].

    common : of `inner`; sizes : of its structure
    positions : of the cells on the cell axes, in the order of `cut` [cell, cell axis]
    """
    hashes = np.full(len(positions), common, np.uint64)
    for (dim, size), at in zip(cut.items(), positions.T, strict=True):
        held = labels[dim][: sizes.get(dim, len(labels[dim]))]
        asked = np.zeros(int(at.max(initial=-1)) + 1, bool)
        asked[at] = True
        numbers = np.zeros(len(asked), np.uint64)
        for place in np.flatnonzero(asked).tolist():  # each label once: groups may be large
            numbers[place] = _hash([dim, list(held[place * size : (place + 1) * size])])
        hashes = _mixed(hashes, numbers[at])
    return (hashes >> BITS).astype(np.int64)


def _hash(value: Any) -> int:
    """64 bits of JSON data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _mixed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """64 bits of two numbers in their order (the finalizer of splitmix64), array by array: groups may be large."""
    with np.errstate(over="ignore"):
        mixed = first * np.uint64(0x9E3779B97F4A7C15) + second
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
