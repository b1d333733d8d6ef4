"""Turns the docstrings of the ops into their page: op, formula, unit of strength, citation."""

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

FIELDS = ("Formula", "Strength", "Citation")


def page() -> str:
    """The page of all ops, in Markdown."""
    return "\n".join([HEAD, *_lines()]) + "\n"


def op_words(op: Callable[..., Any]) -> dict[str, str]:
    """What a docstring says under each of FIELDS, and before them as `what`. Raises ValueError where one is missing."""
    lines = inspect.cleandoc(op.__doc__ or "").splitlines()
    lines_by_name = {
        name: [line.split(": ", 1)[1] for line in lines if line.startswith(f"{name}: ")] for name in FIELDS
    }
    if not all(len(lines) == 1 for lines in lines_by_name.values()):
        raise ValueError(f"the docstring of {op.__name__} needs one line each of {', '.join(FIELDS)}")
    start = next(i for i, line in enumerate(lines) if line.startswith("Formula: "))
    return {"what": " ".join(filter(None, lines[:start])), **{name: lines[0] for name, lines in lines_by_name.items()}}


def _lines() -> Iterator[str]:
    yield "| op | formula | strength | citation |\n|---|---|---|---|"
    for name, op in OPS.items():
        said = op_words(op)
        yield f"| `{name}` | `{_cell(said['Formula'])}` | {_cell(said['Strength'])} | {_cell(said['Citation'])} |"
    for name, op in OPS.items():
        yield f"\n`{name}`: {op_words(op)['what']}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
