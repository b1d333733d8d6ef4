"""What a file of steering vectors holds, and which block each of its layers is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError, printable
from nsteer.science.axis import AXES, EMOTION

OFFSETS = {"block-index": 0, "hidden-states": -1, "one-based": -1}
"""Convention of layer numbers -> what is added to a number to give the index of the block whose output it is."""

CONVENTIONS = {
    "block-index": "N is the output of block N, counted from 0 (nsteer, repeng, llama.cpp, EasySteer, lm-eval)",
    "hidden-states": "N is transformers' hidden_states[N]: 0 the embeddings, N the output of block N - 1 "
    "(persona vectors)",
    "one-based": "N is the output of block N - 1, the first block being 1",
}
"""Convention of layer numbers -> what it says, and whose it is."""

METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Labels of methods, as plans write them."""

LONGEST = 200
"""Characters of an emotion's label."""

Layers = Mapping[int, np.ndarray]
"""Layer -> vector [d_model] float32."""


@dataclass(frozen=True)
class Contents:
    """A file as read: vectors whose layers the file itself defines, or arrays whose meaning it leaves open.

    kind : what sort of file it is. vectors : (method, emotion) -> Layers under the file's own numbers, "" where it
    names none. arrays : names, outermost first -> an array; empty where there are `vectors`
    layers_are : the convention that the file itself states, "" where it states none. about : what else it tells
    """

    kind: str
    vectors: Mapping[tuple[str, str], Layers] = field(default_factory=dict)
    layers_are: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[tuple[str, ...], np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Outgoing:
    """A vector on its way to a file, its layers block indices.

    vectors : as they are to be added: strength and unit are in them. units, amounts : the same as a direction of
    length 1 and a number by layer. about : where it comes from, as JSON data. axis : of its label `emotion`
    """

    method: str
    emotion: str
    vectors: Layers
    units: Layers
    amounts: Mapping[int, float]
    about: Mapping[str, Any]
    axis: str = EMOTION

    def told(self) -> dict[str, Any]:
        """Its labels and where it comes from, as files tell them."""
        return {"method": self.method, self.axis: self.emotion, **self.about}


def labels_of(about: Mapping[str, Any]) -> tuple[str, str]:
    """The labels (method, emotion) that a file tells of a vector, "" for one that it does not tell."""
    return str(about.get("method", "")), str(next((about[name] for name in AXES if name in about), ""))


def axis_of(about: Mapping[str, Any]) -> str:
    """The axis of the second label in what a file tells of its vectors, together or each by itself; "" where it has
    none."""
    each = about.get("vectors")
    told = [about.get("nsteer"), *(each.values() if isinstance(each, Mapping) else ())]
    return next((name for entry in told if isinstance(entry, Mapping) for name in AXES if name in entry), "")


def no_label(dim: str, text: str) -> str:
    """Why a text of a file is no label of a method or an emotion; "" when it is one."""
    if dim == "method":
        return "" if METHOD.fullmatch(text) else "expected letters, digits, '.', '_', '-', at most 64"
    fits = 0 < len(text) <= LONGEST and text == text.strip() and printable(text) == text and "\n" not in text
    return "" if fits else f"expected 1 to {LONGEST} characters that print, without spaces around them"


def blocks(layers: Layers, convention: str, n_layers: int) -> tuple[dict[int, np.ndarray], list[str]]:
    """Layers under the numbers of a file -> under block indices of a model with `n_layers`; and what is to be noted.

    Raises ExchangeError for numbers that the convention gives no block of the model.
    """
    if convention not in OFFSETS:
        raise ExchangeError(f"layers that are {convention!r}: expected one of {', '.join(OFFSETS)}")
    offset, notes = OFFSETS[convention], []
    vectors = {number + offset: vector for number, vector in layers.items()}
    if convention == "hidden-states":
        if vectors.pop(-1, None) is not None:
            notes.append("layer 0 of the file is the embeddings' output, of no block: left out")
        if n_layers - 1 in vectors:
            notes.append(
                f"layer {n_layers} of the file, read after the final norm if it is hidden_states[-1], "
                f"is kept as block {n_layers - 1}, which is edited before that norm"
            )
    lost = sorted(number - offset for number in vectors if not 0 <= number < n_layers)
    if lost:
        first, last = -offset, n_layers - 1 - offset
        raise ExchangeError(
            f"layer {lost[0]} of the file, under --layers-are {convention}: the model has {n_layers} blocks, "
            f"{first} to {last} in that count (another convention? {', '.join(OFFSETS)})"
        )
    if not vectors:
        raise ExchangeError("no layer of the file is a block of the model")
    return vectors, notes
