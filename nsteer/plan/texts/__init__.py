"""Text sets: the templates, passages and prompts that a study shows to its models.

A text set is a YAML file; `nsteer` (for real models) and `zoo` (for the embedded ones) ship with the package,
and a plan may name any other file of the same form.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator

from nsteer.errors import PlanError, Problem, did_you_mean
from nsteer.plan import placeholders
from nsteer.plan.outlines import FOLDER as HERE
from nsteer.plan.outlines import shipped
from nsteer.plan.schema.datasets import one_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from nsteer.plan.reader import Document

__all__ = ["HERE", "TextSet", "find", "load", "shipped"]


def _filled(template: Any) -> Any:
    for name in placeholders.unfilled(template, placeholders.NAMES["generation"]):
        raise ValueError(f"no placeholder but {{emotion}} and {{topic}}, {{{name}}} for braces as they stand")
    return template


Template = Annotated[Any, PlainValidator(one_text), AfterValidator(_filled)]
"""A text with placeholders, or a conversation of such texts."""


Passage = Annotated[Any, PlainValidator(one_text)]
"""A text, or a conversation."""


class TextSet(BaseModel):
    """What a text-set file holds. Every list keeps its order; sample k uses item k modulo its length."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    language: str = "en"
    about: str = ""
    emotions: dict[str, str] = Field(description="emotion -> positive | negative | other")
    story_templates: list[Template] = Field(default=[], description="instructions that hold {emotion}")
    topic_templates: list[Template] = Field(default=[], description="instructions that hold {emotion} and {topic}")
    neutral_story_templates: list[Template] = Field(default=[], description="instructions without an emotion")
    topics: list[str] = []
    passages: dict[str, list[Passage]] = Field(default={}, description="texts that show an emotion without its name")
    neutral_passages: list[Passage] = []
    neutral_sentences: list[str] = []
    prompts: dict[str, dict[str, Passage]] = Field(default={}, description="set -> label -> prompt")
    scenario_targets: dict[str, dict[str, str | int]] = {}


def find(name: str, folder: Path | None = None) -> Path:
    """The file of a shipped text set, or of one named by its path (relative to `folder`).

    Raises LookupError with what to try when there is none.
    """
    if name in shipped():
        return HERE / f"{name}.yaml"
    for path in (Path(name), (folder or Path()) / name):
        if os.path.isfile(path):
            return path
    raise LookupError(did_you_mean(name, shipped()))


def load(path: Path) -> TextSet:
    """The text set in the file `path`. Raises PlanError with every problem, located."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError([Problem("", error.strerror or str(error), "a readable file", "", str(path))]) from None
    except UnicodeDecodeError as error:
        raise PlanError([Problem("", f"byte {error.start} that is not", "UTF-8 text", "", str(path))]) from None
    return _parsed(text, str(path))


@lru_cache(maxsize=8)
def _parsed(text: str, name: str) -> TextSet:
    """The text set that a file holds: by what stands in it, since a file may change while a process goes on."""
    from pydantic import ValidationError

    from nsteer.plan import reader

    document = reader.parse(text, name, strict=False)
    problems = list(document.problems)
    try:
        text_set = TextSet.model_validate(document.data)
    except ValidationError as error:
        problems += [
            _problem(document, problem) for problem in error.errors() if not document.refused & set(_above(problem))
        ]
    if problems:
        raise PlanError(problems)
    return text_set


def _above(error: ErrorDetails) -> list[tuple]:
    """The place of an error, and every place that it lies within."""
    return [error["loc"][:end] for end in range(len(error["loc"]) + 1)]


def _problem(document: Document, error: ErrorDetails) -> Problem:
    if error["type"] == "nsteer":
        context = error["ctx"]
        return document.problem(error["loc"], context["found"], context["expected"], "see docs/texts.md")
    expected = error["msg"].removeprefix("Value error, ").lower()
    return document.problem(error["loc"], repr(error["input"])[:60], expected, "see docs/texts.md")
