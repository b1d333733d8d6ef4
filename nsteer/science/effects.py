"""Turns changes of a judge's scores into paired effects: against controls, over strengths, by class.

Prompts are the independent units: everything is averaged to one number a prompt before it is tested. Arrays in,
arrays out; the axes are said.
"""

from __future__ import annotations

import numpy as np

from nsteer.science.metrics import nan_mean


def chosen_strength(score: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """For each prompt the strength that is best on the *other* prompts, of those it has: index [prompt], or -1.

    score : [strength, prompt]; usable : [strength, prompt], how well a text may be used at all (1) or not (0). Of
    strengths at which at least 80 % of the other prompts' texts are usable the one of the highest mean score; of equals
    the least.
    """
    out = np.full(score.shape[1], -1)
    for k in range(score.shape[1]):
        rest = np.arange(score.shape[1]) != k
        mean, share = nan_mean(score[:, rest], 1), nan_mean(usable[:, rest], 1)
        mean = np.where(((share >= 0.8) | np.isnan(share)) & ~np.isnan(score[:, k]), mean, np.nan)
        if not np.isnan(mean).all():
            out[k] = int(np.nanargmax(mean))
    return out


def at_chosen(values: np.ndarray, place: np.ndarray) -> np.ndarray:
    """values [strength, prompt, ...] at the strength of each prompt: [prompt, ...]; NaN where there is none."""
    picked = values[np.clip(place, 0, None), np.arange(values.shape[1])].astype(float)
    picked[place < 0] = np.nan
    return picked


def selectivity(change: np.ndarray, target: int) -> np.ndarray:
    """Change of the target class minus that of its strongest rival on the other prompts: [prompt, class] -> [prompt].

    The largest of several noisy changes is too large: chosen and measured on one prompt it would count as spill.
    """
    out = np.full(len(change), np.nan)
    others = [c for c in range(change.shape[1]) if c != target]
    for k in range(len(change)):
        rest = nan_mean(np.delete(change, k, 0)[:, others], 0)
        if len(others) and not np.isnan(rest).all():
            out[k] = change[k, target] - change[k, others[int(np.nanargmax(rest))]]
    return out


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
