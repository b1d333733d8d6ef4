"""Checks of fields that stand in several sections of a plan: `chat`, `pooling`, `generate`, `when` and the like."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from nsteer.models.templates import shown
from nsteer.plan import placeholders as filling
from nsteer.plan import positions
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.schema import Calibrated, Editing, Generate, Span, When
from nsteer.program.ops import MAX_STRENGTH, REFERENCED, UNSCALED
from nsteer.science.axis import AXES, current


def chat(check: Checker, path: Path, chat: str) -> None:
    """A chat template in every model of a plan that asks for one."""
    for facts in check.facts:
        if chat == "always" and not facts.has_chat_template:
            check.add(path, f"{facts.label}, which has no chat template", "models with one", "chat: auto")


def placeholders(check: Checker, path: Path, template: str, known: Sequence[str]) -> None:
    """Nothing in braces that would go to the model as it stands."""
    for placeholder in filling.unfilled(template, known):
        offered = [name for name in known if name not in AXES or name == current()]
        expected = f"no placeholder but {' and '.join(f'{{{name}}}' for name in offered)}"
        check.add(path, placeholder, expected, f"{{{placeholder}}} for braces that are meant as they stand")


def prompt_set(check: Checker, path: Path, prompts: Any) -> None:
    """Prompts that are named are a set of the texts."""
    if isinstance(prompts, str) and check.texts is not None:
        what = f"a prompt set of the text set {check.texts.name!r}, a list, or label: prompt"
        check.known(path, prompts, check.texts.prompts, what)


def decoding(check: Checker, path: Path, generate: Any) -> None:
    """The knobs of sampling only where it samples."""
    if generate.sample or check.fails(*path, "sample"):
        return
    for field in ("temperature", "top_p", "top_k"):
        if check.node((*path, field)) is not None:  # said here, not by a preset
            value = getattr(generate, field)
            check.add((*path, field), f"{value} in greedy decoding", "it only with `sample: true`")


def pooling(check: Checker, path: Path, spec: Any) -> None:
    """`k` where the kind of pooling has one, and nowhere else."""
    if check.fails(*path, "kind"):
        return
    if spec.kind == "mean_from" and spec.k is None:
        check.add((*path, "k"), "nothing", "the first position that counts", "mean_from needs `k`")
    if spec.kind == "mean_last" and not spec.k:
        check.add((*path, "k"), str(spec.k or "nothing"), "how many positions count", "mean_last needs `k`, 1 at least")
    if spec.kind not in ("mean_from", "mean_last") and spec.k is not None:
        check.add((*path, "k"), str(spec.k), f"no `k` with {spec.kind}", "only mean_from and mean_last have it")
    if spec.kind == "mid_generation" and spec.sought:
        check.add((*path, "over"), "a part of the text", "no `over` with mid_generation")
    if isinstance(spec.over, Span) and (spec.over.text is None) == (spec.over.turn is None):
        check.add((*path, "over"), "both" if spec.over.text else "neither", "exactly one of `text` and `turn`")


def pooling_of_prompt(check: Checker, path: Path, spec: Any, hint: str) -> None:
    """A pooling where no token is generated."""
    pooling(check, path, spec)
    if spec.kind == "mid_generation" or spec.over == "generated":
        check.add(path, f"{spec.kind} over {spec.over}", "a pooling of a prompt", hint)


Rule = tuple[tuple[str, ...], Path, str, str, str]
"""Fields that a rule looks at beside the one that it is about; that one's path; found, expected, hint."""


def rules(edit: Editing) -> Iterator[Rule]:
    """What in an edit does not go together, whoever asks for it."""
    if edit.op in UNSCALED and "scale" in edit.model_fields_set:
        yield (), ("scale",), edit.scale, f"no scale with {edit.op}", f"its strength is {UNSCALED[edit.op]}"
    if edit.site != "resid_post" and (edit.op in REFERENCED or edit.scale == "reference_norm"):
        actual = f"{edit.site} with {edit.op if edit.op in REFERENCED else edit.scale}"
        yield (), ("site",), actual, "resid_post", "its reference is measured at the output of blocks"
    if edit.norm_skip and edit.scale != "stream_norm":
        yield ("scale",), ("norm_skip",), str(edit.norm_skip), "it only with `scale: stream_norm`", ""
    if edit.when is not None:
        yield from _of_condition(edit.when)


def _of_condition(when: When) -> Iterator[Rule]:
    """A condition that says something, and can hold."""
    looks, gated = ("when.above", "when.below", "when.after"), when.above is not None or when.below is not None
    if not gated and when.after is None:
        yield looks, ("when",), "no `above`, no `below` and no `after`", "a condition", "when: {above: 0.0}"
    elif not gated:
        for name in sorted({"direction", "of"} & when.model_fields_set):
            yield looks, ("when", name), str(getattr(when, name)), "it only with `above` or `below`", ""
    elif when.above is not None and when.below is not None and when.above > when.below:
        yield looks, ("when",), f"above {when.above} and below {when.below}", "a range that holds something", ""


def edit(check: Checker, path: Path, edit: Editing, prompts: Any, chat: str, new: int | None) -> None:
    """What every edit is held to. `prompts` and `chat` say in what, `new` how many tokens are generated (None: none,
    nor could be)."""
    for looks, place, actual, expected, hint in rules(edit):
        if not any(check.fails(*path, *look.split(".")) for look in looks):
            check.add((*path, *place), actual, expected, hint)
    schedule(check, path, edit, new is not None)
    check_positions(check, (*path, "positions"), edit.positions, prompts, chat, new or 0)
    if positions.prompted(edit.positions) or check.fails(*path, "positions"):
        return
    if new is None:
        check.add((*path, "positions"), "generated", "positions of the prompt", "the plan generates nothing")
    elif new == 1:
        hint = "the first new token comes from the prompt's last position"
        check.add((*path, "positions"), "generated, with max_new_tokens 1", "a position that exists", hint)


MEASURES = ("kl", "perplexity_ratio")
"""What calibrated strengths may be given by."""


def strengths(check: Checker, path: Path, given: Calibrated | list[float], edit: Editing) -> None:
    """Each strength once; of calibrated ones one kind of target, over tokens that there are."""
    if isinstance(given, list):
        return check.distinct(path, given)
    named = [name for name in MEASURES if getattr(given, name) is not None or check.fails(*path, name)]
    if len(named) != 1:
        actual = "both of them" if named else "neither kl nor perplexity_ratio"
        check.add(path, actual, "targets of one kind", f"{path[-1]}: {{kl: [0.3, 1.0]}}")
    for name in named:
        check.distinct((*path, name), getattr(given, name) or [])
    if given.prompts is not None:
        prompt_set(check, (*path, "prompts"), given.prompts)
    end = MAX_STRENGTH.get(edit.op, math.inf)
    if given.max_strength is not None and edit.op in UNSCALED and given.max_strength > end:
        expected = f"at most {end:g}"
        check.add((*path, "max_strength"), f"{given.max_strength:g} with {edit.op}", expected, UNSCALED[edit.op])
    if not positions.prompted(edit.positions) and given.tokens == 1:
        hint = "the first token comes from the prompt"
        check.add((*path, "tokens"), "1, with positions generated", "at least 2", hint)


def seeds(check: Checker, path: Path, generate: Generate, given: list[int]) -> None:
    """Each seed once, and several only where it samples."""
    check.distinct((*path, "seeds"), given)
    if len(given) > 1 and not generate.sample and not check.fails(*path, "generate", "sample"):
        check.add((*path, "seeds"), f"{len(given)} seeds in greedy decoding", "one", "or generate: {sample: true}")


def schedule(check: Checker, path: Path, edit: Editing, generates: bool) -> None:
    """One shape, over tokens that are generated and edited."""
    schedule, place = edit.schedule, (*path, "schedule")
    if schedule is None or any(check.fails(*place, name) for name in ("first", "linear", "half_life")):
        return
    given = [name for name in ("first", "linear", "half_life") if getattr(schedule, name) is not None]
    if not given:
        check.add(place, "an empty mapping", "first, linear or half_life")
    elif {"linear", "half_life"} <= set(given):
        check.add(place, "linear and half_life", "one of them")
    elif not generates:
        check.add(place, "a schedule", "`generate`", "it counts the tokens that the model writes")
    elif not positions.written(edit.positions) and not check.fails(*path, "positions"):
        word = edit.positions if isinstance(edit.positions, str) else "of prompts"
        check.add(place, f"a schedule with positions {word}", "positions: all or generated")


def check_positions(check: Checker, path: Path, spec: Any, prompts: Any, chat: str, new: int) -> None:
    """Positions that there are: `prompts` and `chat` say in what, `new` how many tokens are generated (0: none)."""
    if check.fails(*path) or isinstance(spec, str):
        return
    texts = _texts(check, prompts)
    for inner, given in positions.said(spec):
        at = (*path, *inner)
        if not given and not check.node(at):  # else what it says failed by form
            check.add(at, "an empty mapping", "positions", "positions: {index: -1}")
        _window(check, at, given.get("from_"), given.get("to"))
        role = given.get("role")
        without = [facts.label for facts in check.facts if not facts.has_chat_template]
        if role is not None and (chat == "never" or without):
            actual = (
                f"{role}, with chat: never" if chat == "never" else f"{role}, and {without[0]} has no chat template"
            )
            check.add((*at, "role"), actual, "a chat template, which has roles", "chat: always")
        for i, words in enumerate(positions.many(given.get("text", []))):
            if texts is not None and not any(words in text for text in texts):
                place = (*at, "text", i) if isinstance(given["text"], list) else (*at, "text")
                check.add(place, f"{words!r}, which no prompt has", "text that occurs in a prompt")
        chosen = given.get("generated")
        if new and chosen is not None and chosen != "all":
            _of_generated(check, (*at, "generated"), chosen, new)


def _texts(check: Checker, prompts: Any) -> list[str] | None:
    """The prompts themselves; None where they are in doubt."""
    if isinstance(prompts, str):
        named = check.texts.prompts.get(prompts) if check.texts is not None else None
        return None if named is None else list(map(shown, named.values()))
    texts = prompts.values() if isinstance(prompts, dict) else prompts or []
    return [shown(text) for text in texts] or None


def _window(check: Checker, path: Path, first: int | None, last: int | None) -> None:
    if first is not None and last is not None and (first < 0) == (last < 0) and first >= last:
        check.add(path, f"from {first} to {last}", "a window that holds something", "`to` itself is left out")


def _of_generated(check: Checker, path: Path, chosen: Any, new: int) -> None:
    first, last = chosen.from_, chosen.to
    named = positions.many(chosen.index) if chosen.index is not None else []
    if first is None and last is None and not named and not check.node(path):
        check.add(path, "an empty mapping", "all, index, from or to")
    _window(check, path, first, last)
    latest = max([*named, first or 0])
    if latest >= new - 1:
        hint = "the last token that is written is never read again"
        check.add(path, f"token {latest}, with max_new_tokens {new}", f"tokens below {new - 1}", hint)
