"""Turns pooled activations into how well a model tells emotions apart, layer by layer: Dataset -> Dataset.

Activations have dims (…, emotion, sample, layer, d_model), where … is usually (model, method) and the emotion
`neutral` is the baseline; a sample with NaN is NaN. Everything is computed from samples, so baselines may be
changed afterwards and every figure gets an interval or a null from the samples it rests on. No model is needed.
"""

from nsteer.errors import TrapError
from nsteer.science.separation.choosing import best_by_accuracy, best_layer, trap_message, u_shape
from nsteer.science.separation.geometry import (
    anisotropy,
    components,
    cosine_similarity,
    hierarchy,
    leaf_order,
    mean_pairwise_cosine,
    pinned,
    rating_correlation,
    rdms,
    rsa,
)
from nsteer.science.separation.measuring import OPPOSITES, accuracies, measure
from nsteer.science.separation.slices import MEANING, PINNED
from nsteer.science.separation.texts import distinct_texts, first_of_each, folds_of

__all__ = [
    "MEANING",
    "OPPOSITES",
    "PINNED",
    "TrapError",
    "accuracies",
    "anisotropy",
    "best_by_accuracy",
    "best_layer",
    "components",
    "cosine_similarity",
    "distinct_texts",
    "first_of_each",
    "folds_of",
    "hierarchy",
    "leaf_order",
    "mean_pairwise_cosine",
    "measure",
    "pinned",
    "rating_correlation",
    "rdms",
    "rsa",
    "trap_message",
    "u_shape",
]
