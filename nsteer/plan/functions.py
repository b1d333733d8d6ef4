"""Turns `module:name` into the file that it stands in, which runs none of it; where it is trusted, into a function."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsteer.errors import ModelError


def file_of(function: str, folder: Path) -> Path:
    """The file of a function's module: in the plan's folder, else where Python looks. Nothing is imported.

    Raises ModelError when there is none.
    """
    names = function.partition(":")[0].split(".")
    for place in (folder, *map(Path, sys.path)):
        stem = (place or Path()).joinpath(*names)
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file():
                return file.resolve()
    raise ModelError(f"{function!r}: no module {'.'.join(names)!r} in {str(folder) or '.'} or where Python looks")


def names(file: Path, function: str) -> bool:
    """Whether a module's code defines the name of a function, at its top. Raises ModelError for one that is none."""
    name = function.partition(":")[2]
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise ModelError(f"{file.name}: {type(error).__name__}: {error}") from error
    identifiers = {getattr(node, "name", "") for node in tree.body}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            identifiers |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            identifiers |= {alias.asname or alias.name for alias in node.names}
    return name in identifiers


def digest(file: Path) -> str:
    """A hash of a module's code. Raises ModelError."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"{file.name} can not be read: {error.strerror or error}") from error


def load(function: str, file: Path, expected: str) -> Callable[..., Any]:
    """The function of a module whose code has this hash: this runs the module. Raises what that raises, too."""
    name = function.partition(":")[2]
    text = file.read_bytes()
    if hashlib.sha256(text).hexdigest() != expected:
        raise ModelError(f"{file.name} changed since it was checked: run again")
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader(f"nsteer_judge_{expected[:16]}", loader=None, origin=str(file))  # type: ignore[arg-type]
    )
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # dataclasses and pickles look there
    exec(compile(text, str(file), "exec"), module.__dict__)
    attribute = getattr(module, name, None)
    if not callable(attribute):
        raise ModelError(f"{file.name} has no function {name!r}")
    return attribute
