"""Checks of the texts that models are given: each one's chat template takes them, its positions hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nsteer.errors import printable
from nsteer.models import checkpoints, contexts, templates
from nsteer.models.facts import Facts
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import neutral_count, sample_count
from nsteer.plan.placeholders import filled
from nsteer.plan.reader import Path
from nsteer.plan.schema import SIDES, Calibrated, Contrast, Method, Plan, Responses
from nsteer.science.axis import AXES
from nsteer.science.presets import NEUTRAL

SPECIAL = 8
"""Tokens that a tokenizer may add to a text, at most: what is shorter by bytes need not be counted."""


@dataclass(frozen=True)
class Given:
    """Texts that a part of the plan gives to every model, by the names to tell them by, and the tokens written after.

    path : where they are named in the plan; spoken : where `system` is, if not beside them
    """

    path: Path
    texts: dict[str, str]
    new: int = 0
    chat: str = "never"
    system: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    spoken: Path = ()


def all_given(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Every text of the plan beside every model. `emotions` is None where the plan's are in doubt."""
    every = (replace(texts, arguments=plan.chat_arguments) for texts in _given(check, plan, emotions or []))
    given = [texts for texts in every if not check.fails(*texts.path)]
    for facts in check.facts:
        for texts in given:
            if _taken(check, facts, texts):
                _fits(check, facts, texts)


def _given(check: Checker, plan: Plan, emotions: list[str]) -> Iterator[Given]:
    for name, method in plan.methods.items():
        if check.texts is not None and not any(check.fails("methods", name, field) for field in ("source", "samples")):
            yield _of_method(check, name, method, emotions)
    for i, entry in enumerate(plan.steer):
        path = check.steer_path(i)
        yield Given((*path, "prompts"), _prompts(check, entry.prompts), entry.generate.max_new_tokens, entry.chat)
        if isinstance(entry.strengths, Calibrated) and entry.strengths.prompts is not None:
            prompts = _prompts(check, entry.strengths.prompts)
            yield Given((*path, "strengths", "prompts"), prompts, entry.strengths.tokens, entry.chat)
    if plan.prompts is not None:
        new = plan.generate.max_new_tokens if plan.generate else 0
        yield Given(("prompts",), _prompts(check, plan.prompts), new, plan.chat)
    for name, direction in plan.directions.items():
        if direction.contrast is not None and direction.contrast.generate is not None:
            yield from _asked(name, direction.contrast, direction.contrast.generate)
        elif direction.contrast is not None:
            for side in SIDES:
                texts = _numbered(getattr(direction.contrast, side))
                yield Given(("directions", name, "contrast", side), texts, chat=direction.contrast.chat)
        if direction.mean is not None:
            yield Given(
                ("directions", name, "mean", "texts"), _numbered(direction.mean.texts), chat=direction.mean.chat
            )


def _asked(name: str, spec: Contrast, how: Responses) -> Iterator[Given]:
    """The questions of a contrast behind the longest system prompt of each side, and what is written after them."""
    place: Path = ("directions", name, "contrast")
    for side in SIDES:
        systems = [text for text in getattr(spec, side) if isinstance(text, str)]
        longest, spoken = max(systems, key=len, default=None), (*place, side)
        where = (*place, "generate", "questions")
        asked = {name: text for name, text in _numbered(how.questions).items() if _asks(text)}
        yield Given(where, asked, how.max_new_tokens, spec.chat, longest, spoken=spoken)


def _asks(text: Any) -> bool:
    """Whether a system turn may stand before it, and an answer behind; else the contrast's own check says so."""
    return isinstance(text, str) or (text[0]["role"] != "system" and not templates.begun(text))


def _of_method(check: Checker, name: str, method: Method, emotions: list[str]) -> Given:
    """The passages that a method reads, or its templates, filled with the longest words that they may get."""
    assert check.texts is not None
    texts, inputs = check.texts, dict[str, str]()
    if method.source == "comprehension":
        for emotion in (e for e in emotions if e in texts.passages):
            inputs |= {
                f"{emotion}, {i}": text
                for i, text in enumerate(texts.passages[emotion][: sample_count(method, texts, emotion)])
            }
        neutral = texts.neutral_passages[: neutral_count(method)]
        inputs |= {f"{NEUTRAL}, {i}": text for i, text in enumerate(neutral)}
        return Given(("methods", name), inputs, 0, method.chat, method.system_prompt)
    asked = method.templates if isinstance(method.templates, list) else getattr(texts, method.templates, [])
    emotion, topic = (max(words, key=len, default="") for words in (emotions, texts.topics))
    values = {**dict.fromkeys(AXES, emotion), "topic": topic}
    inputs = {templates.shown(template): filled(template, values) for template in asked}
    return Given(("methods", name), inputs, method.generate.max_new_tokens, method.chat, method.system_prompt)


def _prompts(check: Checker, prompts: object) -> dict[str, Any]:
    """Prompts by label; none where the set that is named is not known."""
    if isinstance(prompts, str):
        return dict(check.texts.prompts.get(prompts, {})) if check.texts is not None else {}
    return dict(prompts) if isinstance(prompts, dict) else {templates.shown(text): text for text in prompts or ()}  # type: ignore


def _numbered(texts: Any) -> dict[str, str]:
    return {str(i): text for i, text in enumerate(texts)}


def _taken(check: Checker, facts: Facts, given: Given) -> bool:
    """Whether the model's chat template takes the turns that the plan asks for; a problem where it refuses them."""
    if not given.texts:
        return False
    if facts.template is None or given.chat == "never":
        if said := next((text for text in given.texts.values() if not isinstance(text, str)), None):
            why = "chat: never" if given.chat == "never" else f"{facts.label}, which has no chat template"
            check.add(
                given.path,
                f"a conversation of {len(said)} turn{'s' * (len(said) > 1)}, with {why}",
                WITH_TURNS,
                "chat: always",
            )
            return False
        return True
    of_each_kind = {tuple(turn["role"] for turn in templates.turns_of(text)): text for text in given.texts.values()}
    try:
        for text in of_each_kind.values():
            _shows_system(facts, given, text)
    except templates.Refusal as error:
        said = printable(str(error))
        if given.system is None or any(not isinstance(text, str) for text in of_each_kind.values()):
            check.add(given.path, said, f"turns that the chat template of {facts.label} takes", "chat: never")
        else:
            actual, hint = (
                f"a system turn, with {facts.label}: {said}",
                "" if given.spoken else "put it into the templates",
            )
            check.add(given.spoken or (*given.path, "system_prompt"), actual, "none, or models that take one", hint)
        return False
    return True


def _shows_system(facts: Facts, given: Given, text: Any) -> None:
    """Raises Refusal for a system turn that the template leaves out, or that it refuses."""
    shown = _read(facts, given, text)
    for turn in templates.turns_of(text, given.system):
        if turn["role"] == "system" and turn["content"].strip() not in shown:
            raise templates.Refusal(f"the chat template leaves out the system turn {turn['content'][:40]!r}")


WITH_TURNS = "a chat template, which has turns"


def _read(facts: Facts, given: Given, text: Any) -> str:
    """A text as a model reads it: within its chat template, where it has one and the plan wants it."""
    if facts.template is None or given.chat == "never":
        return templates.shown(text)
    return templates.render(facts.template, templates.turns_of(text, given.system), None, given.arguments)


def _fits(check: Checker, facts: Facts, given: Given) -> None:
    """A text of more positions than a model has is a problem, or a note where the model goes on beyond them."""
    if facts.context is None:
        return
    largest = max(given.texts.values(), key=lambda text: len(templates.shown(text).encode(errors="replace")))
    bound = len(_read(facts, given, largest).encode(errors="replace")) + SPECIAL
    if contexts.positions_needed(bound, given.new) <= facts.context.positions:
        return
    count = checkpoints.counter(facts.name_or_path, facts.revision)
    if count is None:
        return  # said when it is to run
    untemplated = facts.template is None or given.chat == "never"
    lengths = {name: count(_read(facts, given, text), untemplated) for name, text in given.texts.items()}
    longest = max(lengths, key=lambda name: lengths[name])
    if contexts.positions_needed(lengths[longest], given.new) <= facts.context.positions:
        return
    shown = printable(longest if len(longest) <= 40 else longest[:39] + "…")
    actual = f"{shown!r}, of {lengths[longest]} tokens" + (f" and {given.new} new ones" if given.new else "")
    have = f"at most the {facts.context.positions} positions"
    if facts.context.table:
        hint = "a shorter text, or fewer max_new_tokens" if given.new else "a shorter text"
        check.add(given.path, actual, f"{have} that {facts.label} has", hint)
    else:
        check.note(given.path, actual, f"{have} that {facts.label} was made for", "beyond them its texts may be poor")
