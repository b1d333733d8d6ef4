"""What vectors stand for, and so the name of their axis: `emotion`, or `concept` in a study of something else.

The package says `emotion`, in its code and in the sentences it writes. This module turns that word into the study's
own, and back again, and nothing else does:

- names of arrays, dims and columns: `outward` on their way into a store, `inward` on their way out of one, and
  `of_arrays` for functions over labelled arrays;
- sentences: `word`, for what is said while an axis is `named`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

EMOTION, CONCEPT = "emotion", "concept"
AXES = (EMOTION, CONCEPT)

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

_current: ContextVar[str] = ContextVar("axis", default=EMOTION)


# ---- sentences --------------------------------------------------------------------------------------------------


def current() -> str:
    """The name of the axis of the current study."""
    return _current.get()


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
    """Says while it lasts that the current study has an axis of this name."""
    token = _current.set(name)
    try:
        yield
    finally:
        _current.reset(token)


def each(name: str, items: Iterable[T]) -> Iterator[T]:
    """Items one by one, each made while the axis is named so; who takes them need not have it named."""
    left = iter(items)
    while True:
        with named(name):
            try:
                item = next(left)
            except StopIteration:
                return
        yield item


_SAID = re.compile(r"\b(an )?emotion", re.IGNORECASE)


def word(text: str) -> str:
    """A sentence of the package as the current study has it: `an emotion of this plan` is `a concept of this plan` in
    one of concepts. Never for a text that holds labels, or other words of a user."""
    return text if current() == EMOTION else _SAID.sub(_as_concept, text)


def _as_concept(match: re.Match[str]) -> str:
    """`emotion` or `an emotion`, in capitals where it is, as CONCEPT."""
    phrase = match.group().replace("an ", "a ").replace("An ", "A ")
    return phrase.replace("emotion", "concept").replace("Emotion", "Concept").replace("EMOTION", "CONCEPT")


# ---- names ------------------------------------------------------------------------------------------------------


def outward_name(name: str, axis: str) -> str:
    """A name of the package's own as it is under an axis: `n_emotions` is `n_concepts`."""
    return name.replace(EMOTION, axis)


def renamed_records(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records with a field for the emotion, that field named as the current study has it."""
    return [{current() if name == EMOTION else name: value for name, value in record.items()} for record in records]


def inward(data: Any) -> Any:
    """Labelled arrays and tables of concepts as those of emotions, also as the values of lists and mappings."""
    return _renamed(data, CONCEPT, EMOTION)


def outward(data: Any, axis: str) -> Any:
    """Labelled arrays and tables of emotions as those of an axis, also as the values of lists and mappings."""
    return data if axis == EMOTION else _renamed(data, EMOTION, axis)


def _renamed(data: Any, old: str, new: str) -> Any:
    """Arrays whose names hold one word for the axis, under the other; what holds none is the same object."""
    if type(data) in (list, tuple):
        renamed = [_renamed(item, old, new) for item in data]
        return data if all(a is b for a, b in zip(renamed, data, strict=True)) else type(data)(renamed)
    if type(data) is dict:
        renamed = _renamed(list(data.values()), old, new)
        return data if all(a is b for a, b in zip(renamed, data.values(), strict=True)) else dict(zip(data, renamed))
    if not hasattr(data, "rename"):
        return data
    if hasattr(data, "columns"):  # a table
        return data.rename(columns=_names(data.columns, old, new)) if old in data.columns else data
    names = _names([*data.dims, *data.coords, *getattr(data, "data_vars", ())], old, new)
    return data.rename(names) if any({old, f"{old}s"}.intersection(str(name).split("_")) for name in names) else data


def _names(names: Iterable, old: str, new: str) -> dict[Any, str]:
    """The names that hold a word for the axis -> what they are under the other."""
    return {name: name.replace(old, new) for name in map(str, names) if old in name}


def of_arrays(function: Callable[P, R]) -> Callable[P, R]:
    """A function over arrays of emotions, as one that takes those of concepts too and answers in their words.

    A dim that it is told by name is that of the arrays: `over=("concept", "prompt")`.
    """

    @functools.wraps(function)
    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        given, named_ones = inward(list(args)), inward(dict(kwargs))
        if all(a is b for a, b in zip((*args, *kwargs.values()), (*given, *named_ones.values()), strict=True)):
            return function(*args, **kwargs)
        with named(CONCEPT):
            answer = function(*map(_dim, given), **{name: _dim(dims) for name, dims in named_ones.items()})
        return outward(answer, CONCEPT)

    return either


def _dim(given: Any) -> Any:
    """An argument that names the axis of concepts, or lists names of dims with it, as that of emotions."""
    if type(given) in (list, tuple):
        return type(given)(EMOTION if isinstance(dim, str) and dim == CONCEPT else dim for dim in given)
    return EMOTION if isinstance(given, str) and given == CONCEPT else given
