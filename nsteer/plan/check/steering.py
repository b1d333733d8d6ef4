"""Checks of `steer`: the blocks, and the vectors that they steer with."""

from __future__ import annotations

from nsteer.plan import formulas, layers, placeholders
from nsteer.plan.check import directions, fields
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import layer_sets, neutral_count, steered_directions
from nsteer.plan.reader import Path
from nsteer.plan.schema import Also, Calibrated, Plan, Steer
from nsteer.program.ops import REFERENCED, UNSCALED
from nsteer.science import axis
from nsteer.science.axis import AXES, word
from nsteer.science.presets import NEUTRAL


def all_blocks(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Each steer block, then their labels. `emotions` is None where the plan's are in doubt."""
    for i, block in enumerate(plan.steer):
        _block(check, plan, check.steer_path(i), block, emotions)
    _labels(check, plan)
    idle = plan.measure is not None and plan.measure.capability and not check.fails("measure")
    if idle and not any(check.given(plan, name) for name in ("steer", "edits")):
        found = "capability, and nothing is steered"
        check.add(("measure", "capability"), found, "`steer` or `edits`, whose cost is measured", key=True)


def _block(check: Checker, plan: Plan, path: Path, block: Steer, emotions: list[str] | None) -> None:
    if not check.given(plan, "methods") and not check.given(plan, "directions"):
        check.add(path, "no `methods` and no `directions`", "at least one of either, whose vectors steer")
    _directions(check, plan, (*path, "vectors", "directions"), block)
    for i, name in enumerate(block.vectors.methods or []):
        if check.given(plan, "methods") and not check.fails("methods"):
            check.known((*path, "vectors", "methods", i), name, check.names("methods"), "a method of this plan")
    _one_axis(check, plan, (*path, "vectors"), block)
    for i, emotion in enumerate(block.vectors.labels or []):
        if emotions is not None:
            check.known((*path, "vectors", word("emotions"), i), emotion, emotions, word("an emotion of this plan"))
    _formulas(check, plan, (*path, "vectors"), block, emotions)
    check.distinct((*path, "vectors", "methods"), block.vectors.methods or [])
    check.distinct((*path, "vectors", word("emotions")), block.vectors.labels or [])
    fields.strengths(check, (*path, "strengths"), block.strengths, block)
    spec = block.strengths
    own = isinstance(spec, Calibrated) and spec.random == "own" and not check.fails(*path, "strengths", "random")
    if own and not any(control.startswith("random") for control in block.controls):
        found = "own, without the control `random`"
        check.add((*path, "strengths", "random"), found, "it only with controls: [random]")
    check.distinct((*path, "controls"), check.node((*path, "controls")) or [])
    _drawn_once(check, (*path, "controls"), block.controls)
    _shuffled(check, plan, path, block, emotions)
    _prompted(check, path, block)
    fields.decoding(check, (*path, "generate"), block.generate)
    fields.seeds(check, path, block.generate, block.seeds)
    _edit(check, plan, path, block, block, emotions)
    fields.prompt_set(check, (*path, "prompts"), block.prompts)
    fields.chat(check, (*path, "chat"), block.chat)
    if not check.fails(*path, "vectors", "layer"):
        _within_captured(check, plan, path, block)
    for i, one in enumerate(block.also):
        _further(check, plan, (*path, "also", i), block, one, emotions)


def _one_axis(check: Checker, plan: Plan, path: Path, block: Steer) -> None:
    """What is steered to, under the name that the plan gives its axis."""
    for name in axis.AXES:
        if name != plan.axis and getattr(block.vectors, f"{name}s") is not None:
            found, expected = f"`{name}s` in a plan of {plan.axis}s", f"`{plan.axis}s`"
            check.add((*path, f"{name}s"), found, expected, "as the plan itself says", key=True)


def _directions(check: Checker, plan: Plan, path: Path, block: Steer) -> None:
    """Directions that there are, each once; nothing asked of them that only samples can give."""
    named = block.vectors.directions or []
    check.distinct(path, named)
    for i, name in enumerate(named):
        if not check.fails("directions"):
            check.known((*path, i), name, check.names("directions"), "a name in `directions`")
    if check.fails(*path) or not [name for name in steered_directions(plan, block) if name in plan.directions]:
        return
    place = path if named else path[:-2]
    by_norm = block.scale == "reference_norm" and block.op not in UNSCALED
    if block.op in REFERENCED or by_norm:
        found = f"{block.scale if by_norm else block.op}, with a direction, which has no neutral samples"
        check.add((*path[:-2], "scale" if by_norm else "op"), found, "what needs no reference", "scale: stream_norm")
    if "shuffled" in block.controls:
        check.add(place, "directions, with the control `shuffled`", "methods, whose samples have labels", "random")


def _further(check: Checker, plan: Plan, path: Path, block: Steer, one: Also, emotions: list[str] | None) -> None:
    """An edit of `also`: as an edit, its direction of every method that steers."""
    if emotions is not None and one.direction not in emotions and not check.fails("methods"):
        _resolves(check, plan, (*path, "direction"), one.direction, block)
    _edit(check, plan, path, block, one, emotions)
    for facts in check.facts:
        try:
            lost = set(layers.resolve(one.layers, facts.n_layers)) - set(layers.resolve(plan.layers, facts.n_layers))
        except LookupError:
            continue  # said elsewhere
        if lost:
            found = f"layer {min(lost)} of {facts.label}, whose vector is not derived"
            check.add((*path, "layers"), found, "layers among the plan's `layers`", "layers: all")
            return


def _edit(check: Checker, plan: Plan, path: Path, block: Steer, edit: Steer | Also, emotions: list[str] | None) -> None:
    """What a block has in common with the edits of its `also`."""
    _neutral_reference(check, plan, path, block, edit)
    if edit.when is not None and edit.when.direction is not None and emotions is not None:
        check.known((*path, "when", "direction"), edit.when.direction, emotions, word("an emotion of this plan"))
    fields.edit(check, path, edit, block.prompts, block.chat, block.generate.max_new_tokens)


def _steered(plan: Plan, block: Steer) -> list[str]:
    """The methods whose vectors steer, without names that the plan does not have."""
    return [name for name in block.vectors.methods or plan.methods if name in plan.methods]


def _resolves(check: Checker, plan: Plan, place: Path, text: str, block: Steer) -> None:
    """A formula that the vectors of every steered method can be put into; one problem where it is none."""
    for method in _steered(plan, block):
        try:
            found = directions.meanings(check, plan, text, method)
        except formulas.FormulaError as error:
            check.add(place, error.found, error.expected, error.hint)
            return
        if not directions.axes(check, plan, place, found):
            return


def _formulas(check: Checker, plan: Plan, path: Path, block: Steer, emotions: list[str] | None) -> None:
    """Formulas that every steered method's vectors can be put into, under labels that no emotion has."""
    made = block.vectors.formulas
    if block.vectors.labels == [] and not made and not check.fails(*path, "formulas"):
        expected = word("at least one emotion")
        check.add((*path, word("emotions")), "an empty list", expected, "or `formulas` beside it")
    for label, text in made.items():
        place: Path = (*path, "formulas", label)
        if label == NEUTRAL or label in (emotions or []):
            what = "the label of the baseline" if label == NEUTRAL else word("an emotion of this plan")
            check.add(place, f"{label!r}, {what}", "a label of its own", key=True)
        if emotions is None or check.fails("methods"):
            continue
        _resolves(check, plan, place, text, block)


def _drawn_once(check: Checker, path: Path, labels: list[str]) -> None:
    """No label that one draw and several bring: `random` beside `{random: 3}`."""
    given = check.node(path) or []
    twice = next((label for i, label in enumerate(labels) if label in labels[:i]), None)
    if twice is not None and len({repr(one) for one in given}) == len(given):
        check.add(path, f"{twice!r} a second time", "each label once", "a number of draws begins with the first")


def _shuffled(check: Checker, plan: Plan, path: Path, block: Steer, emotions: list[str] | None) -> None:
    """Labels to shuffle for the control of that name, in every method that steers."""
    if "shuffled" not in block.controls or emotions is None or check.fails("methods"):
        return
    given = check.node((*path, "controls"))
    at = [
        i
        for i, one in enumerate(given if isinstance(given, list) else [])
        if one == "shuffled" or (isinstance(one, dict) and "shuffled" in one)
    ]
    place: Path = (*path, "controls", *at[:1])
    alone = len(plan.emotion_labels()) < 2
    for name in _steered(plan, block):
        method = plan.methods[name]
        if method.labels == "shuffled":
            found = f"shuffled, with method {name!r}, whose labels are shuffled already"
            check.add(place, found, "methods with their labels as given", "name others in vectors.methods")
            return
        if alone and method.baseline != "neutral_mean":
            found = f"shuffled, with one label under baseline {method.baseline} of {name!r}"
            check.add(place, found, "at least two labels", word("name more `emotions`"))
            return


def _prompted(check: Checker, path: Path, block: Steer) -> None:
    """Instructions that name the emotion, and nothing that would stay in braces."""
    for name in ("towards", "away"):
        text, place = getattr(block.prompted, name), (*path, "prompted", name)
        if check.fails(*place):
            continue
        if not set(AXES) & set(placeholders.named(text)):
            check.add(place, repr(text), "an instruction that holds {emotion}")
        fields.placeholders(check, place, text, AXES)
    idle = check.node((*path, "prompted")) is not None and "prompted" not in block.controls
    if idle and not check.fails(*path, "controls"):
        check.add((*path, "prompted"), "instructions that nothing uses", "the control `prompted`", key=True)


def _neutral_reference(check: Checker, plan: Plan, path: Path, block: Steer, edit: Steer | Also) -> None:
    """What is measured against neutral samples needs some."""
    by_norm = edit.scale == "reference_norm" and edit.op not in UNSCALED
    if not (edit.op in REFERENCED or by_norm) or check.fails("methods"):
        return
    field, measured, needed = ("scale", edit.scale, "norm") if by_norm else ("op", edit.op, "mean")
    for name in _steered(plan, block):
        if neutral_count(plan.methods[name]) == 0:
            found = f"{measured} with method {name!r}, which has no neutral samples"
            check.add((*path, field), found, f"a reference {needed}", "neutral_samples: 1 or more")


def _within_captured(check: Checker, plan: Plan, path: Path, block: Steer) -> None:
    """Every layer whose vector steers must be among the layers whose vectors are derived."""
    for facts in check.facts:
        try:
            have = set(layers.resolve(plan.layers, facts.n_layers))
            sets = layer_sets(block.layers, facts.n_layers)
            steered = {layer for one in sets.values() for layer in one}
            same = block.vectors.layer == "same"
            need = steered if same else set(layers.resolve(block.vectors.layer, facts.n_layers))
        except LookupError:
            continue  # said elsewhere
        if not same and block.op in REFERENCED and steered - have:
            found = f"layer {min(steered - have)} of {facts.label}, whose reference mean is not captured"
            check.add((*path, "layers"), found, "layers among the plan's `layers`", "layers: all")
            return
        if need - have:
            found = f"layer {min(need - have)} of {facts.label}, whose vector is not derived"
            where = ("layers",) if block.vectors.layer == "same" else ("vectors", "layer")
            check.add((*path, *where), found, "layers among the plan's `layers`", "layers: all")
            return


def _labels(check: Checker, plan: Plan) -> None:
    labels: list[str | int] = [
        i if check.fails("steer", i, "name") or check.fails("steer", i, "op") else block.name or block.op
        for i, block in enumerate(plan.steer)
    ]  # what failed has a label of its own
    for i, label in enumerate(labels):
        if label in labels[:i]:
            check.add(("steer", i), f"a second steer block labelled {label!r}", "distinct labels", "give it a `name`")
