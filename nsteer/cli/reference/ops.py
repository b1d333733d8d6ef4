"""Turns the docstrings of the ops into their page: op, formula, unit of strength, source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

from nsteer.program.ops import OPS

HEAD = """# Ops

Generated from the docstrings in `nsteer/program/ops.py` (`python -m nsteer.cli.reference`); a test holds it
true. What `op:` of `steer` and of `edits` does to the stream h at every position that is edited: v is the
vector, s the strength, m the reference mean. Under `steer` that is the mean of the method's neutral samples at the
edited layer, under `edits` the `reference`. Units of strength: `scale` in the [plan reference](plan.md).
"""

PARTS = ("Formula", "Strength", "Source")


def page() -> str:
    """The page of all ops, in Markdown."""
    return "\n".join([HEAD, *_lines()]) + "\n"


def op_words(op: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says under each of PARTS, and before them as `what`. Raises ValueError where one is missing."""
    lines = inspect.cleandoc(op.__doc__ or "").splitlines()
    found = {part: [line.split(": ", 1)[1] for line in lines if line.startswith(f"{part}: ")] for part in PARTS}
    if not all(len(one) == 1 for one in found.values()):
        raise ValueError(f"the docstring of {op.__name__} needs one line each of {', '.join(PARTS)}")
    start = next(i for i, line in enumerate(lines) if line.startswith("Formula: "))
    return {"what": " ".join(filter(None, lines[:start])), **{part: one[0] for part, one in found.items()}}


def _lines() -> Iterator[str]:
    yield "| op | formula | strength | source |\n|---|---|---|---|"
    for name, op in OPS.items():
        parts = op_words(op)
        yield f"| `{name}` | `{_cell(parts['Formula'])}` | {_cell(parts['Strength'])} | {_cell(parts['Source'])} |"
    for name, op in OPS.items():
        yield f"\n`{name}`: {op_words(op)['what']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
