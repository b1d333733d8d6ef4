"""Checks of `judge` and `judges`: a judge of one kind, that can be had, beside something to judge."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path as FilePath

from nsteer.errors import ExchangeError, ModelError, did_you_mean
from nsteer.models import checkpoints
from nsteer.models import facts as models
from nsteer.plan import functions, placeholders, ratings, rules
from nsteer.plan.check import models as devices
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import steered_directions
from nsteer.plan.reader import OUTSIDE, WITHIN, Path
from nsteer.plan.schema import JUDGE_KINDS, Judge, Model, Plan
from nsteer.science.axis import AXES, word
from nsteer.system import hosts

HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
"""What a model on the hub may be called."""

NAMES = ("text", "prompt", "concept", "emotion")
"""The placeholders of a judge's question."""

CLASSIFIER = "a classifier: hub id, directory or zoo/judge"
OF_CLASSIFIER = ("revision", "device")
"""Fields of a judge that only a classifier has a use for."""


def all_judges(check: Checker, plan: Plan) -> None:
    """Every judge, and that there is something to judge."""
    if plan.judge is not None and "judge" in plan.judges:
        check.add(("judges", "judge"), "'judge' a second time", "each label once", "`judge` is the other", key=True)
    specs = [direction.contrast.filter for direction in plan.directions.values() if direction.contrast is not None]
    filters = {by.judge for by in specs if by is not None}
    for name, spec in plan.all_judges().items():
        path: Path = ("judge",) if spec is plan.judge else ("judges", name)
        if not check.given(plan, "steer", "generate") and name not in filters:
            where = (*path, "classifier") if isinstance(check.node(path), dict) and spec.kind == "classifier" else path
            check.add(where, "a judge", "a judge only beside `steer` or `generate`", "it judges continuations")
        if not check.fails(*path):
            _judge(check, plan, path, spec)


def _judge(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """One judge: of one kind, with a map of labels that are there."""
    given = check.node(path)
    kinds = [kind for kind in JUDGE_KINDS if getattr(spec, kind) is not None or check.fails(*path, kind)]
    labels = [label for entry in plan.steer for label in (*entry.vectors.formulas, *steered_directions(plan, entry))]
    labels += [
        label
        for label, direction in plan.directions.items()
        if direction.contrast is not None and direction.contrast.filter
    ]
    for emotion in spec.map or {}:
        what = word("an emotion") + (f" of the text set {check.texts.name!r}" if check.texts else "")
        known = [*check.texts.emotions, *labels, *check.names("edits")] if check.texts else [emotion]
        check.known((*path, "map", emotion), emotion, known, what)
    for emotion in spec.map or {}:
        _signed(check, (*path, "map", emotion), spec, emotion)
    if len(kinds) != 1:
        actual = "a judge of no kind" if not kinds else f"a judge that is {' and '.join(kinds)}"
        return check.add(path, actual, f"one of {', '.join(JUDGE_KINDS)}", "zoo/judge is a classifier")
    kind = kinds[0]
    if isinstance(given, dict) and kind != "classifier":
        for name in OF_CLASSIFIER:
            if name in given:
                check.add((*path, name), name, f"nothing under {kind}", "it is of a classifier", key=True)
    if not check.fails(*path, kind):
        CHECKS[kind](check, plan, (*path, kind) if isinstance(given, dict) else path, spec)


def _signed(check: Checker, path: Path, spec: Judge, emotion: str) -> None:
    """Classes that tell an emotion together: some, each once, of those that the judge has as far as that is known."""
    target = spec.targets[emotion]
    given = check.node(path)
    if target is None or not isinstance(given, dict) or check.fails(*path):
        return
    if not target.classes and not any(check.fails(*path, field) for field in given):
        hint = f"{emotion}: {{falls: [anger, fear]}}, or null where nothing of the judge's tells it"
        return check.add(path, "neither `rises` nor `falls`", "a class that is to rise, or one that is to fall", hint)
    known = classes_of(spec)
    for side in ("rises", "falls"):
        names = getattr(target, side)
        many = isinstance(check.node((*path, side)), list)
        for i, name in enumerate(names):
            place: Path = (*path, side, i) if many else (*path, side)
            if name in names[:i]:
                check.add(place, f"{name!r} a second time", "each class once")
            elif side == "falls" and name in target.rises:
                check.add(place, f"{name!r}, which is to rise too", "each class on one side", "its change says nothing")
            elif known:
                check.known(place, name, known, f"a class of the judge ({', '.join(known)})")


def classes_of(spec: Judge) -> list[str]:
    """The classes of a judge that its settings, or the config of its model, name; [] where any name is asked about."""
    if spec.rule is not None:
        return list(dict.fromkeys([*spec.rule.words, *spec.rule.regex]))
    if spec.python is not None:
        return list(spec.python.classes)
    if spec.choices is not None and not set(AXES) & set(placeholders.named(spec.choices.question)):
        return list(spec.choices.answers)
    if spec.llm is not None and isinstance(spec.llm.rubric, str):
        return [] if set(AXES) & set(placeholders.named(spec.llm.rubric)) else ["score"]
    if spec.llm is not None:
        return list(spec.llm.rubric)
    if spec.classifier is not None:
        try:
            return list(models.facts(Model(id=spec.classifier, revision=spec.revision)).classes)
        except ModelError:
            return []  # said of the classifier
    return []


def _classifier(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """A classifier of text, with classes to choose among."""
    assert spec.classifier is not None
    if path[-1] == "classifier":
        devices.device(check, (*path[:-1], "device"), spec.device)
    try:
        folder, name = models.local_folder(spec.classifier), spec.classifier
        if folder is None and not HUB_ID.fullmatch(name):
            hint = "a rule, a question or a server is a kind of its own: docs/howto/judges.md"
            check.add(path, f"{name!r}, which can be none of these", CLASSIFIER, hint)
        elif not _classifies(spec, folder):
            check.add(path, f"{name!r}, which does not classify text", CLASSIFIER)
        elif folder is not None and (fault := next(iter(checkpoints.faults(folder)), None)):
            check.add(path, f"{name!r}: {fault.found}", "a model directory that is whole", fault.hint)
        elif folder is not None:
            _comparable(check, path, name, folder)
    except ModelError as error:
        check.add(path, str(error), CLASSIFIER)


def _comparable(check: Checker, path: Path, name: str, folder: FilePath) -> None:
    """A judge with classes to choose among: the likeliest of one, or of raw scores, means nothing."""
    kind, classes = models.head_of(folder)
    if kind == "regression" or classes == 1:
        actual = f"{name!r}, " + ("a regression" if kind == "regression" else "with one class")
        hint = word("what names an emotion is the likeliest class; its scores can be had in Python")
        check.add(path, actual, "a classifier of two classes or more", hint)


def _classifies(judge: Judge, folder: FilePath | None) -> bool:
    """Whether a classifier's config says that it is one. Raises ModelError where it can not be read."""
    if folder is not None:
        return models.is_classifier(folder)
    assert judge.classifier is not None
    return models.facts(Model(id=judge.classifier, revision=judge.revision)).is_classifier


def _rule(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """A rule with a class, whose patterns compile and do not run away."""
    rule = spec.rule
    assert rule is not None
    if not rule.words and not rule.regex and not check.fails(*path, "words") and not check.fails(*path, "regex"):
        check.add(path, "a rule without a class", "`words` or `regex`", "words: {refusal: [sorry, I can not]}")
    for field, classes in (("words", rule.words), ("regex", rule.regex)):
        for name, forms in classes.items():
            many = isinstance(check.node((*path, field, name)), list)
            for i, form in enumerate(forms):
                where: Path = (*path, field, name, i) if many else (*path, field, name)
                if field == "words" and not form.strip():
                    check.add(where, "white space alone", "a word or a phrase")
                elif field == "regex" and (wrong := rules.flaw(form, rule.case)):
                    check.add(where, wrong, "a regular expression that is safe to run on any text")


def _choices(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """A question with the text in it, two answers that differ, and a model that can read."""
    asked = spec.choices
    assert asked is not None
    question(check, (*path, "question"), asked.question)
    if len(asked.answers) < 2:
        check.add((*path, "answers"), "one answer", "two or more", "answers: [yes, no]")
    seen: dict[str, str] = {}
    for name, forms in asked.answers.items():
        for form in forms:
            said = form.strip().lower()
            if not said:
                check.add((*path, "answers"), f"white space alone as an answer of {name!r}", "an answer")
            elif seen.setdefault(said, name) != name:
                actual = f"{form!r} as an answer of {seen[said]!r} and of {name!r}"
                check.add((*path, "answers"), actual, "answers that differ in more than capitals")
    about = {"concept", "emotion"} & set(placeholders.named(asked.question))
    if asked.target is not None and about:
        check.known((*path, "target"), asked.target, asked.answers, "one of the answers")
    elif asked.target is not None:
        hint = "there each answer is a class: `map` says which stands for what"
        check.add((*path, "target"), repr(asked.target), "it only where the question has {concept}", hint)
    if asked.model is not None:
        reader(check, (*path, "model"), asked.model)


def question(check: Checker, path: Path, template: str) -> None:
    """A question about a text: with `{text}`, and nothing that nobody fills in."""
    if check.fails(*path):
        return
    if "text" not in placeholders.named(template):
        check.add(path, "a question without {text}", "{text} where the text to be judged stands")
    for name in placeholders.unfilled(template, NAMES):
        hint = did_you_mean(name.strip("{}"), NAMES)
        check.add(path, f"the placeholder {name}", "one of {text}, {prompt}, {concept}, {emotion}", hint)


def reader(check: Checker, path: Path, spec: object) -> None:
    """A causal language model that is there."""
    expected = "a causal language model: hub id, directory or zoo/NAME"
    if check.fails(*path):
        return
    known = Model(**spec.model_dump())  # type: ignore[attr-defined]
    if isinstance(check.node(path), dict):
        devices.device(check, (*path, "device"), known.device)
        path = (*path, "id")
    try:
        facts = models.facts(known)
    except ModelError as error:
        return check.add(path, str(error), expected)
    if facts.is_classifier:
        check.add(path, f"{known.id!r}, a classifier", expected, "`classifier: ID` judges by it")
    elif fault := next(checkpoints.of_model(facts), None):
        tell = check.note if fault.transient else check.add
        tell(path, fault.found, fault.expected, fault.hint)


OWN_FIELDS = ("model", "messages", "stream", "n", "logprobs", "top_logprobs")
"""Fields of a request that are not for `options`."""

SECRET = re.compile(r"key|token(?!s)|secret|password|auth|header", re.IGNORECASE)
"""What names a field that may hold a credential."""


def _llm(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """Rubrics with the text in them, one place where they are answered, to which texts and key may go."""
    asked = spec.llm
    assert asked is not None
    if isinstance(asked.rubric, str):
        question(check, (*path, "rubric"), asked.rubric)
    else:
        for name, text in asked.rubric.items():
            question(check, (*path, "rubric", name), text)
            if {"concept", "emotion"} & set(placeholders.named(text)):
                hint = "a rubric for each class needs no {concept}; one rubric with it is asked for each"
                check.add((*path, "rubric", name), "{concept} in the rubric of one class", "the class in words", hint)
    if isinstance(asked.coherence, str):
        question(check, (*path, "coherence"), asked.coherence)
    if (asked.local is None) == (asked.model is None):
        actual = "neither `model` nor `local`" if asked.local is None else "`model` and `local`"
        check.add(path, actual, "one of them", "model: NAME is a server's, local: zoo/NAME or a hub id is loaded here")
    if asked.local is not None:
        reader(check, (*path, "local"), asked.local)
        if asked.endpoint is not None:
            check.add((*path, "endpoint"), "an endpoint beside `local`", "one of them")
    elif why := hosts.judge_refusal(asked.endpoint):
        place: Path = (*path, "endpoint") if asked.endpoint is not None else path
        expected = "a server of this machine, or one that you name as well, at https://"
        check.add(place, why, expected, "OPENAI_BASE_URL names it; the key is in OPENAI_API_KEY, in no plan")
    for name in asked.options:
        where: Path = (*path, "options", name)
        if name in OWN_FIELDS:
            check.add(where, repr(name), "another field of the request", "it is nsteer's own", key=True)
        elif SECRET.search(name):
            check.add(where, repr(name), "no credential", "the key comes from OPENAI_API_KEY", key=True)


def _python(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """A function in a module that is there; nothing of it is run."""
    assert spec.python is not None
    check.distinct((*path, "classes"), spec.python.classes)
    if check.fails(*path, "function"):
        return
    try:
        file = functions.file_of(spec.python.function, FilePath(check.document.file).parent)
        if not functions.names(file, spec.python.function):
            actual = f"{spec.python.function!r}, a name that {file.name} does not define"
            check.add((*path, "function"), actual, "a function of the module")
    except ModelError as error:
        check.add((*path, "function"), str(error), "module:name of a function", "nothing of it runs when it is checked")


def _scores(check: Checker, plan: Plan, path: Path, spec: Judge) -> None:
    """Tables, and their key, that may be read and are as they were sent out."""
    given = spec.scores
    assert given is not None
    if spec.over == "all":
        check.add((*path[:-1], "over"), "'all'", "'continuation'", "a rater's table has the continuations")
    folder = FilePath(check.document.file).parent
    for field, file in (*(("tables", table) for table in given.tables), *([("key", given.key)] if given.key else [])):
        if not check.document.may_read(ratings.path_beside(folder, file)):
            return check.add((*path, field), f"{file!r}, outside", WITHIN, OUTSIDE)
    try:
        ratings.of_plan(given.tables, given.key, folder)
    except ExchangeError as error:
        for line in str(error).splitlines():
            check.add((*path, "tables"), line, "tables as they were sent out, with `score` filled in")


CHECKS: dict[str, Callable[[Checker, Plan, Path, Judge], None]] = {
    "classifier": _classifier,
    "rule": _rule,
    "choices": _choices,
    "llm": _llm,
    "python": _python,
    "scores": _scores,
}
"""Kind of judge -> what it must be."""
