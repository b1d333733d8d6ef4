"""Turns the commands into their reference page."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module

import click

HEAD = """# Command reference

Generated from the commands (`python -m nsteer.cli.reference`); a test holds it true. `nsteer COMMAND -h` says
the same on a terminal. Exit codes: 0 when all is well, 2 for a mistake in the plan or on the command line, 1
for everything else that went wrong.
"""


def page() -> str:
    """The page of all commands, in Markdown, in alphabetical order."""
    main = import_module("nsteer.cli").main
    return "\n".join([HEAD, *(line for name in sorted(main.commands) for line in _command(name, main.commands[name]))])


def _command(name: str, command: click.Command) -> Iterator[str]:
    arguments = [param for param in command.params if isinstance(param, click.Argument)]
    options = [param for param in command.params if isinstance(param, click.Option)]
    usage = " ".join(["nsteer", name, *["[OPTIONS]"] * bool(options), *map(_argument, arguments)])
    said, _, example = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    yield f"## {name}\n\n```text\n{usage}\n```\n\n{said.strip()}\n"
    if options:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{_option(option)}` | {_meaning(option)} |" for option in options)
        yield ""
    if example:
        yield f"Example:\n\n```text\n{inspect.cleandoc(example)}\n```\n"


def _argument(argument: click.Argument) -> str:
    shown = argument.metavar or (argument.name or "").upper()
    shown += "..." if argument.nargs == -1 and not shown.endswith("...") else ""
    return shown if argument.required or shown.startswith("[") else f"[{shown}]"


def _option(option: click.Option) -> str:
    value = "" if option.is_flag else f" {option.metavar or _kind(option.type)}"
    return ", ".join([*option.opts, *option.secondary_opts]) + value.replace("|", "\\|")


def _kind(kind: click.ParamType) -> str:
    return "|".join(map(str, kind.choices)) if isinstance(kind, click.Choice) else kind.name.upper()


def _meaning(option: click.Option) -> str:
    return (option.help or "").replace("|", "\\|")
