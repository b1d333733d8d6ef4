"""How an emotion's samples and what they are set against become a direction: a function and a row of ESTIMATORS each.

All but the first need two groups of samples. Their vectors have the length of the gap between the two means along the
direction, so that one strength means one thing whatever the estimator. All are unchanged by a shift of the samples and
turn with them. Where too few samples are left the vector is a missing value (NaN).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nsteer.science.directions.baselines import mean

LEAST_SHRINKAGE = 1e-4
"""Ledoit-Wolf gives none to residuals that are +r and -r (two samples), where the covariance can not be inverted."""


@dataclass(frozen=True)
class Contrast:
    """An emotion at one layer and what it is set against; NaN rows are missing values.

    difference : mean minus baseline, [d_model]
    samples : the emotion's, [sample, d_model]
    against : groups of samples [sample, d_model] that weigh the same: the neutral ones, or each other emotion's
    """

    difference: np.ndarray
    samples: np.ndarray
    against: Sequence[np.ndarray]

    def sides(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Samples [row, d_model], sides [row] of 1 and -1, weights [row]: one half each side, groups within alike."""
        here = _there(self.samples)
        groups = [group for group in map(_there, self.against) if len(group)]
        rows = np.concatenate([here, *groups])
        sides = np.repeat([1.0, -1.0], [len(here), len(rows) - len(here)])
        shares = [np.full(len(here), 0.5 / max(len(here), 1))]
        shares += [np.full(len(group), 0.5 / len(groups) / len(group)) for group in groups]
        return rows, sides, np.concatenate(shares)

    def pairs(self) -> np.ndarray:
        """Sample k minus the mean of the samples of number k that it is set against: [pair, d_model], no NaN."""
        count = min(len(group) for group in (self.samples, *self.against))
        return _there(self.samples[:count] - mean(np.stack([group[:count] for group in self.against])))


def _there(samples: np.ndarray) -> np.ndarray:
    return samples[~np.isnan(samples).any(-1)].astype(np.float64)


def _along(direction: np.ndarray, difference: np.ndarray) -> np.ndarray:
    """`direction` [d_model] at the length of the gap between the means along it."""
    length = np.linalg.norm(direction)
    unit = direction / length if length > 0 else direction
    return unit * abs(unit @ difference)


def _hole(contrast: Contrast) -> np.ndarray:
    return np.full_like(contrast.difference, np.nan)


def mean_difference(contrast: Contrast) -> np.ndarray:
    """The emotion's mean minus its baseline (CAA).

    formula : `v = m_e - b_e`
    citation : Contrastive Activation Addition (2312.06681); Jeong 2026 (2604.04064)
    """
    return contrast.difference


def pca_difference(contrast: Contrast, *, centre: bool) -> np.ndarray:
    """The first principal component of paired differences, its sign towards the mean difference.

    Sample k is paired with sample k of the baseline (`rest`: with the mean of the others' samples k). About zero by
    default; with `centre` about the mean of the differences, where a shift that all pairs share is not seen: only what
    varies from pair to pair.

    formula : `v = argmax_{‖u‖=1} Σ_k ⟨u, d_k⟩²`, `d_k = x[e, k] - x[b, k]`; `⟨v, mean_k d_k⟩ >= 0`
    citation : Representation Engineering (2310.01405); `centre: true` is repeng's `pca_diff`, `false` its `pca_center`
    """
    pairs = contrast.pairs()
    if len(pairs) < 1 + centre:
        return _hole(contrast)
    toward = pairs.mean(0)
    component = np.linalg.svd(pairs - toward * centre, full_matrices=False)[2][0]
    return _along(component if component @ toward >= 0 else -component, contrast.difference)


def ridge(contrast: Contrast, *, penalty: float) -> np.ndarray:
    """The weights of a linear probe, least squares with an L2 penalty.

    Each side weighs one half, whatever its number of samples; the intercept is free. Samples are measured in units of
    their root mean square distance from their mean (`Σ_i a_i ‖x_i - x̄‖² = 1`), so a penalty means the same at every
    layer.

    formula : `v ∝ argmin_w Σ_i a_i (y_i - b - ⟨w, x_i⟩)² + penalty ‖w‖²`, `y_i = ±1`, `Σ_i a_i = 1`
    citation : Hoerl and Kennard 1970
    """
    rows, sides, weights = contrast.sides()
    if abs(sides.sum()) == len(sides):
        return _hole(contrast)
    left, scale, right = _standard(rows, weights)
    return _along((scale / (scale**2 + penalty) * (np.sqrt(weights) * sides @ left)) @ right, contrast.difference)


def logistic(contrast: Contrast, *, penalty: float) -> np.ndarray:
    """The weights of a logistic probe with an L2 penalty.

    Weights of samples, intercept and units as in `ridge`, and the same penalty where the weights are small. The minimum
    lies in the span of the samples and is sought there.

    formula : `v ∝ argmin_w Σ_i a_i log(1 + exp(-y_i (b + ⟨w, x_i⟩))) + penalty/8 ‖w‖²`
    citation : Alain and Bengio 2016 (1610.01644), as probes; Li et al. 2023 (2306.03341), as directions
    """
    from scipy.optimize import minimize  # here: most plans do without
    from scipy.special import expit

    rows, sides, weights = contrast.sides()
    if abs(sides.sum()) == len(sides):
        return _hole(contrast)
    left, scale, right = _standard(rows, weights)
    inputs = np.column_stack([left * scale / np.sqrt(weights)[:, None], np.ones(len(rows))])
    charge = np.append(np.full(len(scale), penalty / 4), 0.0)

    def loss(w: np.ndarray) -> float:
        return float(weights @ np.logaddexp(0, -sides * (inputs @ w)) + charge @ w**2 / 2)

    def slope(w: np.ndarray) -> np.ndarray:
        return -(weights * sides * expit(-sides * (inputs @ w))) @ inputs + charge * w

    def bend(w: np.ndarray) -> np.ndarray:
        chance = expit(inputs @ w)
        return (inputs.T * (weights * chance * (1 - chance))) @ inputs + np.diag(charge)

    start = np.zeros(inputs.shape[1])
    coefficients = minimize(loss, start, jac=slope, hess=bend, method="trust-exact", options={"gtol": 1e-9}).x
    return _along(coefficients[:-1] @ right, contrast.difference)


def _standard(rows: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular value decomposition of the centred rows, each times the root of its weight, at total variance 1."""
    centred = np.sqrt(weights)[:, None] * (rows - weights @ rows)
    total = np.linalg.norm(centred)
    return np.linalg.svd(centred / total if total > 0 else centred, full_matrices=False)


def lda(contrast: Contrast, *, shrinkage: float | None) -> np.ndarray:
    """The mean difference whitened by the covariance within groups (Fisher's linear discriminant).

    `S` is the covariance of the samples about the mean of their own emotion (or of the neutral ones), shrunk towards a
    multiple of the identity by `shrinkage`; by the amount of Ledoit and Wolf when left out (at least 0.0001).

    formula : `v ∝ ((1 - s) S + s tr(S)/d I)⁻¹ (m_e - b_e)`
    citation : Fisher 1936; the amount of shrinkage `s`: Ledoit and Wolf 2004
    """
    here, *groups = map(_there, (contrast.samples, *contrast.against))
    if min(len(here), sum(map(len, groups))) < 2:
        return _hole(contrast)
    rows = np.concatenate([group - group.mean(0) for group in (here, *groups) if len(group)])
    count, width = rows.shape
    average = float((rows**2).sum()) / count / width
    if average == 0:  # samples that do not differ: nothing to whiten by
        return contrast.difference
    amount = max(ledoit_wolf(rows), LEAST_SHRINKAGE) if shrinkage is None else shrinkage
    _, scale, axes = np.linalg.svd(rows, full_matrices=False)
    variance, floor = (1 - amount) * scale**2 / count, amount * average
    inside = axes @ contrast.difference
    # Woodbury: the covariance is `floor` in every direction that the samples do not span
    return _along(contrast.difference - (inside * variance / (variance + floor)) @ axes, contrast.difference)


def ledoit_wolf(rows: np.ndarray) -> float:
    """The shrinkage of the covariance of centred rows [row, d_model] (Ledoit and Wolf 2004), from their Gram matrix."""
    count, width = rows.shape
    gram = rows @ rows.T
    average = np.trace(gram) / count / width
    square = float((gram**2).sum()) / count**2
    spread = square - width * average**2
    error = (float((np.diag(gram) ** 2).sum()) / count - square) / count
    return float(np.clip(error / spread, 0, 1)) if spread > 0 else 1.0


ESTIMATORS: dict[str, Callable[..., np.ndarray]] = {
    "mean_difference": mean_difference,
    "pca_difference": pca_difference,
    "ridge": ridge,
    "logistic": logistic,
    "lda": lda,
}
"""Name in a plan -> (Contrast, its own parameters by keyword) -> vector [d_model]."""
