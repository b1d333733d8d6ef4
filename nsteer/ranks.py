"""Turns numbers into their ranks, as scipy.stats does, which takes as long to import as many a report to compute."""

from __future__ import annotations

from typing import Any

import numpy as np


def ranks(values: Any) -> np.ndarray:
    """Ranks from 1 along the last axis, ties at their mean: [..., n] -> [..., n]. A NaN makes its whole row NaN."""
    values = np.asarray(values, float)
    out = np.full(values.shape, np.nan)
    for at in np.ndindex(values.shape[:-1]):
        row = values[at]
        if not np.isnan(row).any():
            ordered = np.sort(row)
            out[at] = (np.searchsorted(ordered, row, "left") + np.searchsorted(ordered, row, "right") + 1) / 2
    return out
