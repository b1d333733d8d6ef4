"""What an emotion's mean is set against: a function and a row of BASELINES each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import numpy as np

Samples = Mapping[str, np.ndarray]


def mean(samples: np.ndarray) -> np.ndarray:
    """Mean over samples that are there: [sample, layer, d_model] -> [layer, d_model] in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all missing values: NaN is the answer
        return np.nanmean(samples.astype(np.float64), axis=0)


def neutral_mean(emotion: str, means: Samples, neutral: np.ndarray) -> np.ndarray:
    """The mean of the neutral samples.

    formula : `b_e = mean_k x[neutral, k]`
    citation : Jeong 2026 (2604.04064)
    """
    return neutral


def grand_mean(emotion: str, means: Samples, neutral: np.ndarray) -> np.ndarray:
    """The mean over all emotions' means: every emotion weighs the same.

    Vectors minus it sum to zero, so their mean pairwise cosine is near -1/(n-1) by algebra, whatever the model.

    formula : `b_e = mean_o m_o`, over all n emotions, where `m_o = mean_k x[o, k]`
    citation : Emotion Concepts and their Function in a Large Language Model (2604.07729)
    """
    return mean(np.stack(list(means.values())))


def rest(emotion: str, means: Samples, neutral: np.ndarray) -> np.ndarray:
    """The mean over the other emotions' means: every other emotion weighs the same.

    `m_e - b_e` is `n / (n - 1)` times what `grand_mean` leaves: the same direction, a larger length, and the same sum.

    formula : `b_e = mean_o m_o`, over the n - 1 emotions `o != e`
    citation : one against the rest, as classifiers do; a direction equal to that of 2604.07729
    """
    others = [mean for other, mean in means.items() if other != emotion]
    return mean(np.stack(others)) if others else np.full_like(means[emotion], np.nan)


def nothing(emotion: str, means: Samples, neutral: np.ndarray) -> np.ndarray:
    """No baseline: the emotion's mean itself.

    formula : `b_e = 0`
    citation : none; what all texts share stays in the vector
    """
    return np.zeros_like(means[emotion])


BASELINES: dict[str, Callable[[str, Samples, np.ndarray], np.ndarray]] = {
    "neutral_mean": neutral_mean,
    "grand_mean": grand_mean,
    "rest": rest,
    "none": nothing,
}
"""Name in a plan -> (emotion, means of all emotions [layer, d_model], neutral mean) -> baseline [layer, d_model]."""
