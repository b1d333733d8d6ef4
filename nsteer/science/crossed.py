"""Turns samples into cosines and lengths of emotion vectors that noise does not move: products across folds alone.

The mean of noisy samples is longer than the truth, and means that share a noisy baseline look alike: so the usual mean
pairwise cosine is moved by noise. Inner products of samples of *different* folds have no noise in common, and their
means are unbiased (after the crossnobis distance; Walther et al. 2016). Arrays in, arrays out, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special

from nsteer.science import statistics

MAX_FOLDS = 24
"""Folds beyond so many are joined: a few products less, no bias more."""

Units = Literal["folds", "samples"]


@dataclass(frozen=True)
class Crossed:
    """A cross-validated mean pairwise cosine.

    cosine : mean of S over pairs / mean of D, with `low`, `high` by Fieller from a jackknife; infinite where `length`
    can not be distinguished from zero, and then there is no cosine to speak of (NaN)
    length : mean of D, the squared length of the vectors without their noise; `length_p`: P(D this far from 0)
    influence : [unit] deviations whose squares add up to the cosine's variance; df : their degrees of freedom
    n : units that the jackknife left out in turn
    """

    cosine: float
    low: float
    high: float
    length: float
    length_p: float
    influence: np.ndarray
    df: float
    n: int


def joined(folds: np.ndarray, max_folds: int = MAX_FOLDS) -> np.ndarray:
    """Folds, any whole numbers, as 0 .. at most `most` - 1 in their order."""
    _, place = np.unique(folds, return_inverse=True)
    return place.reshape(np.shape(folds)) % max_folds


def crossed(
    values: np.ndarray, neutrals: np.ndarray, rule: str, folds: np.ndarray, neutral_folds: np.ndarray, units: Units
) -> Crossed:
    """The cross-validated mean pairwise cosine of emotion vectors against a baseline.

    values : [emotion, sample, d], neutrals : [sample, d] neutral samples; NaN rows are missing values
    rule : "neutral_mean" or "none" ("grand_mean" is pinned at -1/(n-1) by algebra, with or without noise)
    folds : [emotion, sample], neutral_folds : [sample]: samples of one number are never multiplied with each other
    units : what is independent and left out in turn by the jackknife: whole "folds" of all emotions, or "samples"
    """
    table, count = fold_sums(values, neutrals, folds, neutral_folds)
    if rule == "none":
        table, count = table[:, :-1], count[:, :-1]
    products = _Products.of(table, count)
    known = np.flatnonzero(np.isfinite(np.diagonal(products.whole())))
    labels = len(known) - (rule != "none")
    neutral_gone = rule != "none" and (not len(known) or known[-1] != table.shape[1] - 1)
    if labels < 2 or neutral_gone:
        nothing = np.full(0, np.nan)
        return Crossed(math.nan, -math.inf, math.inf, math.nan, math.nan, nothing, math.nan, 0)
    products = products.of_labels(known)
    top, bottom = _numerator_and_denominator(products.whole()[None], rule)
    drawn, strata = products.without_folds() if units == "folds" else products.without_cells()
    replicates = np.stack(_numerator_and_denominator(drawn, rule), -1)  # [unit, 2]
    scaled, df = deviations(replicates, strata)
    return _ratio(float(top[0]), float(bottom[0]), scaled, df)


def _ratio(top: float, bottom: float, scaled: np.ndarray, df: np.ndarray) -> Crossed:
    """top / bottom with Fieller's interval, from the jackknife's deviations [unit, (top, bottom)]."""
    n = len(scaled)
    cov = scaled.T @ scaled
    freedom = float(df.min())
    if n < 2 or not freedom > 0 or not np.isfinite(cov).all():
        return Crossed(math.nan, -math.inf, math.inf, bottom, math.nan, np.full(n, np.nan), freedom, n)
    t = float(special.stdtrit(freedom, (1 + statistics.LEVEL) / 2))
    error = math.sqrt(float(cov[1, 1]))
    p = float(2 * special.stdtr(freedom, -abs(bottom) / error)) if error else math.nan
    low, high = statistics.fieller(top, bottom, float(cov[0, 0]), float(cov[1, 1]), float(cov[0, 1]), t)
    if bottom <= 0 or math.isinf(low):
        return Crossed(math.nan, -math.inf, math.inf, bottom, p, np.full(n, np.nan), freedom, n)
    ratio = top / bottom
    skew = (ratio * float(cov[1, 1]) - float(cov[0, 1])) / bottom**2  # what a ratio of noisy means is off by
    cosine = float(np.clip(ratio - skew, low, high))
    return Crossed(cosine, low, high, bottom, p, (scaled[:, 0] - ratio * scaled[:, 1]) / bottom, freedom, n)


def fold_sums(
    values: np.ndarray, neutrals: np.ndarray, folds: np.ndarray, neutral_folds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of the samples of each fold: [fold, emotion + 1, d] and [fold, emotion + 1]; neutral last."""
    place = joined(np.concatenate([np.ravel(folds), np.ravel(neutral_folds)]))
    n = np.arange(int(place.max()) + 1 if len(place) else 1)[:, None, None]
    tables, counts = [], []
    for rows, which in (
        (values, place[: folds.size].reshape(folds.shape)),
        (neutrals[None], place[None, folds.size :]),
    ):
        there = ~np.isnan(rows).any(-1)
        member = ((which == n) & there).astype(float)  # [fold, label, sample]
        tables.append(np.einsum("ges,esd->ged", member, np.where(there[..., None], rows, 0.0), optimize=True))
        counts.append(member.sum(-1))
    return np.concatenate(tables, 1), np.concatenate(counts, 1)


@dataclass(frozen=True)
class _Products:
    """Inner products between sums of folds, from which any fold or cell of the table is left out at no cost."""

    top: np.ndarray  # [label, label]: of samples of different folds, summed
    pairs: np.ndarray  # their number
    beside: np.ndarray  # [fold, label, label]: s_ge . (s_f - s_gf)
    beside_pairs: np.ndarray
    filled: np.ndarray  # [fold, label]: whether any sample is there

    @classmethod
    def of(cls, table: np.ndarray, count: np.ndarray) -> _Products:
        whole, total = table.sum(0), count.sum(0)
        beside = np.einsum("ged,gfd->gef", table, whole[None] - table, optimize=True)
        beside_pairs = count[:, :, None] * (total[None] - count)[:, None, :]
        return cls(beside.sum(0), beside_pairs.sum(0), beside, beside_pairs, count > 0)

    def of_labels(self, known: np.ndarray) -> _Products:
        square = np.ix_(known, known)
        sides = (self.beside, self.beside_pairs)
        beside, beside_pairs = (side[:, square[0], square[1]] for side in sides)
        return _Products(self.top[square], self.pairs[square], beside, beside_pairs, self.filled[:, known])

    def whole(self) -> np.ndarray:
        """Mean products [label, label]; NaN where no two samples are of different folds."""
        return _over(self.top, self.pairs)

    def without_folds(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean products without each fold in turn, [fold, label, label], and the stratum (one) of each."""
        used = self.filled.any(-1)
        swapped = np.swapaxes(self.beside, 1, 2), np.swapaxes(self.beside_pairs, 1, 2)
        top = self.top - self.beside - swapped[0]
        return _over(top, self.pairs - self.beside_pairs - swapped[1])[used], np.zeros(int(used.sum()), int)

    def without_cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean products without each sample (fold of one label) in turn, and the label of each as its stratum."""
        fold, label = np.nonzero(self.filled)
        unit = np.arange(len(fold))
        sums_and_counts = []
        for whole, beside in ((self.top, self.beside), (self.pairs, self.beside_pairs)):
            less = np.repeat(whole[None], len(fold), 0)
            less[unit, label] -= beside[fold, label]
            less[unit, :, label] -= beside[fold, label]
            sums_and_counts.append(less)
        return _over(*sums_and_counts), label


def _over(top: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    return np.divide(top, pairs, out=np.full(np.shape(top), np.nan), where=pairs > 0.5)


def _numerator_and_denominator(products: np.ndarray, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean S over pairs and mean D over emotions, of mean products [..., label, label] whose last label is neutral."""
    if rule != "none":
        base = products[..., -1:, -1:]
        side = products[..., :-1, -1]
        products = products[..., :-1, :-1] - side[..., :, None] - side[..., None, :] + base
    row, column = np.triu_indices(products.shape[-1], 1)
    return products[..., row, column].mean(-1), np.diagonal(products, axis1=-2, axis2=-1).mean(-1)


def deviations(replicates: np.ndarray, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jackknife replicates [unit, k] as deviations whose products add up to a covariance, and degrees of freedom [k].

    Each stratum (independent group of units) adds (n - 1) / n of its own squares; df by Satterthwaite's rule.
    """
    _, place, n = np.unique(strata, return_inverse=True, return_counts=True)
    member = np.eye(len(n))[place]  # [unit, stratum]
    means = member.T @ replicates / n[:, None]
    scaled = np.sqrt((n - 1) / n)[place, None] * (replicates - means[place])
    share, each = member.T @ scaled**2, np.maximum(n - 1, 1)[:, None]
    below = (share**2 / each).sum(0)
    return scaled, np.divide(share.sum(0) ** 2, below, out=np.zeros(share.shape[1]), where=below > 0)
