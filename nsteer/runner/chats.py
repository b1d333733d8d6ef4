"""Turns a model's chat template into what should be known of it: BOS tokens, the clock, a system's turn."""

from __future__ import annotations

from typing import Any

from nsteer.errors import ModelError
from nsteer.models import templates
from nsteer.models.facts import Facts
from nsteer.plan.prompts import encode


def look(facts: Facts, tokenizer: Any) -> dict[str, Any]:
    """What is known of a model's chats and positions, as JSON data.

    `chat_bos`: BOS tokens that lead a rendered chat before all but one are left out, None where it can not be rendered;
    `chat_system`: whether a system's turn is taken; `chat_reads_clock`: whether the day is part of a text
    """
    chat_facts: dict[str, Any] = {"positions": facts.context.positions if facts.context else None}
    try:
        template = templates.of_tokenizer(tokenizer)
    except ModelError:  # several, none of them the default: who uses one says so
        return {**chat_facts, "chat": True}
    if template is None:
        return {**chat_facts, "chat": False}
    return {
        **chat_facts,
        "chat": True,
        "chat_reads_clock": templates.CLOCK in template.text,
        "chat_system": _taken(template),
        "chat_bos": _leading(tokenizer),
    }


def _taken(template: templates.Template) -> bool:
    """Whether a template shows a system's turn."""
    marker = "qzxv"
    try:
        return marker in templates.render(template, templates.turns_of("a", marker))
    except ModelError:
        return False


def _leading(tokenizer: Any) -> int | None:
    try:
        encoding = encode(tokenizer, "a", "always")
    except ModelError:
        return None
    return encoding.bos + int(encoding.doubled)
