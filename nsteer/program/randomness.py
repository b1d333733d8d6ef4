"""Turns labels into random numbers: the same labels give the same numbers, whatever ran before them."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def generator(*labels: str | int) -> np.random.Generator:
    """A generator seeded by its labels alone (SHA-256 of their JSON)."""
    digest = hashlib.sha256(json.dumps(labels).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def unit_vector(d_model: int, *labels: str | int) -> np.ndarray:
    """A direction [d_model] of length 1, uniform on the sphere."""
    draw = generator("direction", *labels).standard_normal(d_model)
    return (draw / np.linalg.norm(draw)).astype(np.float32)


def uniforms(steps: int, *labels: str | int) -> np.ndarray:
    """Numbers [step] in [0, 1), one for each token that a row may draw."""
    return generator("uniform", *labels).random(steps)
