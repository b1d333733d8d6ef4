"""Turns changes of a judge's scores into paired effects: against controls, over strengths, by class.

Prompts are the independent units: everything is averaged to one number a prompt before it is tested. Arrays in,
arrays out; the axes are said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from nsteer.science import statistics
from nsteer.science.metrics import nan_mean
from nsteer.science.statistics import Interval

FLIPS = 400
"""Draws of signs by which it is seen how much a mean varies by a choice that the other prompts make."""


def chosen_strength(score: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """For each prompt the strength that is best on the *other* prompts, of those it has: index [..., prompt], or -1.

    score : [..., strength, prompt]; usable : [strength, prompt], how well a text may be used at all (1) or not (0). Of
    strengths at which at least 80 % of the other prompts' texts are usable the one of the highest mean score; of equals
    the least.
    """
    mean, share = _of_others(score), _of_others(usable)
    known = ((share >= 0.8) | np.isnan(share)) & ~np.isnan(score) & ~np.isnan(mean)
    return np.where(known.any(-2), np.where(known, mean, -np.inf).argmax(-2), -1)


def _of_others(values: np.ndarray) -> np.ndarray:
    """For each prompt the mean of what is there over the others: [..., prompt]; NaN where nothing is."""
    known = ~np.isnan(values)
    there = np.where(known, values, 0.0)
    count, total = known.sum(-1, keepdims=True) - known, there.sum(-1, keepdims=True) - there
    return np.divide(total, count, out=np.full(values.shape, np.nan), where=count > 0)


def at_chosen(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """values [strength, prompt, ...] at the strengths `place` [..., prompt]: [..., prompt, ...]; NaN where there is
    none."""
    picked = values[np.clip(place, 0, None), np.arange(values.shape[1])].astype(float)
    picked[place < 0] = np.nan
    return picked


def selectivity(change: np.ndarray, target: int) -> np.ndarray:
    """Change of the target class minus that of its strongest rival on the other prompts: [..., prompt, class] ->
    [..., prompt].

    The largest of several noisy changes is too large: chosen and measured on one prompt it would count as spill.
    """
    rest = np.delete(change, target, -1)
    mean = np.swapaxes(_of_others(np.swapaxes(rest, -1, -2)), -1, -2)
    known = ~np.isnan(mean)
    if not rest.shape[-1]:
        return np.full(change.shape[:-1], np.nan)
    rival = np.where(known, mean, -np.inf).argmax(-1)[..., None]
    spill = np.take_along_axis(rest, rival, -1)[..., 0]
    return change[..., target] - np.where(known.any(-1), spill, np.nan)


def mean_at_chosen(values: np.ndarray, score: np.ndarray, usable: np.ndarray) -> Interval:
    """The mean over prompts of `values` at the strengths that `score` chooses, both [strength, prompt].

    The interval covers although the strengths are chosen: see `_widened`.
    """

    def each(signs: np.ndarray, values: np.ndarray, score: np.ndarray) -> np.ndarray:
        return signs * at_chosen(values, chosen_strength(signs[:, None] * score, usable))

    return _widened(each, values, score)


def mean_selectivity(change: np.ndarray, targets: Sequence[int], score: np.ndarray, usable: np.ndarray) -> Interval:
    """The mean over prompts of selectivity, all emotions together, at the strengths that `score` chooses.

    change : [strength, prompt, emotion, class]; targets : [emotion]; score : [strength, prompt]; see `_widened`
    """

    def each(signs: np.ndarray, change: np.ndarray, score: np.ndarray) -> np.ndarray:
        matrix = at_chosen(change, chosen_strength(signs[:, None] * score, usable)) * signs[..., None, None]
        return nan_mean(np.stack([selectivity(matrix[..., e, :], t) for e, t in enumerate(targets)]), 0)

    return _widened(each, change, score)


def _widened(each: Callable[..., np.ndarray], *arrays: np.ndarray) -> Interval:
    """The mean over prompts of `each(signs [flip, prompt], *arrays [strength, prompt, ...])`, with its interval.

    What is chosen for a prompt rests on the others, so that prompts are not independent, and Student's interval is too
    narrow where choices are about as good as each other. The error is the larger of Student's and what the mean varies
    by where all are equally good: the arrays centred over prompts, signs of prompts flipped, and chosen again for each.
    """
    prompts = arrays[0].shape[1]
    interval = statistics.mean_interval(each(np.ones((1, prompts)), *arrays)[0])
    if interval.n < 2:
        return interval
    centred = [array - np.expand_dims(nan_mean(array, 1), 1) for array in arrays]
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (FLIPS, prompts))
    pieces = np.array_split(signs, max(1, FLIPS * arrays[0][0].size // 2**20))
    spread = float(np.concatenate([nan_mean(each(piece, *centred), 1) for piece in pieces]).std())
    reach = max(
        interval.high - interval.estimate, spread * float(special.stdtrit(interval.df, (1 + interval.level) / 2))
    )
    return replace(interval, low=interval.estimate - reach, high=interval.estimate + reach)


def monotonicity(change: np.ndarray, strengths: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of change with strength for each prompt: [strength, prompt] -> [prompt].

    The unsteered continuation, change 0 at strength 0, is one of the points; fewer than three give NaN.
    """
    x = np.concatenate([[0.0], strengths])
    out = np.full(change.shape[1], np.nan)
    for k in range(change.shape[1]):
        y = np.concatenate([[0.0], change[:, k]])
        known = ~np.isnan(y)
        if known.sum() > 2:
            out[k] = kendall(x[known], y[known])
    return out


def area(change: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Mean change over how far the model was moved, from nothing to the furthest: [target, prompt] -> [prompt].

    reach : [target], such as calibrated KL, least first. Trapezoids, from no change at reach 0; a missing value at any
    target is one of the whole.
    """
    x = np.concatenate([[0.0], reach])
    y = np.concatenate([np.zeros((1, change.shape[1])), change])
    return ((y[1:] + y[:-1]) / 2 * np.diff(x)[:, None]).sum(0) / x[-1]


def kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b; NaN where all are equal."""
    row, column = np.triu_indices(len(x), 1)
    a, b = np.sign(x[row] - x[column]), np.sign(y[row] - y[column])
    scale = float(np.sqrt((a != 0).sum() * (b != 0).sum()))
    return float((a * b).sum()) / scale if scale else float("nan")


def off_target(matrix: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Half of the absolute change that goes to other classes than the target: [emotion, class] -> [emotion]."""
    rest = np.abs(matrix).copy()
    known = targets >= 0
    rest[np.flatnonzero(known), targets[known]] = 0.0
    return rest.sum(1) / 2


def diagonal_share(matrix: np.ndarray, targets: np.ndarray) -> float:
    """Share of emotions whose target class rises most of all: [emotion, class]; those without a class do not count."""
    known = (targets >= 0) & ~np.isnan(matrix).any(1)
    return float((matrix[known].argmax(1) == targets[known]).mean()) if known.any() else float("nan")
