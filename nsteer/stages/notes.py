"""Turns a study into what should be said of it before it runs: what forbids nothing, and one would not guess."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nsteer.models.templates import Turns, shown, turns_of
from nsteer.plan import placeholders
from nsteer.plan.check import Study
from nsteer.plan.prompts import prompt_set, sample_text, system_text
from nsteer.plan.schema.values import DRAWN
from nsteer.science import draws
from nsteer.stages import cells
from nsteer.stages.job import jobs


def notes(study: Study) -> list[str]:
    """What to say of a plan that can run, a sentence each."""
    return [*_dates(study), *_literal(study), *_few_draws(study)]


def _dates(study: Study) -> Iterator[str]:
    """Chat templates that write the date."""
    if study.plan.chat_date is not None:
        return
    for job in jobs(study):
        dates: dict[str, str] = {}
        for chat, turns in _conversations(study):
            dates |= cells.dated(job, chat, turns).get("dates", {})
        if dates:
            yield (
                f"{job.label}: its chat template writes the date ({', '.join(dates.values())}), so cells of another "
                f"day are other cells; `chat_date: '{study.moment:%Y-%m-%d}'` holds it"
            )


def _conversations(study: Study) -> Iterator[tuple[str, list[Turns]]]:
    """`chat`, and what a model is shown under it: of each method one text, and every prompt."""
    plan = study.plan
    for method in plan.methods.values():
        assert study.texts is not None
        first = (method, study.texts, plan.emotion_labels()[0], 0)
        yield method.chat, [turns_of(sample_text(*first), system_text(*first))]
    for chat, prompts in _prompts(study):
        yield chat, [turns_of(text) for text in prompts.values()]


def _prompts(study: Study) -> Iterator[tuple[str, dict[str, Any]]]:
    plan = study.plan
    for entry in plan.steer:
        yield entry.chat, prompt_set(entry.prompts, study.texts)
    if plan.prompts is not None:
        yield plan.chat, prompt_set(plan.prompts, study.texts)


def _literal(study: Study) -> Iterator[str]:
    """Prompts that hold a placeholder of templates: they are shown as they stand."""
    for name in placeholders.NAMES["generation"]:
        where = [label for _, few in _prompts(study) for label, text in few.items() if f"{{{name}}}" in shown(text)]
        if where:
            yield f"{{{name}}} in the prompt {where[0]!r} is not filled in: only templates and system prompts are"


def _few_draws(study: Study) -> Iterator[str]:
    """Several draws of a control, of which none can show what they are asked for."""
    plan = study.plan
    if plan.judge is None and not plan.judges:
        return
    for block in plan.steer:
        for kind in DRAWN:
            n = sum(cells.draw_of(control)[0] == kind for control in block.controls)
            if 1 < n < draws.enough():
                yield (
                    f"{kind}: {n} in {block.name or block.op}: of {n} draws p is {draws.p_among(0, n):.2g} at least, "
                    f"and an effect that agrees takes {draws.AGREEMENT:g}: {draws.enough()} draws of each control"
                )
