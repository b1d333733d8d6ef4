"""Methods from a plan to a store: vectors are those of the stored activations, formulas edit streams."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from test_runner import command, run

from nsteer.executors.fake import Fake
from nsteer.science.directions import axes
from nsteer.science.presets import RATINGS
from nsteer.store import Store

EMOTIONS = ["happy", "sad", "calm", "angry"]
READ = {"source": "comprehension", "samples": 3, "neutral_samples": 3, "pooling": "mean"}
METHODS = {
    "plain": READ,
    "pairs": {**READ, "estimator": "pca_difference"},
    "ridge": {**READ, "estimator": {"kind": "ridge", "penalty": 0.5}},
    "logistic": {**READ, "estimator": "logistic", "baseline": "rest"},
    "lda": {**READ, "estimator": {"kind": "lda", "shrinkage": 0.4}, "unit_norm": False},
    "shuffled": {**READ, "labels": "shuffled"},
}
PLAN = {
    "name": "methods",
    "models": ["zoo/llama"],
    "texts": "zoo",
    "emotions": EMOTIONS,
    "ratings": "nsteer-20",
    "methods": METHODS,
    "layers": [4, 2],
    "prompts": ["the old house was", "tom ran"],
    "reads": {"last": {"pooling": "last", "layers": [2, 4]}},
    "directions": {
        "mixed": "0.5*plain.happy - plain.sad",
        "clean": "orthogonal(plain.happy, plain.sad, mixed) + 2*noise",
        "noise": {"random": 3},
        "up": "plain.valence",
    },
    "edits": {
        name: [{"op": "add", "direction": name, "layers": [4, 2], "strength": 3.0}] for name in ("mixed", "clean", "up")
    },
    "threads": 1,
}


def write(folder: Path, **changes) -> Path:
    plan = {**PLAN, "store": str(folder / "methods.zarr"), **changes}
    (folder / "methods.yaml").write_text(json.dumps(plan))
    return folder / "methods.yaml"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    plan = write(tmp_path_factory.mktemp("methods"))
    summary = run(plan)
    assert not summary.failures, summary.failures
    return plan


def group(plan: Path, path: str) -> xr.Dataset:
    return Store(plan.with_suffix(".zarr")).read(path).load()


def vectors(plan: Path, method: str, layer: int) -> dict[str, np.ndarray]:
    vector_array = group(plan, "vectors/zoo--llama").vector.sel(
        {"model": "zoo/llama", "method": method, "layer": layer}
    )
    return {e: vector_array.sel({"emotion": e}).values.astype(np.float64) for e in EMOTIONS}


def samples(plan: Path, layer: int) -> dict[str, np.ndarray]:
    pooled = group(plan, "activations/zoo--llama").pooled.sel({"model": "zoo/llama", "method": "plain", "layer": layer})
    return {e: pooled.sel({"emotion": e}).values.astype(np.float64) for e in (*EMOTIONS, "neutral")}


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(("layer", "emotions"), [(4, ["sad", "calm"]), (2, ["happy", "angry"])])
def test_vectors_are_those_of_the_activations_by_another_technique(done, layer, emotions):
    texts = samples(done, layer)
    neutral = texts.pop("neutral")
    for emotion in emotions:
        own = texts[emotion]
        difference = own.mean(0) - neutral.mean(0)
        rows, sides = np.concatenate([own, neutral]), np.repeat([1, -1], 3)
        scale = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
        ridge = Ridge(alpha=0.5 * len(rows)).fit(rows / scale, sides).coef_
        rest = [other for name, other in texts.items() if name != emotion]
        every, told = np.concatenate([own, *rest]), np.repeat([1, -1], [3, 9])
        even = np.repeat([0.5 / 3, 0.5 / 9], [3, 9])
        length = np.sqrt((even * ((every - even @ every) ** 2).sum(1)).sum())
        probe = LogisticRegression(C=4 / 0.1, solver="newton-cg", tol=1e-10, max_iter=500)
        logistic = probe.fit(every / length, told, sample_weight=even).coef_[0]
        pairs = np.linalg.eigh((own - neutral).T @ (own - neutral))[1][:, -1]
        within = np.concatenate([own - own.mean(0), neutral - neutral.mean(0)])
        covariance = within.T @ within / 6
        shrunk = 0.6 * covariance + 0.4 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        truths = {
            "plain": difference,
            "pairs": pairs * np.sign(pairs @ difference),
            "ridge": ridge,
            "logistic": logistic,
            "lda": np.linalg.solve(shrunk, difference),
        }
        for method, true in truths.items():
            vector = vectors(done, method, layer)[emotion]
            assert unit(vector) @ unit(true) > 0.99999, (method, emotion)
            assert unit(vector) @ unit(difference) < 0.9999 or method == "plain"
        assert np.linalg.norm(vectors(done, "ridge", layer)[emotion]) == pytest.approx(1, abs=1e-5)
        whitened = vectors(done, "lda", layer)[emotion]
        assert np.linalg.norm(whitened) == pytest.approx(abs(unit(whitened) @ difference), rel=1e-4)


def test_scikit_learn_gives_the_same_discriminant_with_its_own_shrinkage(done):
    """Its covariance is that of samples about the mean of their class, as ours, where classes are as large."""
    texts = samples(done, 4)
    rows = np.concatenate([texts["happy"], texts["neutral"]])
    rows = rows / rows.std()  # its solver is not made for small numbers
    discriminant = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.4).fit(rows, [1, 1, 1, 0, 0, 0]).coef_[0]
    assert unit(discriminant) @ unit(vectors(done, "lda", 4)["happy"]) > 0.99


def test_shuffled_labels_give_other_and_shorter_vectors(done):
    norm = group(done, "vectors/zoo--llama").norm.sel({"model": "zoo/llama", "layer": [4, 2]})
    plain, shuffled = (norm.sel({"method": m}).mean("emotion") for m in ("plain", "shuffled"))
    assert (shuffled < plain).all()
    kept = json.loads(group(done, "methods").protocol.sel({"method": "shuffled"}).item())
    assert kept["labels"] == "shuffled" and kept["estimator"]["kind"] == "mean_difference"


def test_formulas_and_axes_are_what_is_added(done):
    stream = group(done, "reads/zoo--llama").stream.sel({"model": "zoo/llama", "read": "last", "layer": 2})
    plain = vectors(done, "plain", 2)
    mixed = 0.5 * plain["happy"] - plain["sad"]
    added = {"mixed": mixed}
    known = {e: vector[None] for e, vector in plain.items()}
    added["up"] = axes(known, {s: RATINGS["nsteer-20"].scales[s] for s in ("valence", "arousal")})["valence"][0]
    for edit, direction in added.items():
        change = stream.sel({"edit": edit, "strength": 3.0}) - stream.sel({"edit": "none", "strength": 0})
        np.testing.assert_allclose(change.values, np.tile(3 * direction, (2, 1)), atol=2e-4)
    change = (
        (stream.sel({"edit": "clean", "strength": 3.0}) - stream.sel({"edit": "none", "strength": 0}))
        .values[0]
        .astype(np.float64)
    )
    from nsteer.program.randomness import unit_vector

    kept = change / 3 - 2 * unit_vector(len(change), 3, "noise")
    assert abs(kept @ plain["sad"]) < 1e-3 and abs(kept @ mixed) < 1e-3


def test_nothing_is_done_twice_and_a_changed_estimator_derives_its_own_alone(done):
    assert not any(run(done).done.values())
    again = run(done, "methods.ridge.estimator.penalty=0.6").done
    assert {stage: count for stage, count in again.items() if count} == {"vectors": len(EMOTIONS)}
    again = run(done, "methods.ridge.estimator.penalty=0.6", "methods.plain.unit_norm=false").done
    assert again["vectors"] == len(EMOTIONS) and again["reads"] == 3 and not again.get("activations")
    assert run(done).done["vectors"] == 2 * len(EMOTIONS)


def test_conditions_wait_for_vectors_that_are_not_there(tmp_path):
    short = {"plain": {**READ, "pooling": {"kind": "mean_from", "k": 500}}}
    directions = {"mixed": "happy - sad", "noise": {"random": 1}}
    edits = {name: [{"op": "add", "direction": name, "layers": [2]}] for name in directions}
    summary = run(write(tmp_path, methods=short, directions=directions, edits=edits))
    (failed,) = [failure for failure in summary.failures if failure.stage == "reads"]
    assert "mixed" in failed.cell and "rests on vectors/zoo--llama" in failed.reason
    assert "noise" in {edit for _, _, edit, *_ in Store(tmp_path / "methods.zarr").committed("reads/zoo--llama")}


def test_every_method_runs_over_an_executor_of_shaped_numbers(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    from nsteer import zoo
    from nsteer.plan.check import load

    plan = write(tmp_path)
    (facts,) = load(plan).facts
    words = AutoTokenizer.from_pretrained(zoo.path("llama"))
    fake = Fake(n_layers=facts.n_layers, d_model=facts.d_model, tokenizer=words)
    monkeypatch.setattr("nsteer.runner.model.create", lambda *_, **__: fake)
    summary = run(plan)
    assert not summary.failures and summary.done["vectors"] == len(METHODS) * len(EMOTIONS)
    vector_array = group(plan, "vectors/zoo--llama").vector.sel({"layer": [4, 2], "method": list(METHODS)})
    vector_array = vector_array.sel({"emotion": list(EMOTIONS)})
    assert np.isfinite(vector_array.values).all()
    away = [layer for layer in range(facts.n_layers) if layer not in (4, 2)]
    derived = group(plan, "vectors/zoo--llama").vector.sel({"layer": away, "method": list(METHODS)})
    assert np.isnan(derived.values).all()


def test_the_command_runs_them_and_says_what_is_wrong(tmp_path):
    kept = ("name", "models", "texts", "emotions", "layers", "threads")
    quick = {**{key: PLAN[key] for key in kept}, "methods": {"lda": METHODS["lda"]}}
    plan = tmp_path / "methods.yaml"
    plan.write_text(json.dumps({**quick, "store": str(tmp_path / "methods.zarr")}))
    told = command("run", plan, "--quiet")
    assert told.returncode == 0, told.stderr
    told = command("run", plan, "--set", "methods.lda.baseline=none")
    assert told.returncode == 2 and "found lda with baseline none" in told.stderr and "Traceback" not in told.stderr
