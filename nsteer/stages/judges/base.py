"""What every kind of judge is given and gives: texts with what they are about, and scores by class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from nsteer.plan import placeholders
from nsteer.plan.check import Study, counts_for, steering_vectors
from nsteer.plan.schema import Judge
from nsteer.science.targets import Target

LIKELIEST = float("nan")
"""The `threshold` of a judge whose classes exclude each other: a text is of the likeliest one, whatever its score."""

BESIDE = {
    "mass": "of a judge that chooses among answers or numbers: probability on all of them, of all that could be said; "
    "NaN where it is not given",
    "coherence": "of a judge that rates it: how coherent the text is, 0 to 100",
}
"""What a judge may give beside scores, over the same labels: name -> meaning."""


class Asked(NamedTuple):
    """A text to be judged.

    model : label of the model that wrote it; prompt : what it was written to
    classes : those that are asked about, of a judge whose question names one
    """

    text: str
    prompt: str = ""
    model: str = ""
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Known:
    """What is known of a judge before it reads.

    identity : whatever its scores depend on, as JSON data: what a fingerprint is of
    classes : labels in the order of the scores; () where they are known only once it is loaded
    unit : what its scores are
    threshold : a text is of a class whose score is above this; LIKELIEST where classes exclude each other
    beside : names of BESIDE that it gives
    asks : whether its question names a class, so that each class is a question: `own` or `all`; "" where it does not
    bytes : what it weighs in memory
    device : where it is loaded; "" where nothing is
    said : settings that the store keeps beside
    private : what the judge itself needs to know, and no store
    """

    identity: Mapping[str, Any]
    classes: tuple[str, ...]
    unit: str
    threshold: float = LIKELIEST
    beside: tuple[str, ...] = ()
    asks: str = ""
    bytes: int = 0
    device: str = ""
    said: Mapping[str, Any] = field(default_factory=dict)
    private: Any = field(default=None, compare=False, repr=False)


class Reader(Protocol):
    """A judge that is loaded."""

    classes: tuple[str, ...]

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """`score` [text, class], and names of BESIDE likewise; NaN for an empty text and what was not asked.

        Raises ExecutionError for a text that it can not read, OutOfMemoryError where one alone is too much.
        """
        ...


@dataclass(frozen=True)
class Tools:
    """What a run lends to the judges that it loads.

    say : tells the user something, once
    trusted : whether whoever runs the plan lets it run Python code of its own
    likelihood : log P (nats) of each answer after each question, [question, answer], under a model: that of a label of
        the plan, or one of the judge's own
    write : what a model of the judge's own writes to each question
    ask : the replies of a judge's server to requests, in their order; none is sent twice
    All raise ModelError for what can not be had, ExecutionError for a text that can not be read.
    """

    say: Callable[[str], None]
    trusted: bool
    likelihood: Callable[..., np.ndarray]
    write: Callable[..., list[str]]
    ask: Callable[..., list[Mapping[str, Any]]]


def concepts(spec: Judge, study: Study) -> dict[str, tuple[str, ...]]:
    """Label of the axis `emotion`, of `edits`, or of a contrast that it filters -> the classes that tell it, by the
    `map` of a judge that is asked about each.

    Labels that the map gives none are left out.
    """
    given = spec.targets
    steered = dict.fromkeys(label for entry in study.plan.steer for _, label in steering_vectors(study.plan, entry))
    steered |= dict.fromkeys(study.plan.edits if study.plan.generate is not None else ())
    targets = {label: given.get(label, Target((label,))) for label in steered}
    told = {label: target.classes for label, target in targets.items() if target is not None}
    return told | filtered(spec, study)


def filtered(spec: Judge, study: Study) -> dict[str, tuple[str, ...]]:
    """Names of the directions whose answers a judge filters -> the class whose score counts there."""
    judges, classes = study.plan.all_judges(), dict[str, tuple[str, ...]]()
    for name, direction in study.plan.directions.items():
        by = direction.contrast.filter if direction.contrast is not None else None
        if by is not None and judges[by.judge] is spec and (own := counts_for(name, by, spec, (), asks=True)):
            classes[name] = (own,)
    return classes


def names_a_class(template: str) -> bool:
    """Whether a question is about a class."""
    return not {"concept", "emotion"}.isdisjoint(placeholders.named(template))


def filled(template: str, asked: Asked, concept: str = "") -> str:
    """A question about a text."""
    values = {"text": asked.text, "prompt": asked.prompt, "concept": concept, "emotion": concept}
    return placeholders.filled(template, values)


def blank(asked: Sequence[Asked], classes: Sequence[str]) -> np.ndarray:
    """Scores [text, class] of which none is known."""
    return np.full((len(asked), len(classes)), np.nan, np.float32)
