"""Turns arrays without labels into single figures: how vectors and their samples lie, how tokens repeat and surprise.

numpy and scipy alone, no labels: `separation` and `outcomes` put names on what is computed here. Samples stand as
`values` [emotion, sample, d_model] with `there` [emotion, sample], False for NaN; weights [..., emotion, sample]
say how often each sample counts, so a bootstrap, a half and a fold are the same computation. Everything in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

BASELINES = ("neutral_mean", "grand_mean", "none")
ALGEBRAIC = 1e-5
"""Least eigenvalue over the largest, below which vectors count as summing to zero (float32 leaves about 1e-7)."""


# ---- cosines -------------------------------------------------------------------------------------------------


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors [..., d_model] at length 1; a vector without length or with NaN gives NaN."""
    vectors = np.asarray(vectors, float)
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, length, out=np.full_like(vectors, np.nan), where=length > 0)


def cosines(vectors: np.ndarray) -> np.ndarray:
    """Cosine of every two vectors: [..., n, d_model] -> [..., n, n]."""
    units = unit(vectors)
    return units @ np.swapaxes(units, -1, -2)


def cosines_of(inner: np.ndarray) -> np.ndarray:
    """Cosine of every two vectors, by their inner products: [..., n, n] -> [..., n, n]."""
    length = np.sqrt(np.clip(np.diagonal(inner, axis1=-2, axis2=-1), 0.0, None))
    scale = length[..., :, None] * length[..., None, :]
    return np.divide(inner, scale, out=np.full(inner.shape, np.nan), where=scale > 0)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every pair i < j."""
    return np.triu_indices(n, 1)


def pair_mean(matrix: np.ndarray) -> np.ndarray:
    """Mean over all pairs i < j of a symmetric matrix [..., n, n] -> [...]; pairs with NaN do not count."""
    row, column = pairs(matrix.shape[-1])
    return nan_mean(matrix[..., row, column], -1)


def nan_mean(values: np.ndarray, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Mean of what is there; NaN where nothing is."""
    values = np.asarray(values, float)
    there = ~np.isnan(values)
    count = there.sum(axis)
    return np.divide(
        np.where(there, values, 0.0).sum(axis), count, out=np.full(np.shape(count), np.nan), where=count > 0
    )


def mean_pairwise_cosine(vectors: np.ndarray) -> np.ndarray:
    """Mean cosine over all pairs: [..., n, d_model] -> [...]. Lower is better separated (Jeong 2026, layer sweep)."""
    return pair_mean(cosines(vectors))


def pinned_value(n: int) -> float:
    """-1/(n-1): the mean pairwise cosine of n equally long vectors that sum to zero, whatever they are.

    From 0 = |sum v|^2 = n + n(n-1) * mean cosine.
    """
    return -1.0 / (n - 1) if n > 1 else np.nan


def sums_to_zero(vectors: np.ndarray) -> bool:
    """Whether n vectors [n, d_model], at any lengths, sum to zero: the mark of a grand mean taken away.

    So it is when some positive combination of them vanishes: the Gram matrix of the unit vectors has one eigenvalue
    near zero whose eigenvector has one sign. n vectors in fewer than n dims always have such eigenvalues; then the
    vectors as they are must sum to zero.
    """
    vectors = np.asarray(vectors, float)
    vectors = vectors[~np.isnan(vectors).any(-1)]
    units = unit(vectors)
    units = units[~np.isnan(units).any(-1)]
    n = len(units)
    if n < 3:  # two opposite vectors are a finding, not a trap
        return False
    share = np.linalg.norm(vectors.sum(0)) / np.linalg.norm(vectors, axis=-1).sum()
    if share < np.sqrt(ALGEBRAIC):
        return True
    if n > vectors.shape[-1]:
        return False
    values, axes = np.linalg.eigh(units @ units.T)
    axis = axes[:, 0]
    return bool(values[0] < ALGEBRAIC * values[-1] and (np.all(axis > 0) or np.all(axis < 0)))


def pole_separation(cosine: np.ndarray, poles: Any) -> np.ndarray:
    """Mean cosine within the two poles minus that between them: [..., n, n], group names [..., n] -> [...].

    Pairs of two positive or of two negative emotions are within, a positive with a negative one is between; other
    emotions do not count. NaN when a kind of pair is absent.
    """
    group = np.asarray(poles, object)
    sign = (group == "positive").astype(int) - (group == "negative")
    row, column = pairs(sign.shape[-1])
    kind = sign[..., row] * sign[..., column]  # 1 within, -1 between, 0 neither
    values = cosine[..., row, column]
    return nan_mean(np.where(kind > 0, values, np.nan), -1) - nan_mean(np.where(kind < 0, values, np.nan), -1)


# ---- samples -> vectors --------------------------------------------------------------------------------------


def compact(samples: np.ndarray, centre: bool) -> np.ndarray:
    """The same samples [sample, d_model] in the space that they span: inner products stay, d_model becomes at most
    their count.

    `centre` also takes the mean of all away, which no difference of means notices and which keeps huge common
    components from eating the digits.
    """
    if centre and len(samples):
        samples = samples - samples.mean(0)
    if 0 < len(samples) < samples.shape[-1]:
        samples = np.asarray(np.linalg.qr(samples.T, mode="r")).T
    return samples


def means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means: [emotion, sample, d], [..., emotion, sample] -> [..., emotion, d]; no weight gives NaN."""
    filled = np.nan_to_num(values)
    total = weights.sum(-1)[..., None]
    summed = np.einsum("...es,esd->...ed", weights, filled, optimize=True)
    return np.divide(summed, total, out=np.full_like(summed, np.nan), where=total > 0)


def contrast(averages: np.ndarray, neutral: np.ndarray, baseline: str) -> np.ndarray:
    """Emotion vectors from means: [..., emotion, d], neutral [..., d], one of BASELINES -> [..., emotion, d]."""
    if baseline == "none":
        return averages
    if baseline == "grand_mean":
        return averages - nan_mean(averages, -2)[..., None, :]
    return averages - neutral[..., None, :]


def halves(there: np.ndarray, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """n random splits of each emotion's samples into two halves: two [n, emotion, sample] of zeros and ones.

    An emotion with fewer than two samples is in neither. Of an odd number one sample more is now in the first half,
    now in the second.
    """
    first, second = (np.zeros((n, *there.shape)) for _ in range(2))
    for i, row in enumerate(there):
        known = np.flatnonzero(row)
        if len(known) < 2:
            continue
        for k in range(n):
            order = rng.permutation(known)
            cut = (len(known) + (k % 2)) // 2
            first[k, i, order[:cut]] = second[k, i, order[cut:]] = 1.0
    return first, second


def spearman_brown(r: Any) -> Any:
    """Reliability of the whole from the correlation of its halves: 2r / (1 + r); a negative r gives 0."""
    r = np.asarray(r, float)
    return np.where(r > 0, 2 * r / (1 + np.abs(r)), np.where(np.isnan(r), np.nan, 0.0))[()]


def deviation_correlation(first: np.ndarray, second: np.ndarray, across: np.ndarray) -> np.ndarray:
    """How alike two sets of vectors differ among emotions, by inner products [..., emotion, emotion] -> [...].

    first, second : within a set; across : of the vectors of the first with those of the second
    The cosine of the two as long vectors, each minus its mean over the emotions: what all emotions share does not
    count.
    """
    n = max(first.shape[-1], 1)
    first_square, second_square, both = (
        np.trace(part, axis1=-2, axis2=-1) - part.sum((-2, -1)) / n for part in (first, second, across)
    )
    scale = np.sqrt(np.clip(first_square * second_square, 0.0, None))
    return np.divide(both, scale, out=np.full(np.shape(scale), np.nan), where=scale > 0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, equal values sharing the mean of theirs; NaN throughout where there is one.

    scipy.stats has them too: its import takes longer than most reports.
    """
    values = np.asarray(values, float)
    out, order = np.empty(values.shape), values.argsort(-1)
    np.put_along_axis(out, order, np.broadcast_to(np.arange(1.0, values.shape[-1] + 1), values.shape), -1)
    known = np.take_along_axis(values, order, -1)  # NaN comes last
    out[np.isnan(known).any(-1)] = np.nan
    for at in map(tuple, np.argwhere((known[..., 1:] == known[..., :-1]).any(-1) & ~np.isnan(known).any(-1))):
        _, place, count = np.unique(values[at], return_inverse=True, return_counts=True)
        out[at] = (count.cumsum() - (count - 1) / 2)[place]
    return out


def rdm_correlation(first: np.ndarray, second: np.ndarray, rank: bool = True) -> np.ndarray:
    """Correlation of two dissimilarity matrices over pairs i < j: [..., n, n] twice -> [...]; Spearman if `rank`.

    Pairs that one of them lacks do not count; fewer than three pairs give NaN.
    """
    row, column = pairs(first.shape[-1])
    a, b = np.broadcast_arrays(first[..., row, column], second[..., row, column])
    out = np.full(a.shape[:-1], np.nan)
    if a.shape[-1] > 2 and not np.isnan(a).any() and not np.isnan(b).any():
        return _pearson(ranks(a), ranks(b)) if rank else _pearson(a, b)
    for at in np.ndindex(out.shape):
        out[at] = correlation(a[at], b[at], rank)
    return out


def rdm_correlations(rdm: np.ndarray) -> np.ndarray:
    """Spearman correlation of every two of m dissimilarity matrices: [..., m, n, n] -> [..., m, m].

    As `rdm_correlation` of each two; matrices without a missing value are ranked once.
    """
    row, column = pairs(rdm.shape[-1])
    flat = rdm[..., row, column]
    whole, some = ~np.isnan(flat).any(-1), ~np.isnan(flat).all(-1)
    out = np.full((*flat.shape[:-1], flat.shape[-2]), np.nan)
    if flat.shape[-1] > 2:
        order = np.where(whole[..., None], ranks(flat), 0.0)
        order = order - order.mean(-1, keepdims=True)
        length = np.sqrt((order**2).sum(-1))
        scale = length[..., :, None] * length[..., None, :]
        inner = order @ np.swapaxes(order, -1, -2)
        np.divide(inner, scale, out=out, where=scale > 1e-300)
    both, full = (mask[..., :, None] & mask[..., None, :] for mask in (some, whole))
    for at in map(tuple, np.argwhere(both & ~full)):
        *place, i, j = at
        out[at] = out[(*place, j, i)] if i > j else rdm_correlation(rdm[(*place, i)], rdm[(*place, j)])
    return out


def correlation(a: np.ndarray, b: np.ndarray, rank: bool = False) -> float:
    """Pearson (Spearman if `rank`) over the entries that both have; NaN for fewer than three, or no variance."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b = np.asarray(a, float)[known], np.asarray(b, float)[known]
    if len(a) < 3:
        return float("nan")
    return float(_pearson(ranks(a), ranks(b)) if rank else _pearson(a, b))


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation along the last axis, without missing values; NaN where there is no variance."""
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), scale, out=np.full(np.shape(scale), np.nan), where=scale > 1e-300)


def held_out(
    values: np.ndarray, there: np.ndarray, neutral: np.ndarray, baseline: str, folds: np.ndarray | None = None
) -> np.ndarray:
    """Which emotion's vector each sample is nearest to, vectors made without its fold: -> [emotion, sample], -1 NaN.

    values : [emotion, sample, d]; neutral : [d], the neutral mean (used by "neutral_mean")
    folds : [sample] or [emotion, sample]; each sample number is a fold when None

    A fold leaves *every* emotion's samples of that number out, not only the tested one: emotions then share the number
    of samples and the templates behind their vectors, so that without any emotion in the data the rate is chance
    (leaving out one sample alone is below chance). Nearest is by cosine.
    """
    folds = np.arange(there.shape[1]) if folds is None else np.asarray(folds)
    _, fold = np.unique(np.broadcast_to(folds, there.shape), return_inverse=True)
    fold = fold.reshape(there.shape)  # [emotion, sample]
    member = (fold[None] == np.arange(fold.max() + 1)[:, None, None]) & there[None]  # [fold, emotion, sample]
    filled = np.where(there[..., None], values, 0.0)
    each = np.einsum("ges,esd->ged", member.astype(float), filled, optimize=True)
    count = (there.sum(-1)[None] - member.sum(-1))[..., None]  # [fold, emotion, 1] left to train on
    averages = (filled.sum(1) - each) * np.where(count > 0, 1 / np.maximum(count, 1), np.nan)
    vectors = contrast(averages, neutral, baseline)  # [fold, emotion, d]
    length = np.sqrt(np.einsum("ged,ged->ge", vectors, vectors))
    unknown = ~(length > 0)
    base = nan_mean(averages, 1) if baseline == "grand_mean" else np.zeros((len(member), values.shape[-1]))
    base = base + neutral if baseline == "neutral_mean" else base
    predicted = np.full(there.shape, -1)
    for k in range(len(member)):
        at = there & (fold == k)
        if at.any() and not unknown[k].all():
            likeness = np.full((int(at.sum()), len(there)), -np.inf)
            products = (filled[at] - base[k]) @ vectors[k].T
            predicted[at] = np.divide(products, length[k], out=likeness, where=~unknown[k]).argmax(-1)
    return predicted


def accuracy(predicted: np.ndarray) -> float:
    """Share of samples [emotion, sample] predicted as their own emotion; -1 does not count."""
    right = predicted == np.arange(len(predicted))[:, None]
    known = predicted >= 0
    return float(right[known].mean()) if known.any() else float("nan")


def mean_pairwise_interval(vectors: np.ndarray, level: float = 0.95) -> tuple[float, float, float, int]:
    """Mean pairwise cosine of [n, d_model] with a jackknife t interval: mean, low, high, n. NaN rows do not count.

    The mean over pairs is a U-statistic: its jackknife variance is (n-1)/n * sum (m_(-i) - mean)^2, df n - 1.
    """
    units = unit(vectors)
    units = units[~np.isnan(units).any(-1)]
    n = len(units)
    if n < 2:
        return float("nan"), float("nan"), float("nan"), n
    cosine = units @ units.T
    np.fill_diagonal(cosine, 0.0)
    total = cosine.sum()
    mean = total / (n * (n - 1))
    if n < 3:
        return float(mean), float("nan"), float("nan"), n
    without = (total - 2 * cosine.sum(0)) / ((n - 1) * (n - 2))
    error = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return float(mean), float(mean - reach), float(mean + reach), n


# ---- tokens --------------------------------------------------------------------------------------------------


def repeated(tokens: Sequence[int], n: int = 4) -> float:
    """Share of token n-grams that stood before: 1 - distinct / all, in [0, 1). Fewer than n + 1 tokens give 0."""
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(tokens: Sequence[int], n: int = 4, tail: int = 16) -> float:
    """Repetition score in [0, 1) over token n-grams: the larger of that of the whole and that of its last half.

    The half is looked at when it has at least `tail` tokens: a text that starts well and ends in a loop is caught.
    Tokens, never words between spaces: Chinese has no spaces. Ids below 0 (padding) are dropped.
    """
    known = [int(token) for token in tokens if token >= 0]
    half = known[len(known) // 2 :]
    return max(repeated(known, n), repeated(half, n) if len(half) >= tail else 0.0)


def perplexity(log_probability: np.ndarray) -> np.ndarray:
    """exp(-mean log P) over tokens: nats [..., token], NaN beyond the end -> [...]; no token gives NaN."""
    return np.exp(-nan_mean(log_probability, -1))


def ratio(value: Any, reference: Any) -> Any:
    """value / reference; NaN where the reference is not positive."""
    value, reference = np.broadcast_arrays(np.asarray(value, float), np.asarray(reference, float))
    return np.divide(value, reference, out=np.full(value.shape, np.nan), where=reference > 0)[()]
