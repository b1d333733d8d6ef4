"""Directions: what was planted is found again, layer by layer, whatever is missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsteer.plan.schema import Method
from nsteer.science.directions import BASELINES, derive, mean, principal, without

LAYERS, WIDTH = 3, 16


def planted(emotions: int = 4, samples: int = 6, noise: float = 0.0, seed: int = 0):
    """True means by emotion, and samples around them: {emotion: [sample, layer, d_model]}, and neutral ones."""
    draw = np.random.default_rng(seed)
    means = {f"e{i}": draw.normal(size=(LAYERS, WIDTH)) for i in range(emotions)}
    spread = draw.normal(size=(samples, LAYERS, WIDTH)) * noise
    spread -= spread.mean(0)
    shared = 5 * draw.normal(size=(LAYERS, WIDTH))
    activations = {e: (shared + m + spread).astype(np.float32) for e, m in means.items()}
    return means, activations, (shared + spread).astype(np.float32)


def close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, atol=2e-5)


def test_minus_the_neutral_mean_the_planted_means_are_left():
    means, activations, neutral = planted(noise=3.0)
    vectors, lengths = derive(activations, neutral, baseline="neutral_mean", unit_norm=False)
    for emotion in means:
        close(vectors[emotion], means[emotion])
        close(lengths[emotion], np.linalg.norm(means[emotion], axis=-1))


def test_minus_the_grand_mean_vectors_sum_to_zero():
    means, activations, neutral = planted(noise=3.0)
    vectors, _ = derive(activations, neutral, baseline="grand_mean", unit_norm=False)
    close(sum(vectors.values()), 0)
    centre = sum(means.values()) / len(means)
    for emotion in means:
        close(vectors[emotion], means[emotion] - centre)


def test_every_emotion_weighs_the_same_in_the_grand_mean():
    _, activations, neutral = planted(noise=1.0)
    more = {**activations, "e0": np.concatenate([activations["e0"]] * 5)}
    for left, right in zip(
        *(derive(m, neutral, baseline="grand_mean")[0].values() for m in (activations, more)), strict=True
    ):
        close(left, right)


@pytest.mark.parametrize("n", [2, 3, 20])
def test_the_mean_cosine_of_symmetric_vectors_is_pinned_by_algebra(n):
    """The trap of the layer sweep: -1/(n-1) whatever the model."""
    activations = {f"e{i}": np.eye(n)[None, None, i] + 7.0 for i in range(n)}
    vectors, _ = derive(activations, np.zeros((1, 1, n)), baseline="grand_mean")
    pairs = [float(vectors[a][0] @ vectors[b][0]) for a, b in itertools.combinations(activations, 2)]
    assert np.mean(pairs) == pytest.approx(-1 / (n - 1), abs=1e-6)


def test_without_a_baseline_the_mean_itself_is_left():
    _, activations, _ = planted()
    vectors, _ = derive(activations, np.full((0, LAYERS, WIDTH), np.nan), baseline="none", unit_norm=False)
    close(vectors["e0"], activations["e0"].mean(0))


def test_vectors_have_length_one_and_lengths_are_kept():
    _, activations, neutral = planted(noise=1.0)
    raw, lengths = derive(activations, neutral, baseline="neutral_mean", unit_norm=False)
    unit, same = derive(activations, neutral, baseline="neutral_mean", unit_norm=True)
    for emotion in activations:
        assert np.linalg.norm(unit[emotion], axis=-1) == pytest.approx(1, abs=1e-6)
        close(unit[emotion] * lengths[emotion][:, None], raw[emotion])
        assert (lengths[emotion] == same[emotion]).all()
        assert unit[emotion].dtype == lengths[emotion].dtype == np.float32


def test_an_emotion_that_is_its_baseline_has_a_vector_of_zeros():
    same = np.ones((2, LAYERS, WIDTH), np.float32)
    vectors, lengths = derive({"e": same}, same, baseline="neutral_mean")
    assert not vectors["e"].any() and not lengths["e"].any()


# ---- NaN ------------------------------------------------------------------------------------------------------


def test_holes_do_not_count():
    _, activations, neutral = planted(noise=1.0)
    holed = {e: np.concatenate([s, np.full((3, LAYERS, WIDTH), np.nan, np.float32)]) for e, s in activations.items()}
    missing = np.concatenate([np.full((2, LAYERS, WIDTH), np.nan, np.float32), neutral])
    for settings in itertools.product(BASELINES, (None, 0.5), (True, False)):
        named = dict(zip(("baseline", "variance", "unit_norm"), settings, strict=True))
        (left, left_lengths), (right, right_lengths) = (
            derive(activations, neutral, **named),
            derive(holed, missing, **named),
        )
        for emotion in activations:
            close(left[emotion], right[emotion])
            close(left_lengths[emotion], right_lengths[emotion])


def test_an_emotion_of_holes_alone_is_a_hole_and_spoils_no_other():
    _, activations, neutral = planted()
    activations["gone"] = np.full((2, LAYERS, WIDTH), np.nan, np.float32)
    vectors, lengths = derive(activations, neutral, baseline="grand_mean", variance=0.5)
    assert np.isnan(vectors.pop("gone")).all() and np.isnan(lengths.pop("gone")).all()
    assert all(np.isfinite(vector).all() for vector in vectors.values())


def test_a_layer_of_holes_spoils_no_other_layer():
    _, activations, neutral = planted(noise=1.0)
    whole, _ = derive(activations, neutral, baseline="neutral_mean", variance=0.5)
    for samples in (*activations.values(), neutral):
        samples[:, 1] = np.nan
    vectors, _ = derive(activations, neutral, baseline="neutral_mean", variance=0.5)
    for emotion, vector in vectors.items():
        assert np.isnan(vector[1]).all()
        close(vector[[0, 2]], whole[emotion][[0, 2]])


def test_samples_stay_as_they_were():
    _, activations, neutral = planted(noise=1.0)
    kept = {e: s.copy() for e, s in activations.items()}, neutral.copy()
    derive(activations, neutral, baseline="none", variance=0.9)
    assert all((activations[e] == kept[0][e]).all() for e in activations) and (neutral == kept[1]).all()


# ---- denoising --------------------------------------------------------------------------------------------------


def subspace(samples: int = 40, seed: int = 1):
    """Neutral samples [sample, layer, d_model] that vary along two known axes, nine parts to one."""
    draw = np.random.default_rng(seed)
    axes = np.linalg.qr(draw.normal(size=(WIDTH, 2)))[0].T
    weight = draw.normal(size=(samples, 2))
    weight = np.linalg.qr(weight - weight.mean(0))[0] * np.sqrt([0.9, 0.1])
    return axes, np.repeat((weight @ axes + 4.0)[:, None], LAYERS, 1)


@pytest.mark.parametrize(("variance", "count"), [(0.5, 1), (0.9, 1), (0.91, 2), (1.0, 2)])
def test_as_many_components_as_the_variance_asks_for(variance, count):
    axes, neutral = subspace()
    components = principal(neutral[:, 0], variance)
    assert components.shape == (count, WIDTH)
    assert np.abs(components @ axes.T) == pytest.approx(np.eye(2)[:count], abs=1e-6)


def test_nothing_is_left_in_the_neutral_subspace():
    axes, neutral = subspace()
    _, activations, _ = planted(noise=1.0)
    vectors, _ = derive(activations, neutral, baseline="neutral_mean", variance=1.0)
    plain, _ = derive(activations, neutral, baseline="neutral_mean", unit_norm=False)
    for emotion, vector in vectors.items():
        assert np.abs(vector @ axes.T).max() < 1e-6
        left = without(plain[emotion], axes)
        close(vector, left / np.linalg.norm(left, axis=-1, keepdims=True))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_neutral_samples_that_do_not_differ_have_nothing_to_remove(count):
    """Greedy decoding of one template writes one text: its rounding errors are no subspace."""
    draw = np.random.default_rng(3)
    sample = draw.normal(size=(1, LAYERS, WIDTH)) * 50
    neutral = (np.repeat(sample, count, 0) * (1 + 1e-7 * draw.normal(size=(count, LAYERS, WIDTH)))).astype(np.float32)
    _, activations, _ = planted(noise=1.0)
    plain, _ = derive(activations, neutral, baseline="neutral_mean")
    denoised, _ = derive(activations, neutral, baseline="neutral_mean", variance=0.5)
    for emotion in activations:
        close(denoised[emotion], plain[emotion])


@given(st.integers(2, 12), st.floats(0.05, 1.0), st.integers(0, 10_000))
def test_removed_twice_is_removed_once(samples, variance, seed):
    draw = np.random.default_rng(seed)
    components = principal(draw.normal(size=(samples, WIDTH)), variance)
    assert components @ components.T == pytest.approx(np.eye(len(components)), abs=1e-9)
    vector = draw.normal(size=(LAYERS, WIDTH))
    once = without(vector, components)
    close(without(once, components), once)
    assert np.abs(once @ components.T).max(initial=0) < 1e-9
    assert (np.linalg.norm(once, axis=-1) <= np.linalg.norm(vector, axis=-1) + 1e-9).all()


def test_means_are_taken_in_float64():
    many = np.full((3000, 1, 1), 0.1, np.float32)
    assert mean(many).dtype == np.float64 and mean(many).item() == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_every_baseline_of_the_plan_is_here():
    import typing

    assert set(typing.get_args(Method.model_fields["baseline"].annotation)) == set(BASELINES)
