"""Principal components of samples, projected out of vectors."""

from __future__ import annotations

import numpy as np


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
