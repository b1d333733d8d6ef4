"""Figures of plain arrays: by hand, by algebra, and against samples whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nsteer.science import metrics

RNG = np.random.default_rng(0)


def test_mean_pairwise_cosine_by_hand():
    assert metrics.mean_pairwise_cosine(np.array([[1.0, 0], [0, 1], [-1, 0]])) == pytest.approx((0 - 1 + 0) / 3)


@pytest.mark.parametrize("n", [3, 7, 20])
def test_equally_long_vectors_that_sum_to_zero_are_pinned(n):
    vectors = np.eye(n) - 1 / n
    assert metrics.mean_pairwise_cosine(vectors) == pytest.approx(metrics.pinned_value(n))


@pytest.mark.parametrize("seed", range(5))
def test_vectors_minus_their_mean_are_known_at_any_lengths(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(20, 64)) * rng.uniform(0.2, 5, size=(20, 1)) + rng.normal(size=64) * 3
    centred = (vectors - vectors.mean(0)).astype(np.float32)
    assert metrics.sums_to_zero(centred)
    assert metrics.sums_to_zero(metrics.unit(centred).astype(np.float32))
    assert not metrics.sums_to_zero(vectors)
    assert not metrics.sums_to_zero(rng.normal(size=(20, 64)))


def test_two_opposite_vectors_are_a_finding_and_holes_do_not_count():
    assert not metrics.sums_to_zero(np.array([[1.0, 0, 0], [-1, 0, 0]]))
    vectors = RNG.normal(size=(6, 30))
    centred = np.concatenate([vectors - vectors.mean(0), np.full((1, 30), np.nan)])
    assert metrics.sums_to_zero(centred)


def test_pole_separation_by_hand():
    cosine = np.array([[1, 0.8, -0.5], [0.8, 1, -0.3], [-0.5, -0.3, 1]])
    assert metrics.pole_separation(cosine, ["positive", "positive", "negative"]) == pytest.approx(0.8 + 0.4)
    assert math.isnan(metrics.pole_separation(cosine, ["positive", "other", "other"]))


def test_compact_keeps_inner_products_of_differences():
    values, neutral = RNG.normal(size=(3, 4, 500)) + 1e4, RNG.normal(size=(4, 500)) + 1e4
    values[1, 2] = np.nan
    known = ~np.isnan(values).any(-1)
    small = metrics.compact(np.concatenate([values[known], neutral]), centre=True)
    assert small.shape == (15, 15)
    small, plain = small[:4], small[-4:]
    before, after = values[0] - neutral, small - plain
    assert after @ after.T == pytest.approx(before @ before.T, rel=1e-9)


def test_spearman_brown_by_hand():
    assert metrics.spearman_brown(0.5) == pytest.approx(2 / 3)
    assert metrics.spearman_brown(-0.2) == 0
    assert math.isnan(metrics.spearman_brown(np.nan))


def test_halves_share_no_sample_and_leave_none_out():
    there = np.array([[True] * 5, [True, False, True, False, False], [False] * 4 + [True]])
    first, second = metrics.halves(there, 9, RNG)
    assert ((first + second)[:, :2] == there[:2]).all() and (first * second == 0).all()
    assert (first[:, 2] == 0).all() and set(first[:, 0].sum(-1)) == {2, 3}


def held_out_by_hand(values, neutral, baseline):
    """The same as a loop over folds and samples."""
    out = np.full(values.shape[:2], -1)
    for k in range(values.shape[1]):
        rest = np.delete(values, k, axis=1)
        averages = np.array([np.nanmean(samples, 0) for samples in rest])
        base = {"neutral_mean": neutral, "grand_mean": averages.mean(0), "none": 0 * neutral}[baseline]
        vectors = averages - base
        for e in range(len(values)):
            x = values[e, k] - base
            if not np.isnan(x).any():
                out[e, k] = np.argmax([x @ v / np.linalg.norm(v) for v in vectors])
    return out


@pytest.mark.parametrize("baseline", metrics.BASELINES)
def test_held_out_is_the_loop(baseline):
    values = RNG.normal(size=(4, 5, 7)) + RNG.normal(size=(4, 1, 7))
    values[2, 3] = np.nan
    neutral = RNG.normal(size=7)
    predictions = metrics.held_out(values, ~np.isnan(values).any(-1), neutral, baseline)
    assert (predictions == held_out_by_hand(values, neutral, baseline)).all() and predictions[2, 3] == -1


@pytest.mark.parametrize("baseline", metrics.BASELINES)
def test_held_out_accuracy_of_nothing_is_chance(baseline):
    """Leaving out one sample alone would be below chance; leaving out the whole number is not."""
    accuracies = []
    for _ in range(300):
        values = RNG.normal(size=(4, 4, 6))
        predicted = metrics.held_out(values, np.ones((4, 4), bool), RNG.normal(size=6), baseline)
        accuracies.append(metrics.accuracy(predicted))
    assert np.mean(accuracies) == pytest.approx(0.25, abs=4 * np.std(accuracies) / math.sqrt(300))


def test_templates_held_out_together():
    """Samples 0 and 2 share a template whose content is all there is: held out together they tell nothing."""
    content = np.random.default_rng(1).normal(size=(5, 2, 400))
    values = content[:, [0, 1, 0, 1]]
    there = np.ones((5, 4), bool)
    alone = metrics.accuracy(metrics.held_out(values, there, np.zeros(400), "neutral_mean"))
    together = metrics.accuracy(metrics.held_out(values, there, np.zeros(400), "neutral_mean", np.array([0, 1, 0, 1])))
    assert alone == 1.0 and together < 0.6


def test_anisotropy_interval_holds_the_planted_value():
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        vectors = 2.0 * np.eye(50)[0] + rng.normal(size=(20, 50)) * 0.4
        mean, low, high, n = metrics.mean_pairwise_interval(vectors)
        held += low <= 4 / (4 + 50 * 0.16) <= high
        assert n == 20 and mean == pytest.approx(4 / 12, abs=0.1)
    assert held >= 88


def test_repetition_by_hand():
    assert metrics.repeated([1, 2, 3, 4, 5, 6], 4) == 0.0
    assert metrics.repeated([1, 1, 1, 1, 1, 1], 4) == pytest.approx(2 / 3)
    assert metrics.repetition([1, 2, -1, -1]) == 0.0
    assert metrics.repetition([]) == 0.0


@given(st.integers(1, 12), st.integers(40, 60))
@settings(max_examples=30, deadline=None)
def test_a_loop_of_any_short_period_scores_high_and_a_late_one_too(period, n):
    loop = [i % period for i in range(n)]
    assert metrics.repetition(loop) >= 0.6
    late = [*range(100, 100 + n // 2), *[i % min(period, 6) for i in range(n // 2)]]
    assert metrics.repetition(late) >= 0.5


def test_perplexity_by_hand_with_padding():
    logs = np.log([[0.5, 0.125, np.nan], [0.25, 0.25, 0.25]])
    assert metrics.perplexity(logs).tolist() == pytest.approx([4.0, 4.0])
    assert math.isnan(metrics.perplexity(np.array([np.nan])))
    assert math.isnan(metrics.ratio(3.0, 0.0)) and metrics.ratio(6.0, 3.0) == 2.0
