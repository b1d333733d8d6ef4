"""Turns samples into held-out accuracies: with the layer chosen inside the folds, of shuffled labels, of words alone.

All of them leave out the same folds, so that they may stand beside each other.
"""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np

from nsteer.science import metrics

OUTER = 10
"""Folds beyond so many are joined where a layer is chosen inside of each."""

MAX_SAMPLES = 1500
"""Samples up to which inner products of all pairs are worth it: they grow with their square."""

AT_ONCE = 2**17
"""Numbers that shuffles done together may hold: arrays of 1 MiB, which a core's cache holds."""

WORD = re.compile(r"\w+")


def outer_folds(folds: np.ndarray) -> np.ndarray:
    """Folds as 0 .. at most OUTER - 1, of the same shape."""
    _, fold = np.unique(folds, return_inverse=True)
    return fold.reshape(np.shape(folds)) % OUTER


class _Vectors(NamedTuple):
    """Emotion vectors by the inner products of the sums that they are made of, [..., emotion] each.

    likeness of a sample = (its products with sums * each - their mean by `share` - level) * scale
    """

    each: np.ndarray
    share: np.ndarray
    level: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, inner: np.ndarray, count: np.ndarray, rule: str) -> _Vectors:
        """Of inner products of sums [..., emotion, emotion], or [..., emotion] of each with itself if that is enough.

        count : [..., emotion] samples in each sum; an emotion without any has no vector
        """
        each = np.divide(1.0, count, out=np.zeros(count.shape), where=count > 0.5)
        if rule != "grand_mean":
            return cls(each, np.zeros(1), np.zeros(1), _over_length(inner * each**2, each))
        known = each > 0
        share = known / np.maximum(known.sum(-1, keepdims=True), 1)
        inner = inner * each[..., None] * each[..., None, :]
        level = (inner * share[..., None]).sum(-2)  # of the grand mean with each average
        own = (level * share).sum(-1, keepdims=True)  # and with itself
        squared = np.diagonal(inner, axis1=-2, axis2=-1) - 2 * level + own
        return cls(each, share, level - own, _over_length(squared, each))

    def at(self, place: Any) -> _Vectors:
        return _Vectors(*(array[place] if array.ndim > 1 else array for array in self))

    def nearest(self, products: np.ndarray) -> np.ndarray:
        """Which vector each sample is nearest to by cosine: [..., emotion] -> [...]; the first where there is none."""
        like = products * self.each
        if self.share.ndim > 1:
            like = like - (like * self.share).sum(-1, keepdims=True) - self.level
        like = like * self.scale
        like[np.isnan(like)] = -np.inf
        return like.argmax(-1)


def _over_length(squared: np.ndarray, each: np.ndarray) -> np.ndarray:
    known = (each > 0) & (squared > 0)
    return np.divide(1.0, np.sqrt(np.abs(squared)), out=np.full(squared.shape, np.nan), where=known)


def inner_accuracy(
    values: np.ndarray, there: np.ndarray, neutral: np.ndarray, rule: str, fold: np.ndarray
) -> np.ndarray:
    """Held-out accuracy over the other folds, of vectors that never saw the fold: [fold].

    Arguments as in `metrics.held_out`; fold : [emotion, sample], from `outer_folds`
    """
    n, emotions = int(fold.max()) + 1, len(there)
    filled = np.where(there[..., None], values - neutral if rule == "neutral_mean" else values, 0.0)
    member = (fold[None] == np.arange(n)[:, None, None]) & there  # [fold, emotion, sample]
    sums = np.einsum("ges,esd->ged", member.astype(float), filled, optimize=True).reshape(n * emotions, -1)
    place, own = fold[there], np.broadcast_to(np.arange(emotions)[:, None], there.shape)[there]
    products = (filled[there] @ sums.T).reshape(len(place), n, emotions)
    products = products.sum(1)[:, None] - products[np.arange(len(place)), place][:, None] - products
    kept = "gehf->ghef" if rule == "grand_mean" else "gehe->ghe"
    inner = np.einsum(kept, (sums @ sums.T).reshape(n, emotions, n, emotions))
    less = inner[np.arange(n), np.arange(n)] - inner.sum(1) - inner.sum(0)
    inner = inner.sum((0, 1)) + less[:, None] + less + inner + inner.swapaxes(0, 1)  # [fold, fold, ...] without both
    tally = member.sum(-1)
    vectors = _Vectors.of(inner, tally.sum(0) - tally[:, None] - tally, rule)
    two = (np.arange(n) != np.arange(n)[:, None]) & ~np.isnan(vectors.scale).all(-1)  # which may choose, and is tried
    right = vectors.at(place).nearest(products) == own[:, None]  # [sample, fold that chooses nothing]
    tried = two[place]
    return np.divide((right & tried).sum(0), tried.sum(0), out=np.full(n, np.nan), where=tried.any(0))


def predicted_at_chosen(predicted: np.ndarray, inner: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Predictions of each fold at the layer that is best on the other folds: [emotion, sample], -1 a missing value.

    predicted : [layer, emotion, sample] of `metrics.held_out`; inner : [layer, fold] of `inner_accuracy`

    A layer that is good by chance on the samples that choose it has no such luck on those that test it.
    """
    out = np.full(fold.shape, -1)
    for k in range(inner.shape[1]):
        if not np.isnan(inner[:, k]).all():
            out[fold == k] = predicted[int(np.nanargmax(inner[:, k]))][fold == k]
    return out


def permuted(there: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Which sample stands where when labels are shuffled within each sample number: [n, emotion, sample].

    Numbers are those of the flattened [emotion, sample]; templates stay balanced.
    """
    own = np.arange(there.size).reshape(there.shape)
    out = np.repeat(own[None], n, 0)
    for k in range(there.shape[1]):
        known = np.flatnonzero(there[:, k])
        for i in range(n):
            out[i, known, k] = own[rng.permutation(known), k]
    return out


def null_accuracy(
    values: np.ndarray,
    there: np.ndarray,
    neutral: np.ndarray,
    rule: str,
    folds: np.ndarray,
    permutations: np.ndarray,
) -> np.ndarray:
    """Held-out accuracy of n data sets whose emotion labels are shuffled within each sample number: [n].

    Arguments as in `metrics.held_out`; permutations : [n, emotion, sample], of `permuted`. All that a shuffle needs are
    inner products of samples. Of emotions equally near, the own one counts.
    """
    n, flat = len(permutations), values.reshape(there.size, -1)
    if there.size > MAX_SAMPLES:
        return np.array(
            [metrics.accuracy(metrics.held_out(flat[order], there, neutral, rule, folds)) for order in permutations]
        )
    known = np.flatnonzero(there.ravel())
    _, fold = np.unique(np.broadcast_to(folds, there.shape).ravel()[known], return_inverse=True)
    order = np.argsort(fold, kind="stable")
    known, fold = known[order], fold[order]
    rows = flat[known] - neutral if rule == "neutral_mean" else flat[known]
    if not n or not len(known) or np.isnan(rows).any():
        return np.full(n, np.nan)
    gram, edges = rows @ rows.T, np.searchsorted(fold, np.arange(fold[-1] + 2))
    label = np.empty((n, there.size), int)
    np.put_along_axis(label, permutations.reshape(n, -1), np.repeat(np.arange(len(there)), there.shape[1])[None], 1)
    groups = np.array_split(label[:, known].T, -(-len(known) * n * len(there) // AT_ONCE) or 1, axis=1)
    nearest = _nearest_to_deviations if rule == "grand_mean" else _nearest
    return np.concatenate([nearest(group, gram, edges, len(there)) for group in groups])


def _nearest(label: np.ndarray, gram: np.ndarray, edges: np.ndarray, emotions: int) -> np.ndarray:
    """Accuracies [n] of labels [sample, n], from inner products [sample, sample] of samples in the order of folds.

    edges : where each fold begins, and the end of the last. Emotions come first: maxima over them cost a fifth.
    """
    n, folds = label.shape[1], len(edges) - 1
    of = (label == np.arange(emotions)[:, None, None]).astype(float)  # [emotion, sample, n]
    like = gram @ of
    own = np.empty(label.shape)  # of each sample with those of its emotion in its fold
    for a, b in itertools.pairwise(edges):
        inside = gram[a:b, a:b] @ of[:, a:b]
        own[a:b] = np.take_along_axis(inside, label[None, a:b], 0)[0]
        like[:, a:b] -= inside
    cell = (label * folds + np.repeat(np.arange(folds), np.diff(edges))[:, None]) * n + np.arange(n)
    shape = (emotions, folds, n)

    def over_cells(weights: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell.ravel(), None if weights is None else weights.ravel(), math.prod(shape)).reshape(shape)

    beside, within, count = over_cells(np.take_along_axis(like, label[None], 0)), over_cells(own), over_cells(None)
    squared = (beside + within).sum(1, keepdims=True) - 2 * beside - within  # |sum of those outside the fold|^2
    known = count.sum(1, keepdims=True) - count > 0.5
    scale = 1 / np.sqrt(np.clip(squared, 1e-300, None))
    for k, (a, b) in enumerate(itertools.pairwise(edges)):
        like[:, a:b] *= scale[:, k, None]
        if not known[:, k].all():
            like[:, a:b] = np.where(known[:, k, None], like[:, a:b], -np.inf)
    tried = np.repeat(known.any(0), np.diff(edges), axis=0)  # [sample, n]
    right = (np.take_along_axis(like, label[None], 0)[0] >= like.max(0)) & tried
    return np.divide(right.sum(0), tried.sum(0), out=np.full(n, np.nan), where=tried.any(0))


def _nearest_to_deviations(label: np.ndarray, gram: np.ndarray, edges: np.ndarray, emotions: int) -> np.ndarray:
    """The same where the grand mean of the vectors is taken away, which depends on the labels too."""
    n = label.shape[1]
    of = np.eye(emotions)[label.T]  # [n, sample, emotion]
    whole = gram @ of
    total, tally = of.swapaxes(1, 2) @ whole, of.sum(1)
    right, tried = np.zeros(n), np.zeros(n)
    for a, b in itertools.pairwise(edges):
        turned, inside = of[:, a:b].swapaxes(1, 2), gram[a:b, a:b] @ of[:, a:b]
        side = turned @ whole[:, a:b]
        inner = total - side - side.swapaxes(1, 2) + turned @ inside
        vectors = _Vectors.of(inner, tally - of[:, a:b].sum(1), "grand_mean")
        some = ~np.isnan(vectors.scale).all(-1)
        near = vectors.at((slice(None), None)).nearest(whole[:, a:b] - inside)
        right += some * (near == label[a:b].T).sum(1)
        tried += some * (b - a)
    return np.divide(right, tried, out=np.full(n, np.nan), where=tried > 0)


def words(texts: np.ndarray) -> np.ndarray:
    """Counts of words, or of characters where a text has no spaces: texts [...] -> [..., word]."""
    split = [WORD.findall(str(text).lower()) for text in texts.ravel()]
    known = {word: i for i, word in enumerate(sorted({word for words in split for word in words}))}
    out = np.zeros((len(split), max(len(known), 1)), np.float32)
    for row, words in zip(out, split, strict=True):
        np.add.at(row, [known[word] for word in words], 1.0)
    return out.reshape(*texts.shape, -1)


def by_words(texts: np.ndarray, there: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Predictions from a bag of words on the same folds: [emotion, sample], -1 a missing value.

    Multinomial naive Bayes, equal priors, one added to every count (Laplace): what a reader of word lists would tell
    without any model.
    """
    count = words(np.where(there, texts, ""))
    _, fold = np.unique(np.broadcast_to(folds, there.shape), return_inverse=True)
    fold = fold.reshape(there.shape)
    predicted = np.full(there.shape, -1)
    for k in range(int(fold.max()) + 1):
        at, rest = there & (fold == k), there & (fold != k)
        known = rest.any(1)
        if not at.any() or not known.any():
            continue
        summed = np.einsum("es,esw->ew", rest.astype(np.float32), count) + 1.0
        log = np.log(summed / summed.sum(1, keepdims=True))
        score = np.where(known[None], count[at] @ log.T, -np.inf)
        predicted[at] = score.argmax(1)
    return predicted
