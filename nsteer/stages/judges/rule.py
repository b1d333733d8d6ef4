"""The judge that is a rule: words or patterns for each class, found in the text or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import regex

from nsteer.errors import ExecutionError
from nsteer.plan import rules
from nsteer.plan.check import Study
from nsteer.plan.schema import Judge
from nsteer.stages.judges.base import Asked, Known, Reader, Tools, blank

UNITS = {
    "hit": "1 where the rule finds the class, else 0",
    "count": "times that the rule finds the class",
    "per_token": "times that the rule finds the class, over the words and marks of the text",
}

TOKEN = regex.compile(r"\w+|[^\w\s]")
"""What `per_token` counts: words, and marks between them."""


def known(spec: Judge, study: Study) -> Known:
    """The rule's own text."""
    assert spec.rule is not None
    classes = tuple(dict.fromkeys([*spec.rule.words, *spec.rule.regex]))
    return Known({"rule": spec.rule.model_dump()}, classes, UNITS[spec.rule.score], threshold=0.0)


class Loaded:
    """The compiled patterns of each class."""

    def __init__(self, spec: Judge, classes: tuple[str, ...]):
        assert spec.rule is not None
        self.classes, self.score = classes, spec.rule.score
        self.patterns = rules.compiled(spec.rule)

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts. Raises ExecutionError for a pattern that takes longer than rules.SECONDS with one."""
        out = blank(asked, self.classes)
        for i, question in enumerate(asked):
            if not question.text.strip():
                continue
            tokens = len(TOKEN.findall(question.text)) if self.score == "per_token" else 1
            for j, name in enumerate(self.classes):
                out[i, j] = self._found(name, question.text) / max(tokens, 1)
        return {"score": out}

    def _found(self, name: str, text: str) -> int:
        try:
            return rules.count_matches(self.patterns[name], text, once=self.score == "hit")
        except TimeoutError:
            raise ExecutionError(
                f"a pattern of the class {name!r} takes longer than {rules.SECONDS:g} s with a text of {len(text)} "
                "characters: it runs away; write it without repeats within repeats"
            ) from None


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The rule, compiled."""
    return Loaded(spec, about.classes)
