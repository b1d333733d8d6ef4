"""Statistics against scipy, against cases worked by hand, and against each other."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import found_too_often
from scipy import stats

from nsteer.science import statistics as ours

RNG = np.random.default_rng(0)
SIDES = ("two-sided", "less", "greater")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 4), (7, 7), (5, 12)])
def test_mann_whitney_is_scipys_exact_test(sizes, side):
    a, b = RNG.normal(size=sizes[0]), RNG.normal(0.4, 1, size=sizes[1])
    theirs = stats.mannwhitneyu(a, b, alternative=side, method="exact")
    test = ours.mann_whitney(a, b, side)
    assert test.statistic == theirs.statistic
    assert test.p == pytest.approx(theirs.pvalue, abs=1e-12)


@pytest.mark.parametrize("side", SIDES)
def test_mann_whitney_with_ties_counts_every_way_to_deal_the_ranks(side):
    a, b = [1.0, 2.0, 2.0], [2.0, 3.0, 3.0, 5.0]
    ranks = stats.rankdata(a + b)
    sums = np.array([sum(ranks[list(subset)]) for subset in itertools.combinations(range(7), 3)])
    own = ranks[:3].sum()
    less, greater = (sums <= own).mean(), (sums >= own).mean()
    wanted = {"less": less, "greater": greater, "two-sided": min(1, 2 * min(less, greater))}[side]
    assert ours.mann_whitney(a, b, side).p == pytest.approx(wanted, abs=1e-12)


def test_seven_against_seven_apart_has_the_smallest_p_by_hand():
    assert ours.mann_whitney(range(7), range(7, 14)).p == pytest.approx(2 / math.comb(14, 7))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("n", [1, 5, 12])
def test_wilcoxon_is_scipys_exact_test(n, side):
    a, b = RNG.normal(size=n), RNG.normal(0.5, 1, size=n)
    theirs = stats.wilcoxon(a, b, alternative=side, method="exact")
    test = ours.wilcoxon(a, b, side)
    assert test.p == pytest.approx(theirs.pvalue, abs=1e-12)
    assert test.statistic == pytest.approx(stats.wilcoxon(a, b, alternative="greater", method="exact").statistic)


def test_wilcoxon_drops_equal_pairs_and_says_so():
    test = ours.wilcoxon([1, 2, 3, 4], [1, 1, 1, 1])
    assert test.groups.n_a == 3
    assert test.p == pytest.approx(2 / 8)


@pytest.mark.parametrize("side", SIDES)
def test_paired_permutation_is_scipys(side):
    a, b = RNG.normal(size=8), RNG.normal(0.3, 1, size=8)
    theirs = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", alternative=side, n_resamples=np.inf
    )
    # scipy's two-sided doubles the smaller tail; ours counts |mean difference|: the same for sign flips
    assert ours.paired_permutation(a, b, side).p == pytest.approx(theirs.pvalue, abs=1e-12)


def test_paired_permutation_of_many_pairs_is_near_the_t_test_and_never_zero():
    a = RNG.normal(0.2, 1, size=60)
    test = ours.paired_permutation(a, np.zeros(60), n=4999)
    assert test.p == pytest.approx(stats.ttest_1samp(a, 0).pvalue, abs=0.03)
    assert ours.paired_permutation(np.ones(60) + a / 100, np.zeros(60), n=99).p == pytest.approx(1 / 100)


def test_pairs_of_unequal_number_are_refused():
    with pytest.raises(ValueError, match="found 2 and 3"):
        ours.wilcoxon([1, 2], [1, 2, 3])


def test_cohens_d_by_hand_with_what_stands_behind_it():
    effect = ours.cohens_d([1, 2, 3], [3, 4, 5])
    assert effect.value == pytest.approx(-2.0)
    assert str(effect.groups) == "n 3 and 3, means 2 and 4, SDs 1 and 1"


def test_hedges_g_by_hand():
    # d = -2, m = 4: J = gamma(2) / (sqrt(2) gamma(1.5)) = 1 / (1.41421 * 0.886227) = 0.797885
    assert ours.hedges_g([1, 2, 3], [3, 4, 5]).value == pytest.approx(-2 * 0.7978845608)
    assert ours.correction(100) == pytest.approx(1 - 3 / (4 * 100 - 1), abs=1e-4)


@pytest.mark.parametrize("shift", [0.0, 0.5, 3.0, 40.0])
def test_the_interval_of_d_inverts_the_noncentral_t(shift):
    a, b = RNG.normal(shift, 1, size=6), RNG.normal(0, 1, size=9)
    effect = ours.cohens_d(a, b)
    root = math.sqrt(6 * 9 / 15)
    assert ours.noncentral_cdf(effect.value * root, 13, effect.low * root) == pytest.approx(0.975, abs=1e-5)
    assert ours.noncentral_cdf(effect.value * root, 13, effect.high * root) == pytest.approx(0.025, abs=1e-5)
    assert effect.low < effect.value < effect.high


@pytest.mark.parametrize("t", [-20.0, -4.0, 4.0, 8.0, 20.0])
def test_the_noncentral_t_is_scipys_where_scipy_has_it(t):
    assert ours.noncentral_cdf(t, 6, 0.7 * t) == pytest.approx(stats.nct.cdf(t, 6, 0.7 * t), abs=1e-7)


def test_the_papers_d_would_need_an_sd_that_no_handful_of_models_has():
    assert ours.implied_sd(-0.2, -107.5) == pytest.approx(0.00186, abs=1e-5)


def test_wilson_of_37_of_40():
    interval = ours.wilson(37, 40)
    assert (interval.estimate, round(interval.low, 2), round(interval.high, 2)) == (0.925, 0.80, 0.97)


def test_wilson_by_its_formula():
    k, n, z = 3, 8, stats.norm.ppf(0.975)
    centre = (k / n + z**2 / 2 / n) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(k / n * (1 - k / n) / n + z**2 / 4 / n**2)
    interval = ours.wilson(k, n)
    assert (interval.low, interval.high) == pytest.approx((centre - reach, centre + reach))


def test_wilson_of_nothing_and_of_nonsense():
    assert math.isnan(ours.wilson(0, 0).estimate)
    with pytest.raises(ValueError, match="5 of 4"):
        ours.wilson(5, 4)


def test_bootstrap_is_near_scipys_and_depends_on_its_seed_alone():
    a = RNG.exponential(size=40)
    theirs = stats.bootstrap((a,), np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    interval = ours.bootstrap(np.mean, a, n=4000)
    assert (interval.low, interval.high) == pytest.approx((theirs.low, theirs.high), abs=0.07)
    assert interval == ours.bootstrap(np.mean, a, n=4000)


def test_bootstrap_of_one_number_has_no_interval():
    interval = ours.bootstrap(np.mean, [3.0, math.nan])
    assert interval.estimate == 3.0 and interval.n == 1 and math.isnan(interval.low)


def test_permutation_null_is_never_zero_and_keeps_to_strata():
    values = np.array([0.0, 1.0, 10.0, 11.0])
    labels = np.array(["a", "b", "a", "b"])

    def difference(given):
        return values[given == "b"].mean() - values[given == "a"].mean()

    free = ours.permutation_null(difference, labels, n=500)
    kept = ours.permutation_null(difference, labels, strata=[0, 0, 1, 1], n=500)
    assert kept.p == pytest.approx(1 / 4, abs=0.06)
    assert free.p == pytest.approx(2 / 6, abs=0.06)
    assert kept.high <= 1.0 < free.high


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=50, deadline=None)
def test_holm_and_bh_keep_order_and_never_lower_a_p(values):
    p = np.array(values)
    for adjusted in (ours.holm(p), ours.benjamini_hochberg(p)):
        assert np.all(adjusted >= p - 1e-12) and np.all(adjusted <= 1)
        assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= -1e-12)
    assert np.all(ours.holm(p) >= ours.benjamini_hochberg(p) - 1e-12)


def test_holm_by_hand_with_a_hole():
    assert ours.holm([0.01, math.nan, 0.04, 0.03]).tolist() == pytest.approx([0.03, math.nan, 0.06, 0.06], nan_ok=True)
    assert ours.multiplicity({"u": 0.01, "v": math.nan, "w": 0.04}) == (
        "2 tests: 2 at p <= 0.05 alone, 2 after Benjamini-Hochberg, 2 after Holm: u, w"
    )


def test_spearman_of_few_is_exact_and_of_many_near_scipys():
    rho, p, n = ours.spearman([1, 2, 3, 4], [2, 1, 4, 3])
    assert (rho, n) == (pytest.approx(0.6), 4)
    orders = [stats.spearmanr([1, 2, 3, 4], order).statistic for order in itertools.permutations([2, 1, 4, 3])]
    assert p == pytest.approx(np.mean(np.abs(orders) >= 0.6 - 1e-12))
    x, y = RNG.normal(size=30), RNG.normal(size=30)
    theirs = stats.spearmanr(x, y)
    assert ours.spearman(x, y)[0] == pytest.approx(theirs.statistic)
    assert ours.spearman(x, y)[1] == pytest.approx(theirs.pvalue, abs=0.03)


def test_fiellers_interval_covers_as_often_as_it_says():
    """Ratios of two normals that go together: -0.6 / 0.5, the bottom ten standard errors from zero."""
    rng, held, cov = np.random.default_rng(3), 0, np.array([[0.01, 0.001], [0.001, 0.0025]])
    for top, bottom in rng.multivariate_normal([-0.6, 0.5], cov, size=2000):
        low, high = ours.fieller(top, bottom, cov[0, 0], cov[1, 1], cov[0, 1], 1.96)
        held += low <= -0.6 / 0.5 <= high
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_a_ratio_over_what_may_be_zero_has_no_end():
    assert ours.fieller(1.0, 0.1, 0.04, 0.04, 0.0, 1.96) == (-math.inf, math.inf)


def test_tests_hold_their_level_on_null_data():
    rng, hits = np.random.default_rng(1), {"u": 0, "w": 0, "perm": 0}
    for _ in range(2000):
        a, b = rng.normal(size=(2, 7))
        hits["u"] += ours.mann_whitney(a, b).p <= 0.05
        hits["w"] += ours.wilcoxon(a, b).p <= 0.05
        hits["perm"] += ours.paired_permutation(a, b).p <= 0.05
    assert not any(found_too_often(k, 2000) for k in hits.values()), hits
