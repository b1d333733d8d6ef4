"""What bags of embeddings tell apart, and one label a model by the rule of the author's later code."""

from __future__ import annotations

import numpy as np
import pytest
import recompute
import xarray as xr

from nsteer.science import outcomes, separation

EMOTIONS, SAMPLES, D = 8, 6, 24


def labelled(values: np.ndarray, neutral: np.ndarray, dims: tuple[str, ...]) -> xr.DataArray:
    names = [f"e{i}" for i in range(len(values))] + ["neutral"]
    coords = {"emotion": names, "sample": range(values.shape[1])} | ({"layer": [5, 2]} if "layer" in dims else {})
    return xr.DataArray(np.concatenate([values, neutral[None]]), coords, dims)


def drawn(rng, signal: float) -> tuple[np.ndarray, np.ndarray]:
    mu = signal * rng.normal(size=(EMOTIONS, 1, D))
    return mu + rng.normal(size=(EMOTIONS, SAMPLES, D)), rng.normal(size=(SAMPLES, D))


def measured(rng, signal: float, **more) -> tuple[xr.Dataset, tuple[np.ndarray, np.ndarray]]:
    streams = rng.normal(size=(EMOTIONS, SAMPLES, 2, D)), rng.normal(size=(SAMPLES, 2, D))
    bags = drawn(rng, signal)
    measures = separation.measure(
        labelled(*streams, ("emotion", "sample", "layer", "d_model")),
        embeddings=labelled(*bags, ("emotion", "sample", "d_model")),
        shuffles=0,
        splits=2,
        **more,
    )
    return measures, bags


def test_bags_with_a_planted_signal_are_told_apart_whatever_the_streams_say():
    measures, bags = measured(np.random.default_rng(0), 3.0)
    assert float(measures.embedding) > 0.95 and float(measures.accuracy.max()) < 0.5
    assert float(measures.embedding) == pytest.approx(recompute.accuracy(*bags)), "by slow arithmetic"


def test_bags_of_noise_are_at_chance():
    rng = np.random.default_rng(1)
    shares = [float(measured(rng, 0.0)[0].embedding) for _ in range(60)]
    assert abs(np.mean(shares) - 1 / EMOTIONS) < 0.02, "n = 60 of 48 samples each"


def test_a_copy_of_a_text_tells_nothing_of_its_bag():
    rng = np.random.default_rng(2)
    text = np.array([[f"{e} {k}" for k in range(SAMPLES)] for e in range(EMOTIONS)], object)
    text[:, 1] = text[:, 0]
    every = np.concatenate([text, np.array([[f"n {k}" for k in range(SAMPLES)]], object)])
    coords = {"emotion": [f"e{i}" for i in range(EMOTIONS)] + ["neutral"], "sample": range(SAMPLES)}
    measures, (values, neutral) = measured(rng, 1.0, text=xr.DataArray(every, coords, ("emotion", "sample")))
    assert float(measures.embedding) == pytest.approx(recompute.accuracy(np.delete(values, 1, 1), neutral))


@pytest.mark.parametrize(
    ("texts", "label", "apart"),
    [
        (["one two three four five"] * 4, "surgical", "surgical"),
        (["go to sea go to sea go to sea"] * 3 + ["one two three"] * 2, "repetitive", "repetitive"),
        (["go to sea go to sea go to sea"] * 2 + ["one two three"] * 2, "surgical", "surgical"),  # not more than half
        (["xkcd"] * 4 + ["one two three"] * 6, "explosive", "explosive"),
        (["xkcd"] * 3 + ["one two three"] * 7, "surgical", "surgical"),  # not more than 30 %
        ([""] * 6 + ["one two three"] * 4, "explosive", "empty"),  # six of ten without a word: not an explosion
        ([""] * 3 + ["xkcd"] * 3 + ["one two three"] * 4, "explosive", "explosive"),
        (["去去去去去去去去去去"] * 4, "explosive", "explosive"),  # a loop that spaces do not part: why it is not ours
        ([], "", ""),
    ],
)
def test_the_label_of_the_authors_code(texts, label, apart):
    assert outcomes.code_regime(texts) == label and outcomes.code_regime_apart(texts) == apart


@pytest.mark.parametrize(
    ("words", "empty", "lost", "apart"),
    [
        (10, 0, 4, "surgical"),  # 4 of 14
        (9, 0, 4, "not finite"),  # 4 of 13
        (6, 2, 1, "empty"),
        (6, 1, 2, "not finite"),
        (6, 2, 2, "empty"),
        (0, 0, 5, "not finite"),
    ],
)
def test_texts_that_are_empty_or_not_finite_have_labels_of_their_own(words, empty, lost, apart):
    assert outcomes.code_regime_apart(["one two three four"] * words + [""] * empty, lost) == apart
