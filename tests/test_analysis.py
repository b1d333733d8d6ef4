"""Analysis by names: every answer against a computation by hand, with labels in another order."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import xarray as xr

from nsteer.science.analysis import cosine_similarity, mean_pairwise_cosine, target_rate

EMOTIONS, LAYERS = ["calm", "angry", "sad", "happy"], [4, 0, 2]


@pytest.fixture
def vector() -> xr.DataArray:
    draw = np.random.default_rng(0)
    return xr.DataArray(
        draw.normal(size=(3, 4, 8)),
        dims=("layer", "emotion", "d_model"),
        coords={"layer": LAYERS, "emotion": EMOTIONS, "d_model": range(8), "depth": ("layer", [1.0, 0.0, 0.5])},
    )


def cosine(left, right) -> float:
    return float(np.dot(left, right) / np.linalg.norm(left) / np.linalg.norm(right))


def shuffles(array: xr.DataArray):
    """The same labelled numbers in other orders of labels and dims."""
    yield array
    yield array.transpose(*reversed(array.dims))
    yield array.sel({"emotion": sorted(EMOTIONS)})
    yield array.isel({"layer": [2, 0, 1], "emotion": [3, 1, 0, 2]})


def test_cosine_is_by_label(vector):
    for shuffle in shuffles(vector):
        cosines = cosine_similarity(shuffle)
        assert set(cosines.dims) == {"layer", "emotion", "emotion_2"}
        for layer, a, b in itertools.product(LAYERS, EMOTIONS, EMOTIONS):
            where = {"layer": layer}
            by_hand = cosine(vector.sel({**where, "emotion": a}).values, vector.sel({**where, "emotion": b}).values)
            assert cosines.sel({**where, "emotion": a, "emotion_2": b}).item() == pytest.approx(by_hand, abs=1e-12)


def test_coordinates_beside_the_emotions_are_no_hindrance(vector):
    vector = vector.assign_coords(group=("emotion", ["p", "n", "n", "p"]), model="zoo/llama")
    plain = vector.drop_vars("group")
    xr.testing.assert_allclose(cosine_similarity(vector).drop_vars("group", errors="ignore"), cosine_similarity(plain))
    xr.testing.assert_allclose(mean_pairwise_cosine(vector), mean_pairwise_cosine(plain))
    assert mean_pairwise_cosine(vector).sel({"layer": 2}).depth.item() == 0.5


def test_the_mean_over_pairs_is_over_distinct_pairs(vector):
    for shuffle in shuffles(vector):
        means = mean_pairwise_cosine(shuffle)
        for layer in LAYERS:
            at = vector.sel({"layer": layer})
            pairs = [
                cosine(at.sel({"emotion": a}).values, at.sel({"emotion": b}).values)
                for a, b in itertools.combinations(EMOTIONS, 2)
            ]
            assert means.sel({"layer": layer}).item() == pytest.approx(np.mean(pairs), abs=1e-12)


def test_emotions_without_a_vector_do_not_count(vector):
    holed = vector.copy()
    holed.loc[{"emotion": "sad", "layer": 2}] = np.nan
    holed.loc[{"emotion": ["sad", "calm", "happy"], "layer": 0}] = np.nan
    means = mean_pairwise_cosine(holed)
    rest = mean_pairwise_cosine(vector.drop_sel({"emotion": "sad"}))
    assert means.sel({"layer": 2}).item() == pytest.approx(rest.sel({"layer": 2}).item(), abs=1e-12)
    assert means.sel({"layer": 4}).item() == mean_pairwise_cosine(vector).sel({"layer": 4}).item()
    assert np.isnan(means.sel({"layer": 0}).item()), "one vector has no pair; 0 or -1/(n-1) would be a lie"


def test_vectors_minus_their_mean_are_pinned():
    many = xr.DataArray(np.eye(20), dims=("emotion", "d_model"), coords={"emotion": [f"e{i}" for i in range(20)]})
    assert mean_pairwise_cosine(many - many.mean("emotion")).item() == pytest.approx(-1 / 19)


CLASSES = ["sad", "happy", "anger"]


@pytest.fixture
def probability() -> xr.DataArray:
    """Over emotion x strength x prompt x seed x class; every text named 'happy' but where said otherwise."""
    emotions, strengths, prompts = ["happy", "calm", "sad"], [0.2, 0.1], ["b", "a"]
    probabilities = xr.DataArray(
        np.full((3, 2, 2, 1, 3), 0.1),
        dims=("emotion", "strength", "prompt", "seed", "class"),
        coords={"emotion": emotions, "strength": strengths, "prompt": prompts, "seed": [0], "class": CLASSES},
    )
    probabilities.loc[{"class": "happy"}] = 0.8
    return probabilities


def test_the_rate_counts_texts_named_as_the_emotion_steered_to(probability):
    probability.loc[{"emotion": "sad", "strength": 0.1, "prompt": "a", "class": "sad"}] = 0.9
    for array in (
        probability,
        probability.transpose(*reversed(probability.dims)),
        probability.isel({"class": [2, 0, 1]}),
    ):
        rates = target_rate(array)
        assert set(rates.rate.dims) == {"strength"}
        # happy: 2 of 2 at each strength; sad: 1 of 2 at 0.1; calm is no class of this judge
        assert rates.n.sel({"strength": 0.1}).item() == rates.n.sel({"strength": 0.2}).item() == 4
        assert rates.hits.sel({"strength": 0.1}).item() == 3 and rates.rate.sel({"strength": 0.1}).item() == 0.75
        assert rates.hits.sel({"strength": 0.2}).item() == 2 and rates.rate.sel({"strength": 0.2}).item() == 0.5


def test_holes_do_not_count(probability):
    probability.loc[{"emotion": "happy", "strength": 0.1, "prompt": "a"}] = np.nan
    probability.loc[{"strength": 0.2}] = np.nan
    rates = target_rate(probability)
    assert rates.n.sel({"strength": 0.1}).item() == 3 and rates.hits.sel({"strength": 0.1}).item() == 1
    assert rates.hits.sel({"strength": 0.2}).item() == rates.n.sel({"strength": 0.2}).item() == 0
    assert np.isnan(rates.rate.sel({"strength": 0.2}).item())


def test_a_judge_of_other_classes_judges_nothing(probability):
    other = probability.assign_coords({"class": ["x", "y", "z"]})
    rates = target_rate(other)
    assert int(rates.n.sum()) == 0 and np.isnan(rates.rate).all()


def test_a_judges_own_words_are_mapped(probability):
    probability.loc[{"emotion": "calm", "class": "anger"}] = 0.9
    rates = target_rate(probability, {"calm": "anger", "sad": None})
    assert rates.n.sel({"strength": 0.1}).item() == 4, "sad has no class, happy is its own"
    assert rates.hits.sel({"strength": 0.1}).item() == 4
