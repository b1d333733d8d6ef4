"""Turns the public functions and classes into their reference page: signatures and docstrings, by module."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from importlib import import_module
from itertools import groupby
from types import ModuleType
from typing import Any

HEAD = """# Python reference

Generated from the signatures and docstrings (`python -m nsteer.cli.reference`); a test holds it true. Dims of
arrays are named in parentheses, those without labels in brackets. Everything raised on purpose is an
`nsteer.errors.NsteerError`.
"""

MODULES = (
    "nsteer",
    "nsteer.store.results",
    "nsteer.vectors.hooks",
    "nsteer.vectors.exchange",
    "nsteer.science.analysis",
    "nsteer.science.separation",
    "nsteer.science.outcomes",
    "nsteer.report.claims",
    "nsteer.report.figures",
    "nsteer.science.metrics",
    "nsteer.science.statistics",
)
"""What an analyst meets, from the store down to arrays."""


def page() -> str:
    """The page of all modules, in Markdown."""
    return "\n".join([HEAD, *(line for name in MODULES for line in _module(import_module(name)))]).rstrip() + "\n"


def public(module: ModuleType) -> dict[str, Any]:
    """Name -> function or class that a module offers: those of `__all__`, or those it defines under a public name."""
    listed = getattr(module, "__all__", None)
    if listed is None:
        listed = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    offered = {name: getattr(module, name) for name in listed if not name.startswith("_")}
    return {name: value for name, value in offered.items() if inspect.isfunction(value) or inspect.isclass(value)}


def _module(module: ModuleType) -> Iterator[str]:
    yield f"## {module.__name__}\n\n{prose(module)}\n"
    for name, value in public(module).items():
        yield f"### `{module.__name__}.{name}`\n\n```text\n{signature(name, value)}\n```\n\n{prose(value)}\n"
        for inner, method in _methods(value).items():
            yield f"#### `{name}.{inner}`\n\n```text\n{signature(inner, method)}\n```\n\n{prose(method)}\n"


def _methods(kind: Any) -> dict[str, Any]:
    """The public methods and properties that a class itself defines and describes."""
    if not inspect.isclass(kind):
        return {}
    wanted = {name: value for name, value in vars(kind).items() if name == "__getitem__" or not name.startswith("_")}
    held = (property, cached_property)
    return {n: v for n, v in wanted.items() if (inspect.isfunction(v) or isinstance(v, held)) and v.__doc__}


def signature(name: str, value: Any) -> str:
    """`name(argument: type = default, …) -> type`, a line an argument where one line would not do."""
    if isinstance(value, property | cached_property):
        getter: Any = value.fget if isinstance(value, property) else value.func
        return f"property {name} -> {inspect.signature(getter).return_annotation}"
    if inspect.isclass(value) and issubclass(value, Exception):
        return f"class {name}(message)"
    whole = inspect.signature(value)
    kept = [parameter for parameter in whole.parameters.values() if parameter.name != "self"]
    returned = "" if inspect.isclass(value) else f" -> {whole.return_annotation}"
    kind = "class " if inspect.isclass(value) else ""
    arguments: list[str] = []
    for parameter in kept:
        if parameter.kind is parameter.KEYWORD_ONLY and not any(argument.startswith("*") for argument in arguments):
            arguments.append("*")
        arguments.append(_argument(parameter))
    line = f"{kind}{name}({', '.join(arguments)}){returned}"
    return (
        line
        if len(line) <= 100
        else "\n".join([f"{kind}{name}(", *(f"    {argument}," for argument in arguments), f"){returned}"])
    )


def _argument(parameter: inspect.Parameter) -> str:
    """An argument as it is written; its annotation is text already."""
    stars = "*" * (parameter.kind is parameter.VAR_POSITIONAL) + "**" * (parameter.kind is parameter.VAR_KEYWORD)
    default = "" if parameter.default is parameter.empty else " = " + _value(parameter.default)
    return f"{stars}{parameter.name}: {parameter.annotation}{default}"


def _value(value: Any) -> str:
    return "..." if repr(value).startswith("<") else repr(value).replace("'", '"')


PARAMETER = re.compile(r"^(\*{0,2}\w[\w, *]*?) : (.*)")


def prose(value: Any) -> str:
    """A docstring as Markdown: `name : meaning` becomes a list, what is set in by four spaces stays as it stands."""
    lines: list[str] = []
    listing = False
    said = (
        value.__doc__ if inspect.ismodule(value) else inspect.getdoc(value)
    )  # getdoc would take an example's indent away
    for line in _escaped(said or "").splitlines():
        if match := PARAMETER.match(line):
            lines += [""] * (not listing and bool(lines and lines[-1]))
            line = f"- `{match[1]}`: {match[2]}"
            listing = True
        elif listing and (not line or line.startswith(("Returns", "Raises", "The same"))):
            lines += [""] * bool(line)
            listing = False
        elif listing:
            line = f"  {line.strip()}"
        lines.append(line)
    return "\n".join(_fenced(lines))


def _escaped(text: str) -> str:
    """Text in which `<` is no markup; code in back quotes and examples are left alone."""
    pieces = re.split(r"(`[^`\n]*`|^ {4}.*$)", text, flags=re.M)
    return "".join(piece if i % 2 else piece.replace("<", "\\<") for i, piece in enumerate(pieces))


def _fenced(lines: list[str]) -> Iterator[str]:
    """Lines whose set-in blocks are fenced as text: as examples they have no session to run in."""
    for is_code, group in groupby(lines, lambda line: line.startswith("    ")):
        lines = [line.removeprefix("    ") for line in group]
        yield from ["```text", *lines, "```"] if is_code else lines
