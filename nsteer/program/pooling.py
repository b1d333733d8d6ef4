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


def last(at: np.ndarray, before: int, k: int | None) -> np.ndarray:
    """The last position; where nothing was generated, the last of the prompt."""
    return at[-1:] if len(at) else np.array([before])


def mean(at: np.ndarray, before: int, k: int | None) -> np.ndarray:
    """Every position."""
    return at


def mean_from(at: np.ndarray, before: int, k: int | None) -> np.ndarray:
    """The positions from the k-th on."""
    return at[k or 0 :]


def mean_last(at: np.ndarray, before: int, k: int | None) -> np.ndarray:
    """The last k positions; all of fewer."""
    return at[-(k or 1) :]


def mid_generation(at: np.ndarray, before: int, k: int | None) -> np.ndarray:
    """The one position in the middle, `before + 1 + n // 2`, or the one before all when little was generated."""
    return at[len(at) // 2 :][:1] if len(at) > MIDDLE_NEEDS_MORE_THAN else np.array([before])


POOLINGS: dict[str, Callable[[np.ndarray, int, int | None], np.ndarray]] = {
    "last": last,
    "mean": mean,
    "mean_from": mean_from,
    "mean_last": mean_last,
    "mid_generation": mid_generation,
}
"""Of the positions that are counted, in order, and the one before the first: those that stand for the text."""


def weights(
    kind: str,
    prompt: int,
    total: int,
    *,
    k: int | None = None,
    over: str = "auto",
    bos: int = 0,
    within: np.ndarray | None = None,
) -> np.ndarray:
    """The weights [total] of a text of `total` tokens whose first `prompt` tokens were given, not generated.

    `over`: "generated" counts from `prompt` on, "all" from `bos` on (`bos`: leading BOS tokens left out of
    means), "auto" is "generated" where the text has a generated part; `within` [total] bool counts these alone. Sums to
    1, or to 0 for a missing value.
    """
    generated = over == "generated" or (over == "auto" and total > prompt) or kind == "mid_generation"
    start = prompt if generated else min(bos, total - 1)
    at = np.arange(start, total) if within is None else np.flatnonzero(within)
    chosen = np.zeros(total, np.float32)
    if within is not None and not len(at):
        return chosen
    chosen[POOLINGS[kind](at, start - 1, k)] = 1
    return chosen / chosen.sum() if chosen.any() else chosen
