"""Turns what two judges said of the same texts into how far they agree, beyond chance.

Cohen's kappa (Cohen 1960) of verdicts, and with squared weights (Cohen 1968) of scores on one scale; the interval is a
bootstrap over prompts, since the texts of a prompt are alike.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xarray as xr

from nsteer.science.statistics import LEVEL, NAN, Interval


def kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two judges' verdicts [text]; NaN where both say one thing of every text, or nothing is known."""
    if not len(a):
        return NAN
    labels = np.unique(np.concatenate([a, b]))
    expected = float(sum((a == label).mean() * (b == label).mean() for label in labels))
    return NAN if expected == 1 else (float((a == b).mean()) - expected) / (1 - expected)


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """Cohen's kappa of two judges' scores [text] on one scale, disagreement counted by its square.

    1 - mean (a - b)² over that of all pairs of texts. NaN where that is zero.
    """
    if not len(a):
        return NAN
    expected = float(a.var() + b.var() + (a.mean() - b.mean()) ** 2)
    return NAN if expected == 0 else 1 - float(((a - b) ** 2).mean()) / expected


def agreement(
    a: xr.DataArray,
    b: xr.DataArray,
    of: Callable[[np.ndarray, np.ndarray], float] = kappa,
    units: str = "prompt",
    level: float = LEVEL,
    n: int = 1000,
    seed: int = 0,
) -> tuple[Interval, int]:
    """How far two judges agree over texts that both judged, with its interval; and the number of those texts.

    a, b : (…, prompt, …), NaN where a text was not judged. `n` of the interval counts units, the prompts; fewer than
    two give NaN edges.
    """
    a, b = xr.align(a, b, join="inner")
    first, second = (
        scores.transpose(units, ...).values.reshape(scores.sizes[units], -1) for scores in (a, b.transpose(*a.dims))
    )
    known = ~(np.isnan(first) | np.isnan(second))
    there = np.flatnonzero(known.any(1))
    pairs = [(first[i][known[i]], second[i][known[i]]) for i in there]

    def measured(which: np.ndarray) -> float:
        if not len(which):
            return NAN
        return of(*(np.concatenate([pairs[i][side] for i in which]) for side in (0, 1)))

    estimate = measured(np.arange(len(pairs)))
    method = f"percentile bootstrap over {units}s, {n} resamples"
    if len(pairs) < 2:
        return Interval(estimate, NAN, NAN, len(pairs), level, method), int(known.sum())
    rng = np.random.default_rng(seed)
    drawn = np.array([measured(rng.integers(0, len(pairs), len(pairs))) for _ in range(n)])
    if np.isnan(drawn).all():
        return Interval(estimate, NAN, NAN, len(pairs), level, method), int(known.sum())
    low, high = np.nanquantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), len(pairs), level, method), int(known.sum())
