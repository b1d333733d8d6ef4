"""Turns a plan that is written in Python, as mappings and lists, into the same document as one read from a file.

Problems are located by their path in the mapping, since there are no lines. Imports neither torch nor xarray.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nsteer.errors import PlanError, Problem
from nsteer.plan import reader
from nsteer.plan.reader import Document, Mark, Path, spell


def document(data: Mapping[str, Any], anywhere: bool = False) -> Document:
    """The document of a mapping, built on the plan that its `extends` names; as `reader.read(strict=False)` makes one.

    What only Python knows is taken as what a file would say: tuples, ranges and arrays as lists, numbers of
    numpy as numbers, paths as text, keys as text. Anything else is a problem of the document.
    """
    taken = _Taken()
    taken_data = taken.taken(data, ())
    unextended = Document(
        taken_data,
        written(taken_data),
        "",
        taken.values,
        problems=tuple(taken.problems),
        refused=frozenset(taken.refused),
    )
    return replace(reader.extended(unextended, anywhere), anywhere=anywhere)


def written(data: Any) -> str:
    """JSON data as YAML: what the store keeps of a plan that was never a file."""
    from ruamel.yaml import YAML

    yaml, out = YAML(typ="safe", pure=True), io.StringIO()
    yaml.width, yaml.default_flow_style, yaml.sort_base_mapping_type_on_output = 120, False, False  # type: ignore[assignment]
    yaml.dump(data, out)
    return out.getvalue()


class _Taken:
    """Walks a value once; keeps what is no JSON data."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.refused: set[Path] = set()
        self.values: dict[Path, Mark] = {}
        self.count = 0
        self.open: list[int] = []  # the collections that the walk is in

    def taken(self, value: Any, path: Path) -> Any:
        self.count += 1
        self.values[path] = Mark("", 0, 0)
        if self.count > reader.MAX_VALUES or len(path) > reader.MAX_LEVELS:
            actual = f"more than {reader.MAX_VALUES:,} values, or than {reader.MAX_LEVELS} levels"
            raise PlanError([Problem(spell(path[:4]), actual, "a plan that a person could have written")])
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if value is None or type(value) in (bool, int, float, str):
            return value
        if id(value) in self.open:
            return self.refuse(path, "a collection inside itself")
        self.open.append(id(value))
        try:
            return self.inside(value, path)
        finally:
            self.open.pop()

    def inside(self, value: Any, path: Path) -> Any:
        if isinstance(value, Mapping):
            mapping: dict[str, Any] = {}
            for key, item in value.items():
                name = key if type(key) is str else str(key)
                if name in mapping:
                    self.problems.append(Problem(spell((*path, name)), f"{name!r} given twice", "each key once"))
                    continue
                mapping[name] = self.taken(item, (*path, name))
            return mapping
        if isinstance(value, list | tuple | range):
            return [self.taken(item, (*path, i)) for i, item in enumerate(value)]
        if hasattr(value, "tolist") and hasattr(value, "dtype"):  # of numpy, xarray, pandas
            return self.taken(value.tolist(), path)
        if isinstance(value, str | int | float):  # a subclass, such as an enum of text
            return next(of(value) for of in (str, int, float) if isinstance(value, of))
        return self.refuse(path, f"{type(value).__name__}")

    def refuse(self, path: Path, actual: str) -> None:
        self.problems.append(Problem(spell(path), actual, "JSON data: text, numbers, mappings, lists"))
        self.refused.add(path)
