"""Judges: what reads a continuation and gives it a score for each class. One kind is one file here, one row of KINDS.

A kind says without reading anything what it is (`Known`: its identity for the fingerprint, its classes), and is loaded
when a cell needs it. All give the same: scores [text, class], and for some numbers beside them (BESIDE).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nsteer.plan.check import Study
from nsteer.plan.schema import Judge
from nsteer.stages.judges import choices, classifier, llm, python, rule, scores
from nsteer.stages.judges.base import BESIDE, LIKELIEST, Asked, Known, Reader, Tools, concepts

__all__ = ["BESIDE", "KINDS", "LIKELIEST", "Asked", "Kind", "Known", "Reader", "Tools", "concepts", "known", "load"]


@dataclass(frozen=True)
class Kind:
    """One kind of judge.

    known : what is known of a judge before it reads. Raises ModelError for one that is not there
    load : the judge itself. Raises ModelError
    """

    known: Callable[[Judge, Study], Known]
    load: Callable[[Judge, Known, Tools], Reader]


KINDS: Mapping[str, Kind] = {
    "classifier": Kind(classifier.known, classifier.load),
    "rule": Kind(rule.known, rule.load),
    "choices": Kind(choices.known, choices.load),
    "llm": Kind(llm.known, llm.load),
    "python": Kind(python.known, python.load),
    "scores": Kind(scores.known, scores.load),
}
"""Field of `plan.Judge` -> what it does."""


def known(spec: Judge, study: Study) -> Known:
    """What is known of a judge of a study before it reads. Raises ModelError."""
    return KINDS[spec.kind].known(spec, study)


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The judge, ready to read. Raises ModelError."""
    return KINDS[spec.kind].load(spec, about, tools)
