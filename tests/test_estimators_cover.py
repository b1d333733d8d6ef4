"""Simulations with planted truth: estimators are not biased, 95 % intervals cover, noise gives no findings."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from kit import found_too_often
from scipy import stats

from nsteer.report.claims.evidence import AGREES, DIFFERS, Evidence, Row, Rules
from nsteer.report.claims.steering import steering_works
from nsteer.report.claims.verdicts import claimed, decided
from nsteer.science import effects, heldout, metrics, separation, statistics
from nsteer.science.crossed import crossed

EMOTIONS, D = 20, 48


def directions(rng, signal: float, common: float) -> tuple[np.ndarray, float]:
    """Emotion vectors [emotion, d] against a neutral mean of 0, and their mean cosine in the ratio of means."""
    mu = (rng.normal(size=(EMOTIONS, D)) * signal + rng.normal(size=D) * common) / np.sqrt(D)
    products = mu @ mu.T
    return mu, float(products[np.triu_indices(EMOTIONS, 1)].mean() / np.diag(products).mean())


def drawn(rng, mu: np.ndarray, n: int, m: int, noise: float, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """n samples of each emotion and m neutral ones; `shared` noise is that of a template, the same in all emotions."""
    templates = rng.normal(size=(max(n, m), D)) * shared
    uneven = np.exp(-np.arange(D) / 8) / np.sqrt((np.exp(-np.arange(D) / 4)).mean())
    samples = mu[:, None] + (rng.normal(size=(EMOTIONS, n, D)) * noise * uneven + templates[:n]) / np.sqrt(D)
    return samples, (rng.normal(size=(m, D)) * noise * uneven + templates[:m]) / np.sqrt(D)


@pytest.mark.parametrize(
    ("n", "m", "shared", "units"), [(12, 12, 0.0, "samples"), (6, 10, 0.0, "samples"), (12, 12, 1.0, "folds")]
)
def test_the_cross_validated_cosine_is_unbiased_and_its_interval_covers(n, m, shared, units):
    rng = np.random.default_rng(n + m)
    mu, truth = directions(rng, 0.9, 1.4)
    folds = np.tile(np.arange(n), (EMOTIONS, 1))
    cosines, plain = [], []
    for _ in range(300):
        values, neutral = drawn(rng, mu, n, m, 2.0, shared)
        cosines.append(crossed(values, neutral, "neutral_mean", folds, np.arange(m), units))
        plain.append(metrics.mean_pairwise_cosine(values.mean(1) - neutral.mean(0)))
    estimates = np.array([cosine.cosine for cosine in cosines])
    assert np.isfinite(estimates).mean() > 0.98
    assert abs(np.nanmean(estimates) - truth) < 0.01, "n = 300"
    assert np.mean([cosine.low <= truth <= cosine.high for cosine in cosines]) >= 0.9
    assert abs(np.mean(plain) - truth) > 0.02, "the plain cosine is moved by noise: that is why"


def test_vectors_of_noise_alone_have_no_cosine():
    rng = np.random.default_rng(3)
    folds = np.tile(np.arange(6), (EMOTIONS, 1))
    cosines = [
        crossed(*drawn(rng, np.zeros((EMOTIONS, D)), 6, 6, 2.0, 0.0), "neutral_mean", folds, np.arange(6), "samples")
        for _ in range(200)
    ]
    assert np.mean([np.isfinite(cosine.low) for cosine in cosines]) <= 0.05


def layered(rng, apart: np.ndarray, noise: float, n: int = 8) -> xr.DataArray:
    """Samples whose emotions are `apart` [layer] of each other over one common direction."""
    mu = rng.normal(size=(EMOTIONS, D)) / np.sqrt(D)
    common = rng.normal(size=D) / np.sqrt(D)
    values = np.zeros((EMOTIONS + 1, n, len(apart), D))
    values[:EMOTIONS] = (apart[:, None] * mu[:, None] + common)[:, None]
    values += rng.normal(size=values.shape) * noise / np.sqrt(D)
    names = [*(f"e{k}" for k in range(EMOTIONS)), "neutral"]
    coords = {"emotion": names, "sample": range(n), "layer": range(len(apart))}
    depth = ("layer", np.arange(len(apart)) / len(apart))
    return xr.DataArray(values, coords, ("emotion", "sample", "layer", "d_model")).assign_coords(depth=depth)


@pytest.mark.slow
@pytest.mark.parametrize("apart", [np.full(8, 1.0), 1.4 - 3 * (np.arange(8) / 8 - 0.5) ** 2], ids=["flat", "a U"])
def test_the_best_layer_and_the_curvature_are_covered_and_a_flat_curve_is_no_u(apart):
    rng = np.random.default_rng(5)
    truth = 1 / (1 + apart**2)
    bend = np.polyfit(np.arange(8) / 8, truth, 2)[0]
    placed, bent, findings = [], [], []
    for _ in range(60):
        curves = separation.measure(layered(rng, apart, 1.5), units="samples", splits=1, shuffles=0)
        shape = separation.u_shape(curves)
        placed.append(any(shape.depth_low <= k / 8 <= shape.depth_high for k in np.flatnonzero(truth == truth.min())))
        bent.append(bool(shape.curvature_low <= bend <= shape.curvature_high))
        findings.append(bool((shape.curvature_low > 0) | (shape.curvature_high < 0)))
        assert shape.curvature_low <= shape.curvature <= shape.curvature_high
        assert not shape.vertex_low > shape.vertex and not shape.vertex_high < shape.vertex, (
            "an interval holds its estimate"
        )
    assert np.mean(placed) >= 0.9 and np.mean(bent) >= 0.9, "n = 60"
    assert np.mean(findings) <= 0.05 if bend == pytest.approx(0) else np.mean(findings) > 0.5


def test_noise_that_is_least_in_the_middle_is_no_middle_layer():
    """The plain cosine is pulled up where noise is loud, and shows a U over nothing."""
    rng = np.random.default_rng(7)
    wrong, right = 0, 0
    for _ in range(20):
        data = layered(rng, np.full(8, 1.6), 1.0)
        loud = 3 * np.abs(np.arange(8) - 4) / 4
        data = data + rng.normal(size=data.shape) * loud[None, None, :, None] / np.sqrt(D)
        curves = separation.measure(data, units="samples", splits=1, shuffles=0)
        shape = separation.u_shape(curves)
        right += not (shape.curvature_low > 0) and not (shape.depth_low > 0.3 and shape.depth_high < 0.7)
        wrong += int(separation.best_layer(curves).layer) in (3, 4, 5)
    assert right >= 19 and wrong >= 12


def test_an_accuracy_whose_layer_was_chosen_inside_the_folds_is_at_chance_on_noise():
    rng = np.random.default_rng(11)
    best, inside = [], []
    for _ in range(25):
        curves = separation.measure(layered(rng, np.zeros(8), 1.0, 6), units="samples", splits=1, shuffles=0)
        best.append(float(curves.accuracy.max()))
        inside.append(float(curves.accuracy_chosen))
    assert abs(np.mean(inside) - 1 / EMOTIONS) < 0.015, "25 x 120 texts"
    assert np.mean(best) > np.mean(inside) + 0.02, "the best of eight layers looks better than it is"


def test_accuracies_inside_the_folds_are_those_of_slow_arithmetic():
    rng = np.random.default_rng(2)
    values, there = rng.normal(size=(5, 12, 9)) + rng.normal(size=(5, 1, 9)), rng.random((5, 12)) < 0.8
    there[3, 2:] = False
    values[~there] = np.nan
    neutral, fold = rng.normal(size=9), heldout.outer_folds(np.tile(np.arange(12) % 7, (5, 1)))
    for rule in ("neutral_mean", "none", "grand_mean"):
        slow = [metrics.accuracy(metrics.held_out(values, there & (fold != k), neutral, rule, fold)) for k in range(7)]
        assert heldout.inner_accuracy(values, there, neutral, rule, fold) == pytest.approx(slow)
    single_fold = np.zeros_like(fold)
    assert np.isnan(heldout.inner_accuracy(values, there, neutral, "none", single_fold)).all()


def test_the_null_of_shuffled_labels_is_that_of_slow_arithmetic(monkeypatch):
    rng = np.random.default_rng(0)
    values, there = rng.normal(size=(5, 7, 9)) + rng.normal(size=(5, 1, 9)), np.ones((5, 7), bool)
    there[2, 3] = False
    neutral, folds = rng.normal(size=9), np.tile(np.arange(7) % 4, (5, 1))
    for rule in ("neutral_mean", "none", "grand_mean"):
        deals = heldout.permuted(there, 20, np.random.default_rng(1))
        fast = heldout.null_accuracy(values, there, neutral, rule, folds, deals)
        monkeypatch.setattr(heldout, "AT_ONCE", 7 * 35 * 5)
        assert (heldout.null_accuracy(values, there, neutral, rule, folds, deals) == fast).all(), "in several parts"
        slow = [
            metrics.accuracy(metrics.held_out(values.reshape(35, 9)[order], there, neutral, rule, folds))
            for order in deals
        ]
        assert fast == pytest.approx(slow)
        alone = heldout.null_accuracy(values, there, neutral, rule, np.zeros_like(folds), deals[:3])
        assert np.isnan(alone).all(), "one fold leaves nothing to learn from"


def test_a_bag_of_words_tells_texts_apart_by_their_words_alone():
    texts = np.array([[f"{w} sun rain {k}" for k in range(6)] for w in ("glad", "grim", "still")], object)
    there, folds = np.ones(texts.shape, bool), np.tile(np.arange(6), (3, 1))
    assert metrics.accuracy(heldout.by_words(texts, there, folds)) == 1.0
    same = np.array([[f"sun rain {k}" for k in range(6)]] * 3, object)
    assert metrics.accuracy(heldout.by_words(same, there, folds)) == pytest.approx(1 / 3)


def test_texts_of_one_instruction_are_held_out_together():
    asked = np.array([[f"write {e} by {k % 2}" for k in range(4)] for e in "ab"], object)
    fold = separation.folds_of(xr.DataArray(asked, dims=("emotion", "sample"), coords={"sample": range(4)}))
    assert fold.values.tolist() == [[0, 1, 0, 1]] * 2
    values = np.random.default_rng(0).normal(size=(2, 4, 5))
    values[:, 2:] = values[:, :2] + 0.01  # the same again under another number
    there = np.ones((2, 4), bool)
    alone = metrics.held_out(values, there, np.zeros(5), "none")
    together = metrics.held_out(values, there, np.zeros(5), "none", fold.values)
    assert metrics.accuracy(alone) == 1.0 and metrics.accuracy(together) < 1.0, "its twin gave it away"


# ---- effects -------------------------------------------------------------------------------------------------


def test_paired_effects_have_their_size_and_prompts_as_units():
    rng = np.random.default_rng(2)
    covers, sizes = [], []
    for _ in range(300):
        prompts = rng.normal(size=20) * 0.2
        vector, random = (prompts + gain + rng.normal(size=20) * 0.1 for gain in (0.1, 0.02))
        interval = statistics.mean_interval(vector - random)
        covers.append(interval.holds(0.08))
        sizes.append(interval.estimate)
    assert np.mean(covers) >= 0.9 and abs(np.mean(sizes) - 0.08) < 0.01, "n = 300"


def test_selectivity_does_not_count_the_luckiest_rival_as_spill():
    rng = np.random.default_rng(4)
    selectivities = [
        effects.selectivity(rng.normal(size=(20, 8)) * 0.2 + np.eye(8)[2] * 0.3, 2).mean() for _ in range(300)
    ]
    naive = [
        (lambda m: m[2] - np.delete(m, 2).max())(rng.normal(size=(20, 8)).mean(0) * 0.2 + np.eye(8)[2] * 0.3)
        for _ in range(300)
    ]
    assert abs(np.mean(selectivities) - 0.3) < 0.01 and np.mean(naive) < 0.27


def test_a_strength_is_chosen_on_the_other_prompts():
    rng = np.random.default_rng(6)
    noise = [rng.normal(size=(6, 12)) for _ in range(400)]
    inside = [
        effects.at_chosen(scores, effects.chosen_strength(scores, np.full(scores.shape, np.nan))).mean()
        for scores in noise
    ]
    assert abs(np.mean(inside)) < 0.05 < np.mean([scores.mean(1).max() for scores in noise])
    usable = np.ones((2, 5))
    usable[1] = 0.0
    score = np.array([[0.1] * 5, [0.9] * 5])
    assert effects.chosen_strength(score, usable).tolist() == [0] * 5, "broken texts are no success"


@pytest.mark.parametrize("better", [0.0, 0.3])
def test_what_is_chosen_on_the_other_prompts_is_covered_and_of_noise_little_is_found(better):
    """Strengths and rivals that are about as good are chosen by luck, and prompts are then no independent units: by
    Student's interval alone 8 % of means of noise, and 14 % of selectivities, are told from 0."""
    rng, n, prompts = np.random.default_rng(31), 1000 if not better else 300, 12
    findings = {"plain": 0, "wide": 0, "selective": 0}
    missed = dict.fromkeys(findings, 0)
    usable = np.full((3, prompts), np.nan)
    for _ in range(n):
        change = rng.normal(size=(3, prompts, 2, 3)) * 0.2
        change[:, :, 0, 0] += better * np.arange(3)[:, None]
        change[:, :, 1, 1] += better * np.arange(3)[:, None]
        score = change[:, :, [0, 1], [0, 1]].mean(-1)
        each = effects.at_chosen(score, effects.chosen_strength(score, usable))
        intervals = {
            "plain": statistics.mean_interval(each),
            "wide": effects.mean_at_chosen(score, score, usable),
            "selective": effects.mean_selectivity(change, [0, 1], score, usable),
        }
        assert intervals["wide"].estimate == pytest.approx(intervals["plain"].estimate)
        for name, interval in intervals.items():
            findings[name] += not interval.holds(0.0)
            missed[name] += not interval.holds(2 * better)
    if better:
        assert findings["wide"] == findings["selective"] == n
    else:
        assert found_too_often(findings["plain"], n), "that is why"
    for name in ("wide", "selective"):
        assert not found_too_often(missed[name], n), (name, missed)


def test_monotone_doses_are_found():
    rising = np.outer([1, 2, 3], np.ones(4)) + np.array([0, 0, 0, 0])
    assert effects.monotonicity(rising, np.array([0.1, 0.2, 0.3])).tolist() == [1.0] * 4
    assert effects.monotonicity(-rising, np.array([0.1, 0.2, 0.3])).tolist() == [-1.0] * 4


# ---- verdicts ------------------------------------------------------------------------------------------------


def row(interval: statistics.Interval, **region) -> Row:
    return Row("x", "what", "scope", "paper", **claimed(interval, **region))


def test_noise_gives_few_findings_and_no_agreement():
    """Tables in which nothing is so: one in twenty has a finding, at most, one in four hundred an agreement."""
    rng, n = np.random.default_rng(8), 4000
    tables = []
    for _ in range(n):
        rows = [row(statistics.mean_interval(rng.normal(size=12)), above=0.0) for _ in range(5)]
        tables.append({decision.verdict for decision in decided(rows)})
    assert not found_too_often(sum(bool({AGREES, DIFFERS} & verdicts) for verdicts in tables), n)
    assert not found_too_often(sum(AGREES in verdicts for verdicts in tables), n, 0.0025)


@pytest.mark.parametrize("share", [0.5, 0.8, 0.05])
def test_shares_are_told_apart_at_most_as_often_as_said(share):
    """Exactly, over all that n yes or no can give; by the score test 7.2 % of 40 are at 0.8."""
    for n in range(1, 61):
        counts = np.arange(n + 1)
        p = np.array([statistics.binomial_p(int(k), n, share) for k in counts])
        chance = stats.binom.pmf(counts, n, share)
        assert chance[p <= 0.05].sum() <= 0.05
        wanted = [stats.binomtest(int(k), n, share).pvalue for k in counts] if n in (11, 40) else p
        assert p == pytest.approx(wanted)
        decisions = [decided([row(statistics.wilson(int(k), n), above=share, p=float(p[k]))])[0] for k in counts]
        assert chance[[decision.verdict in (AGREES, DIFFERS) for decision in decisions]].sum() <= 0.05
    assert statistics.binomial_p(36.6, 40, 0.8) == statistics.binomial_p(36, 40, 0.8), "towards what is expected"
    assert np.isnan(statistics.binomial_p(0, 0, 0.5))


class InMemory(dict):
    """The groups of a store that is none."""

    models, axis = ["m"], "emotion"


def judged_noise(rng) -> InMemory:
    """Twelve prompts steered to two emotions at two strengths, with two controls; the judge's scores are noise."""
    prompts = {"prompt": [f"p{k}" for k in range(12)], "seed": [0]}
    axes = {"model": ["m"], "op": ["add"], "layer_set": ["all"], "method": ["a"], "emotion": ["happy", "sad"]}
    axes |= {"strength": [0.05, 0.1], "control": ["none", "random", "random-2"], **prompts}
    plain = {"model": ["m"], "op": ["add"], **prompts}
    groups = InMemory()
    for path, own in (("judged", axes), ("judged_unsteered", plain)):
        dims = {**own, "judge": ["j"], "class": ["happy", "sad", "other"]}
        scores = rng.dirichlet([1, 1, 1], tuple(map(len, dims.values()))[:-1])
        groups[path] = xr.Dataset({"score": (tuple(dims), scores)}, dims)
    return groups


def test_a_judge_of_noise_finds_no_effect_and_agrees_with_nothing():
    """From scores to verdicts; that shares of one half are below 0.8 is so, and no false finding."""
    rng, n, tables = np.random.default_rng(21), 60, []
    for _ in range(n):
        rows = decided(steering_works(Evidence(judged_noise(rng), Rules(), {})))
        assert {decision.claim for decision in rows} >= {"4", "effects"}
        tables += [[decision.verdict for decision in rows if decision.claim == "effects" or decision.verdict == AGREES]]
    assert not found_too_often(sum(AGREES in verdicts for verdicts in tables), n, 0.0025)
    assert not found_too_often(sum(DIFFERS in verdicts for verdicts in tables), n)


def test_a_verdict_needs_an_interval_with_a_width_and_ends():
    edges = {"none": (np.nan, np.nan), "no end": (-np.inf, 3.0), "no width": (2.0, 2.0)}
    for low, high in edges.values():
        [decision] = decided([row(statistics.Interval(2.0, low, high, 9), above=0.0)])
        assert decision.verdict == "inconclusive" and decision.why
    [decision] = decided([row(statistics.Interval(2.0, 1.9, 2.1, 9), above=0.0)])
    assert decision.verdict == AGREES
    [decision] = decided([row(statistics.Interval(-2.0, -2.1, -1.9, 9), above=0.0)])
    assert decision.verdict == DIFFERS
    [decision] = decided([Row("x", "what", "scope", "paper", value=2.0, low=1.9, high=2.1)])
    assert decision.verdict == "cannot be compared", "its claim says nothing of the value"


def test_the_p_of_an_interval_is_that_of_its_test():
    values = np.random.default_rng(9).normal(size=12) + 0.7
    assert row(statistics.mean_interval(values), above=0.0).p == pytest.approx(stats.ttest_1samp(values, 0).pvalue)


# ---- intervals -----------------------------------------------------------------------------------------------


def test_the_shift_of_mann_whitney_is_that_of_its_own_test():
    rng = np.random.default_rng(10)
    for _ in range(50):
        a, b = rng.normal(size=6) + rng.normal(), rng.normal(size=7)
        interval = statistics.shift(a, b)
        assert interval.low <= interval.estimate <= interval.high
        rejected = statistics.mann_whitney(a, b).p <= 0.05
        assert rejected == (not interval.low < 0 < interval.high)


def test_the_spread_between_models_covers():
    rng = np.random.default_rng(12)
    covers, false = [], []
    for _ in range(300):
        errors = rng.uniform(0.05, 0.2, 8)
        interval, _ = statistics.heterogeneity(rng.normal(size=8) * 0.2 + rng.normal(size=8) * errors, errors)
        covers.append(interval.holds(0.2))
    for _ in range(2000):
        errors = rng.uniform(0.05, 0.2, 8)
        false.append(statistics.heterogeneity(rng.normal(size=8) * errors, errors)[1] <= 0.05)
    assert np.mean(covers) >= 0.9 and not found_too_often(sum(false), 2000)


def test_differences_of_lopsided_intervals_cover():
    rng = np.random.default_rng(13)
    covers = []
    for _ in range(400):
        k, m = rng.binomial(20, 0.9), rng.binomial(20, 0.6)
        covers.append(statistics.difference(statistics.wilson(k, 20), statistics.wilson(m, 20)).holds(0.3))
    assert np.mean(covers) >= 0.9, "n = 400"


def test_the_lowest_of_several_is_in_its_set():
    rng = np.random.default_rng(14)
    inside = []
    for _ in range(300):
        truth = np.array([0.5, 0.45, 0.4, 0.42, 0.6])
        samples = truth[:, None] + rng.normal(size=(5, 15)) * 0.3
        off = (samples - samples.mean(1, keepdims=True)) / np.sqrt(15 * 14)
        inside.append(statistics.lowest(samples.mean(1), off, 14, n=500)[2] > 0.05)
    assert np.mean(inside) >= 0.9, "n = 300"


def test_selectivity_is_over_classes_and_its_mean_over_prompts():
    """Three emotions, two prompts, four classes: each pushes its own class, one also another."""

    matrix = np.zeros((3, 2, 4))  # [emotion, prompt, class]
    for emotion, own in enumerate((2, 0, 3)):
        matrix[emotion, :, own] = 0.5, 0.3
    matrix[1, :, 1] = -0.2
    whole, targets = np.stack([metrics.nan_mean(scores, 0) for scores in matrix]), np.array([2, 0, 3])
    np.testing.assert_allclose(whole[0], [0, 0, 0.4, 0])
    np.testing.assert_allclose(effects.off_target(whole, targets), [0, 0.1, 0])
    assert effects.diagonal_share(whole, targets) == 1
