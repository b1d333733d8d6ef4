"""Vectors as they are: cosines, dissimilarity matrices and their correlation, anisotropy, components, order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import axis, metrics, statistics
from nsteer.science.presets import NEUTRAL
from nsteer.science.separation.measuring import EXACT
from nsteer.science.separation.slices import (
    CORE,
    MEANING,
    PINNED,
    assemble,
    coords_of,
    emotions_of,
    knob_of,
    neutral_mean,
    prepared,
    split_half,
)


@axis.of_arrays
def cosine_similarity(vector: xr.DataArray) -> xr.DataArray:
    """Cosine between the vectors of every two emotions: (…, emotion, d_model) -> (…, emotion, emotion_2)."""
    unit = vector / np.sqrt((vector**2).sum("d_model", skipna=False))
    return xr.dot(unit, unit.rename(emotion="emotion_2"), dim="d_model").rename("cosine")


@axis.of_arrays
def mean_pairwise_cosine(vector: xr.DataArray) -> xr.DataArray:
    """Mean cosine over all pairs of emotions: (…, emotion, d_model) -> (…). Lower is better separated (Jeong 2026).

    An emotion with NaN (NaN) does not count. For vectors minus their grand mean it is near -1/(n-1) by algebra,
    whatever the model: see `pinned`.
    """
    cosine = cosine_similarity(vector)
    pairs = xr.DataArray(np.tri(vector.sizes["emotion"], k=-1, dtype=bool), dims=("emotion", "emotion_2"))
    return cosine.where(pairs).mean(("emotion", "emotion_2")).rename(PINNED)


@axis.of_arrays
def pinned(vector: xr.DataArray) -> xr.DataArray:
    """Whether vectors (…, emotion, d_model) sum to zero at some lengths, so that their mean cosine says nothing."""
    core = ["emotion", "d_model"]
    flags = xr.apply_ufunc(metrics.sums_to_zero, vector, input_core_dims=[core], vectorize=True, output_dtypes=[bool])
    return flags.rename("pinned")


@axis.of_arrays
def rdms(
    activations: xr.DataArray,
    *,
    baseline: str | Mapping[str, str] = "neutral_mean",
    variance: float | Mapping[str, float | None] | None = None,
    text: xr.DataArray | None = None,
    splits: int = 20,
    seed: int = 0,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """Dissimilarity matrices from samples: `rdm` = 1 - cosine (…, emotion, emotion_2), and their `reliability` (…).

    Arguments as in `measure`. `reliability` is that of the whole set of samples, by split halves and Spearman-Brown.
    Matrices of models of any width can be set side by side: join them with `xr.concat(..., "model")`.
    """
    labels = [str(e) for e in activations.emotion.values.tolist()]

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule = knob_of(baseline, at)
        values, there, neutrals = prepared(array, labels, neutral, rule, knob_of(variance, at))
        vectors = metrics.contrast(metrics.means(values, there.astype(float)), neutral_mean(neutrals), rule)
        _, reliability = split_half(values, there, neutrals, rule, splits, seed)
        return {
            "rdm": (("emotion", "emotion_2"), 1 - metrics.cosines(vectors)),
            "reliability": ((), reliability),
        }

    names = np.array(emotions_of(activations, neutral), object)
    matrices = assemble(activations, CORE, of_slice, {"emotion": names, "emotion_2": names}, text)
    matrices.reliability.attrs["long_name"] = axis.word(MEANING["rdm_reliability"])
    return matrices


@axis.of_arrays
def rsa(rdm: xr.Dataset, along: str, shuffles: int = 999, seed: int = 0) -> xr.Dataset:
    """Correlation of dissimilarity matrices between every two labels of a dim, each beside its noise ceiling.

    rdm : from `rdms`: `rdm` (…, along, emotion, emotion_2), `reliability` (…, along)
    along : "method", "model" (so also dtypes: one model label for each), or "layer"
    Returns over (…, along, along_2): `correlation` (Spearman over pairs of emotions that both have), `ceiling`
    = sqrt(reliability_1 * reliability_2), the correlation that two noisy measurements of one geometry would show;
    `share` = correlation / ceiling; `p` of a Mantel test (emotions of one matrix shuffled, greater); `n_emotions`.

    The ceiling supposes that noise is not shared. Layers, and dtypes that read the same texts, share it: there a
    correlation may pass the ceiling.
    """
    labels = rdm[along].values.tolist()
    lead = [str(d) for d in rdm.rdm.dims if d not in (along, "emotion", "emotion_2")]
    values = rdm.rdm.transpose(*lead, along, "emotion", "emotion_2").values
    reliability = rdm.reliability.transpose(*lead, along).values
    there = ~np.isnan(values).all(-1)  # [..., label, emotion]
    some = there.any(-1)  # of most labels there may be nothing
    both = some[..., :, None] & some[..., None, :]
    count = (there[..., :, None, :] & there[..., None, :, :]).sum(-1)
    out = {
        "correlation": metrics.rdm_correlations(values),
        "ceiling": np.where(both, np.sqrt(reliability[..., :, None] * reliability[..., None, :]), np.nan),
        "p": np.full(both.shape, np.nan),
    }
    for at in map(tuple, np.argwhere(both & bool(shuffles))):
        *here, i, j = at
        known = there[(*here, i)] & there[(*here, j)]
        if i < j:
            a, b = (values[(*here, k)][np.ix_(known, known)] for k in (i, j))
            out["p"][at] = out["p"][(*here, j, i)] = _mantel(a, b, shuffles, seed)
    out["share"] = np.where(np.eye(len(labels), dtype=bool), np.nan, metrics.ratio(out["correlation"], out["ceiling"]))
    dims = (*lead, along, f"{along}_2")
    coords = {**coords_of(rdm.rdm, [*lead, along]), f"{along}_2": np.array(labels, rdm[along].dtype)}
    variables = {name: (dims, array) for name, array in out.items()}
    return xr.Dataset({**variables, "n_emotions": (dims, count)}, coords=coords, attrs={"along": along, "seed": seed})


def _mantel(a: np.ndarray, b: np.ndarray, n: int, seed: int) -> float:
    """P(correlation this high) when the emotions of one matrix are permuted."""
    if len(a) < 4 or not n:
        return float("nan")

    row, column = metrics.pairs(len(a))
    ranks = np.zeros_like(b)
    ranks[row, column] = ranks[column, row] = metrics.ranks(b[row, column])
    x, rng = metrics.ranks(a[row, column]), np.random.default_rng(seed)
    x = x - x.mean()
    if math.factorial(len(a)) <= EXACT:
        every = [np.array(order) for order in itertools.permutations(range(len(a)))]
        own = float(x @ ranks[row, column])
        return float(np.mean([float(x @ ranks[order[row], order[column]]) >= own - 1e-9 for order in every]))
    orders = np.array([rng.permutation(len(a)) for _ in range(n)])
    null = ranks[orders[:, row], orders[:, column]] @ x  # the rest of the formula does not change
    return statistics.against(float(x @ ranks[row, column]), null).p


@axis.of_arrays
def anisotropy(pooled: xr.DataArray, level: float = statistics.LEVEL) -> xr.Dataset:
    """Mean pairwise cosine of neutral sentences' streams: (…, sentence, d_model) -> `anisotropy`, `low`, `high`, `n`.

    … is usually (model, bos, layer), with `bos` "with" and "without" (Jeong 2026: last token, 20 sentences). The
    interval is a jackknife over sentences. 0: directions fill the space; 1: all streams point one way.
    """

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        mean, low, high, n = metrics.mean_pairwise_interval(array, level)
        return {"anisotropy": ((), mean), "low": ((), low), "high": ((), high), "n": ((), n)}

    intervals = assemble(pooled, ("sentence", "d_model"), of_slice)
    intervals.anisotropy.attrs["long_name"] = "mean pairwise cosine of neutral sentences' last-token streams"
    return intervals.assign_attrs(level=level)


@axis.of_arrays
def components(vector: xr.DataArray, n: int = 2) -> xr.Dataset:
    """PCA of emotion vectors (…, emotion, d_model): `score` (…, emotion, component), `share` of variance of each.

    The mean over emotions is taken away; emotions with NaN do not count. A component's sign is arbitrary: the emotion
    with the largest score is made positive.
    """

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        known = ~np.isnan(array).any(-1)
        score, share = np.full((len(array), n), np.nan), np.full(n, np.nan)
        if known.sum() > 1:
            left, scale, _ = np.linalg.svd(array[known] - array[known].mean(0), full_matrices=False)
            k = min(n, len(scale))
            scores = left[:, :k] * scale[:k]
            scores *= np.sign(scores[np.abs(scores).argmax(0), np.arange(k)])
            score[known, :k], share[:k] = scores, scale[:k] ** 2 / (scale**2).sum()
        return {"score": (("emotion", "component"), score), "share": (("component",), share)}

    names = vector.emotion.values.astype(object)
    return assemble(vector, ("emotion", "d_model"), of_slice, {"emotion": names, "component": np.arange(n)})


@axis.of_arrays
def rating_correlation(score: xr.DataArray, ratings: Mapping[str, Mapping[str, float]]) -> xr.Dataset:
    """Spearman of component scores (…, emotion, component) with named ratings {name: {emotion: value}}.

    Returns `rho`, `p`, `n` over (…, component, rating). The sign of rho is arbitrary, as a component's is.
    """

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rows = [[table.get(str(e), np.nan) for e in score.emotion.values.tolist()] for table in ratings.values()]
        correlations = [[statistics.spearman(column, row) for row in rows] for column in array.T]
        dims = ("component", "rating")
        return {
            "rho": (dims, np.array([[f[0] for f in line] for line in correlations])),
            "p": (dims, np.array([[f[1] for f in line] for line in correlations])),
            "n": (dims, np.array([[f[2] for f in line] for line in correlations])),
        }

    coords = {"component": score.component.values, "rating": np.array(list(ratings), object)}
    return assemble(score, ("emotion", "component"), of_slice, coords)


@axis.of_arrays
def leaf_order(rdm: xr.DataArray) -> list[str]:
    """Emotions in the order of average-linkage clustering of one RDM (emotion, emotion_2), leaves optimally turned.

    Emotions with NaN are left out.
    """
    return hierarchy(rdm)[0]


@axis.of_arrays
def hierarchy(rdm: xr.DataArray) -> tuple[list[str], dict[str, int]]:
    """`leaf_order`, and the side (0 or 1) of the tree's first split on which each emotion lies."""
    from scipy.cluster import hierarchy as trees
    from scipy.spatial.distance import squareform

    values = rdm.transpose("emotion", "emotion_2").values
    known = ~np.isnan(values).all(-1)
    names = [str(e) for e, there in zip(rdm.emotion.values.tolist(), known, strict=True) if there]
    if len(names) < 3:
        return names, {name: min(i, 1) for i, name in enumerate(names)}
    square = np.clip(values[np.ix_(known, known)], 0, None)
    np.fill_diagonal(square, 0.0)
    flat = squareform((square + square.T) / 2, checks=False)
    tree = trees.linkage(flat, "average", optimal_ordering=True)
    sides = trees.fcluster(tree, 2, "maxclust")
    order = [names[i] for i in trees.leaves_list(tree)]
    return order, {name: int(side != sides[0]) for name, side in zip(names, sides, strict=True)}
