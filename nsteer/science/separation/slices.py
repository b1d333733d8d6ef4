"""Labelled arrays cut into slices without labels and put together again; samples prepared for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import directions, metrics
from nsteer.science.axis import word
from nsteer.science.separation.texts import first_of_each

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


def slices_of(
    data: xr.DataArray, core: Sequence[str], text: xr.DataArray | None
) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Every slice over the core dims, with where it stands; read one by one when the whole is large."""
    lead = leading(data, core)
    held = data.transpose(*lead, *core).values if data.nbytes < 2**29 else None
    copy = None if text is None else _copies(data, core, text)
    for at in np.ndindex(*[data.sizes[dim] for dim in lead]):
        where = dict(zip(lead, at, strict=True))
        values = data.isel(where).transpose(*core).values if held is None else held[at]
        array = np.array(values, float, order="C")
        if copy is not None:
            array[copy.values[tuple(where[str(dim)] for dim in copy.dims[: -len(core) + 1])]] = np.nan
        yield where, array


def _copies(data: xr.DataArray, core: Sequence[str], text: xr.DataArray) -> xr.DataArray:
    """Which samples of data are not the first of their text, (some of the leading dims, emotion, sample)."""
    first = first_of_each(text).reindex({dim: data[dim] for dim in text.dims}, fill_value=False)
    return ~first.transpose(*(dim for dim in data.dims if dim in first.dims and dim not in core), *core[:-1])


def coords_of(data: xr.DataArray, dims: Sequence[str]) -> dict[str, Any]:
    """The labels of dims, and what else lies along them alone (such as depth); text as Python objects."""
    coords: dict[str, Any] = {}
    for name, coord in data.coords.items():
        if coord.dims and set(coord.dims) <= set(dims):
            values = coord.values
            coords[str(name)] = (coord.dims, values.astype(object) if values.dtype.kind in "TU" else values)
    return coords


def assemble(
    data: xr.DataArray,
    core: Sequence[str],
    compute: Callable[[np.ndarray, dict[str, Any]], Mapping[str, tuple[tuple[str, ...], Any]]],
    extra: Mapping[str, Any] | None = None,
    text: xr.DataArray | None = None,
) -> xr.Dataset:
    """compute(array, labels) -> {name: (dims, values)} of every slice, as one Dataset over the leading dims.

    text : (…, emotion, sample): samples that are copies of a text are NaN
    """
    lead = leading(data, core)
    shape = [data.sizes[dim] for dim in lead]
    arrays: dict[str, np.ndarray] = {}
    dims_of: dict[str, tuple[str, ...]] = {}
    known = {dim: data[dim].values.tolist() for dim in lead if dim in data.coords}
    for where, array in slices_of(data, core, text):
        labels = {dim: listed[where[dim]] for dim, listed in known.items()}
        for name, (dims, values) in compute(array, labels).items():
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


def prepared(
    array: np.ndarray, labels: Sequence[str], neutral: str, baseline: str, variance: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples [emotion, sample, k], which are there [emotion, sample], neutral samples [sample, k], ready to combine.

    Neutral principal components are projected out of the samples (which is the same as out of the vectors) and held
    fixed; then all move to the space that they span. Samples with NaN are NaN.
    """
    rows = np.array([label != neutral for label in labels])
    there = ~np.isnan(array).any(-1)
    known = array[there]
    if variance is not None and (neutrals := array[~rows][there[~rows]]).shape[0] > 1:
        known = directions.without(known, directions.principal(neutrals, variance))
    known = metrics.compact(known, centre=baseline != "none")
    out = np.full((*there.shape, known.shape[-1]), np.nan)
    out[there] = known
    nothing = np.full((1, *out.shape[1:]), np.nan)
    return out[rows], there[rows], np.concatenate([out[~rows], nothing])[0]


def neutral_mean(neutrals: np.ndarray) -> np.ndarray:
    return metrics.nan_mean(neutrals, 0)


def knob_of(given: Any, at: Mapping[str, Any]) -> Any:
    """A knob, or that of the current method."""
    return given[at["method"]] if isinstance(given, Mapping) else given


@lru_cache(maxsize=8)
def _halved(there: bytes, shape: tuple[int, int], neutrals: bytes, n: int, seed: int) -> tuple:
    """Random halves of the samples that are there, and of the neutral ones: the same at every layer, so drawn once."""
    rng = np.random.default_rng(seed + 1)
    sides = metrics.halves(np.frombuffer(there, bool).reshape(shape), n, rng)
    return sides, metrics.halves(np.frombuffer(neutrals, bool)[None], n, rng)


def split_half(
    values: np.ndarray, there: np.ndarray, neutrals: np.ndarray, rule: str, n: int, seed: int
) -> tuple[float, float]:
    """Reliability of vectors and of their RDM: mean correlation of n random halves, stepped up by Spearman-Brown.

    Neutral samples are halved too, so that halves share no noise. All follows from inner products of the halves' means.
    """
    sides, bases = _halved(there.tobytes(), there.shape, (~np.isnan(neutrals).any(-1)).tobytes(), n, seed)
    emotions, width = values.shape[0], values.shape[-1]
    samples = np.concatenate([np.where(there[..., None], values, 0.0), np.nan_to_num(neutrals)[None]])
    drawn = np.stack(
        [np.concatenate(both, 1) for both in zip(sides, bases, strict=True)], 1
    )  # [n, half, label, sample]
    count = drawn.sum(-1, keepdims=True)
    means = np.einsum("nhes,esd->nhed", drawn / np.maximum(count, 1), samples, optimize=True).reshape(n, -1, width)
    known = (count[0, 0] > 0)[:, 0]  # the same in every half
    inner = means @ means.swapaxes(1, 2)
    own = np.flatnonzero(known[:-1])
    weights = np.zeros((2, len(own), 2, emotions + 1))  # vectors from means
    for half in range(2):
        weights[half, np.arange(len(own)), half, own] = 1.0
        if rule == "grand_mean":
            weights[half, :, half, own] -= 1 / max(len(own), 1)
        elif rule == "neutral_mean":
            weights[half, :, half, emotions] = -1.0
    weights = weights.reshape(2 * len(own), 2 * (emotions + 1))
    products = (weights @ inner @ weights.T).reshape(n, 2, len(own), 2, len(own))
    first, second, across = products[:, 0, :, 0], products[:, 1, :, 1], products[:, 0, :, 1]
    rdm = float("nan")
    if rule != "neutral_mean" or known[-1]:  # no two neutral samples: the differences still compare
        first_rdm, second_rdm = (1 - metrics.cosines_of(table) for table in (first, second))
        rdm = float(metrics.nan_mean(metrics.rdm_correlation(first_rdm, second_rdm)))
    whole = float(metrics.nan_mean(metrics.deviation_correlation(first, second, across)))
    return float(metrics.spearman_brown(whole)), float(metrics.spearman_brown(rdm))
