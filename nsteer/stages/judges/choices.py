"""The judge that puts a question with given answers to a language model, unsteered: how probable is each answer.

Nothing is written. The probability of an answer is that of its tokens after the question, summed over its spellings;
scores are shares of what lies on all answers together, and that `mass` is kept beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.plan.schema import Choices, Judge, Model
from nsteer.stages.judges.base import LIKELIEST, Asked, Known, Reader, Tools, blank, concepts, filled, names_a_class

UNIT = "share of the probability that lies on the answers"

THIN = 0.1
"""A mass below which what a model says of the answers is a guess about what it would hardly say."""


def known(spec: Judge, study: Study) -> Known:
    """The question, the answers, and the model that reads; where it is the one that wrote, cells know it."""
    asked = spec.choices
    assert asked is not None
    own = asked.model
    model_facts = None if own is None else models.facts(Model(**own.model_dump(exclude={"device"})))
    identity = asked.model_dump(exclude={"model", "ask"}) | {
        "model": None if own is None or model_facts is None else {"identity": model_facts.judging, "dtype": own.dtype}
    }
    more: dict[str, Any] = {"beside": ("mass",)}
    more |= {} if own is None or model_facts is None else {"bytes": model_facts.bytes, "device": own.device}
    if not names_a_class(asked.question):
        return Known({"choices": identity}, tuple(asked.answers), UNIT, LIKELIEST, **more)
    classes = tuple(dict.fromkeys(name for few in concepts(spec, study).values() for name in few))
    return Known({"choices": identity}, classes, UNIT, 0.5, asks=asked.ask, **more)


def target(asked: Choices) -> str:
    """The answer that says yes."""
    return asked.target or next(iter(asked.answers))


def spellings(answer: Sequence[str]) -> list[str]:
    """The texts that are tried for an answer: as given, with a capital, with a space before."""
    stripped = [spelling.strip() for spelling in answer]
    both = [
        form
        for spelling in stripped
        for form in (spelling, spelling[:1].upper() + spelling[1:], spelling[:1].lower() + spelling[1:])
    ]
    return list(dict.fromkeys(form for spelling in both for form in (spelling, f" {spelling}")))


class Loaded:
    """The question, with a way to have it read."""

    def __init__(self, spec: Judge, about: Known, tools: Tools):
        assert spec.choices is not None
        self.asked, self.classes, self.asks, self.tools = spec.choices, about.classes, about.asks, tools
        self.answers = [spellings(forms) for forms in spec.choices.answers.values()]
        self.names = list(spec.choices.answers)
        self.told = False

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts, and the mass on the answers. Raises ModelError, ExecutionError."""
        score, mass = blank(asked, self.classes), blank(asked, self.classes)
        rows = [
            (i, j)
            for i, question in enumerate(asked)
            if question.text.strip()
            for j in ([self.classes.index(name) for name in question.classes] if self.asks else [-1])
        ]
        for model in dict.fromkeys(asked[i].model for i, _ in rows):
            mine = [(i, j) for i, j in rows if asked[i].model == model]
            questions = [filled(self.asked.question, asked[i], self.classes[j] if j >= 0 else "") for i, j in mine]
            share, total = self._shares(model, questions)
            for k, (i, j) in enumerate(mine):
                if j < 0:
                    score[i], mass[i] = share[k], total[k]
                else:
                    score[i, j], mass[i, j] = share[k, self.names.index(target(self.asked))], total[k]
        self._tell(mass)
        return {"score": score, "mass": mass}

    def _shares(self, model: str, questions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of each question, the share of each answer [question, answer], and the probability of all [question]."""
        read = self.tools.likelihood(model, self.asked.model, questions, self.answers, self.asked.chat)
        p = np.exp(read)
        total = p.sum(-1)
        # shares from logarithms, so that answers of 1e-60 have some too
        top = read.max(-1, keepdims=True)
        ratio = np.exp(read - np.where(np.isfinite(top), top, 0.0))
        return ratio / ratio.sum(-1, keepdims=True), total

    def _tell(self, mass: np.ndarray) -> None:
        told = mass[~np.isnan(mass)]
        if told.size and np.median(told) < THIN and not self.told:
            self.told = True
            self.tools.say(
                f"half of the questions have {np.median(told):.1g} or less of the probability on the answers, so "
                "that the shares say little: give the answers that the model would write (`mass` in the store)"
            )


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The question. The model is loaded when it is read."""
    return Loaded(spec, about, tools)
