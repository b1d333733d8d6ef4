"""Edits of the residual stream, as pure functions on tensors: stream, vector, amount -> change.

Each op takes `stream` [row, position, d_model] in float32, `vector` [row, d_model] and `amount` [row]; those named in
REFERENCED also `reference` [row], the projection of the reference mean on `vector`. It returns the change to be added,
[row, position, d_model]; where it acts is the caller's mask. Their code is embedded in compiled programs, so
they use nothing but tensor methods (no matmul: exact under autocast). In formulas h is the stream at a position, v the
vector, s the strength, m the reference mean. `docs/ops.md` is made from `Formula:`, `Strength:`, `Citation:` below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def add(stream, vector, amount):
    """The vector is added, the same at every position.

    Formula: h + s v
    Strength: multiples of the vector in the unit of `scale`
    Citation: Turner et al. 2023, activation addition; Rimsky et al. 2023, contrastive activation addition
    """
    return (amount[:, None] * vector)[:, None, :].expand_as(stream)


def project_out(stream, vector, amount):
    """The projection on the vector is removed, or a fraction of it (directional ablation).

    Formula: h - s (h·v) v, |v| = 1
    Strength: the fraction removed: 1 is all of it, 0.5 half (no `scale`)
    Citation: Arditi et al. 2024, refusal is mediated by a single direction
    """
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return -amount[:, None, None] * projection * vector[:, None, :]


def clamp(stream, vector, amount):
    """The projection on the vector is set to a value; at strength 0 it is removed.

    Formula: h + (s - h·v) v, |v| = 1
    Strength: the projection it is set to, in the unit of `scale`
    Citation: Templeton et al. 2024, scaling monosemanticity (features clamped to a value)
    """
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return (amount[:, None, None] - projection) * vector[:, None, :]


def set_mean(stream, vector, amount, reference):
    """The projection on the vector is moved to that of the reference mean (mean ablation of one direction).

    Formula: h + s (m·v - h·v) v, |v| = 1
    Strength: the fraction of the way: 1 is all of it (no `scale`)
    Citation: Wang et al. 2022, interpretability in the wild (mean ablation), here of one direction
    """
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return amount[:, None, None] * (reference[:, None, None] - projection) * vector[:, None, :]


def affine(stream, vector, amount, reference):
    """Ablates and adds: the projection is set to that of the reference mean plus a value (affine concept editing).

    Formula: h - (h·v) v + (m·v) v + s v, |v| = 1
    Strength: distance from the reference mean along the vector, in the unit of `scale`; 0 is `set_mean` at 1
    Citation: Marshall, Scherlis and Belrose 2024, refusal in LLMs is an affine function
    """
    projection = (stream * vector[:, None, :]).sum(-1, keepdim=True)
    return ((reference + amount)[:, None, None] - projection) * vector[:, None, :]


def rotate(stream, vector, amount):
    """Turns the stream towards the vector, its length kept, in their plane; it stops there, or opposite the vector.

    Where the stream is (anti)parallel to the vector within 1e-5 of its length there is no plane: nothing changes there.

    Formula: |h| (cos(φ - s) v + sin(φ - s) u), φ the angle of h and v, u = h - (h·v) v at length 1, φ - s in [0°, 180°]
    Strength: an angle in degrees, below 0 away from the vector (no `scale`)
    Citation: Vu and Nguyen 2025, angular steering; here in the plane of h and v, so that no second direction is chosen
    """
    unit = vector[:, None, :]
    along = (stream * unit).sum(-1, keepdim=True)
    across = stream - along * unit
    length = across.norm(dim=-1, keepdim=True)
    angle, opposite = length.atan2(along), (-length).atan2(-along)
    turn = amount.deg2rad()[:, None, None].expand_as(angle).minimum(angle).maximum(opposite)
    new_along = along * turn.cos() + length * turn.sin()
    new_length = length * turn.cos() - along * turn.sin()
    change = (new_along - along) * unit + (new_length / length - 1) * across
    return change.masked_fill(length <= 1e-5 * stream.norm(dim=-1, keepdim=True), 0.0)


OPS: dict[str, Callable[..., Any]] = {
    "add": add,
    "project_out": project_out,
    "clamp": clamp,
    "set_mean": set_mean,
    "affine": affine,
    "rotate": rotate,
}

DIRECTIONAL = ("project_out", "clamp", "set_mean", "affine", "rotate")
"""Ops that use only the direction of a vector: they get it at length 1, whatever the scale."""

UNSCALED = {
    "project_out": "the fraction removed",
    "set_mean": "the fraction of the way to the reference",
    "rotate": "an angle in degrees",
}
"""Ops whose strength takes no unit from `scale`, and what it is."""

MAX_STRENGTH = {"project_out": 1.0, "set_mean": 1.0, "rotate": 180.0}
"""Ops whose strength has an end, and where it is."""

REFERENCED = ("set_mean", "affine")
"""Ops that need a reference mean."""

ACTING_AT_ZERO = ("clamp", "affine")
"""Ops that change a stream at strength 0 too."""

SCALES = ("raw", "unit", "stream_norm", "reference_norm")
"""Units of strength; what they mean stands at `scale` in docs/plan.md."""


def in_unit(op: str, scale: str, unit: Any, length: float, strength: float, reference: float | None = None) -> Any:
    """A direction `unit` [d_model] of length 1 and a strength in the unit of `scale`, as the vector and amount of `op`.

    length : of the vector as its method left it. reference : mean norm of the neutral samples' streams (reference_norm)
    Ops that use a direction alone get it at length 1 and the unit in their amount; `add` under `raw` gets the
    vector as the method left it. Under `stream_norm` the amount is still to be multiplied by the live norm.
    """
    if op in UNSCALED or scale in ("unit", "stream_norm"):
        return unit, float(strength)
    if scale == "reference_norm":
        assert reference is not None
        return unit, float(strength) * reference
    return (unit, float(strength) * length) if op in DIRECTIONAL else (unit * length, float(strength))


OVERFLOWS = "the edited stream is not finite"
MISSING = "has missing values (NaN) or infinite ones"
"""What is said where an edit can not be made because something of it is no number."""


def not_finite(reason: str) -> bool:
    """Whether an edit failed because its stream, its vector or what it is measured by is not finite."""
    return OVERFLOWS in reason or MISSING in reason


def receipt_problem(receipt: Any, conditional: bool = False) -> str:
    """What is wrong with a text's receipts [edit, 4], an array as `kernel.edit` gives; empty where nothing is.

    conditional : an edit may find its condition nowhere, and touch nothing
    """
    if not (abs(receipt) < float("inf")).all():
        return f"{OVERFLOWS}: its strength is too much for the model's dtype"
    untouched = receipt[:, 0] == 0
    if untouched.any() and not conditional:
        return "the edit touched no position"
    if (receipt[~untouched, 1] == 0).any():
        return "the edit changed nothing: its strength is lost in the rounding of the stream, or its vector is 0"
    return ""
