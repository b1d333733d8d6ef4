"""Turns what judges said of the project's own passages into a card of each: how well it tells known concepts apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence
from nsteer.science import statistics
from nsteer.science.targets import targets_of

GROUP = "judge_passages"
"""The group of what judges say of passages whose concept is known: `score` (judge, emotion, sample, class)."""


@dataclass(frozen=True)
class Card:
    """How one judge tells passages of known concepts apart.

    rows : concepts, in the order of `counts`; columns : its classes; counts : passages of a concept that it gives to a
    class; targets : concept -> classes that stand for it; silent : classes that it gives no passage to
    k, n : passages given to a class of their own concept, of those whose concept has one, with Wilson's interval
    """

    judge: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    targets: dict[str, tuple[str, ...]]
    silent: tuple[str, ...]
    k: int
    n: int
    low: float
    high: float
    unmatched: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        return self.k / self.n


def card(judge: str, score: xr.DataArray, targets: Mapping[str, Any], threshold: float | None = None) -> Card | None:
    """The card of a judge from its scores (emotion, sample, class) of passages, NaN where there is none.

    targets : concept -> class, as in `judge.map`; one that is told by classes that fall alone has none of its own
    threshold : a passage is of no class whose score is not above it
    None where no concept has a class, or nothing was read.
    """
    names, classes = ([str(v) for v in score[dim].values.tolist()] for dim in ("emotion", "class"))
    concept_targets = targets_of(names, classes, targets)
    known = {name: target.rises for name, target in concept_targets.items() if target is not None and target.rises}
    values = score.transpose("emotion", "sample", "class").values
    there = ~np.isnan(values).all(-1)
    said = _said(values, threshold)
    counts = np.stack([(said == k).sum(1) for k in range(len(classes))], 1)
    k = int(sum(counts[i, classes.index(c)] for i, name in enumerate(names) for c in known.get(name, ())))
    n = int(sum(there[i].sum() for i, name in enumerate(names) if name in known))
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


def _said(score: np.ndarray, threshold: float | None) -> np.ndarray:
    """Place of the likeliest class of each passage: [emotion, sample]; -1 where nothing was read, or none is above."""
    filled = np.where(np.isnan(score), -np.inf, score)
    return np.where(filled.max(-1) > (-np.inf if threshold is None else threshold), filled.argmax(-1), -1)


def cards(evidence: Evidence) -> tuple[Card, ...]:
    """The cards of the judges that have read passages, and whose classes can be matched with concepts."""
    if not evidence.has(GROUP):
        return ()
    kept = evidence.results[GROUP].score
    judge_cards = []
    for judge in map(str, kept.judge.values.tolist()):
        score = kept.sel({"judge": judge}).load().dropna("class", how="all").dropna("emotion", how="all")
        if not score.size:
            continue
        judge_card = card(judge, score, evidence.map_of(judge), evidence.judge_settings(judge).get("threshold"))
        judge_cards += [judge_card] if judge_card else []
    return tuple(judge_cards)
