"""A real model end to end: half of plans/smollm2-small.yaml, under three minutes of CPU, and what it must find.

The model comes by `scripts/get-smollm2`; where it is not there nothing of this is tested, and the summary says so.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xarray as xr
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.report import claims
from nsteer.science import costing, separation

ROOT = Path(__file__).parent.parent
FILE = ROOT / "models/SmolLM2-135M-Instruct.Q4_1.gguf"
ABSENT = f"NO REAL MODEL IS TESTED: {FILE.relative_to(ROOT)} is not there; scripts/get-smollm2 fetches it (93 MB)"

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not FILE.is_file(), reason=ABSENT),
]
MODEL = "SmolLM2-135M"
CALIBRATED_ON = {
    "shop": "The shop on the corner closed early today, and",
    "letter": "Tell me what was in the letter that came this morning.",
    "walk": "We walked along the river until",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """The store of the small plan, filled once: the first ten of its emotions, two thirds of its texts; happy alone
    steers, at a strength that three prompts give."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = tmp_path_factory.mktemp("real") / "smollm2.zarr"
    plan = str(ROOT / "plans/smollm2-small.yaml")
    few = [
        "emotions=[happy, sad, calm, desperate, afraid, angry, proud, guilty, nervous, hopeful]",
        "methods.sound.samples=8",
        "steer.vectors.emotions=[happy]",
        "steer.strengths=" + json.dumps({"kl": [0.6], "tokens": 12, "tolerance": 0.1, "prompts": CALIBRATED_ON}),
    ]
    settings = [f"models[0].id={FILE}", f"store={path}", *few]
    words = ["run", plan, *(word for setting in settings for word in ("--set", setting))]
    result = CliRunner().invoke(cli.main, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return nsteer.open(path)


@pytest.fixture(scope="module")
def measured(store):
    told = store["methods"].protocol
    baseline = {m: json.loads(told.sel({"method": m}).item())["baseline"] for m in told.method.values.tolist()}
    pooled = store["activations", MODEL].pooled.sel({"model": MODEL}).load()
    return separation.measure(pooled, baseline=baseline, splits=5, shuffles=50)


def test_emotions_are_told_apart_best_in_the_middle(measured):
    accuracy = measured.accuracy.sel({"method": "sound"})
    best = int(accuracy.layer[accuracy.argmax("layer")])
    assert float(accuracy.max()) >= 0.45 and 0.4 <= best / 30 <= 0.7
    assert float(accuracy[0]) < 0.35 and float(measured.accuracy_p_any.sel({"method": "sound"})) < 0.05


def test_the_lowest_cosine_is_not_where_they_are_told_apart(measured):
    measures = measured.sel({"method": "jeong-comprehension"})
    lowest, best = (
        int(measures.layer[at])
        for at in (measures.mean_pairwise_cosine.argmin("layer"), measures.accuracy.argmax("layer"))
    )
    assert lowest < 6 < 12 <= best
    assert float(measures.accuracy.sel({"layer": lowest})) < float(measures.accuracy.max()) / 2


def test_the_file_says_that_there_is_no_bos_and_the_model_agrees(store):
    seen = json.loads(store["models"].health.sel({"model": MODEL}).item())
    assert seen["adds_bos"] is False and seen["perplexity_without_bos"] < 40
    assert seen["perplexity_with_bos"] > 0.5 * seen["perplexity_without_bos"], "nothing to warn of"
    assert store["models"].weights.sel({"model": MODEL}).item() == "GGUF, dequantised: 210 Q4_1, 61 F32, 1 Q8_0"


def test_steered_texts_speak_of_the_emotion_more_than_those_of_the_control(store):
    words = ("happy", "glad", "joy", "delight", "wonderful")
    texts = (
        store["generations"]
        .text.isel(model=0, op=0, layer_set=0, method=0, strength=0, seed=0)
        .sel(emotion="happy")
        .load()
    )
    unsteered = store["unsteered"].text.isel(model=0, op=0, seed=0).load()

    def count(text: xr.DataArray) -> int:
        return sum(map(str(text.item()).lower().count, words))

    def rises(control: str) -> int:
        of = {"control": control}
        pairs = [
            (texts.sel({**of, "prompt": prompt}), unsteered.sel({"prompt": prompt})) for prompt in texts.prompt.values
        ]
        return sum(count(steered) > count(before) for steered, before in pairs)

    # 6 of 8 and none of 8 when this was written: too few for a test of significance, docs/results-smollm2.md has 32
    assert rises("none") >= rises("random") + 3


def test_steering_costs_a_model_that_has_something_to_lose(store):
    """Unlike a toy it reads English and answers capability questions: 28 of 32 when this was written, at 2.99 nats."""
    plain = store["capability_unsteered"].sel({"model": MODEL}).load()
    assert 2.5 < float(plain.nll.mean()) < 3.5
    right = costing.right(plain.log_likelihood)
    assert int(right.sum()) >= 24 and right.size == 32
    steered = store["capability"].sel({"model": MODEL}).load().squeeze(("op", "layer_set", "method", "strength"))
    cost = costing.cost(steered, plain)
    assert bool(cost.notnull().to_array().all()) and bool((steered.kl > 0).all())
    rise = cost.nll_rise.mean(("emotion", "passage"))
    assert (rise > 0).all() and (rise < 3).all(), (
        "at a KL of 0.6 on its own texts plain ones are read less well, not lost"
    )
    rows = claims.table(claims.claims(store, claims.Rules(shuffles=9)))
    (nll, answers) = rows[rows.claim == "capability"].itertuples()
    assert (nll.n, answers.n) == (16, 32) and "random rotation" in nll.control
    assert nll.value == pytest.approx(float(rise.sel({"control": "none"})), abs=1e-5)
    assert "by chance" not in nll.why and nll.low < nll.value < nll.high
