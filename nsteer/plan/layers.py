"""Turns what a plan says of layers into block indices of one model.

A layer is the 0-based index of a decoder block; its residual stream is the block's output (`resid_post`).
Depth is `layer / n_layers`. A depth fraction f names block floor(f * n_layers), at most the last one: so 0.5
is `n_layers // 2`, as in the protocol of Jeong 2026.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FORMS = 'an index (5, -1), a depth fraction (0.5), "all", a half-open range ("2:6", "0.25:0.75") or a list of these'


def problem_of(spec: Any) -> str:
    """Why `spec` is no layer specification, or '' when it is one (whatever the model)."""
    if isinstance(spec, list):
        if not spec:
            return "an empty list"
        return next((why for why in map(problem_of, spec) if why), "")
    if isinstance(spec, bool) or spec is None or isinstance(spec, Mapping):
        return {True: "true", False: "false", None: "nothing"}[spec] if not isinstance(spec, Mapping) else "a mapping"
    if isinstance(spec, float):
        return "" if 0 <= spec <= 1 else f"the depth {spec}"
    if isinstance(spec, int) or spec == "all":
        return ""
    return "" if isinstance(spec, str) and _range(spec) else repr(spec)


def spoken(text: str) -> Any:
    """A layer specification as it is typed on a command line: `5`, `-1`, `0.5`, `all`, `2:6`, `3-5` (both), `1,4-6`.

    Raises LookupError for anything else.
    """
    items = [_spoken(item.strip()) for item in text.split(",")]
    spec = items[0] if len(items) == 1 else items
    if why := problem_of(spec):
        raise LookupError(f"{why} is no layer: expected {FORMS}")
    return spec


def _spoken(item: str) -> Any:
    first, dash, last = item.partition("-")
    if dash and first.isdecimal() and last.isdecimal():
        return f"{int(first)}:{int(last) + 1}"
    for kind in (int, float):
        try:
            return kind(item)
        except ValueError:
            continue
    return item


def resolve(spec: Any, n_layers: int) -> tuple[int, ...]:
    """The block indices that `spec` names in a model of `n_layers` blocks, ascending.

    Raises LookupError with what was found when a layer is out of range, named twice, or the range is empty.
    """
    if isinstance(spec, list):
        named = [layer for item in spec for layer in resolve(item, n_layers)]
        twice = sorted({layer for layer in named if named.count(layer) > 1})
        if twice:
            raise LookupError(f"layer {twice[0]} named twice (the model has {n_layers} layers)")
        return tuple(sorted(named))
    if spec == "all":
        return tuple(range(n_layers))
    if isinstance(spec, str):
        start, stop, step = _range(spec) or (0, 0, 1)
        if not all(-n_layers <= edge <= n_layers for edge in (start, stop) if isinstance(edge, int)):
            raise LookupError(f"{spec!r} of a model with {n_layers} layers (0 to {n_layers - 1})")
        indices = range(n_layers)[_edge(start, n_layers) : _edge(stop, n_layers) : step or 1]
        if not indices:
            raise LookupError(f"{spec!r}, which names no layer of {n_layers}")
        return tuple(indices)
    if isinstance(spec, float):
        return (at_depth(spec, n_layers),)
    if not -n_layers <= spec < n_layers:
        raise LookupError(f"layer {spec} of a model with {n_layers} layers (0 to {n_layers - 1})")
    return (spec % n_layers,)


def at_depth(depth: float, n_layers: int) -> int:
    """floor(depth * n_layers), at most the last block; 1e-9 forgives binary fractions (0.29 * 100)."""
    return min(math.floor(depth * n_layers + 1e-9), n_layers - 1)


def label(layers: tuple[int, ...], n_layers: int) -> str:
    """A set of layers as a label: `all`, `4`, `2:6` when they follow each other, else `1,3,5`."""
    if len(layers) == n_layers:
        return "all"
    if len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}:{layers[-1] + 1}"
    return ",".join(map(str, layers))


def _range(text: str) -> tuple[Any, Any, int | None] | None:
    bounds = text.split(":")
    if len(bounds) not in (2, 3):
        return None
    try:
        start, stop = (None if not p.strip() else float(p) if "." in p else int(p) for p in bounds[:2])
        step = int(bounds[2]) if len(bounds) == 3 and bounds[2].strip() else None
    except ValueError:
        return None
    depths = [edge for edge in (start, stop) if isinstance(edge, float)]
    if (step is not None and step < 1) or not all(0 <= depth <= 1 for depth in depths):
        return None
    return start, stop, step


def _edge(edge: Any, n_layers: int) -> int | None:
    return math.floor(edge * n_layers + 1e-9) if isinstance(edge, float) else edge
