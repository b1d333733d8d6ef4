"""Turns pooled activations into one vector per emotion, layer by layer: pure functions on numpy arrays.

Samples that are holes (NaN) never count; an emotion without a sample left gives NaN.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np

Samples = Mapping[str, np.ndarray]


def mean(samples: np.ndarray) -> np.ndarray:
    """Mean over samples that are there: [sample, layer, d_model] -> [layer, d_model] in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all holes: NaN is the answer
        return np.nanmean(samples.astype(np.float64), axis=0)


def neutral_mean(emotions: Samples, neutral: np.ndarray) -> np.ndarray:
    """The mean of the neutral samples (Jeong 2026)."""
    return mean(neutral)


def grand_mean(emotions: Samples, neutral: np.ndarray) -> np.ndarray:
    """The mean over the emotions' means (2604.07729): every emotion weighs the same.

    Vectors minus it sum to zero, so their mean pairwise cosine is near -1/(n-1) by algebra, whatever the model.
    """
    return mean(np.stack([mean(samples) for samples in emotions.values()]))


def nothing(emotions: Samples, neutral: np.ndarray) -> np.ndarray:
    """No baseline."""
    return np.float64(0.0)  # type: ignore[return-value]


BASELINES: dict[str, Callable[[Samples, np.ndarray], np.ndarray]] = {
    "neutral_mean": neutral_mean,
    "grand_mean": grand_mean,
    "none": nothing,
}


def principal(samples: np.ndarray, variance: float) -> np.ndarray:
    """The first principal components of [sample, d_model] that hold at least `variance` of it: [component, d_model].

    Samples that differ by no more than float32 rounds (greedy texts repeat) have none, and nor has a single one.
    """
    samples = samples[~np.isnan(samples).any(-1)].astype(np.float64)
    if len(samples) < 2:
        return np.zeros((0, samples.shape[-1]))
    _, scale, components = np.linalg.svd(samples - samples.mean(0), full_matrices=False)
    rank = int((scale > np.abs(samples).max() * np.sqrt(samples.size) * np.finfo(np.float32).eps).sum())
    share = np.cumsum(scale**2) / max(float((scale**2).sum()), np.finfo(float).tiny)
    return components[: min(rank, int(np.searchsorted(share, variance - 1e-12) + 1))]


def without(vector: np.ndarray, components: np.ndarray) -> np.ndarray:
    """`vector` [..., d_model] minus its projection on orthonormal `components` [component, d_model]."""
    return vector - (vector @ components.T) @ components


def derive(
    emotions: Samples,
    neutral: np.ndarray,
    *,
    baseline: str,
    variance: float | None = None,
    unit_norm: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Emotion vectors {emotion: [layer, d_model]} and their lengths before normalisation {emotion: [layer]}.

    emotions : {emotion: [sample, layer, d_model]}; neutral : [sample, layer, d_model]
    baseline : what is subtracted (a key of BASELINES)
    variance : share of the neutral samples' variance whose principal components are projected out, or None
    """
    base = BASELINES[baseline](emotions, neutral)
    vectors = {emotion: mean(samples) - base for emotion, samples in emotions.items()}
    if variance is not None:
        for layer in range(neutral.shape[1]):
            components = principal(neutral[:, layer], variance)
            for vector in vectors.values():
                vector[layer] = without(vector[layer], components)
    lengths = {emotion: np.linalg.norm(vector, axis=-1) for emotion, vector in vectors.items()}
    if unit_norm:
        vectors = {e: v / np.maximum(lengths[e], np.finfo(float).tiny)[:, None] for e, v in vectors.items()}
    return (
        {e: v.astype(np.float32) for e, v in vectors.items()},
        {e: n.astype(np.float32) for e, n in lengths.items()},
    )
