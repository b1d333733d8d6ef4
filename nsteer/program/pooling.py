"""Turns the lengths of a text into weights over its positions: which of them stand for it.

Positions are counted among real tokens (padding never counts), 0-based. Weights are float32, one a token, and
sum to 1, or are all 0 when no position qualifies (a text shorter than `mean_from`'s k): such a sample is a
missing value, never a guess. A generated end-of-text token counts as a generated position.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MIDDLE_NEEDS_MORE_THAN = 10
"""`mid_generation` falls back to the last prompt token at this many generated tokens or fewer (Jeong 2026)."""


def last(start: int, stop: int, k: int | None) -> np.ndarray:
    """The last position of [start, stop)."""
    return np.arange(stop) == stop - 1


def mean(start: int, stop: int, k: int | None) -> np.ndarray:
    """Every position of [start, stop)."""
    return np.arange(stop) >= start


def mean_from(start: int, stop: int, k: int | None) -> np.ndarray:
    """The positions of [start, stop) from the k-th on."""
    return np.arange(stop) >= start + (k or 0)


def mid_generation(start: int, stop: int, k: int | None) -> np.ndarray:
    """The one position `start + (stop - start) // 2`, or `start - 1` when little was generated."""
    written = stop - start
    return np.arange(stop) == (start + written // 2 if written > MIDDLE_NEEDS_MORE_THAN else start - 1)


POOLINGS: dict[str, Callable[[int, int, int | None], np.ndarray]] = {
    "last": last,
    "mean": mean,
    "mean_from": mean_from,
    "mid_generation": mid_generation,
}


def weights(
    kind: str, prompt: int, total: int, *, k: int | None = None, over: str = "auto", bos: int = 0
) -> np.ndarray:
    """The weights [total] of a text of `total` tokens whose first `prompt` tokens were given, not generated.

    `over`: "generated" counts from `prompt` on, "all" from `bos` on (`bos`: leading BOS tokens left out of
    means), "auto" is "generated" where the text has a generated part. Sums to 1, or to 0 for a missing value.
    """
    generated = over == "generated" or (over == "auto" and total > prompt) or kind == "mid_generation"
    start = prompt if generated else min(bos, total - 1)
    chosen = POOLINGS[kind](start, total, k).astype(np.float32)
    return chosen / chosen.sum() if chosen.any() else chosen
