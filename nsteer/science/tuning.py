"""Turns what settings scored into the settings to try next, and into the best: layer sets and strengths, one vector.

Numbers and labels alone: coarse grid first, then strengths between the best one and its neighbours, in the layer sets
that did best. What is proposed depends on the scores alone, so a search that is run again walks the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nsteer.science import statistics

Setting = tuple[str, float]
"""A layer set by its label, and a strength."""

REFINED = 2
"""Layer sets in which a round goes on."""

CLOSE = 0.05
"""Strengths nearer to each other than this, relative, are one."""


@dataclass(frozen=True)
class Score:
    """What a setting did: the mean of the objective, the perplexity ratio, and whether that is within its limit."""

    value: float
    ratio: float
    allowed: bool

    @property
    def known(self) -> bool:
        return math.isfinite(self.value)


def score(values: np.ndarray, ratios: np.ndarray, limit: float) -> Score:
    """Of one setting's continuations: the mean objective, and the geometric mean of their perplexity ratios."""
    known = np.log(ratios[np.isfinite(ratios) & (ratios > 0)])
    ratio = float(np.exp(known.mean())) if known.size else math.inf  # nothing was written: no text to be sure of
    return Score(float(np.mean(values)) if values.size else math.nan, ratio, ratio <= limit)


def best(scores: Mapping[Setting, Score]) -> Setting | None:
    """The allowed setting of the highest score; of equals the least strength, then the first layer set."""
    order = {layer_set: i for i, layer_set in enumerate(dict.fromkeys(label for label, _ in scores))}
    good = [setting for setting, score in scores.items() if score.allowed and score.known]
    return min(good, key=lambda setting: (-scores[setting].value, setting[1], order[setting[0]]), default=None)


def propose(
    scores: Mapping[Setting, Score], room: int, max_strength: float = math.inf, rest: float = 0.0
) -> list[Setting]:
    """At most `room` settings to try next; none where nothing is left between what was tried.

    most : the greatest strength that makes sense; rest : the strength that does nothing
    """
    sets = list(dict.fromkeys(label for label, _ in scores))
    own = {label: {s: score for (other, s), score in scores.items() if other == label} for label in sets}
    tops = {label: top for label in sets if (top := best({(label, s): score for s, score in own[label].items()}))}
    if tops:
        ranked = sorted(tops.values(), key=lambda setting: -scores[setting].value)[:REFINED]
        proposals = [(label, s) for label, at in ranked for s in around(sorted(own[label]), at, max_strength, rest)]
    else:  # everything is too strong: go down where it hurts least
        known = [setting for setting in scores if math.isfinite(scores[setting].ratio)] or list(scores)
        label = min(known, key=lambda setting: scores[setting].ratio)[0]
        lowest = min(own[label])
        proposals = [(label, tidy(rest + (lowest - rest) / part)) for part in (2, 4)]
    return [setting for setting in dict.fromkeys(proposals) if setting not in scores][: max(room, 0)]


def around(strengths: list[float], at: float, max_strength: float = math.inf, rest: float = 0.0) -> list[float]:
    """The strengths half-way from one to its neighbours; beyond the last, as far again."""
    i = strengths.index(at)
    below = strengths[i - 1] if i else rest
    step = at / below if i else 2.0
    above = strengths[i + 1] if i + 1 < len(strengths) else min(at * min(step, 2.0) ** 2, max_strength)
    middles = [tidy(math.sqrt(a * b) if a > rest else (a + b) / 2) for a, b in ((at, above), (below, at))]
    return [s for s in middles if all(abs(s - known) > CLOSE * known for known in strengths)]


def tidy(strength: float) -> float:
    """Four digits: a label that a person can type."""
    return float(f"{strength:.4g}")


def interval(values: np.ndarray, shares: bool, seed: int = 0) -> statistics.Interval:
    """The mean of an objective with its interval: Wilson's of shares, else a bootstrap over continuations."""
    if shares:
        return statistics.wilson(int(np.sum(values)), len(values))
    return statistics.bootstrap(np.mean, values, seed=seed)
