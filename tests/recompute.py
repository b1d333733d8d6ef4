"""Recomputes rows of a claims table from arrays, by numpy and scipy alone and by the definitions of docs/science.md.

Nothing of nsteer's own arithmetic is used: sums over pairs are loops, tests are scipy's.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy import stats


def cv_cosine(samples: np.ndarray, neutral: np.ndarray) -> float:
    """samples [emotion, sample, d], neutral [sample, d]; a sample number is a fold; a plain ratio."""
    top, bottom = cv_parts(samples, neutral)
    return top / bottom


def cv_parts(samples: np.ndarray, neutral: np.ndarray) -> tuple[float, float]:
    groups = [*samples, neutral]

    def product(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [(x, y) for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)) if i != j]
        return float(np.mean([x @ y for x, y in pairs]))

    own = len(samples)
    to_neutral = [product(one, neutral) for one in samples]
    base = product(neutral, neutral)
    crossed = [
        product(groups[e], groups[f]) - to_neutral[e] - to_neutral[f] + base
        for e, f in itertools.combinations(range(own), 2)
    ]
    length = [product(groups[e], groups[e]) - 2 * to_neutral[e] + base for e in range(own)]
    return float(np.mean(crossed)), float(np.mean(length))


def jackknife_by_folds(samples: np.ndarray, neutral: np.ndarray) -> tuple[float, float, float]:
    """The cosine and Fieller's interval when folds are left out in turn."""
    top, bottom = cv_parts(samples, neutral)
    n = samples.shape[1]
    left = np.array([cv_parts(np.delete(samples, k, 1), np.delete(neutral, k, 0)) for k in range(n)])
    cov = (n - 1) / n * (left - left.mean(0)).T @ (left - left.mean(0))
    t = stats.t.ppf(0.975, n - 1)
    # |top - r bottom| <= t * sd(top - r bottom)
    a = bottom**2 - t**2 * cov[1, 1]
    b = -2 * (top * bottom - t**2 * cov[0, 1])
    c = top**2 - t**2 * cov[0, 0]
    low, high = sorted(np.roots([a, b, c]).real)
    ratio = top / bottom
    return ratio - (ratio * cov[1, 1] - cov[0, 1]) / bottom**2, low, high


def accuracy(samples: np.ndarray, neutral: np.ndarray) -> float:
    """Held-out nearest vector by cosine; a sample number of all emotions is left out together."""
    right = []
    base = neutral.mean(0)
    for k in range(samples.shape[1]):
        vectors = np.delete(samples, k, 1).mean(1) - base
        for e in range(len(samples)):
            x = samples[e, k] - base
            cosine = [x @ v / np.linalg.norm(x) / np.linalg.norm(v) for v in vectors]
            right.append(int(np.argmax(cosine)) == e)
    return float(np.mean(right))


def wilson(k: float, n: int) -> tuple[float, float]:
    """The two shares at which k of n is just at the edge of the score test."""
    z = stats.norm.ppf(0.975)
    roots = np.roots([n + z**2, -(2 * k + z**2), k**2 / n])
    return float(min(roots)), float(max(roots))


def sign_flips(values: np.ndarray) -> float:
    """Two-sided p of a mean of 0 over all signs."""
    means = [abs(np.mean(values * signs)) for signs in itertools.product((1, -1), repeat=len(values))]
    return float(np.mean(np.array(means) >= abs(values.mean()) - 1e-12))


def mean_t(values: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def verdict(low: float, high: float, above: float, below: float, p_adjusted: float) -> str:
    """The rule of docs/science.md of a row that tests something."""
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        return "inconclusive"
    inside, outside = above < low and high < below, high <= above or low >= below
    if not (inside or outside) or not p_adjusted <= 0.05:
        return "inconclusive"
    return "agrees" if inside else "differs"
