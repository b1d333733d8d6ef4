"""Turns pooled activations into one vector per emotion, layer by layer: pure functions on numpy arrays.

Samples that are missing values (NaN) never count; an emotion without a sample left gives NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer.science.directions.arithmetic import axes, combine, orthogonal, rated, tells_apart
from nsteer.science.directions.baselines import BASELINES, Samples, mean
from nsteer.science.directions.controls import permutation, permuted, sides_shuffled
from nsteer.science.directions.denoising import principal, without
from nsteer.science.directions.estimators import ESTIMATORS, Contrast

__all__ = [
    "BASELINES",
    "ESTIMATORS",
    "Contrast",
    "axes",
    "combine",
    "derive",
    "mean",
    "orthogonal",
    "permutation",
    "permuted",
    "principal",
    "rated",
    "sides_shuffled",
    "tells_apart",
    "without",
]


def derive(
    emotions: Samples,
    neutral: np.ndarray,
    *,
    baseline: str,
    estimator: str = "mean_difference",
    parameters: Mapping[str, Any] | None = None,
    variance: float | None = None,
    denoised_by: np.ndarray | None = None,
    unit_norm: bool = True,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Emotion vectors {emotion: [layer, d_model]} and their lengths before normalisation {emotion: [layer]}.

    emotions : {emotion: [sample, layer, d_model]}; neutral : [sample, layer, d_model]
    baseline : what an emotion is set against (a key of BASELINES)
    estimator, parameters : how the two become a direction (a key of ESTIMATORS), and its own parameters
    variance : share of the neutral samples' variance whose principal components are projected out, or None
    denoised_by : the samples of those components; the neutral ones when left out
    Raises ValueError when the estimator needs two groups of samples, which the baseline does not give.
    """
    means, neutral_mean = {emotion: mean(samples) for emotion, samples in emotions.items()}, mean(neutral)
    estimate = ESTIMATORS[estimator]
    vectors = {}
    for emotion, samples in emotions.items():
        difference = means[emotion] - BASELINES[baseline](emotion, means, neutral_mean)
        against = opposite(emotion, emotions, neutral, baseline)
        if estimator != "mean_difference" and not against:
            raise ValueError(f"{estimator} needs a baseline of samples: neutral_mean or rest, not {baseline}")
        layers = [
            estimate(Contrast(row, samples[:, i], [group[:, i] for group in against]), **(parameters or {}))
            if np.isfinite(row).all()
            else row
            for i, row in enumerate(difference)
        ]
        vectors[emotion] = np.stack(layers)
    if variance is not None:
        noise = neutral if denoised_by is None else denoised_by
        for layer in range(neutral.shape[1]):
            components = principal(noise[:, layer], variance)
            for vector in vectors.values():
                vector[layer] = without(vector[layer], components)
    lengths = {emotion: np.linalg.norm(vector, axis=-1) for emotion, vector in vectors.items()}
    if unit_norm:
        vectors = {e: v / np.maximum(lengths[e], np.finfo(float).tiny)[:, None] for e, v in vectors.items()}
    return (
        {e: v.astype(np.float32) for e, v in vectors.items()},
        {e: n.astype(np.float32) for e, n in lengths.items()},
    )


def opposite(emotion: str, emotions: Samples, neutral: np.ndarray, baseline: str) -> Sequence[np.ndarray]:
    """The groups of samples that an emotion is set against; none where its baseline is no other samples' mean."""
    if baseline == "neutral_mean":
        return [neutral]
    return [samples for other, samples in emotions.items() if other != emotion] if baseline == "rest" else []
