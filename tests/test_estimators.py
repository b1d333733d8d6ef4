"""Estimators: a planted direction is found, where there is none it is not; algebra; oracles in another technique."""

from __future__ import annotations

import inspect
import typing

import numpy as np
import pytest
from sklearn.covariance import ledoit_wolf as oracle_shrinkage
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, Ridge

from nsteer.plan.schema import PARAMETERS, Estimator
from nsteer.science.directions import BASELINES, ESTIMATORS, derive, mean, permutation, permuted
from nsteer.science.directions.estimators import Contrast, ledoit_wolf

LAYERS, WIDTH = [5, 2], 24
OWN: dict[str, dict[str, typing.Any]] = {
    "mean_difference": {},
    "pca_difference": {"centre": False},
    "ridge": {"penalty": 0.1},
    "logistic": {"penalty": 0.1},
    "lda": {"shrinkage": None},
}
PROBES = [name for name in OWN if name != "mean_difference"]


def close(actual, wanted, atol=1e-6):
    np.testing.assert_allclose(actual, wanted, atol=atol)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def planted(noise: float = 0.05, samples: int = 12, seed: int = 0, signal: float = 1.0):
    """Directions {emotion: [layer, d_model]} at right angles, samples around them, and neutral ones."""
    draw = np.random.default_rng(seed)
    shared = 3 * draw.normal(size=(len(LAYERS), WIDTH))
    axes = np.stack([np.linalg.qr(draw.normal(size=(WIDTH, 3)))[0].T for _ in LAYERS], 1)
    true = dict(zip(("joy", "rage", "fear"), axes, strict=True))
    noises = {label: draw.normal(size=(samples, len(LAYERS), WIDTH)) * noise for label in (*true, "neutral")}
    groups = {label: (shared + signal * axis + noises[label]).astype(np.float32) for label, axis in true.items()}
    return true, groups, (shared + noises["neutral"]).astype(np.float32)


def contrast(seed: int = 0, here: int = 9, there: int = 9, width: int = WIDTH) -> Contrast:
    """Two unequal clouds, neither round."""
    draw = np.random.default_rng(seed)
    stretch = np.diag(np.linspace(0.2, 2, width))
    above, below = (draw.normal(size=(n, width)) @ stretch for n in (here, there))
    above = above + draw.normal(size=width)
    return Contrast(above.mean(0) - below.mean(0), above, [below])


def of(name: str, clouds: Contrast, **own) -> np.ndarray:
    return ESTIMATORS[name](clouds, **{**OWN[name], **own})


# ---- planted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", ["neutral_mean", "rest"])
@pytest.mark.parametrize("name", OWN)
def test_a_planted_direction_is_found_at_every_layer(name, baseline):
    true, groups, neutral = planted(samples=40)  # whitening needs more samples than 24 dimensions to be this good
    vectors, lengths = derive(groups, neutral, baseline=baseline, estimator=name, parameters=OWN[name])
    for emotion, axis in true.items():
        others = np.mean([direction for other, direction in true.items() if other != emotion], 0)
        wanted = axis - others if baseline == "rest" else axis
        cosines = (vectors[emotion] * unit(wanted)).sum(-1)
        assert cosines.shape == (2,) and (cosines >= 0.99).all(), (emotion, cosines)
        assert lengths[emotion] == pytest.approx(np.linalg.norm(wanted, axis=-1), rel=0.05)


@pytest.mark.parametrize("name", OWN)
def test_where_none_is_planted_none_is_found(name):
    true, groups, neutral = planted(signal=0.0)
    vectors, lengths = derive(groups, neutral, baseline="neutral_mean", estimator=name, parameters=OWN[name])
    for emotion, axis in true.items():
        assert (np.abs((vectors[emotion] * axis).sum(-1)) < 0.7).all()
        assert (lengths[emotion] < 0.2).all()


def test_centred_pairs_see_what_varies_and_not_the_shift_that_all_share():
    true, groups, neutral = planted()
    settings = {"baseline": "neutral_mean", "estimator": "pca_difference", "parameters": {"centre": True}}
    blind, _ = derive(groups, neutral, **settings)
    assert all((np.abs((blind[e] * axis).sum(-1)) < 0.9).all() for e, axis in true.items())
    sizes = np.linspace(0.5, 6, 12)[:, None, None]
    varied = {e: (groups[e] - true[e] + sizes * true[e]).astype(np.float32) for e in groups}
    seeing, _ = derive(varied, neutral, **settings)
    assert all(((seeing[e] * axis).sum(-1) >= 0.99).all() for e, axis in true.items())


def test_whitening_turns_away_from_an_axis_of_noise_and_the_mean_difference_does_not():
    draw = np.random.default_rng(3)
    loud, planted_axis = np.eye(WIDTH)[:2]
    above, below = (draw.normal(size=(10, WIDTH)) * 0.02 + np.outer(draw.normal(size=10) * 4, loud) for _ in range(2))
    clouds = Contrast(above.mean(0) + planted_axis - below.mean(0), above + planted_axis, [below])
    cosines = {name: float(unit(of(name, clouds)) @ planted_axis) for name in OWN}
    assert min(cosines["ridge"], cosines["lda"], cosines["logistic"]) > 0.95
    assert cosines["mean_difference"] < 0.5 and cosines["pca_difference"] < 0.5


# ---- algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_shift_changes_nothing_a_scale_scales_a_turn_turns(name):
    clouds, draw = contrast(), np.random.default_rng(5)
    turn, shift = np.linalg.qr(draw.normal(size=(WIDTH, WIDTH)))[0], 10 * draw.normal(size=WIDTH)
    plain = of(name, clouds)

    def moved(change, difference) -> np.ndarray:
        return of(name, Contrast(difference, change(clouds.samples), [change(group) for group in clouds.against]))

    close(moved(lambda x: x + shift, clouds.difference), plain, 1e-5)
    close(moved(lambda x: 7.0 * x, 7.0 * clouds.difference), 7.0 * plain, 1e-5)
    close(moved(lambda x: x @ turn, clouds.difference @ turn), plain @ turn, 1e-5)
    assert np.abs(plain @ turn - plain).max() > 0.05


@pytest.mark.parametrize("name", OWN)
def test_sides_exchanged_give_the_opposite(name):
    clouds = contrast()
    close(of(name, Contrast(-clouds.difference, clouds.against[0], [clouds.samples])), -of(name, clouds), 1e-5)


@pytest.mark.parametrize("name", OWN)
def test_the_length_is_the_gap_of_the_means_along_the_direction(name):
    clouds = contrast(here=7, there=7)
    vector = of(name, clouds)
    assert np.linalg.norm(vector) == pytest.approx(abs(unit(vector) @ clouds.difference), rel=1e-6)
    assert unit(vector) @ clouds.difference > 0


@pytest.mark.parametrize("name", ["ridge", "logistic", "lda"])
def test_at_the_end_of_its_parameter_it_is_the_mean_difference(name):
    clouds = contrast()
    last = {"lda": {"shrinkage": 1.0}}.get(name, {"penalty": 1e6})
    close(unit(of(name, clouds, **last)), unit(clouds.difference), 1e-4)
    assert unit(of(name, clouds)) @ unit(clouds.difference) < 0.999


@pytest.mark.parametrize("name", ["ridge", "logistic"])
def test_a_group_weighs_the_same_whatever_its_number_of_samples(name):
    clouds = contrast()
    more = Contrast(clouds.difference, np.concatenate([clouds.samples] * 3), clouds.against)
    close(of(name, more), of(name, clouds), 1e-5)


def test_samples_that_do_not_differ_leave_the_difference():
    above, below = np.ones((3, WIDTH)), np.zeros((3, WIDTH))
    for name in OWN:
        close(of(name, Contrast(above[0], above, [below])), above[0])
        close(of(name, Contrast(above[0] * 0, above, [above])), above[0] * 0)


# ---- oracles ----------------------------------------------------------------------------------------------------


def standard(clouds: Contrast) -> tuple[np.ndarray, np.ndarray]:
    """Rows at total variance 1 and sides, for as many samples on each side."""
    rows = np.concatenate([clouds.samples, *clouds.against])
    rows = rows - rows.mean(0)
    return rows / np.sqrt((rows**2).sum(1).mean()), np.repeat([1, -1], len(clouds.samples))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("here", [4, 40])
def test_probes_agree_with_scikit_learn(seed, here):
    clouds = contrast(seed, here, here)
    rows, sides = standard(clouds)
    count = len(rows)
    ridge = Ridge(alpha=0.3 * count).fit(rows, sides).coef_
    close(unit(of("ridge", clouds, penalty=0.3)), unit(ridge), 1e-6)
    probe = LogisticRegression(C=4 / 0.3 / count, solver="newton-cg", tol=1e-9, max_iter=500).fit(rows, sides)
    close(unit(of("logistic", clouds, penalty=0.3)), unit(probe.coef_[0]), 1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("here", [4, 40])
def test_whitening_agrees_with_the_covariance_written_out(seed, here):
    clouds = contrast(seed, here, here)
    rows = np.concatenate([clouds.samples - clouds.samples.mean(0), clouds.against[0] - clouds.against[0].mean(0)])
    covariance, amount = oracle_shrinkage(rows, assume_centered=True)
    assert ledoit_wolf(rows) == pytest.approx(amount, rel=1e-9) and 0 < amount < 1
    close(unit(of("lda", clouds)), unit(np.linalg.solve(covariance, clouds.difference)))
    plain = rows.T @ rows / len(rows)
    shrunk = 0.7 * plain + 0.3 * np.trace(plain) / WIDTH * np.eye(WIDTH)
    close(unit(of("lda", clouds, shrinkage=0.3)), unit(np.linalg.solve(shrunk, clouds.difference)))


@pytest.mark.parametrize("seed", range(4))
def test_components_agree_with_scikit_learn(seed):
    clouds = contrast(seed)
    pairs = clouds.samples - clouds.against[0]
    component = PCA(1).fit(pairs).components_[0]  # centred
    close(np.abs(unit(of("pca_difference", clouds, centre=True)) @ component), 1)
    component = PCA(1).fit(np.concatenate([pairs, -pairs])).components_[0]  # about zero
    close(np.abs(unit(of("pca_difference", clouds)) @ component), 1)


def test_the_mean_difference_is_what_it_was_to_the_last_bit():
    draw = np.random.default_rng(2)
    groups = {e: (draw.normal(size=(9, 2, WIDTH)) * 40).astype(np.float32) for e in ("joy", "rage")}
    neutral = (draw.normal(size=(5, 2, WIDTH)) * 40).astype(np.float32)
    groups["joy"][3] = np.nan
    vectors, _ = derive(groups, neutral, baseline="neutral_mean", unit_norm=False)
    for emotion, samples in groups.items():
        wanted = np.nanmean(samples.astype(np.float64), 0) - np.nanmean(neutral.astype(np.float64), 0)
        assert (vectors[emotion] == wanted.astype(np.float32)).all()


# ---- baselines, NaN, controls ----------------------------------------------------------------------------------


def test_the_rest_has_the_direction_of_the_grand_mean_and_more_length():
    _, groups, neutral = planted(noise=1.0)
    left, left_lengths = derive(groups, neutral, baseline="grand_mean")
    right, right_lengths = derive(groups, neutral, baseline="rest")
    for emotion in groups:
        close(left[emotion], right[emotion], 1e-5)
        close(right_lengths[emotion], left_lengths[emotion] * 3 / 2, 1e-5)


def test_with_one_emotion_there_is_no_rest():
    _, groups, neutral = planted()
    vectors, _ = derive({"joy": groups["joy"]}, neutral, baseline="rest")
    assert np.isnan(vectors["joy"]).all()


@pytest.mark.parametrize("baseline", ["neutral_mean", "rest"])
@pytest.mark.parametrize("name", OWN)
def test_holes_do_not_count(name, baseline):
    _, groups, neutral = planted(noise=1.0)
    settings = {"baseline": baseline, "estimator": name, "parameters": OWN[name]}
    plain, _ = derive({e: s[2:] for e, s in groups.items()}, neutral[2:], **settings)
    for samples in (*groups.values(), neutral):
        samples[:2] = np.nan
    holed, lengths = derive(groups, neutral, **settings)
    for emotion in groups:
        close(holed[emotion], plain[emotion], 1e-5)
        assert np.isfinite(lengths[emotion]).all()


def test_a_pair_with_a_hole_on_one_side_is_left_out():
    clouds = contrast()
    holed = clouds.samples.copy()
    holed[4] = np.nan
    kept = np.delete(np.arange(9), 4)
    left = of("pca_difference", Contrast(clouds.difference, holed, clouds.against))
    close(left, of("pca_difference", Contrast(clouds.difference, clouds.samples[kept], [clouds.against[0][kept]])))
    shifted = Contrast(
        clouds.difference, clouds.samples[kept], [clouds.against[0][:8]]
    )  # as if missing values closed up
    assert np.abs(left - of("pca_difference", shifted)).max() > 1e-3


@pytest.mark.parametrize(("name", "left"), [("lda", 1), ("pca_difference", 0), ("ridge", 0), ("logistic", 0)])
def test_too_few_samples_are_a_hole_at_that_layer_alone(name, left):
    _, groups, neutral = planted()
    neutral[left:, 1] = np.nan
    groups["joy"][left:, 1] = np.nan
    settings = {"baseline": "neutral_mean", "estimator": name, "parameters": OWN[name]}
    vectors, _ = derive(groups, neutral, **settings)
    assert np.isnan(vectors["joy"][1]).all() and np.isfinite(vectors["joy"][0]).all()


@pytest.mark.parametrize("baseline", ["grand_mean", "none"])
@pytest.mark.parametrize("name", PROBES)
def test_two_groups_are_needed(name, baseline):
    _, groups, neutral = planted()
    with pytest.raises(ValueError, match=f"{name} needs a baseline of samples"):
        derive(groups, neutral, baseline=baseline, estimator=name, parameters=OWN[name])


def test_labels_change_places_among_the_samples_of_one_number():
    counts = {"joy": 40, "rage": 40, "neutral": 25}
    places = permutation(counts, np.random.default_rng(0))
    assert {label: len(hand) for label, hand in places.items()} == counts
    assert sorted(place for hand in places.values() for place in hand) == sorted(
        (label, k) for label, count in counts.items() for k in range(count)
    )
    assert all(number == k for hand in places.values() for k, (_, number) in enumerate(hand))
    assert 5 < sum(was == "joy" for was, _ in places["joy"]) < 30
    assert places == permutation(counts, np.random.default_rng(0)) != permutation(counts, np.random.default_rng(1))


@pytest.mark.parametrize("name", OWN)
def test_shuffled_labels_lose_the_planted_direction(name):
    _, groups, neutral = planted(samples=60)
    every = {**groups, "neutral": neutral}
    given = permuted(every, permutation(dict.fromkeys(every, 60), np.random.default_rng(3)))
    close(sum(given.values()), sum(every.values()), 1e-4)
    against = given.pop("neutral")
    _, lengths = derive(given, against, baseline="neutral_mean", estimator=name, parameters=OWN[name])
    assert all((length < 0.5).all() for length in lengths.values())


# ---- the plan and the code name the same ------------------------------------------------------------------------


def test_every_estimator_of_the_plan_is_here_with_its_own_fields():
    assert set(typing.get_args(Estimator.model_fields["kind"].annotation)) == set(ESTIMATORS)
    for name, estimator in ESTIMATORS.items():
        own = [
            parameter.name
            for parameter in inspect.signature(estimator).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        ]
        assert tuple(own) == PARAMETERS.get(name, ()) and set(Estimator(kind=name).parameters()) == set(own)
    assert {field for own in PARAMETERS.values() for field in own} == set(Estimator.model_fields) - {"kind"}
    assert set(OWN) == set(ESTIMATORS) and set(BASELINES) >= {"rest"} and mean(np.ones((2, 1, 1))).item() == 1
