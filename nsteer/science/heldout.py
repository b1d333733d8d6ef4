"""Turns samples into held-out accuracies: with the layer chosen inside the folds, of shuffled labels, of words alone.

All of them leave out the same folds, so that they may stand beside each other.
"""

from __future__ import annotations

import re

import numpy as np

from nsteer.science import metrics

OUTER = 10
"""Folds beyond so many are joined where a layer is chosen inside of each."""

MOST = 1500
"""Samples up to which inner products of all pairs are worth it: they grow with their square."""

AT_ONCE = 2**15
"""Numbers that shuffles done together may hold: arrays of 256 KiB stay in a core's cache, larger ones cost twice."""

WORD = re.compile(r"\w+")


def outer_folds(folds: np.ndarray) -> np.ndarray:
    """Folds as 0 .. at most OUTER - 1, of the same shape."""
    _, fold = np.unique(folds, return_inverse=True)
    return fold.reshape(np.shape(folds)) % OUTER


def inner_accuracy(
    values: np.ndarray, there: np.ndarray, neutral: np.ndarray, rule: str, fold: np.ndarray
) -> np.ndarray:
    """Held-out accuracy over the other folds, of vectors that never saw the fold: [fold].

    Arguments as in `metrics.held_out`; fold : [emotion, sample], from `outer_folds`
    """
    n = int(fold.max()) + 1
    member = (fold[None] == np.arange(n)[:, None, None]) & there  # [fold, emotion, sample]
    filled, own = np.where(there[..., None], values, 0.0), np.arange(len(there))
    each, tally = np.einsum("ges,esd->ged", member.astype(float), filled, optimize=True), member.sum(-1)
    first, second = np.triu_indices(n)  # two folds left out; either may be the one that chooses nothing
    pair = np.empty((n, n), int)
    pair[first, second] = pair[second, first] = np.arange(len(first))
    two = first != second
    sums = filled.sum(1) - each[first] - two[:, None, None] * each[second]
    count = (there.sum(-1) - tally[first] - two[:, None] * tally[second])[..., None]
    averages = np.divide(sums, count, out=np.full(sums.shape, np.nan), where=count > 0)
    vectors = metrics.unit(metrics.contrast(averages, neutral, rule))  # [pair, emotion, d]
    base = metrics.nan_mean(averages, 1) if rule == "grand_mean" else np.zeros(neutral.shape)
    base = np.nan_to_num(base + neutral if rule == "neutral_mean" else base)
    unknown = np.isnan(vectors).any(-1)
    vectors = np.nan_to_num(vectors)
    level = (np.broadcast_to(base, (len(first), values.shape[-1]))[:, None] * vectors).sum(-1)
    right, tried = np.zeros(n), np.zeros(n)
    for k in range(n):
        rows, without = filled[member[k]], pair[k]
        likeness = np.einsum("md,ged->gme", rows, vectors[without], optimize=True) - level[without, None]
        nearest = np.where(unknown[without, None], -np.inf, likeness).argmax(-1)
        counts = two[without] * ~unknown[without].all(-1)
        right += counts * (nearest == np.broadcast_to(own[:, None], there.shape)[member[k]]).sum(-1)
        tried += counts * len(rows)
    return np.divide(right, tried, out=np.full(n, np.nan), where=tried > 0)


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

    Arguments as in `metrics.held_out`; permutations : [n, emotion, sample], of `permuted`. Against a fixed baseline all
    that a shuffle needs are inner products of samples.
    """
    n = len(permutations)
    if rule == "grand_mean" or there.size > MOST:
        flat = values.reshape(there.size, -1)
        return np.array(
            [metrics.accuracy(metrics.held_out(flat[one], there, neutral, rule, folds)) for one in permutations]
        )
    centred = values - neutral if rule == "neutral_mean" else values
    known = np.flatnonzero(there.ravel())
    if not len(known) or np.isnan(centred.reshape(there.size, -1)[known]).any():
        return np.full(n, np.nan)
    rows = centred.reshape(there.size, -1)[known]
    gram = rows @ rows.T
    _, fold = np.unique(np.broadcast_to(folds, there.shape), return_inverse=True)
    member = np.eye(int(fold.max()) + 1)[fold.ravel()[known]]  # [sample, fold]
    apart = gram * (1 - member @ member.T)
    label = np.empty((n, there.size), int)
    for i, order in enumerate(permutations):
        label[i, order.ravel()] = np.repeat(np.arange(len(there)), there.shape[1])
    label = label[:, known]
    parts = np.array_split(label, -(-label.size * len(there) // AT_ONCE) or 1)
    return np.concatenate([_nearest(one, gram, apart, member, len(there)) for one in parts])


def _nearest(label: np.ndarray, gram: np.ndarray, apart: np.ndarray, member: np.ndarray, emotions: int) -> np.ndarray:
    """Accuracies [n] of labels [n, sample], from inner products [sample, sample]: of all, and of other folds alone."""
    n, of = len(label), np.eye(emotions)[label]  # [n, sample, emotion]
    own = member.argmax(1)  # fold of each sample
    away, whole = (np.einsum("st,nte->nse", one, of, optimize=True) for one in (apart, gram))
    count = (of.sum(1)[:, None] - member.T @ of)[:, own]  # samples of the emotion outside the sample's fold
    inside, all_of = member.T @ (whole * of), (whole * of).sum(1)[:, None]
    squared = all_of - inside - member.T @ (away * of)  # |sum of those outside the fold|^2, [n, fold, emotion]
    length = np.sqrt(np.clip(squared, 1e-300, None))[:, own]
    likeness = np.where(count > 0.5, away / length, -np.inf)
    tried = (count > 0.5).any(2)
    right = ((likeness.argmax(2) == label) & tried).sum(1)
    return np.divide(right, tried.sum(1), out=np.full(n, np.nan), where=tried.any(1))


def words(texts: np.ndarray) -> np.ndarray:
    """Counts of words, or of characters where a text has no spaces: texts [...] -> [..., word]."""
    split = [WORD.findall(str(one).lower()) for one in texts.ravel()]
    known = {word: i for i, word in enumerate(sorted({word for one in split for word in one}))}
    out = np.zeros((len(split), max(len(known), 1)), np.float32)
    for row, one in zip(out, split, strict=True):
        np.add.at(row, [known[word] for word in one], 1.0)
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
