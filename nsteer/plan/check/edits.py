"""Checks of `edits`: directions that there are, at layers where they are known."""

from __future__ import annotations

from nsteer.plan import layers
from nsteer.plan.check import fields
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import derived_for, directions_of
from nsteer.plan.reader import Path
from nsteer.plan.schema import Calibrated, Edit, Plan
from nsteer.program.ops import REFERENCED


def all_edits(check: Checker, plan: Plan, sound: set[str]) -> None:
    """Each edit of each condition. `sound` are the directions that can be worked out."""
    if "none" in plan.edits:
        check.add(
            ("edits", "none"), "a condition called 'none'", "another name", "none is the unedited condition", True
        )
    for name, edits in plan.edits.items():
        for i, edit in enumerate(edits):
            _edit(check, plan, ("edits", name, i), edit, sound)
        _swept(check, name, edits)
    _continued(check, plan)


def _edit(check: Checker, plan: Plan, path: Path, edit: Edit, sound: set[str]) -> None:
    _direction(check, (*path, "direction"), edit.direction)
    if set(directions_of(edit)) <= sound:
        _within_derived(check, plan, path, edit)
    _reference(check, plan, path, edit)
    if edit.when is not None and edit.when.direction is not None:
        _direction(check, (*path, "when", "direction"), edit.when.direction)
    generated = plan.generate.max_new_tokens if plan.generate else 0
    new = generated if check.given(plan, "generate") else None
    fields.edit(check, path, edit, plan.prompts, plan.chat, new)


def _swept(check: Checker, name: str, edits: list[Edit]) -> None:
    """The strengths over which a condition goes: one list, whichever of its edits have it."""
    listed = [(i, edit.strength) for i, edit in enumerate(edits) if not isinstance(edit.strength, float | int)]
    for i, strengths in listed:
        path: Path = ("edits", name, i, "strength")
        fields.strengths(check, path, strengths, edits[i])
        if isinstance(strengths, Calibrated) and "random" in strengths.model_fields_set:
            check.add((*path, "random"), strengths.random, "nothing", "conditions of `edits` have no random control")
        if strengths != listed[0][1] and not (
            check.fails(*path) or check.fails("edits", name, listed[0][0], "strength")
        ):
            expected = f"the strengths of edits.{name}[{listed[0][0]}], with which they are swept together"
            check.add(path, "other strengths", expected, "the same list, one number, or a condition of its own")


def _continued(check: Checker, plan: Plan) -> None:
    """Seeds and projections of texts that are written."""
    for name, value in (("seeds", plan.seeds), ("project", plan.project)):
        if check.node((name,)) is not None and value and not check.given(plan, "generate"):
            check.add((name,), str(value), "it beside `generate`", "generate: {max_new_tokens: 50}")
    if plan.generate is not None:
        fields.seeds(check, (), plan.generate, plan.seeds)
    if plan.project and not (check.given(plan, "methods") or check.given(plan, "directions")):
        check.add(("project",), "true", "it beside `methods` or `directions`, whose vectors it is on")


def _direction(check: Checker, path: Path, name: str) -> None:
    if not check.fails("directions"):
        check.known(path, name, check.names("directions"), "a name in `directions`")


def _reference(check: Checker, plan: Plan, path: Path, edit: Edit) -> None:
    """The reference mean of an edit: there where its op needs one, and nowhere else."""
    place = (*path, "reference")
    if edit.op not in REFERENCED:
        if edit.reference is not None and not check.fails(*path, "op"):
            check.add(place, repr(edit.reference), f"no reference with {edit.op}", f"{', '.join(REFERENCED)} have one")
    elif edit.reference is None:
        hint = "directions: {usual: {mean: {texts: [...]}}}, and reference: usual"
        check.add(path, f"{edit.op} without a `reference`", "a name in `directions`", hint)
    elif not check.fails("directions"):
        named = check.known(place, edit.reference, check.names("directions"), "a name in `directions`")
        if named and edit.reference in plan.directions and plan.directions[edit.reference].mean is None:
            check.add(place, f"{edit.reference!r}, which is no mean", "a direction with `mean`")


def _within_derived(check: Checker, plan: Plan, path: Path, edit: Edit) -> None:
    """Where a formula rests on emotion vectors, they must be derived at the layers that an edit uses."""
    if not any(derived_for(plan, name) for name in directions_of(edit)):
        return
    spec = edit.layers if edit.vector_layer == "same" else edit.vector_layer
    where = "layers" if edit.vector_layer == "same" else "vector_layer"
    for facts in check.facts:
        try:
            lost = set(layers.resolve(spec, facts.n_layers)) - set(layers.resolve(plan.layers, facts.n_layers))
        except LookupError:
            continue  # said elsewhere
        if lost:
            actual = f"layer {min(lost)} of {facts.label}, whose vector is not derived"
            check.add((*path, where), actual, "layers among the plan's `layers`", "layers: all")
            return
