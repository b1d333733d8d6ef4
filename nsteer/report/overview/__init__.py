"""Turns an open store into what people ask first: what was done, whether it worked, against which control.

    found = overview.overview_of(reporting.evidence(nsteer.open("store/quickstart.zarr")))
    found.answers[0].text, found.doses, found.layers, found.pairs

Nothing of it is about one paper: it is of any study, of conditions written by hand, of captures too.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsteer.report.claims.evidence import Evidence
from nsteer.report.overview.asked import of_the_paper, question_lines
from nsteer.report.overview.judging import Card, cards
from nsteer.report.overview.layers import Layers, layers
from nsteer.report.overview.pairs import RULE, Pair, pairs
from nsteer.report.overview.steered import UNDETERMINED, Answer, Dose, steered

__all__ = ["RULE", "Answer", "Card", "Dose", "Layers", "Overview", "Pair", "of_the_paper", "overview_of"]


@dataclass(frozen=True)
class Overview:
    """What a store has to say first.

    asked : sentences, what was done; answers : whether it worked, a line a setup or method; doses : by concept and
    strength; layers : by model and method; pairs : steered texts beside their unsteered continuations; cards : how well
    judges tell the project's own passages apart; axis : what vectors stand for, `emotion` or `concept`
    """

    name: str
    axis: str
    asked: tuple[str, ...]
    answers: tuple[Answer, ...]
    doses: tuple[Dose, ...]
    layers: tuple[Layers, ...]
    pairs: tuple[Pair, ...]
    cards: tuple[Card, ...]


def overview_of(evidence: Evidence, name: str = "", texts: int = 3) -> Overview:
    """The overview of a store, with so many pairs of texts."""
    axis, told = evidence.axis, layers(evidence)
    answers, doses = steered(evidence)
    shown_answers = (
        answers
        if any(answer.verdict != UNDETERMINED for answer in answers)
        else answers + tuple(o.answer(axis) for o in told)
    )
    return Overview(
        name, axis, question_lines(evidence), shown_answers, doses, told, pairs(evidence, texts), cards(evidence)
    )
