"""Turns a template with `{name}` in it, a text or turns, into what it stands for: what is known is filled in, what is
not is named."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import TypeVar

from nsteer.science.axis import AXES

T = TypeVar("T", str, list[dict[str, str]])
"""A text, or the turns of a conversation."""

NAMES = {"generation": (*AXES, "topic"), "comprehension": AXES}
"""Source of a method -> the placeholders of its templates and system prompt."""

_NAME = r"[ \t]*[\w.\[\] -]*(?:![a-z])?(?::[^\s{}\"']*)?"
_FIELD = re.compile(rf"\{{\{{\{{({_NAME})\}}\}}\}}|\{{\{{({_NAME})\}}\}}|\{{({_NAME})\}}")
"""What looks like a placeholder: `{name}`, in doubled braces one that is meant as it stands. JSON and lists do not."""


def filled(template: T, values: Mapping[str, str]) -> T:
    """The template with its placeholders filled in, in one pass; `{{name}}` gives `{name}`. Of turns, what is said."""
    if isinstance(template, list):
        return [{**turn, "content": filled(turn["content"], values)} for turn in template]

    def filling(match: re.Match[str]) -> str:
        framed, doubled, name = match.groups()
        if doubled is not None:
            return f"{{{doubled}}}"
        if framed is not None:
            return f"{{{values[framed]}}}" if framed in values else match.group()
        return values.get(name, match.group())

    return _FIELD.sub(filling, template)


def named(template: T) -> list[str]:
    """The names of a template's placeholders, in their order, each once."""
    if isinstance(template, list):
        return list(dict.fromkeys(name for turn in template for name in named(turn["content"])))
    names = [match.group(1) or match.group(3) or "" for match in _FIELD.finditer(template) if match.group(2) is None]
    return list(dict.fromkeys(names))


def unfilled(template: T, known: Collection[str]) -> list[str]:
    """The placeholders of a template that nothing fills, as they are written."""
    return [f"{{{name}}}" for name in named(template) if name not in known]
