"""Agreement of judges: kappa as scikit-learn has it, an interval over prompts, and rows of the claims table."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from sklearn.metrics import cohen_kappa_score

from nsteer.science import agreement


def rated(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, {"prompt": [f"p{i}" for i in range(len(values))]}, ("prompt", "text"))


def test_kappa_is_cohens():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 200).astype(float)
    b = np.where(rng.random(200) < 0.6, a, rng.integers(0, 4, 200)).astype(float)
    assert agreement.kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
    assert agreement.weighted_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b, weights="quadratic"))
    assert agreement.kappa(a, a) == agreement.weighted_kappa(a, a) == 1
    assert np.isnan(agreement.kappa(np.ones(5), np.ones(5))) and np.isnan(agreement.weighted_kappa(a[:0], b[:0]))


def test_the_interval_is_over_prompts_and_covers_what_is_planted():
    """Texts of a prompt are alike: an interval over texts would be far too narrow."""
    rng, covered, widths = np.random.default_rng(1), 0, []
    true = 0.5  # verdicts of each prompt are shared by its 8 texts; half of the prompts agree, half are drawn anew
    for _ in range(60):
        a = rng.integers(0, 2, 40)
        b = np.where(rng.random(40) < 0.5, a, rng.integers(0, 2, 40))
        ratings = [rated(np.repeat(verdicts[:, None], 8, 1).astype(float)) for verdicts in (a, b)]
        interval, texts = agreement.agreement(*ratings, n=200)
        assert texts == 320 and interval.n == 40
        covered += interval.low <= true <= interval.high
        widths.append(interval.high - interval.low)
    assert covered >= 50 and np.mean(widths) > 0.35


def test_what_one_judge_did_not_read_does_not_count():
    a, b = (rated(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])) for _ in range(2))
    a[0, 0] = b[2, :] = np.nan
    interval, texts = agreement.agreement(a, b.isel(prompt=[2, 1, 0]), n=50)
    assert texts == 3 and interval.n == 2 and interval.estimate == 1
    nothing, texts = agreement.agreement(a * np.nan, b)
    assert texts == 0 and np.isnan(nothing.estimate) and np.isnan(nothing.low)
