"""Checks of `steer`: the entries, and the vectors that they steer with."""

from __future__ import annotations

import contextlib

from nsteer.plan import formulas, layers, placeholders
from nsteer.plan.check import directions, fields
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import layer_sets, neutral_count, steered_directions
from nsteer.plan.reader import Path
from nsteer.plan.schema import SIDES, Also, Calibrated, Plan, Steer
from nsteer.program.ops import REFERENCED, UNSCALED
from nsteer.science import axis
from nsteer.science.axis import AXES, word
from nsteer.science.presets import NEUTRAL


def all_entries(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Each steer entry, then their labels. `emotions` is None where the plan's are in doubt."""
    for i, entry in enumerate(plan.steer):
        _steer_entry(check, plan, check.steer_path(i), entry, emotions)
    _labels(check, plan)
    idle = plan.measure is not None and plan.measure.capability and not check.fails("measure")
    if idle and not any(check.given(plan, name) for name in ("steer", "edits")):
        actual = "capability, and nothing is steered"
        check.add(("measure", "capability"), actual, "`steer` or `edits`, whose cost is measured", key=True)


def _steer_entry(check: Checker, plan: Plan, path: Path, entry: Steer, emotions: list[str] | None) -> None:
    if not check.given(plan, "methods") and not check.given(plan, "directions"):
        check.add(path, "no `methods` and no `directions`", "at least one of either, whose vectors steer")
    _directions(check, plan, (*path, "vectors", "directions"), entry)
    for i, name in enumerate(entry.vectors.methods or []):
        if check.given(plan, "methods") and not check.fails("methods"):
            check.known((*path, "vectors", "methods", i), name, check.names("methods"), "a method of this plan")
    _one_axis(check, plan, (*path, "vectors"), entry)
    for i, emotion in enumerate(entry.vectors.labels or []):
        if emotions is not None:
            check.known((*path, "vectors", word("emotions"), i), emotion, emotions, word("an emotion of this plan"))
    _formulas(check, plan, (*path, "vectors"), entry, emotions)
    check.distinct((*path, "vectors", "methods"), entry.vectors.methods or [])
    check.distinct((*path, "vectors", word("emotions")), entry.vectors.labels or [])
    fields.strengths(check, (*path, "strengths"), entry.strengths, entry)
    spec = entry.strengths
    own = isinstance(spec, Calibrated) and spec.random == "own" and not check.fails(*path, "strengths", "random")
    if own and not any(control.startswith("random") for control in entry.controls):
        actual = "own, without the control `random`"
        check.add((*path, "strengths", "random"), actual, "it only with controls: [random]")
    check.distinct((*path, "controls"), check.node((*path, "controls")) or [])
    _drawn_once(check, (*path, "controls"), entry.controls)
    _shuffled(check, plan, path, entry, emotions)
    _prompted(check, path, entry)
    fields.decoding(check, (*path, "generate"), entry.generate)
    fields.seeds(check, path, entry.generate, entry.seeds)
    _edit(check, plan, path, entry, entry, emotions)
    fields.prompt_set(check, (*path, "prompts"), entry.prompts)
    fields.chat(check, (*path, "chat"), entry.chat)
    if not check.fails(*path, "vectors", "layer"):
        _within_captured(check, plan, path, entry)
    for i, further in enumerate(entry.also):
        _further(check, plan, (*path, "also", i), entry, further, emotions)


def _one_axis(check: Checker, plan: Plan, path: Path, entry: Steer) -> None:
    """What is steered to, under the name that the plan gives its axis."""
    for name in axis.AXES:
        if name != plan.axis and getattr(entry.vectors, f"{name}s") is not None:
            actual, expected = f"`{name}s` in a plan of {plan.axis}s", f"`{plan.axis}s`"
            check.add((*path, f"{name}s"), actual, expected, "as the plan itself says", key=True)


def _directions(check: Checker, plan: Plan, path: Path, entry: Steer) -> None:
    """Directions that there are, each once; nothing asked of them that only samples can give."""
    named = entry.vectors.directions or []
    check.distinct(path, named)
    for i, name in enumerate(named):
        if not check.fails("directions"):
            check.known((*path, i), name, check.names("directions"), "a name in `directions`")
    if check.fails(*path) or not [name for name in steered_directions(plan, entry) if name in plan.directions]:
        return
    by_norm = entry.scale == "reference_norm" and entry.op not in UNSCALED
    if entry.op in REFERENCED or by_norm:
        actual = f"{entry.scale if by_norm else entry.op}, with a direction, which has no neutral samples"
        check.add((*path[:-2], "scale" if by_norm else "op"), actual, "what needs no reference", "scale: stream_norm")


def _further(check: Checker, plan: Plan, path: Path, entry: Steer, further: Also, emotions: list[str] | None) -> None:
    """An edit of `also`: as an edit, its direction of every method that steers."""
    if emotions is not None and further.direction not in emotions and not check.fails("methods"):
        _resolves(check, plan, (*path, "direction"), further.direction, entry)
    _edit(check, plan, path, entry, further, emotions)
    for facts in check.facts:
        try:
            lost = set(layers.resolve(further.layers, facts.n_layers)) - set(
                layers.resolve(plan.layers, facts.n_layers)
            )
        except LookupError:
            continue  # said elsewhere
        if lost:
            actual = f"layer {min(lost)} of {facts.label}, whose vector is not derived"
            check.add((*path, "layers"), actual, "layers among the plan's `layers`", "layers: all")
            return


def _edit(check: Checker, plan: Plan, path: Path, entry: Steer, edit: Steer | Also, emotions: list[str] | None) -> None:
    """What an entry has in common with the edits of its `also`."""
    _neutral_reference(check, plan, path, entry, edit)
    if edit.when is not None and edit.when.direction is not None and emotions is not None:
        check.known((*path, "when", "direction"), edit.when.direction, emotions, word("an emotion of this plan"))
    fields.edit(check, path, edit, entry.prompts, entry.chat, entry.generate.max_new_tokens)


def _steered(plan: Plan, entry: Steer) -> list[str]:
    """The methods whose vectors steer, without names that the plan does not have."""
    return [name for name in entry.vectors.methods or plan.methods if name in plan.methods]


def _resolves(check: Checker, plan: Plan, place: Path, text: str, entry: Steer) -> None:
    """A formula that the vectors of every steered method can be put into; one problem where it is none."""
    for method in _steered(plan, entry):
        try:
            references = directions.meanings(check, plan, text, method)
        except formulas.FormulaError as error:
            check.add(place, error.found, error.expected, error.hint)
            return
        if not directions.axes(check, plan, place, references):
            return


def _formulas(check: Checker, plan: Plan, path: Path, entry: Steer, emotions: list[str] | None) -> None:
    """Formulas that every steered method's vectors can be put into, under labels that no emotion has."""
    texts = entry.vectors.formulas
    if entry.vectors.labels == [] and not texts and not check.fails(*path, "formulas"):
        expected = word("at least one emotion")
        check.add((*path, word("emotions")), "an empty list", expected, "or `formulas` beside it")
    for label, text in texts.items():
        place: Path = (*path, "formulas", label)
        if label == NEUTRAL or label in (emotions or []):
            what = "the label of the baseline" if label == NEUTRAL else word("an emotion of this plan")
            check.add(place, f"{label!r}, {what}", "a label of its own", key=True)
        if emotions is None or check.fails("methods"):
            continue
        _resolves(check, plan, place, text, entry)


def _drawn_once(check: Checker, path: Path, labels: list[str]) -> None:
    """No label that one draw and several bring: `random` beside `{random: 3}`."""
    given = check.node(path) or []
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice is not None and len({repr(value) for value in given}) == len(given):
        check.add(path, f"{twice!r} a second time", "each label once", "a number of draws begins with the first")


def _shuffled(check: Checker, plan: Plan, path: Path, entry: Steer, emotions: list[str] | None) -> None:
    """Labels to shuffle for the control of that name, in every method that steers, and sides in every direction."""
    if "shuffled" not in entry.controls:
        return
    given = check.node((*path, "controls"))
    at = [
        i
        for i, control in enumerate(given if isinstance(given, list) else [])
        if control == "shuffled" or (isinstance(control, dict) and "shuffled" in control)
    ]
    place: Path = (*path, "controls", *at[:1])
    if not check.fails("directions"):
        _sides(check, plan, place, entry)
    if emotions is None or check.fails("methods"):
        return
    alone = len(plan.emotion_labels()) < 2
    for name in _steered(plan, entry):
        method = plan.methods[name]
        if method.labels == "shuffled":
            actual = f"shuffled, with method {name!r}, whose labels are shuffled already"
            check.add(place, actual, "methods with their labels as given", "name others in vectors.methods")
            return
        if alone and method.baseline != "neutral_mean":
            actual = f"shuffled, with one label under baseline {method.baseline} of {name!r}"
            check.add(place, actual, "at least two labels", word("name more `emotions`"))
            return


def _sides(check: Checker, plan: Plan, place: Path, entry: Steer) -> None:
    """Two sides of several texts in every direction that steers, or that a formula names: what `shuffled` changes."""
    names = steered_directions(plan, entry)
    if not plan.methods:
        with contextlib.suppress(formulas.FormulaError):  # said elsewhere
            trees = [formulas.parse(text) for text in entry.vectors.formulas.values()]
            names = [*names, *(dotted[0] for tree in trees for dotted in formulas.names(tree))]
    for name in dict.fromkeys(name for name in names if name in plan.directions):
        contrast = plan.directions[name].contrast
        if contrast is None:
            actual = f"shuffled, with the direction {name!r} ({plan.directions[name].source})"
            check.add(
                place, actual, "methods, whose samples have labels, or contrasts, whose texts have sides", "random"
            )
            return
        texts = {side: getattr(contrast, side) for side in SIDES if contrast.generate is None}
        if few := [side for side, given in texts.items() if isinstance(given, list) and len(given) < 2]:
            actual = f"shuffled, with one {few[0]} text in {name!r}"
            check.add(place, actual, "at least two texts on each side", "random")
            return


def _prompted(check: Checker, path: Path, entry: Steer) -> None:
    """Instructions that name the emotion, and nothing that would stay in braces."""
    for name in ("towards", "away"):
        text, place = getattr(entry.prompted, name), (*path, "prompted", name)
        if check.fails(*place):
            continue
        if not set(AXES) & set(placeholders.named(text)):
            check.add(place, repr(text), "an instruction that holds {emotion}")
        fields.placeholders(check, place, text, AXES)
    idle = check.node((*path, "prompted")) is not None and "prompted" not in entry.controls
    if idle and not check.fails(*path, "controls"):
        check.add((*path, "prompted"), "instructions that nothing uses", "the control `prompted`", key=True)


def _neutral_reference(check: Checker, plan: Plan, path: Path, entry: Steer, edit: Steer | Also) -> None:
    """What is measured against neutral samples needs some."""
    by_norm = edit.scale == "reference_norm" and edit.op not in UNSCALED
    if not (edit.op in REFERENCED or by_norm) or check.fails("methods"):
        return
    field, measured, needed = ("scale", edit.scale, "norm") if by_norm else ("op", edit.op, "mean")
    for name in _steered(plan, entry):
        if neutral_count(plan.methods[name]) == 0:
            actual = f"{measured} with method {name!r}, which has no neutral samples"
            check.add((*path, field), actual, f"a reference {needed}", "neutral_samples: 1 or more")


def _within_captured(check: Checker, plan: Plan, path: Path, entry: Steer) -> None:
    """Every layer whose vector steers must be among the layers whose vectors are derived."""
    for facts in check.facts:
        try:
            have = set(layers.resolve(plan.layers, facts.n_layers))
            sets = layer_sets(entry.layers, facts.n_layers)
            steered = {layer for chosen in sets.values() for layer in chosen}
            same = entry.vectors.layer == "same"
            need = steered if same else set(layers.resolve(entry.vectors.layer, facts.n_layers))
        except LookupError:
            continue  # said elsewhere
        if not same and entry.op in REFERENCED and steered - have:
            actual = f"layer {min(steered - have)} of {facts.label}, whose reference mean is not captured"
            check.add((*path, "layers"), actual, "layers among the plan's `layers`", "layers: all")
            return
        if need - have:
            actual = f"layer {min(need - have)} of {facts.label}, whose vector is not derived"
            where = ("layers",) if entry.vectors.layer == "same" else ("vectors", "layer")
            check.add((*path, *where), actual, "layers among the plan's `layers`", "layers: all")
            return


def _labels(check: Checker, plan: Plan) -> None:
    labels: list[str | int] = [
        i if check.fails("steer", i, "name") or check.fails("steer", i, "op") else entry.name or entry.op
        for i, entry in enumerate(plan.steer)
    ]  # what failed has a label of its own
    for i, label in enumerate(labels):
        if label in labels[:i]:
            check.add(("steer", i), f"a second steer entry labelled {label!r}", "distinct labels", "give it a `name`")
