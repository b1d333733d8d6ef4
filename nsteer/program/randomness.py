"""Turns labels into random numbers: the same labels give the same numbers, whatever ran before them."""

from __future__ import annotations

import hashlib
import json

import numpy as np


def generator(*labels: str | int) -> np.random.Generator:
    """A generator seeded by its labels alone (SHA-256 of their JSON)."""
    digest = hashlib.sha256(json.dumps(labels).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def draw_label(draw: int) -> list[int]:
    """What labels the k-th draw of a kind, from 1 on, beside the kind: nothing the first, which is what one draw is."""
    return [draw] if draw > 1 else []


def unit_vector(d_model: int, *labels: str | int) -> np.ndarray:
    """A direction [d_model] of length 1, uniform on the sphere."""
    draw = generator("direction", *labels).standard_normal(d_model)
    return (draw / np.linalg.norm(draw)).astype(np.float32)


def rotated(vectors: np.ndarray, *labels: str | int) -> np.ndarray:
    """The rows of [layer, d_model] under one random rotation, the same of all: lengths and cosines between rows stay.

    One direction drawn again for each layer would be no control of a vector that the layers share: pushes of several
    layers then cancel each other. Uniform over all rotations (Haar): a frame of the span is sent to a random frame.
    """
    frame, rest = np.linalg.qr(np.asarray(vectors, float).T)  # rows = rest' frame'
    sign = np.where(np.diag(rest) < 0, -1.0, 1.0)
    other, upper = np.linalg.qr(generator("rotation", *labels).standard_normal(frame.shape))
    other = other * np.where(np.diag(upper) < 0, -1.0, 1.0)
    return ((rest * sign[:, None]).T @ other.T).astype(np.float32)


def uniforms(steps: int, *labels: str | int) -> np.ndarray:
    """Numbers [step] in [0, 1), one for each token that a row may draw."""
    return generator("uniform", *labels).random(steps)
