"""Held-out accuracy of shuffled labels by inner products is what the vectors themselves give; ranks are scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from nsteer.science import metrics, statistics
from nsteer.science.separation import nulls

RNG = np.random.default_rng(5)
CASES = {"each a fold": None, "pairs": [0, 1, 0, 1, 2, 2], "two": [0, 0, 0, 1, 1, 1]}


@pytest.mark.parametrize("baseline", metrics.BASELINES)
@pytest.mark.parametrize("folds", CASES)
@pytest.mark.parametrize("whole", [True, False])
def test_every_shuffle_has_the_accuracy_of_its_own_vectors(baseline, folds, whole, monkeypatch):
    """Far from the origin, where inner products lose digits; some samples are holes, one emotion has none at all."""
    monkeypatch.setattr(nulls, "NUMBERS", 1000)
    values = RNG.normal(size=(5, 6, 9)) + 0.8 * RNG.normal(size=(5, 1, 9)) + 50 * RNG.normal(size=9)
    there = np.ones((5, 6), bool) if whole else RNG.random((5, 6)) > 0.2
    there[3] &= whole
    values[~there] = np.nan
    neutral = values[there].mean(0) + RNG.normal(size=9)
    fold = np.arange(6) if CASES[folds] is None else np.array(CASES[folds])
    drawn = nulls.orders(there.tobytes(), there.shape, 25, 3)
    assert (np.sort(drawn, 1) == np.arange(5)[None, :, None]).all(), "a shuffle: nothing is lost or doubled"
    assert (drawn[:, ~there] == np.nonzero(~there)[0]).all(), "holes stay"
    found = nulls.shuffled_accuracy(values, there, neutral, baseline, fold, drawn)
    numbers = np.arange(6)
    true = [metrics.accuracy(metrics.held_out(values[one, numbers], there, neutral, baseline, fold)) for one in drawn]
    assert np.array_equal(found, true) and len(set(true)) > 3


def test_without_a_second_sample_there_is_nothing_to_hold_out():
    values, there = RNG.normal(size=(4, 1, 9)), np.ones((4, 1), bool)
    drawn = nulls.orders(there.tobytes(), there.shape, 3, 0)
    assert np.isnan(nulls.shuffled_accuracy(values, there, np.zeros(9), "neutral_mean", np.zeros(1), drawn)).all()


def test_ranks_are_those_of_scipy():
    for values in (
        RNG.normal(size=(3, 20)),
        RNG.integers(0, 4, size=(2, 3, 15)).astype(float),
        np.array([1.0, np.nan]),
    ):
        assert np.array_equal(metrics.ranks(values), stats.rankdata(values, axis=-1), equal_nan=True)


def test_fisher_is_that_of_scipy():
    tables = [RNG.integers(0, 30, size=(2, 2)) for _ in range(30)] + [
        np.array(one) for one in ([[5, 0], [0, 5]], [[0, 3], [0, 4]])
    ]
    for table in tables:
        assert np.isclose(statistics.fisher(table), stats.fisher_exact(table).pvalue, atol=1e-9), table


def test_benjamini_and_hochberg_are_those_of_scipy():
    for n in (1, 2, 20):
        p = RNG.random(n)
        p[n // 2 :: 5] = p[0]
        assert np.allclose(statistics.benjamini_hochberg(p), stats.false_discovery_control(p, method="bh"), atol=1e-15)
    assert statistics.benjamini_hochberg([]).shape == (0,) and np.isnan(statistics.benjamini_hochberg([np.nan])).all()


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_that_of_scipy(level):
    for n in (1, 7, 40):
        for k in range(n + 1):
            theirs = stats.binomtest(k, n).proportion_ci(level, method="wilson")
            found = statistics.wilson(k, n, level)
            assert np.allclose((found.low, found.high), (theirs.low, theirs.high), atol=1e-12)
