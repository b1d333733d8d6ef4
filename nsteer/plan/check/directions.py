"""Checks of `directions`: one source each, and formulas that can be worked out."""

from __future__ import annotations

import os
from pathlib import Path as FilePath

from nsteer.plan import formulas, reader
from nsteer.plan.check import contrasts, fields
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.schema import DIRECTION_SOURCES, Plan, Stored
from nsteer.science import axis
from nsteer.science.axis import word
from nsteer.science.presets import EMOTION_SETS, RATINGS


def all_directions(check: Checker, plan: Plan) -> set[str]:
    """Each direction, then each formula. Returns the names of those that can be worked out."""
    for name in plan.directions:
        _direction(check, plan, name)
    return {name for name in plan.directions if _formula(check, plan, name)}


def _direction(check: Checker, plan: Plan, name: str) -> None:
    direction = plan.directions[name]
    given = [field for field in DIRECTION_SOURCES if getattr(direction, field) is not None]
    path: Path = ("directions", name)
    if len(given) != 1 and not any(bad[: len(path)] == path for bad in check.failed):
        check.add(path, " and ".join(given) or "none of them", f"exactly one of {', '.join(DIRECTION_SOURCES)}")
    if direction.contrast is not None:
        contrasts.contrast(check, plan, name, direction.contrast)
    if direction.mean is not None:
        contrasts.as_they_stand(check, (*path, "mean", "texts"), direction.mean.texts)
        fields.pooling_of_prompt(check, (*path, "mean", "pooling"), direction.mean.pooling, "a mean generates nothing")
        fields.chat(check, (*path, "mean", "chat"), direction.mean.chat)
    if direction.store is not None:
        _label_in_store(check, (*path, "store"), direction.store)
    if direction.store is not None and not os.path.isdir(direction.store.path):
        check.add((*path, "store", "path"), f"{direction.store.path!r}, which does not exist", "the path of a store")
    elif direction.store is not None and not check.document.may_read(FilePath(direction.store.path)):
        check.add((*path, "store", "path"), f"{direction.store.path!r}, outside", reader.WITHIN, reader.OUTSIDE)


def _label_in_store(check: Checker, path: Path, spec: Stored) -> None:
    """One label of the vector, on the axis that its store has."""
    given = [name for name in axis.AXES if getattr(spec, name) is not None or check.fails(*path, name)]
    if not given:
        check.add((*path, axis.EMOTION), "nothing", "a value", "it is required (`concept` in a store of concepts)")
    elif len(given) > 1:
        check.add((*path, axis.CONCEPT), "emotion and concept", "one of the two", "as the store calls its axis")


def _formula(check: Checker, plan: Plan, name: str, above: tuple[str, ...] = ()) -> bool:
    """Whether a direction's formula can be worked out; says why not of the one that `above` starts with."""
    text = plan.directions[name].formula
    path: Path = ("directions", name)
    path = (*path, "formula") if isinstance(check.node(path), dict) else path
    if text is None or check.fails(*path):
        return True
    try:
        references = meanings(check, plan, text)
    except formulas.FormulaError as error:
        if not above:
            check.add(path, error.found, error.expected, error.hint)
        return False
    if not axes(check, plan, path, references):
        return False
    for sort, *where in references:
        if sort == "direction" and where[0] in (*above, name):
            if above[:1] in ((), (where[0],)):
                check.add(path, f"{where[0]!r} again", "formulas that end", "give the direction a name of its own")
            return False
        if sort == "direction" and where[0] not in plan.directions:
            return False  # failed by form
        if sort == "direction" and not _formula(check, plan, where[0], (*above, name)):
            return False
    return True


def meanings(check: Checker, plan: Plan, text: str, method: str | None = None) -> list[tuple[str, ...]]:
    """What every name in a formula stands for. Raises FormulaError.

    method : of a formula that steers: whose vectors a name without a method means; there it means no direction
    """
    known = plan.concepts is not None or isinstance(plan.emotions, list) or plan.emotions in EMOTION_SETS
    emotions = plan.emotion_labels() if known else []
    every, named = check.names("methods"), check.names("directions") if method is None else []
    return [
        formulas.meaning(
            dotted,
            directions=named,
            methods=every if method is None or len(dotted) > 1 else [method],
            emotions=emotions,
            scales=_scales(plan),
        )
        for dotted in formulas.names(formulas.parse(text))
    ]


def axes(check: Checker, plan: Plan, path: Path, references: list[tuple[str, ...]]) -> bool:
    """Whether every axis of the ratings that a formula names can be worked out; a problem where one can not."""
    for sort, *where in references:
        emotions, scales = plan.emotion_labels() if sort == "axis" else [], _scales(plan)
        if sort == "axis" and not _determined(emotions, scales):
            have = sum(all(e in scale for scale in scales.values()) for e in emotions)
            expected = f"at least {len(scales) + 1}, whose ratings tell the {len(scales)} scales apart"
            check.add(path, f"{where[1]!r}, with {have} rated {word('emotions')} in the plan", expected)
            return False
    return True


def _scales(plan: Plan) -> dict[str, dict[str, float]]:
    return plan.scales() if not isinstance(plan.ratings, str) or plan.ratings in RATINGS else {}


def _determined(emotions: list[str], scales: dict[str, dict[str, float]]) -> bool:
    """Whether the plan's emotions give every scale of the ratings an axis."""
    import numpy as np  # here: few plans rate

    from nsteer.science.directions import rated, tells_apart

    table = [[scale[emotion] for scale in scales.values()] for emotion in rated(emotions, scales)]
    return bool(tells_apart(np.array(table, float).reshape(len(table), len(scales))))
