"""Checks of contrasts: what their texts are, how the model writes them, and which of those a judge keeps."""

from __future__ import annotations

from typing import Any

from nsteer.models.templates import shown
from nsteer.plan import placeholders
from nsteer.plan.check import fields, judges
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import counts_for
from nsteer.plan.reader import Path
from nsteer.plan.schema import SIDES, Contrast, Filter, Judge, Plan, Responses
from nsteer.plan.schema.datasets import is_dataset
from nsteer.science.presets import CONTRASTS


def contrast(check: Checker, plan: Plan, name: str, spec: Contrast) -> None:
    """A contrast of texts that are given, or of what the model writes."""
    path: Path = ("directions", name, "contrast")
    if spec.preset is not None:
        check.known((*path, "preset"), spec.preset, CONTRASTS, "a preset of contrasts")
    fields.chat(check, (*path, "chat"), spec.chat)
    for side in SIDES:
        as_they_stand(check, (*path, side), getattr(spec, side))
    if spec.generate is not None and not check.fails(*path, "generate"):
        _written(check, path, spec, spec.generate)
        if spec.filter is not None and not check.fails(*path, "filter"):
            _filter(check, plan, path, name, spec.filter)
        return
    fields.pooling_of_prompt(check, (*path, "pooling"), spec.pooling, "a contrast without `generate` writes nothing")
    if spec.filter is not None and not check.fails(*path, "generate"):
        check.add((*path, "filter"), "a filter of texts that are given", "it only with `generate`", key=True)


def as_they_stand(check: Checker, path: Path, texts: Any) -> None:
    """Texts of the plan itself hold no placeholder of templates: nobody would fill it in."""
    given = check.node(path)
    if not isinstance(given, list) or is_dataset(given):
        return
    for i, text in enumerate(texts if isinstance(texts, list) else []):
        for name in placeholders.NAMES["generation"]:
            if f"{{{name}}}" in shown(text):
                hint = "a column of a `file` is filled in; a text of the plan is read as it stands"
                check.add((*path, i), f"{{{name}}}, which nothing fills in", "the text that the model is to read", hint)


def _written(check: Checker, path: Path, spec: Contrast, how: Responses) -> None:
    """System prompts, questions that a user asks, and a chat template that shows both."""
    place: Path = (*path, "generate")
    fields.decoding(check, place, how)
    fields.pooling(check, (*path, "pooling"), spec.pooling)
    as_they_stand(check, (*place, "questions"), how.questions)
    if how.samples > 1 and not how.sample and not check.fails(*place, "sample"):
        expected = "1 in greedy decoding, where all are the same"
        check.add((*place, "samples"), str(how.samples), expected, "or generate: {sample: true}")
    if spec.chat != "always" and not check.fails(*path, "chat"):
        hint = "the sides differ in their system turn, which a chat template shows"
        check.add((*path, "chat"), spec.chat, "always, with `generate`", hint)
    for side in SIDES:
        for i, text in enumerate(getattr(spec, side)):
            if not isinstance(text, str):
                check.add((*path, side, i), "a conversation", "a system prompt: text, with `generate`")
    for i, text in enumerate(how.questions if isinstance(how.questions, list) else []):
        roles = [] if isinstance(text, str) else [turn["role"] for turn in text]
        if "system" in roles or roles[-1:] == ["assistant"]:
            actual = "a system turn" if "system" in roles else "a begun answer"
            check.add(
                (*place, "questions", i), actual, "a question, or turns that end with one", "sides bring the system"
            )


TOP = {"choices": 1.0, "classifier": 1.0, "llm": 100.0}
"""Kind of judge -> the highest score that it can give; the lowest is 0."""


def _filter(check: Checker, plan: Plan, path: Path, name: str, by: Filter) -> None:
    """A judge of the plan that can tell the class, and thresholds that its scores can be on either side of."""
    place: Path = (*path, "filter")
    spec = plan.all_judges().get(by.judge)
    where: Path = ("judge",) if spec is plan.judge else ("judges", by.judge)
    if spec is None or check.fails(*where):
        known = [*plan.all_judges(), *check.names("judges"), *(["judge"] if check.node(("judge",)) else [])]
        if not check.fails(*place, "judge"):
            check.known((*place, "judge"), by.judge, dict.fromkeys(known), "a judge of the plan")
        return
    if spec.kind == "scores":
        expected = "a judge that reads texts which the model is still to write"
        return check.add((*place, "judge"), f"{by.judge!r}, scores that raters gave", expected)
    if not spec.kind:
        return
    classes = judges.classes_of(spec)
    if counts_for(name, by, spec, classes, not classes) is None:
        actual = f"{by.class_!r}" if by.class_ else f"several classes of {by.judge!r}, none called {name!r}"
        at = (*place, "class") if by.class_ else place
        check.add(at, actual, f"one of {', '.join(classes)}", "" if by.class_ else f"class: {classes[0]}")
    _thresholds(check, place, by, spec)


def _thresholds(check: Checker, place: Path, by: Filter, spec: Judge) -> None:
    top = TOP.get(spec.kind)
    if spec.rule is not None and spec.rule.score != "count":
        top = 1.0
    own = "null: as the judge says it is of the class, or not" if check.node((*place, "judge")) else ""
    said = f"scores of {by.judge!r} go from 0 to {top:g}" if top is not None else ""
    if top is not None and by.above is not None and by.above >= top:
        check.add((*place, "above"), f"{by.above:g}, and {said}", f"less than {top:g}", f"above: {own}")
    lowest = 0.0 if top is not None or spec.rule is not None else None
    if lowest is not None and by.below is not None and by.below <= lowest:
        check.add((*place, "below"), f"{by.below:g}", "more than 0, the lowest score", f"below: {own}")
    elif top is not None and by.below is not None and by.below > top:
        check.add((*place, "below"), f"{by.below:g}, and {said}", f"at most {top:g}", f"below: {own}")
    if by.coherence is not None and (spec.llm is None or not spec.llm.coherence):
        hint = "llm: {coherence: true}; or coherence: null"
        check.add((*place, "coherence"), f"{by.coherence:g}", f"a judge that rates it, not {by.judge!r}", hint)
