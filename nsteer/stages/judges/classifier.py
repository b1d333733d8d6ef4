"""The judge that is a text classifier of transformers: scores by the function of its own head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.plan.schema import Judge, Model
from nsteer.stages.judges.base import LIKELIEST, Asked, Known, Reader, Tools

UNITS = {
    "softmax": "probability of the class among all of them",
    "sigmoid": "probability of the class, each by itself",
    "regression": "raw score",
}
"""The head of a classifier, as `models.head` names it -> what its scores are."""


def facts(spec: Judge) -> models.Facts:
    """The facts of the classifier. Raises ModelError."""
    assert spec.classifier is not None
    return models.facts(Model(id=spec.classifier, revision=spec.revision))


def known(spec: Judge, study: Study) -> Known:
    """Its files, and the classes of its config. Raises ModelError."""
    model_facts = facts(spec)
    identity = {"classifier": model_facts.judging}
    more: dict[str, Any] = {"bytes": model_facts.bytes, "device": spec.device, "said": {"head": model_facts.head}}
    return Known(identity, model_facts.classes, UNITS[model_facts.head], LIKELIEST, **more)


class Loaded:
    """A loaded classifier as a judge."""

    def __init__(self, classifier: object):
        self._classifier = classifier
        self.classes: tuple[str, ...] = classifier.classes  # type: ignore[attr-defined]

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts; see `nsteer.executors.classifier`."""
        return {"score": self._classifier.probabilities([question.text for question in asked])}  # type: ignore[attr-defined]


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The classifier, if it is what `about` says. Raises ModelError."""
    from nsteer.executors.classifier import Classifier

    model_facts = facts(spec)
    with models.unchanged(model_facts):
        return Loaded(Classifier(model_facts.name_or_path, model_facts.revision, spec.device, say=tools.say))
