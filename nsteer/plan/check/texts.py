"""Checks of `texts`, `emotions` and `ratings`."""

from __future__ import annotations

import difflib
from pathlib import Path as FilePath

from nsteer.errors import PlanError
from nsteer.plan import reader, texts
from nsteer.plan.check import rows
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.schema import Dataset, Plan
from nsteer.science import axis
from nsteer.science.axis import word
from nsteer.science.presets import EMOTION_SETS, NEUTRAL, RATINGS

SETS = "a named set of emotions, or a list"


def text_set(check: Checker, plan: Plan) -> None:
    """A text set that is there, may be read and is right: then it is `check.texts`."""
    if check.fails("texts"):
        return
    if isinstance(plan.texts, Dataset):
        check.texts = rows.text_set(check, ("texts",), plan.texts)
        return
    try:
        file = texts.find(plan.texts, FilePath(check.document.file).parent)
        if plan.texts not in texts.shipped() and not check.document.may_read(file):
            check.add(("texts",), f"{plan.texts!r}, outside", reader.WITHIN, reader.OUTSIDE)
            return
        check.texts = texts.load(file)
    except LookupError as error:
        check.add(("texts",), repr(plan.texts), "a shipped text set or a file", error.args[0])
    except PlanError as error:
        check.problems += error.problems


def own_emotions(check: Checker, plan: Plan) -> Plan:
    """The plan with the emotions of its text set, where it names none and the set is not that of the default."""
    if check.texts is None or plan.texts == DEFAULT or check.node(("emotions",)) is not None:
        return plan
    return plan.model_copy(update={"emotions": list(check.texts.emotions)})


DEFAULT = "nsteer"
"""The text set that holds the emotions of a plan that names neither."""


def emotions(check: Checker, plan: Plan) -> list[str] | None:
    """The emotions that a steer entry may name; None where the plan's own are in doubt."""
    field = word("emotions")
    if check.fails(field):
        return None
    if plan.concepts is not None:
        if check.node((axis.EMOTION + "s",)) is not None:
            check.add((field,), "`concepts` and `emotions`", "one of the two", "vectors stand for one kind of thing")
        if not plan.concepts and plan.methods:
            check.add((field,), "an empty list", "at least one concept", "what the methods make vectors of")
    elif isinstance(plan.emotions, str) and not check.known((field,), plan.emotions, EMOTION_SETS, SETS):
        return None
    emotions = plan.emotion_labels()
    check.distinct((field,), emotions)
    if not plan.methods or check.texts is None:
        return emotions
    known = check.texts.emotions
    for i, emotion in enumerate(emotions):
        path: Path = (field, i) if isinstance(check.node((field,)), list) else (field,)
        if emotion == NEUTRAL:
            check.add(path, repr(emotion), word("an emotion"), f"{NEUTRAL!r} is the label of the baseline")
        else:
            check.known(path, emotion, known, f"{word('an emotion')} of the text set {check.texts.name!r}")
    meant = [near for label in emotions if label not in known for near in difflib.get_close_matches(label, known)]
    return [*emotions, *meant]  # one slip is said once, not wherever the right word stands


def ratings(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """A known table, or one of the plan's emotions."""
    if isinstance(plan.ratings, str):
        check.known(("ratings",), plan.ratings, RATINGS, word("a table of ratings, or scale: {emotion: number}"))
    elif plan.ratings is not None and emotions is not None:
        for scale, table in plan.ratings.items():
            for emotion in table:
                check.known(("ratings", scale, emotion), emotion, emotions, word("an emotion of this plan"))
