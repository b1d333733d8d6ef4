"""Vectors made of vectors: formulas worked out layer by layer, and axes by regression on ratings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def combine(tree: Any) -> np.ndarray:
    """The direction [layer, d_model] of a formula whose names are replaced by arrays of that form.

    `unit` and `⟂` act on every layer for itself. A component of no more than float32 rounding is none.

    formula : `a ⟂ b = a - ⟨a, b⟩ b / ‖b‖²`; `orthogonal(a, b, c)`: a minus its projection on the span of b and c
    citation : vector arithmetic of steering vectors (2308.10248); projection: linear algebra
    """
    if isinstance(tree, np.ndarray):
        return tree.astype(np.float64)
    kind, *operands = tree
    if kind == "scale":
        return operands[0] * combine(operands[1])
    if kind == "add":
        return combine(operands[0]) + combine(operands[1])
    if kind == "unit":
        vector = combine(operands[0])
        return vector / np.maximum(np.linalg.norm(vector, axis=-1, keepdims=True), np.finfo(float).tiny)
    assert kind == "without", kind
    return orthogonal(combine(operands[0]), np.stack([combine(operand) for operand in operands[1]]))


def orthogonal(vector: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`vector` [layer, d_model] minus its projection on the span of `others` [other, layer, d_model], at each layer."""
    remainder = np.full_like(vector, np.nan)
    for layer, row in enumerate(vector):
        span = others[:, layer]
        if np.isfinite(row).all() and np.isfinite(span).all():
            _, scale, axes = np.linalg.svd(span, full_matrices=False)
            axes = axes[scale > scale.max(initial=0) * np.finfo(np.float32).eps]
            remainder[layer] = row - (row @ axes.T) @ axes
    return remainder


def axes(vectors: Mapping[str, np.ndarray], ratings: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """Directions of rated scales {scale: [layer, d_model]}: what a vector gains by a unit of a scale, the others kept.

    Ordinary least squares of the vectors on all scales at once and a constant, over the emotions that have a vector and
    a rating on every scale.

    vectors : {emotion: [layer, d_model]}; ratings : {scale: {emotion: number}}
    formula : `v_e = c + Σ_s r[s, e] a_s + rest_e`, `a = argmin Σ_e ‖rest_e‖²`
    citation : linear regression; ours
    Raises ValueError when the ratings do not tell the scales apart.
    """
    known = rated(vectors, ratings)
    table = np.array([[scale[emotion] for scale in ratings.values()] for emotion in known]).reshape(len(known), -1)
    if not tells_apart(table):
        raise ValueError(f"{len(known)} rated emotions do not tell {len(ratings)} scales apart")
    values = np.stack([vectors[emotion] for emotion in known]).astype(np.float64)
    slopes = np.linalg.pinv(table - table.mean(0)) @ (values - values.mean(0)).reshape(len(known), -1)
    return dict(zip(ratings, slopes.reshape(len(ratings), *values.shape[1:]), strict=True))


def rated(emotions: Any, ratings: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The emotions that have a rating on every scale."""
    return [emotion for emotion in emotions if all(emotion in scale for scale in ratings.values())]


def tells_apart(table: np.ndarray) -> bool:
    """Whether ratings [emotion, scale] determine a slope for each scale beside a constant."""
    return len(table) > table.shape[1] and np.linalg.matrix_rank(table - table.mean(0)) == table.shape[1]
