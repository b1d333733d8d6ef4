"""The judge that is people: scores that raters gave, brought back as tables and joined by the text that was rated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nsteer.errors import ExchangeError, ModelError
from nsteer.plan import ratings
from nsteer.plan.check import Study
from nsteer.plan.schema import Judge
from nsteer.stages.judges.base import Asked, Known, Reader, Tools, blank
from nsteer.system.fingerprints import fingerprint

UNIT = "mean of the raters, 0 to 1"


def known(spec: Judge, study: Study) -> Known:
    """What was rated, and how: the tables may be saved again. Raises ModelError for tables that can not be read."""
    assert spec.scores is not None
    try:
        tables = ratings.of_plan(spec.scores.tables, spec.scores.key, Path(study.document.file).parent)
    except ExchangeError as error:
        raise ModelError(str(error)) from error
    given = sorted([*pair, *scores] for pair, scores in tables.scores.items())
    said = {"raters": tables.raters, "texts": len(given)}
    threshold = spec.scores.threshold
    return Known({"scores": fingerprint(given)}, tuple(tables.concepts), UNIT, threshold, said=said, private=tables)


class Loaded:
    """What the raters said."""

    def __init__(self, about: Known, tools: Tools):
        self.given: ratings.Ratings = about.private
        self.classes, self.tools = about.classes, tools

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts; NaN for those that nobody rated."""
        out = blank(asked, self.classes)
        for i, question in enumerate(asked):
            for j, name in enumerate(self.classes):
                value = self.given.of(question.text, name) if question.text.strip() else None
                out[i, j] = np.nan if value is None else value
        if any(question.text.strip() for question, row in zip(asked, out, strict=True) if np.isnan(row).all()):
            self.tools.say("some texts were rated by nobody: missing values")
        return {"score": out}


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """What the raters said."""
    return Loaded(about, tools)
