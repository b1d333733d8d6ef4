"""Labelled arrays cut into blocks of plain numbers and put together again; samples prepared for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import directions, metrics
from nsteer.science.axis import word

CORE = ("emotion", "sample", "d_model")
PINNED = "mean_pairwise_cosine"

MEANING = {
    "mean_pairwise_cosine": "mean cosine over all pairs of emotion vectors as they are: the metric of Jeong "
    "2026, which noise moves",
    "cv_cosine": "cross-validated mean pairwise cosine: products of samples of different folds alone, which "
    "noise does not move; lower is better separated; NaN where the vectors' length can not be distinguished from 0",
    "cv_cosine_low": "lower edge of its interval (jackknife, Fieller)",
    "cv_cosine_high": "upper edge of its interval",
    "cv_length": "mean squared length of the vectors without their noise",
    "cv_length_p": "P(cv_length this far from 0)",
    "cv_influence": "deviation of cv_cosine by each unit left out; their squares add up to its variance",
    "cv_df": "degrees of freedom of that variance",
    "n_units": "independent units that the jackknife leaves out",
    "pinned": "whether mean_pairwise_cosine is held at -1/(n-1) by algebra, so that it says nothing",
    "accuracy": "share of held-out samples nearest to their own emotion's vector",
    "chance": "its chance level, 1 / emotions",
    "accuracy_hit": "mean over the samples of a fold of whether each was held out right, less the accuracy",
    "accuracy_chosen": "accuracy at the layer that is best on the other folds, chosen again for each fold",
    "accuracy_chosen_n": "samples that it was tried on",
    "lexical": "accuracy of a bag of words on the same folds",
    "embedding": "accuracy of a bag of token embeddings, which no block has read, on the same folds",
    "accuracy_p": "P(accuracy this high | emotion labels shuffled), this layer alone",
    "accuracy_p_any": "P(best accuracy over layers this high | labels shuffled): counts that layers were searched",
    "reliability": "split-half reliability of the vectors' differences among emotions (Spearman-Brown)",
    "rdm": "1 - cosine between emotion vectors",
    "rdm_reliability": "split-half reliability of the dissimilarity matrix (Spearman, Spearman-Brown)",
    "pole_separation": "mean cosine within positive and within negative emotions minus that between them",
    "pole_p": "P(pole_separation this high | groups shuffled among emotions)",
    "opposite_cosine": "cosine between the vectors of an opposite pair",
    "n_emotions": "emotions with a vector",
    "n_samples": "samples (distinct texts, where texts are given) behind the vectors",
    "n_each": "samples of each emotion",
    "n_least": "samples of the emotion that has fewest",
}


def leading(data: xr.DataArray, core: Sequence[str]) -> list[str]:
    return [str(dim) for dim in data.dims if dim not in core]


def _blocks(data: xr.DataArray, core: Sequence[str]) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Every block over the core dims, with where it stands; read one by one when the whole is large."""
    lead = leading(data, core)
    held = data.transpose(*lead, *core).values if data.nbytes < 2**29 else None
    for at in np.ndindex(*[data.sizes[dim] for dim in lead]):
        where = dict(zip(lead, at, strict=True))
        one = data.isel(where).transpose(*core).values if held is None else held[at]
        yield where, np.array(one, float, order="C")


def coords_of(data: xr.DataArray, dims: Sequence[str]) -> dict[str, Any]:
    """The labels of dims, and what else lies along them alone (such as depth); text as plain objects."""
    found: dict[str, Any] = {}
    for name, coord in data.coords.items():
        if coord.dims and set(coord.dims) <= set(dims):
            values = coord.values
            found[str(name)] = (coord.dims, values.astype(object) if values.dtype.kind in "TU" else values)
    return found


def assemble(
    data: xr.DataArray,
    core: Sequence[str],
    compute: Callable[[np.ndarray, dict[str, Any]], Mapping[str, tuple[tuple[str, ...], Any]]],
    extra: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """compute(block, labels) -> {name: (dims, values)} of every block, as one Dataset over the leading dims."""
    lead = leading(data, core)
    shape = [data.sizes[dim] for dim in lead]
    arrays: dict[str, np.ndarray] = {}
    dims_of: dict[str, tuple[str, ...]] = {}
    known = {dim: data[dim].values.tolist() for dim in lead if dim in data.coords}
    for where, block in _blocks(data, core):
        labels = {dim: listed[where[dim]] for dim, listed in known.items()}
        for name, (dims, values) in compute(block, labels).items():
            values = np.asarray(values)
            if name not in arrays:
                blank = 0 if values.dtype.kind in "bi" else np.nan
                arrays[name] = np.full((*shape, *values.shape), blank, values.dtype)
                dims_of[name] = (*lead, *dims)
            arrays[name][tuple(where.values())] = values
    variables = {name: (dims_of[name], values, about_of(name)) for name, values in arrays.items()}
    return xr.Dataset(variables, coords={**coords_of(data, lead), **(extra or {})})


def about_of(name: str) -> dict[str, str]:
    return {"long_name": word(MEANING[name]), "units": "1"} if name in MEANING else {}


def emotions_of(data: xr.DataArray, neutral: str) -> list[str]:
    return [str(e) for e in data.emotion.values.tolist() if str(e) != neutral]


def _split(block: np.ndarray, labels: Sequence[str], neutral: str) -> tuple[np.ndarray, np.ndarray]:
    """A block [emotion, sample, d] as the emotions' [emotion, sample, d] and the neutral [sample, d]; NaN are NaN."""
    block = np.where(np.isnan(block).any(-1, keepdims=True), np.nan, block)
    rows = [i for i, label in enumerate(labels) if label != neutral]
    at = [i for i, label in enumerate(labels) if label == neutral]
    return block[rows], block[at[0]] if at else np.full(block.shape[1:], np.nan)


def prepared(
    block: np.ndarray, labels: Sequence[str], neutral: str, baseline: str, variance: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples [emotion, sample, k], which are there [emotion, sample], neutral samples [sample, k], ready to combine.

    Neutral principal components are projected out of the samples (which is the same as out of the vectors) and held
    fixed; then all move to the space that they span.
    """
    values, plain = _split(block, labels, neutral)
    if variance is not None and (~np.isnan(plain).any(-1)).sum() > 1:
        components = directions.principal(plain, variance)
        values, plain = directions.without(values, components), directions.without(plain, components)
    values, plain = metrics.compact(values, plain, centre=baseline != "none")
    return values, ~np.isnan(values).any(-1), plain


def neutral_mean(plain: np.ndarray) -> np.ndarray:
    return metrics.nan_mean(plain, 0)


def knob_of(given: Any, at: Mapping[str, Any]) -> Any:
    """A knob, or that of the current method."""
    return given[at["method"]] if isinstance(given, Mapping) else given


def drawn_neutral(plain: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return metrics.means(plain[None], weights[:, None])[:, 0]


@lru_cache(maxsize=8)
def _halved(there: bytes, shape: tuple[int, int], plain: bytes, n: int, seed: int) -> tuple:
    """Random halves of the samples that are there, and of the neutral ones: the same at every layer, so drawn once."""
    rng = np.random.default_rng(seed + 1)
    sides = metrics.halves(np.frombuffer(there, bool).reshape(shape), n, rng)
    return sides, metrics.halves(np.frombuffer(plain, bool)[None], n, rng)


def split_half(
    values: np.ndarray, there: np.ndarray, plain: np.ndarray, rule: str, n: int, seed: int
) -> tuple[float, float]:
    """Reliability of vectors and of their RDM: mean correlation of n random halves, stepped up by Spearman-Brown.

    Neutral samples are halved too, so that halves share no noise.
    """
    sides, bases = _halved(there.tobytes(), there.shape, (~np.isnan(plain).any(-1)).tobytes(), n, seed)
    first, second = (
        metrics.contrast(metrics.means(values, side), drawn_neutral(plain, base[:, 0]), rule)
        for side, base in zip(sides, bases, strict=True)
    )
    if rule == "neutral_mean" and np.isnan(first).all():  # no two neutral samples: the differences still compare
        first, second = (metrics.means(values, side) for side in sides)
        rdm = float("nan")
    else:
        one, two = 1 - metrics.cosines(first), 1 - metrics.cosines(second)
        rdm = float(metrics.nan_mean(metrics.rdm_correlation(one, two)))
    whole = float(metrics.nan_mean(metrics.vector_correlation(first, second)))
    return float(metrics.spearman_brown(whole)), float(metrics.spearman_brown(rdm))
