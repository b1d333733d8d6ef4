"""What every check is given: the document, and the problems found in it so far."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nsteer.errors import Problem, did_you_mean
from nsteer.models import facts as models
from nsteer.plan import texts
from nsteer.plan.reader import Document, Path
from nsteer.plan.schema import Plan


class Checker:
    """The document, what of it failed by form, the problems so far, and what checks found out on the way.

    A path is one of the checked plan, unless it is said to be one of the document.
    """

    def __init__(self, document: Document):
        self.document = document
        self.problems: list[Problem] = list(document.problems)
        self.notes: list[Problem] = []
        self.failed: set[Path] = set()  # what failed by form, as paths of the document
        self.left_out: dict[Path, set[int]] = {}  # list -> the places in it that failed
        self.texts: texts.TextSet | None = None
        self.named: dict[Path, dict[str, Any]] = {}  # path of the plan -> the dataset whose texts stand there
        self.beside: dict[str, dict[str, str]] = {}  # of prompts: coordinate -> label -> value
        self.beside_passages: dict[str, dict[str, list[str]]] = {}  # coordinate -> emotion -> a value a passage
        self.facts: list[models.Facts] = []

    def add(self, path: Path, actual: str, expected: str, hint: str = "", key: bool = False) -> None:
        """One more problem, unless its place has already failed by form."""
        if not self.fails(*path):
            self.problems.append(self.document.problem(self.original(path), actual, expected, hint, key))

    def note(self, path: Path, actual: str, expected: str, hint: str = "") -> None:
        """Something that ends no plan and that whoever runs it should know, unless its place has failed by form."""
        if not self.fails(*path):
            self.notes.append(self.document.problem(self.original(path), actual, expected, hint))

    def known(self, path: Path, word: str, known: Iterable[str], what: str) -> bool:
        """Whether `word` is one of `known`; a problem, with the nearest of them, where it is not."""
        known = list(known)
        if word in known:
            return True
        self.add(path, repr(word), what, did_you_mean(word, known))
        return False

    def distinct(self, path: Path, labels: list) -> None:
        """A problem for every label that stands a second time."""
        for i, label in enumerate(labels):
            if label in labels[:i]:
                self.add((*path, i), f"{label!r} a second time", "each label once")

    def fails(self, *path: str | int) -> bool:
        """Whether what the plan says there failed by form, so that a default or stand-in is in its place."""
        return self.covers(self.original(path))

    def covers(self, place: Path) -> bool:
        """Whether a path of the document is, or lies within, what failed by form."""
        return any(place[: len(bad)] == bad for bad in self.failed)

    def given(self, plan: Plan, *fields: str) -> bool:
        """Whether the document says anything under one of these fields, in any form: what failed is not absent."""
        return any(bool(getattr(plan, name)) or self.fails(name) or bool(self.node((name,))) for name in fields)

    def names(self, name: str) -> list[str]:
        """The labels in a mapping of the document, those of entries that fail by form too."""
        node = self.node((name,))
        return list(node) if isinstance(node, dict) else []

    def node(self, path: Path) -> Any:
        """What the document holds at a path of the checked plan; None where it holds nothing."""
        data = self.document.data
        for key in self.original(path):
            try:
                data = data[key]
            except (LookupError, TypeError):
                return None
        return data

    def steer_path(self, i: int) -> Path:
        """The path of a steer entry: one alone may stand without a list."""
        return ("steer", i) if isinstance(self.node(("steer",)), list) else ("steer",)

    def original(self, path: Path) -> Path:
        """A path of the checked plan as a path of the document: list entries that failed are not in the plan."""
        place: Path = ()
        for key in path:
            if isinstance(key, int):
                for gone in sorted(self.left_out.get(place, ())):
                    key += gone <= key
            place = (*place, key)
        return place

    def reduced(self, path: Path) -> Path:
        """A path of the document as a path of the checked plan."""
        keys = [
            key - sum(gone < key for gone in self.left_out.get(path[:i], ())) if isinstance(key, int) else key
            for i, key in enumerate(path)
        ]
        return tuple(keys)
