"""Turns an error of form, as pydantic states it, into a problem in the words of plans."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel

from nsteer.errors import Problem, did_you_mean
from nsteer.plan.reader import Document, Path, kind
from nsteer.plan.schema import Plan


def problem(document: Document, path: Path, error: Any) -> Problem:
    """An error of pydantic's at a path of the document, as a problem of the plan."""
    context = error.get("ctx", {})
    if error["type"] == "nsteer":
        return document.problem(path, context["found"], context["expected"], context["hint"])
    if error["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        actual = f"the unknown key {path[-1]!r}"
        return document.problem(path, actual, "a field of the plan", did_you_mean(path[-1], known), key=True)
    if error["type"] == "missing":
        return document.problem(path, "nothing", EXPECTED_FIELD.get(path[-1], "a value"), "it is required")
    if error["loc"][-1] == "[key]":
        expected = _EXPECTED.get(error["type"], lambda _: error["msg"].lower())(context)
        return document.problem(path, kind(error["input"]), expected, key=True)
    if error["loc"][-1] == "str" and error["type"] == "string_type":
        return document.problem(path, kind(error["input"]), "text or a list")
    expected = _EXPECTED.get(error["type"], lambda _: error["msg"].lower())(context)
    hint = ""
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        hint = did_you_mean(
            error["input"], [w.strip(" '") for w in context["expected"].replace(" or ", ",").split(",")]
        )
        hint = hint if hint.startswith("did") else ""
    return document.problem(path, kind(error["input"]), expected, hint)


def _number(context: dict) -> str:
    return "a number"


_EXPECTED: dict[str, Callable[[dict], str]] = {
    "float_type": _number,
    "int_type": lambda _: "a whole number",
    "int_from_float": lambda _: "a whole number",
    "string_type": lambda _: "text",
    "bool_type": lambda _: "true or false",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "a mapping",
    "model_type": lambda _: "a mapping",
    "model_attributes_type": lambda _: "a mapping",
    "literal_error": lambda context: f"one of {context['expected'].replace(' or ', ', ')}",
    "greater_than": lambda context: f"a number above {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
    "string_pattern_mismatch": lambda _: "letters, digits, '.', '_' and '-', a letter or digit first",
    "string_too_long": lambda context: f"text of at most {context['max_length']} characters",
    "finite_number": _number,
    "string_too_short": lambda _: "text that is not empty",
}

EXPECTED_FIELD: dict[Any, str] = {
    "name": "a name for the study",
    "models": "a list of models",
    "store": "where results go, e.g. store/study.zarr",
    "strengths": "a list of strengths",
    "prompts": "prompts",
    "source": "generation or comprehension, or a `preset`",
    "op": "add, project_out, clamp, set_mean, affine or rotate",
    "direction": "a name in `directions`",
    "id": "a hub id, a model directory, a GGUF file or zoo/NAME",
    "question": "a question, with {text} where the text to be judged stands",
    "rubric": "a rubric, with {text} where the text to be judged stands",
    "function": "module:name of a function",
    "tables": "a CSV file, or a list of them",
    "classes": "a list of classes",
    "answers": "a list of answers, or class: spellings of its answer",
    "kind": "last, mean, mean_from or mid_generation",
    "positive": "a list of texts",
    "negative": "a list of texts",
    "texts": "a list of texts",
    "held_out": "prompts or seeds to score on, e.g. {prompts: others}",
}
"""Required field -> what should stand there."""


def _fields_at(path: Path) -> list[str]:
    """The field names that the schema knows at `path`."""
    section: Any = Plan
    for step in path:
        section = _peel(section)
        origin = typing.get_origin(section)
        if origin is list and isinstance(step, str):  # one mapping where a list may stand
            section = _peel(typing.get_args(section)[-1])
            origin = None
        if origin in (list, dict):
            section = typing.get_args(section)[-1]  # an index or a label
        elif isinstance(section, type) and issubclass(section, BaseModel) and step in named(section):
            section = section.model_fields[named(section)[str(step)]].annotation
        else:
            return []
    section = _peel(section)
    if typing.get_origin(section) is list:  # one mapping where a list may stand
        section = _peel(typing.get_args(section)[-1])
    return list(named(section)) if isinstance(section, type) and issubclass(section, BaseModel) else []


def named(section: type[BaseModel]) -> dict[str, str]:
    """The names of a section's fields in a plan, and in Python."""
    return {info.alias or name: name for name, info in section.model_fields.items()}


def _peel(annotation: Any) -> Any:
    """What stands inside `Annotated` and `Optional`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _peel(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        branches = [_peel(arg) for arg in typing.get_args(annotation) if arg is not type(None)]
        return next(
            (branch for branch in branches if isinstance(branch, type) and issubclass(branch, BaseModel)), branches[0]
        )
    return annotation
