"""The capability passages and questions, by which what steering costs a model is measured: `capability.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nsteer.plan import reader

FILE = Path(__file__).with_name("capability.yaml")
RIGHT = "right"


@dataclass(frozen=True)
class Passages:
    """What is put to a model.

    passages : label -> its opening, and the rest that is scored after it
    items : label -> the question, and its answers by choice: `right`, then `wrong-1` and so on, as many in each
    """

    passages: dict[str, tuple[str, str]]
    items: dict[str, tuple[str, dict[str, str]]]

    @property
    def choices(self) -> list[str]:
        """The labels of the answers, the right one first."""
        return list(next(iter(self.items.values()))[1])

    def scored(self) -> dict[tuple[str, str], tuple[str, str]]:
        """What is scored: (label, choice) -> what stands before it, and it; of a passage the choice is ""."""
        pairs = {(label, ""): (opening, f" {rest}") for label, (opening, rest) in self.passages.items()}
        for label, (question, answers) in self.items.items():
            pairs |= {(label, choice): (question, f" {answer}") for choice, answer in answers.items()}
        return pairs


@lru_cache(maxsize=1)
def shipped() -> Passages:
    """The passages and items that the package brings."""
    data: Any = reader.parse(FILE.read_text(encoding="utf-8"), FILE.name).data
    passages = {label: (passage["opening"], passage["rest"]) for label, passage in data["passages"].items()}
    items = {label: (item["question"], _answers(item)) for label, item in data["items"].items()}
    return Passages(passages, items)


def _answers(item: dict[str, Any]) -> dict[str, str]:
    return {RIGHT: item["right"], **{f"wrong-{i}": answer for i, answer in enumerate(item["wrong"], 1)}}
