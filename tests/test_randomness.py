"""Random numbers come from labels alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsteer.program.randomness import generator, rotated, uniforms, unit_vector

LABELS = st.lists(st.text(max_size=6) | st.integers(-(10**12), 10**12), min_size=1, max_size=3)


@given(LABELS, LABELS)
def test_equal_labels_equal_numbers_other_labels_others(left, right):
    assert (generator(*left).random(4) == generator(*left).random(4)).all()
    if left != right:
        assert not (generator(*left).random(4) == generator(*right).random(4)).any()


@pytest.mark.parametrize(
    ("left", "right"), [((1,), ("1",)), (("a", "b"), ("ab",)), (("a,b",), ("a", "b")), ((1, 2), (2, 1))]
)
def test_labels_do_not_run_together(left, right):
    assert generator(*left).random() != generator(*right).random()


def test_what_ran_before_does_not_matter():
    first = uniforms(3, "row", 7)
    np.random.default_rng(0).random(100)
    uniforms(9, "other")
    assert (uniforms(3, "row", 7) == first).all()


def test_numbers_stay_what_they_were():
    """Stored results rest on them: a change here is a new algorithm version of every sampled stage."""
    assert uniforms(2, 0, "calm").tolist() == [0.9107886012144998, 0.8573470996331227]
    assert unit_vector(3, 0, "calm") == pytest.approx([-0.25652796, -0.96117258, 0.10168908], abs=1e-7)


def test_a_longer_text_draws_the_same_numbers_first():
    assert (uniforms(50, "row")[:20] == uniforms(20, "row")).all()


def test_uniforms_are_uniform():
    drawn = uniforms(20_000, "many")
    assert drawn.min() >= 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.var() - 1 / 12) < 0.002


def test_directions_have_length_one_and_no_preferred_side():
    many = np.stack([unit_vector(16, "seed", k) for k in range(2000)])
    assert np.linalg.norm(many, axis=1) == pytest.approx(1, abs=1e-6)
    assert np.abs(many.mean(0)).max() < 0.03
    assert np.abs(many.T @ many / len(many) - np.eye(16) / 16).max() < 0.01


def test_a_rotation_keeps_lengths_and_the_cosines_between_layers():
    layers = np.random.default_rng(1).normal(size=(5, 32)) * np.array([1, 2, 3, 40, 0.1])[:, None]
    layers[2] = layers[1] + 0.1 * layers[2]
    for vectors in (layers, layers[[1, 1, 1]], layers[:, :3]):  # as they are; of one layer; more layers than dims
        turned = rotated(vectors, 0, "made", "joy")
        assert turned @ turned.T == pytest.approx(vectors @ vectors.T, rel=1e-5, abs=1e-4)
    assert rotated(layers[[1, 1]], 7)[0] == pytest.approx(rotated(layers[[1, 1]], 7)[1], abs=1e-6)


def test_rotations_have_no_preferred_side_and_no_memory_of_the_vector():
    layers = np.random.default_rng(2).normal(size=(3, 16))
    many = np.stack([rotated(layers, k) for k in range(2000)]) / np.linalg.norm(layers, axis=1)[:, None]
    assert np.abs(many.mean(0)).max() < 0.03
    for layer in range(3):
        assert np.abs(many[:, layer].T @ many[:, layer] / 2000 - np.eye(16) / 16).max() < 0.01
    assert not np.allclose(rotated(layers, 0), rotated(layers, 1))
