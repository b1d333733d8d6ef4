"""Draws what held-out accuracy is when emotion labels mean nothing: many data sets at once, by their inner products.

A shuffle moves samples and makes no new ones, so every cosine that a data set needs is a sum of inner products of the
samples as they are. These are taken once; a data set costs sums over [emotion, emotion, sample], whatever d_model is.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MOST = 1500
"""Samples up to which this is worth it: inner products of all pairs grow with their square."""

NUMBERS = 2**22
"""Numbers of the largest array that is held for the data sets which are worked out together."""


@lru_cache(maxsize=8)
def orders(there: bytes, shape: tuple[int, int], n: int, seed: int) -> np.ndarray:
    """n shuffles of emotion labels among the samples of one number, so that templates stay balanced.

    there : the bytes of a bool [emotion, sample] of that shape; layers mostly have one
    Returns [n, emotion, sample], the emotion whose sample of that number comes to stand there; holes stay.
    """
    held, rng = np.frombuffer(there, bool).reshape(shape), np.random.default_rng(seed)
    found = np.tile(np.arange(shape[0])[:, None], (n, 1, shape[1]))
    known = [np.flatnonzero(column) for column in held.T]
    for drawn in found:
        for k, rows in enumerate(known):
            drawn[rows, k] = rng.permutation(rows)
    found.flags.writeable = False
    return found


def shuffled_accuracy(
    values: np.ndarray, there: np.ndarray, neutral: np.ndarray, baseline: str, folds: np.ndarray, orders: np.ndarray
) -> np.ndarray:
    """`metrics.accuracy` of `metrics.held_out`, of data sets whose samples are in other emotions: -> [n].

    values : [emotion, sample, d]; neutral : [d]; folds : [sample]
    orders : [n, emotion, sample], the emotion whose sample of that number stands there; holes stand where they stood
    """
    emotions, samples = there.shape
    filled = np.where(there[..., None], np.nan_to_num(values), 0.0).reshape(emotions * samples, -1).astype(float)
    if baseline == "neutral_mean":
        filled = np.where(there.reshape(-1, 1), filled - neutral, 0.0)  # all that is compared is a difference from it
    elif baseline == "grand_mean":
        filled = np.where(there.reshape(-1, 1), filled - filled[there.ravel()].mean(0), 0.0)  # for precision alone
    products = filled @ filled.T
    _, fold = np.unique(folds, return_inverse=True)
    same = fold[:, None] == fold[None]  # [sample, sample]
    count = there.sum(1)[:, None] - there.astype(float) @ same  # [emotion, sample]: left to train on, without its fold
    rows = orders * samples + np.arange(samples)
    each = emotions**2 * samples * (samples if same.sum() > samples else 1)
    step = max(1, NUMBERS // each)
    found = [
        _accuracy(products, rows[start : start + step], there, same.astype(float), count, baseline == "grand_mean")
        for start in range(0, len(rows), step)
    ]
    return np.concatenate(found) if found else np.empty(0)


def _accuracy(
    products: np.ndarray, rows: np.ndarray, there: np.ndarray, same: np.ndarray, count: np.ndarray, centred: bool
) -> np.ndarray:
    """Of the data sets whose samples are those rows [n, emotion, sample]; `centred`: against the mean of the means."""
    n, emotions, samples = rows.shape
    flat = rows.reshape(n, -1)
    member = np.zeros((n, emotions, len(products)))
    np.put_along_axis(member, rows, there[None].astype(float), -1)
    total = (member.reshape(n * emotions, -1) @ products).reshape(n, emotions, -1)
    whole = np.take_along_axis(total, flat[:, None, :], -1).reshape(n, emotions, emotions, samples)  # T_f . x_hk
    near = products[rows[:, :, None, :, None], rows[:, None, :, None, :]] if same.sum() > samples else None
    if near is None:  # a fold is one number: only samples of one number meet in it
        inside = products[rows[:, :, None, :], rows[:, None, :, :]] * there[None, :, None, :]
    else:
        inside = np.einsum("nfhjk,fj,jk->nfhk", near, there.astype(float), same)  # S_gf . x_hk, g the fold of k
    known = np.broadcast_to(there.astype(float)[None, None], whole.shape)
    of_fold = (whole * known) @ same  # T_f . S_gh
    both = (inside * known) @ same  # S_gf . S_gh
    pair = (whole * known).sum(-1)[..., None] - of_fold - of_fold.swapaxes(1, 2) + both
    usable = count > 0.5  # [emotion, sample]
    share = np.where(usable, 1 / np.where(usable, count, 1), 0.0)
    pair = pair * share[None, :, None] * share[None, None]  # a_f . a_h, means without the fold of k
    mine = (whole - inside) * share[None, :, None]  # a_f . x_hk
    square = np.einsum("nffk->nfk", pair)
    if centred:
        weight = usable / np.maximum(usable.sum(0), 1)  # [emotion, sample]
        middle = np.einsum("nfhk,hk->nfk", pair, weight)  # c . a_f
        centre = np.einsum("nfk,fk->nk", middle, weight)  # c . c
        mine = mine - np.einsum("nfhk,fk->nhk", mine, weight)[:, None] - middle[:, :, None] + centre[:, None, None]
        square = square - 2 * middle + centre[:, None]
    known_vector = usable[None] & (square > 1e-12 * np.abs(square).max(initial=0.0))
    likeness = np.where(
        known_vector[:, :, None], mine / np.sqrt(np.where(known_vector, square, 1.0))[:, :, None], -np.inf
    )
    right = likeness.argmax(1) == np.arange(emotions)[None, :, None]  # [n, emotion, sample]
    counted = there[None] & known_vector.any(1)[:, None]
    return np.where(counted.any((1, 2)), (right & counted).sum((1, 2)) / np.maximum(counted.sum((1, 2)), 1), np.nan)
