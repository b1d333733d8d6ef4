"""Turns what judges said of the project's own passages into a card of each: how well it tells known concepts apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence
from nsteer.science import outcomes, statistics

GROUP = "judge_passages"
"""The group of what judges say of passages whose concept is known: `score` (judge, emotion, sample, class)."""


@dataclass(frozen=True)
class Card:
    """How one judge tells passages of known concepts apart.

    rows : concepts, in the order of `counts`; columns : its classes; counts : passages of a concept that it gives to a
    class; targets : concept -> class that stands for it; silent : classes that it gives no passage to
    k, n : passages given to the class of their own concept, of those whose concept has one, with Wilson's interval
    """

    judge: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    targets: dict[str, str]
    silent: tuple[str, ...]
    k: int
    n: int
    low: float
    high: float
    unmatched: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.k / self.n


def card(judge: str, score: xr.DataArray, targets: dict[str, str | None]) -> Card | None:
    """The card of a judge from its scores (emotion, sample, class) of passages, NaN where there is none.

    targets : concept -> class, None where none stands for it. None where no concept has a class, or nothing was read.
    """
    names, classes = ([str(v) for v in score[dim].values.tolist()] for dim in ("emotion", "class"))
    known = {name: cls for name in names if (cls := targets.get(name)) in classes and cls is not None}
    said = _said(score.transpose("emotion", "sample", "class").values)
    counts = np.stack([(said == k).sum(1) for k in range(len(classes))], 1)
    hits = [(counts[i, classes.index(known[name])], counts[i].sum()) for i, name in enumerate(names) if name in known]
    k, n = (int(sum(column)) for column in zip(*hits, strict=True)) if hits else (0, 0)
    if not n:
        return None
    edges = statistics.wilson(k, n)
    return Card(
        judge,
        tuple(names),
        tuple(classes),
        tuple(tuple(map(int, row)) for row in counts),
        known,
        tuple(c for c, total in zip(classes, counts.sum(0), strict=True) if not total),
        k,
        n,
        edges.low,
        edges.high,
        tuple(name for name in names if name not in known),
    )


def _said(score: np.ndarray) -> np.ndarray:
    """Place of the likeliest class of each passage: [emotion, sample]; -1 where nothing was read."""
    known = ~np.isnan(score).all(-1)
    return np.where(known, np.where(np.isnan(score), -np.inf, score).argmax(-1), -1)


def cards(evidence: Evidence) -> tuple[Card, ...]:
    """The cards of the judges that have read passages, and whose classes can be matched with concepts."""
    if not evidence.has(GROUP):
        return ()
    kept = evidence.results[GROUP].score
    found = []
    for judge in kept.judge.values.tolist():
        score = kept.sel({"judge": judge}).dropna("class", how="all").load()
        targets = outcomes.class_map(score.emotion.values.tolist(), score["class"].values.tolist(), evidence.judge_map)
        if score.sizes["class"] and (made := card(str(judge), score, targets)):
            found.append(made)
    return tuple(found)
