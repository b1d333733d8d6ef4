"""Edits of the residual stream, as pure functions on tensors: stream, vector, amount -> change.

Each op takes `stream` [row, position, d_model] in float32, `vector` [row, d_model] and `amount` [row], and
returns the change to be added, [row, position, d_model]; where it acts is the caller's mask. Their source text
is embedded in compiled programs, so they use nothing but tensor methods (no matmul: exact under autocast).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def add(stream, vector, amount):
    """amount * vector, the same at every position."""
    return (amount[:, None] * vector)[:, None, :].expand_as(stream)


def project_out(stream, vector, amount):
    """Removes the fraction `amount` of the projection on `vector` (length 1): -amount (h·v) v."""
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return -amount[:, None, None] * projection * vector[:, None, :]


def clamp(stream, vector, amount):
    """Sets the projection on `vector` (length 1) to `amount`: (amount - h·v) v."""
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return (amount[:, None, None] - projection) * vector[:, None, :]


OPS: dict[str, Callable[[Any, Any, Any], Any]] = {"add": add, "project_out": project_out, "clamp": clamp}

DIRECTIONAL = ("project_out", "clamp")
"""Ops that use only the direction of a vector: they get it at length 1, whatever the scale."""

UNSCALED = ("project_out",)
"""Ops whose strength is a fraction and has no unit."""
