"""Checks of `methods`: how vectors are extracted."""

from __future__ import annotations

from nsteer.models.templates import shown
from nsteer.plan import placeholders
from nsteer.plan.check import fields
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import neutral_count, reads_instruction, sample_count
from nsteer.plan.placeholders import NAMES
from nsteer.plan.reader import Path
from nsteer.plan.schema import PARAMETERS, Method, Plan
from nsteer.plan.texts import TextSet
from nsteer.science import axis
from nsteer.science.axis import word
from nsteer.science.presets import PRESETS

PARAMETER_OF = {
    field: [kind for kind, own in PARAMETERS.items() if field in own]
    for field in sorted(set().union(*PARAMETERS.values()))
}
"""Field of an estimator -> the kinds that have it."""

LEAST = {"pca_difference": 2, "lda": 2}
"""Estimator -> fewest samples on a side that make it more than the mean difference."""


def all_methods(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Each method by itself. `emotions` is None where the plan's are in doubt."""
    for name, method in plan.methods.items():
        _method(check, name, method, emotions)
        _draws(check, plan, name, method)


def without_neutral(plan: Plan, texts: TextSet | None) -> Plan:
    """The plan whose methods read no neutral texts where their set has none, and neither number nor baseline asks."""

    def spare(method: Method) -> bool:
        asked = method.neutral_samples is not None or method.baseline == "neutral_mean" or method.project_out
        there = texts is None or (
            texts.neutral_passages if method.source == "comprehension" else texts.neutral_story_templates
        )
        return not asked and not there

    updates = {
        n: method.model_copy(update={"neutral_samples": 0}) for n, method in plan.methods.items() if spare(method)
    }
    for name, method in plan.methods.items():
        if method.samples == "all" and method.neutral_samples is None and name not in updates and texts is not None:
            updates[name] = method.model_copy(update={"neutral_samples": len(texts.neutral_passages)})
    return plan.model_copy(update={"methods": plan.methods | updates}) if updates else plan


def _method(check: Checker, name: str, method: Method, emotions: list[str] | None) -> None:
    path: Path = ("methods", name)
    if method.preset is not None:
        here = (*path, "preset") if isinstance(check.node(path), dict) else path
        check.known(here, method.preset, PRESETS, "a preset")
    pooling = method.pooling
    fields.pooling(check, (*path, "pooling"), pooling)
    neutral = neutral_count(method)
    if method.baseline == "neutral_mean" and neutral == 0 and not check.fails(*path, "baseline"):
        check.add((*path, "neutral_samples"), "0", "at least 1", "baseline neutral_mean needs neutral texts")
    if method.project_out and neutral < 2:
        check.add((*path, "neutral_samples"), str(neutral), "at least 2", "project_out needs neutral texts")
    _estimator(check, path, method, neutral, emotions)
    fields.decoding(check, (*path, "generate"), method.generate)
    if check.fails(*path, "source"):
        pass  # which of the two is not known
    elif method.source == "comprehension":
        if pooling.kind == "mid_generation" or pooling.over == "generated":
            actual = f"{pooling.kind} over {pooling.over}"
            check.add((*path, "pooling"), actual, "a pooling of a text that is read", "comprehension generates nothing")
        _passages(check, path, method, neutral, emotions or [])
    else:
        if method.samples == "all":
            check.add((*path, "samples"), "'all'", "a number", "only passages are there before they are written")
        _templates(check, (*path, "templates"), method)
    _context(check, path, method)
    _system_prompt(check, path, method)
    fields.chat(check, (*path, "chat"), method.chat)


def _context(check: Checker, path: Path, method: Method) -> None:
    """A text read alone only where there is an instruction to leave out, and by a pooling that needs none."""
    if method.context == "with_prompt" or check.fails(*path, "context") or check.fails(*path, "source"):
        return
    if method.source == "comprehension":
        check.add((*path, "context"), "text, with comprehension", "it only with generation", "passages are read alone")
    elif method.pooling.kind == "mid_generation" and not check.fails(*path, "pooling"):
        hint = "it falls back on the instruction's last token"
        check.add((*path, "context"), "text, with pooling mid_generation", "a pooling of the text alone", hint)


def swap(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Texts to read behind other instructions, and as many other instructions as are asked for."""
    if plan.measure is None or not plan.measure.swap or emotions is None or check.fails("measure"):
        return
    place, others = ("measure", "swap"), len(emotions) - 1
    if not check.fails("methods") and not any(reads_instruction(method) for method in plan.methods.values()):
        actual = f"{plan.measure.swap}, and no generated text is read behind its instruction"
        check.add(place, actual, "a method of source generation with context: with_prompt")
    elif plan.measure.swap > others:
        check.add(place, str(plan.measure.swap), f"at most the {others} other emotions")


def _system_prompt(check: Checker, path: Path, method: Method) -> None:
    """A system turn that is shown, and whose placeholders are filled in."""
    if method.system_prompt is None or check.fails(*path, "system_prompt"):
        return
    place = (*path, "system_prompt")
    if method.chat == "never" and not check.fails(*path, "chat"):
        check.add(place, "a system turn, with chat: never", "a chat template, which has turns", "chat: auto")
    if not check.fails(*path, "source"):
        fields.placeholders(check, place, method.system_prompt, NAMES[method.source])


def _draws(check: Checker, plan: Plan, name: str, method: Method) -> None:
    """Draws of another method, where both sample."""
    path: Path = ("methods", name, "draws_of")
    if method.draws_of is None or check.fails("methods", name, "generate"):
        return
    other = plan.methods.get(method.draws_of)
    if not check.known(path, method.draws_of, check.names("methods"), "a method of this plan"):
        return
    if not method.generate.sample or method.source == "comprehension":
        check.add(path, f"{method.draws_of!r}, where nothing is drawn", "it only with `sample: true`")
    elif method.draws_of == name:
        check.add(path, f"{name!r}, the method itself", "another method")
    elif other is not None and other.draws_of is not None:
        check.add(path, f"{method.draws_of!r}, which uses those of {other.draws_of!r}", "a method with its own draws")


def _estimator(check: Checker, path: Path, method: Method, neutral: int, emotions: list[str] | None) -> None:
    """What an estimator is given and has no use for, and what it needs and is not given."""
    kind, given = method.estimator.kind, check.node((*path, "estimator"))
    alone, against_neutral = emotions is not None and len(emotions) < 2, method.baseline == "neutral_mean"
    if method.baseline == "rest" and alone:
        actual, hint = word("rest, with one emotion"), word("name more `emotions`")
        check.add((*path, "baseline"), actual, "a baseline that exists", hint)
    if method.labels == "shuffled" and alone and not against_neutral:
        check.add((*path, "labels"), "shuffled, with one label", "at least two labels", "baseline: neutral_mean")
    if check.fails(*path, "estimator", "kind") or check.fails(*path, "baseline"):
        return
    for field in given if isinstance(given, dict) else ():
        if field != "kind" and field in PARAMETER_OF and kind not in PARAMETER_OF[field]:
            owners = PARAMETER_OF[field]
            only = f"only {' and '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
            check.add((*path, "estimator", field), str(given[field]), f"no `{field}` with {kind}", only)
    if kind == "mean_difference":
        return
    if method.baseline in ("grand_mean", "none"):
        place = "estimator" if check.node((*path, "baseline")) is None else "baseline"
        hint = "rest has the direction of grand_mean" if method.baseline == "grand_mean" else ""
        actual = f"{kind} with baseline {method.baseline}"
        check.add((*path, place), actual, "baseline neutral_mean or rest: samples to set against", hint)
    least = LEAST.get(kind, 1) + method.estimator.centre
    few = min((sample_count(method, check.texts, emotion) for emotion in emotions or ()), default=least)
    few = few if method.samples == "all" else method.samples
    if few < least:
        check.add((*path, "samples"), str(few), f"at least {least}", f"{kind} needs them")
    if against_neutral and kind == "pca_difference" and neutral != method.samples:
        actual = f"{neutral} beside {method.samples} samples"
        check.add((*path, "neutral_samples"), actual, "as many as `samples`", f"{kind} pairs them by number")
    elif against_neutral and method.neutral_samples is not None and 0 < neutral < least:
        check.add((*path, "neutral_samples"), str(neutral), f"at least {least}", f"{kind} needs them")


def _passages(check: Checker, path: Path, method: Method, neutral: int, emotions: list[str]) -> None:
    if check.texts is None:
        return
    groups = {e: check.texts.passages.get(e, []) for e in emotions if e in check.texts.emotions}
    least = 1 if method.samples == "all" else method.samples
    short = [f"{label} ({len(group)})" for label, group in groups.items() if len(group) < least]
    if short:
        actual = f"{method.samples} samples, more than the passages of {', '.join(short[:4])}"
        check.add((*path, "samples"), actual, f"at most what text set {check.texts.name!r} holds")
    if len(check.texts.neutral_passages) < neutral and not check.fails(*path, "samples"):
        have = len(check.texts.neutral_passages)
        check.add(
            (*path, "neutral_samples"), str(neutral), f"at most the {have} neutral passages of {check.texts.name!r}"
        )


def _templates(check: Checker, path: Path, method: Method) -> None:
    texts = check.texts
    if isinstance(method.templates, list):
        templates = method.templates
        for i, template in enumerate(templates):
            if not set(axis.AXES).intersection(placeholders.named(template)):
                check.add((*path, i), repr(shown(template)), word("a template that holds {emotion}"))
            fields.placeholders(check, (*path, i), template, NAMES[method.source])
    else:
        named = ("story_templates", "topic_templates")
        if not check.known(path, method.templates, named, "a list of templates, or a field of the text set"):
            return
        templates = getattr(texts, method.templates) if texts else []
        if texts and not templates:
            check.add(path, f"no {method.templates} in text set {texts.name!r}", "templates")
    if texts is None:
        return
    spoken = [*templates, method.system_prompt or ""]
    if any("topic" in placeholders.named(template) for template in spoken) and not texts.topics:
        check.add(path, f"no topics in text set {texts.name!r}", "topics for the templates")
    if neutral_count(method) and not texts.neutral_story_templates:
        actual = f"no neutral_story_templates in text set {texts.name!r}"
        check.add(path, actual, "templates of the neutral baseline", "or neutral_samples: 0")
