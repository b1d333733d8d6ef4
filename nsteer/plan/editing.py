"""Turns an edit as a plan writes it, and its vectors, into what a program does with a row; says what it came to.

The one place for `steer`, its `also`, `edits`, their calibrations, `nsteer.steer` and the chat. It takes numbers, not
models or stores: whose vector, mean or norm it is, the caller knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nsteer.errors import EditError
from nsteer.plan import positions
from nsteer.plan.prompts import Encoded, norm_weights
from nsteer.plan.schema import Editing, Schedule, When
from nsteer.program.form import EditSite, RowEdit
from nsteer.program.ops import ACTING_AT_ZERO, MISSING, REFERENCED, UNSCALED, in_unit, receipt_problem


@dataclass(frozen=True)
class CompiledEdit:
    """An edit at one layer: vector [d_model], amount in the unit of its op, projection of the reference mean on the
    vector, and the gate [d_model] of its condition."""

    vector: np.ndarray
    amount: float
    reference: float = 0.0
    gate: np.ndarray | None = None


def site(layer: int, edit: Editing) -> EditSite:
    """Where an edit stands in the text of a program, and what decides that text."""
    when = edit.when
    gated = when is not None and (when.above is not None or when.below is not None)
    return EditSite(
        layer,
        edit.op,
        live=live(edit),
        paced=edit.schedule is not None or positions.bounded(edit.positions),
        gate=when.of if when is not None and gated else "",
        after=when is not None and when.after is not None,
        site=edit.site,
    )


def live(edit: Editing) -> bool:
    """Whether strengths are multiples of the stream's norm as it passes."""
    return edit.scale == "stream_norm" and edit.op not in UNSCALED


def needs_norm(edit: Editing) -> bool:
    """Whether strengths are multiples of the mean norm of reference streams."""
    return edit.scale == "reference_norm" and edit.op not in UNSCALED


def needs_mean(edit: Editing) -> bool:
    """Whether there is a reference mean."""
    return edit.op in REFERENCED


def acts(edit: Editing, strength: float) -> bool:
    """Whether an edit of this strength changes anything, by its op."""
    return strength != 0 or edit.op in ACTING_AT_ZERO


def finite(name: str, values: np.ndarray, layers: Sequence[int]) -> None:
    """Raises EditError for the first of these layers at which values [layer, ...] are not all numbers."""
    for layer, value in zip(layers, values, strict=True):
        if not np.isfinite(value).all():
            raise EditError(f"the {name} {MISSING} at layer {layer}")


def compiled_edit(
    edit: Editing,
    layer: int,
    vector: np.ndarray,
    strength: float,
    *,
    along: np.ndarray | None = None,
    norm: float | None = None,
    mean: np.ndarray | None = None,
    gate: np.ndarray | None = None,
) -> CompiledEdit:
    """An edit at one layer.

    vector : [d_model], as its method left it; along : of a control, the vector whose direction it takes at that length
    norm, mean : of the reference streams, where the scale or the op has one; gate : the vector's own when left out
    Raises EditError for a vector that is 0, and for what is not a number.
    """
    known = {"vector": vector, "control's vector": along, "reference mean": mean, "gate": gate, "reference norm": norm}
    for name, values in known.items():
        if values is None:
            continue
        finite(name, np.asarray(values)[None], [layer])
        if name in ("vector", "control's vector", "gate") and not np.any(values):
            raise EditError(f"the {name} is 0 at layer {layer}")
    length = float(np.linalg.norm(vector))
    other = vector if along is None else along
    unit = other / max(length if along is None else float(np.linalg.norm(along)), 1e-12)
    own, amount = in_unit(edit.op, edit.scale, unit, length, strength, norm)
    return CompiledEdit(own, amount, float(mean @ own) if mean is not None else 0.0, vector if gate is None else gate)


def row_edit(edit: Editing, compiled: CompiledEdit, prompt: Encoded, new: int, after: tuple[int, ...] = ()) -> RowEdit:
    """What an edit does to a row: where it acts, what its live norm is taken over, and what decides while the program
    runs whether and how much it acts.

    new : most tokens that are generated; after : the ids of the tokens that its condition names
    """
    where = edit.positions
    touched = prompt.mask(where)
    edit_of_row = RowEdit(
        compiled.vector,
        compiled.amount,
        touched,
        positions.written(where),
        norm_weights(len(touched), edit.norm_skip),
        compiled.reference,
        steps=positions.of_generated(where, new) if positions.bounded(where) else None,
    )
    if edit.when is not None:
        assert compiled.gate is not None
        edit_of_row = _under(edit_of_row, edit.when, prompt.tokens, after, compiled.gate)
    return edit_of_row if edit.schedule is None else _paced(edit_of_row, edit.schedule, new)


def _under(edit: RowEdit, when: When, tokens: Sequence[int], after: tuple[int, ...], gate: np.ndarray) -> RowEdit:
    low = -np.inf if when.above is None else when.above
    high = np.inf if when.below is None else when.below
    length = max(float(np.linalg.norm(gate)), 1e-12)
    edit = replace(edit, gate=gate / length, low=low, high=high, after=after)
    if when.after is None:
        return edit
    return replace(edit, prompt=edit.prompt & np.isin(np.array([-1, *tokens[:-1]]), after))


def _paced(edit: RowEdit, schedule: Schedule, new: int) -> RowEdit:
    token = np.arange(new)
    factor = np.ones(new)
    if schedule.linear is not None:
        factor = np.maximum(0.0, 1 - token / schedule.linear)
    elif schedule.half_life is not None:
        factor = 0.5 ** (token / schedule.half_life)
    steps = np.full(new, edit.generated) if edit.steps is None else edit.steps
    steps = steps & (token < (new if schedule.first is None else schedule.first))
    return replace(edit, steps=steps, factor=factor)


def check(
    edit: Editing,
    strengths: Sequence[float],
    layers: Sequence[int],
    receipts: np.ndarray,
    names: Sequence[str],
    wrote: Sequence[bool],
) -> None:
    """Raises EditError where an edit did not do to every text what it should have: an edit that did nothing, or too
    much, is no result.

    strengths : one a text; layers : of its sites; receipts : [text, site, 4], as of `kernel.edit`
    names : of the texts, to be named in the error
    wrote : whether tokens that a text generated were read again: else an edit of such tokens has nothing to touch
    Texts may have none of positions that are counted or sought, and no place where a condition holds; where no text has
    any of the positions, that is an error.
    """
    misses = edit.when is not None or positions.may_miss(edit.positions)
    for name, strength, text, later in zip(names, strengths, receipts, wrote, strict=True):
        if not acts(edit, strength) or not (later or positions.prompted(edit.positions)):
            continue
        for layer, value in zip(layers, text, strict=True):
            if why := receipt_problem(value[None], misses):
                raise EditError(f"layer {layer}{f', {name}' if name else ''}: {why}")
    if edit.when is None and misses and not receipts[..., 0].any():
        raise EditError("no prompt has any of the positions: nothing was touched")
