"""What vectors follow, text or instruction: planted truth, and rows that are read as they should be."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr
from kit import found_too_often, zoo_llama
from test_runner import run

import nsteer
from nsteer.report import claims
from nsteer.science import swapping
from nsteer.store import Store

EMOTIONS, D = 6, 40
SAMPLES = 8


def study(rng, of_text: float, of_instruction: float, noise: float = 1.0):
    """Samples, neutral ones, and swapped texts with so much of the emotion of the text and of the instruction."""
    mu = rng.normal(size=(EMOTIONS, D)) / np.sqrt(D)
    common = rng.normal(size=D)

    def stream(b: int, a: int) -> np.ndarray:
        return common + of_text * mu[b] + of_instruction * mu[a] + noise * rng.normal(size=D) / np.sqrt(D)

    values = np.array([[stream(e, e) for _ in range(SAMPLES)] for e in range(EMOTIONS)])
    asked = np.array(
        [
            [[(e + 1 + (k + i) % (EMOTIONS - 1)) % EMOTIONS for i in range(1)] for k in range(SAMPLES)]
            for e in range(EMOTIONS)
        ]
    )
    read = np.array([[[stream(e, a) for a in asked[e, k]] for k in range(SAMPLES)] for e in range(EMOTIONS)])
    neutral = np.mean([common + noise * rng.normal(size=D) / np.sqrt(D) for _ in range(SAMPLES)], 0)
    return values, neutral, read, asked


def planted_shares(rng, *planted, rule="neutral_mean", **more) -> dict:
    values, neutral, read, asked = study(rng, *planted, **more)
    folds = np.tile(np.arange(SAMPLES), (EMOTIONS, 1))
    there = np.ones(values.shape[:2], bool)
    return swapping.followed(swapping.nearest(values, there, neutral, rule, folds, read, asked), asked)


@pytest.mark.parametrize("rule", ["neutral_mean", "grand_mean"])
def test_what_was_planted_is_followed(rule):
    rng = np.random.default_rng(0)
    text, instruction = planted_shares(rng, 3.0, 0.0, rule=rule), planted_shares(rng, 0.0, 3.0, rule=rule)
    assert text["text"] > 0.9 and text["follows"] > 0.9 and text["instruction"] < 0.1 and text["p"] < 1e-4
    assert instruction["instruction"] > 0.9 and instruction["follows"] < 0.1 and instruction["p"] < 1e-4
    assert text["n"] == EMOTIONS * SAMPLES


def test_where_neither_is_followed_more_the_estimate_is_one_half_and_its_interval_covers():
    rng = np.random.default_rng(1)
    repeats = [planted_shares(rng, 1.5, 1.5) for _ in range(400)]
    assert abs(np.mean([shares["follows"] for shares in repeats]) - 0.5) < 0.01, "n = 400"
    assert np.mean([shares["follows_low"] <= 0.5 <= shares["follows_high"] for shares in repeats]) >= 0.9


def test_of_noise_few_findings_are_made_and_shares_are_chance():
    rng = np.random.default_rng(2)
    repeats = [planted_shares(rng, 0.0, 0.0) for _ in range(800)]
    assert abs(np.mean([shares["text"] for shares in repeats]) - 1 / EMOTIONS) < 0.01
    assert not found_too_often(sum(shares["p"] <= 0.05 for shares in repeats), 800)


def test_a_text_behind_several_instructions_is_one_unit():
    asked = np.zeros((2, 1, 3), int)
    asked[0] = 1
    predicted = np.array([[[0, 0, 1]], [[0, 0, 0]]])
    shares = swapping.followed(predicted, asked)
    assert shares["n"] == 2 and shares["n_either"] == 2
    assert shares["text"] == pytest.approx((2 / 3 + 0) / 2) and shares["follows"] == 0.5


def test_a_hole_is_in_no_share():
    rng = np.random.default_rng(3)
    values, neutral, read, asked = study(rng, 3.0, 0.0)
    read[0, 0] = np.nan
    there = np.ones(values.shape[:2], bool)
    there[1, 2] = False
    folds = np.tile(np.arange(SAMPLES), (EMOTIONS, 1))
    predicted = swapping.nearest(values, there, neutral, "neutral_mean", folds, read, asked)
    assert (predicted[0, 0] == -1).all() and (predicted[1, 2] == -1).all() and (predicted >= 0).sum() == 46


def test_vectors_see_neither_the_fold_of_the_text_nor_that_of_the_instruction():
    """A sample that is the swapped stream itself would win, were it among those that make the vectors."""
    values = np.zeros((3, 2, 3)) + np.eye(3)[:, None]
    folds = np.array([[0, 1], [0, 1], [0, 1]])
    asked = np.full((3, 2, 1), -1)
    asked[0, 0, 0] = 1
    read = np.zeros((3, 2, 1, 3))
    read[0, 0, 0] = [0.0, 0.0, 1.0]
    values[0, 0] = values[1, 0] = [0.0, 0.0, 50.0]
    predictions = swapping.nearest(values, np.ones((3, 2), bool), np.zeros(3), "neutral_mean", folds, read, asked)
    assert predictions[0, 0, 0] == 2


# ---- from a plan to the store -------------------------------------------------------------------------------

METHOD = {
    "preset": "jeong2026-generation",
    "samples": 4,
    "neutral_samples": 4,
    "generate": {"max_new_tokens": 14},
    "pooling": "mean",
}
PLAN = {
    "name": "swap",
    "models": ["zoo/llama"],
    "texts": "zoo",
    "emotions": ["happy", "sad", "calm"],
    "methods": {
        "behind": METHOD,
        "alone": {**METHOD, "context": "text"},
        "read": {"source": "comprehension", "samples": 2, "pooling": "last", "chat": "never"},
    },
    "layers": [4, 2],
    "measure": {"swap": 2, "embeddings": True, "perplexity": False, "lens": 0, "anisotropy": False},
    "threads": 1,
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swap")
    (folder / "swap.yaml").write_text(json.dumps({**PLAN, "store": str(folder / "swap.zarr")}))
    summary = run(folder / "swap.yaml")
    assert not summary.failures, summary.failures
    return folder / "swap.zarr"


@pytest.fixture(scope="module")
def model():
    return zoo_llama()


def group(store, name: str) -> xr.Dataset:
    return Store(store).read(f"{name}/zoo--llama").load().sel({"model": "zoo/llama"})


def streams(module, tokens) -> list[np.ndarray]:
    """[layer][token, d] of one text, what enters the first block first."""
    with torch.no_grad():
        states = module(torch.tensor([list(map(int, tokens))]), output_hidden_states=True).hidden_states
    return [state[0].numpy() for state in states]


def written(sample: xr.Dataset) -> list[int]:
    return sample.token_id.values[: int(sample.generated_tokens)].tolist()


@pytest.mark.parametrize("layer", [4, 2])
def test_a_swapped_row_is_another_instruction_with_the_same_text(done, model, layer):
    module, words = model
    texts, swapped = (group(done, name).sel({"method": "behind"}) for name in ("samples", "swapped"))
    lengths = set()
    for emotion, k, i in [("happy", 0, 0), ("sad", 3, 1), ("calm", 2, 0)]:
        row = swapped.sel({"emotion": emotion, "sample": k, "swap": i})
        assert row.asked.item() != emotion
        asked, told = (texts.sel({"emotion": e, "sample": k}) for e in (row.asked.item(), emotion))
        prompt = words(asked.prompt.item(), add_special_tokens=not bool(asked.chat))["input_ids"]
        new = written(told)
        lengths.add(len(prompt) + len(new))
        stream = hooked(module, [*prompt, *new], layer)
        np.testing.assert_allclose(row.pooled.sel({"layer": layer}), stream[len(prompt) :].mean(0), atol=2e-5)
    assert len(lengths) > 1, "rows of unequal length"


def hooked(module, tokens, layer: int) -> np.ndarray:
    """The output of a block, by a plain hook: hidden_states of the last block are behind the final norm."""
    kept = []
    handle = module.model.layers[layer].register_forward_hook(
        lambda block, inputs, out: kept.append(out[0] if isinstance(out, tuple) else out)
    )
    streams(module, tokens)
    handle.remove()
    return kept[0][0].detach().numpy()


@pytest.mark.parametrize("layer", [4, 2])
def test_a_text_read_alone_is_read_as_a_passage(done, model, layer):
    module, words = model
    texts, pooled = (group(done, name).sel({"method": "alone"}) for name in ("samples", "activations"))
    for emotion, k in [("happy", 0), ("sad", 3), ("neutral", 1)]:
        tokens = words(texts.text.sel({"emotion": emotion, "sample": k}).item())["input_ids"]
        bos = int(tokens[0] == words.bos_token_id)
        stream = hooked(module, tokens, layer)[bos:]
        sample = pooled.sel({"emotion": emotion, "sample": k})
        np.testing.assert_allclose(sample.pooled.sel({"layer": layer}), stream.mean(0), atol=2e-5)
        assert int(sample.positions) == len(tokens) - bos


@pytest.mark.parametrize("method", ["behind", "alone", "read"])
def test_a_bag_of_embeddings_is_the_mean_of_what_enters_the_first_block(done, model, method):
    module, words = model
    sample = group(done, "samples").sel({"method": method, "emotion": "sad", "sample": 1})
    table = module.get_input_embeddings().weight.detach().numpy()
    own = written(sample) if method == "behind" else words(sample.text.item())["input_ids"]
    own = own[int(own[0] == words.bos_token_id) :]
    bag = group(done, "embeddings").pooled.sel({"method": method, "emotion": "sad", "sample": 1})
    np.testing.assert_allclose(bag, table[own].mean(0), atol=1e-5)


def test_each_instruction_stands_before_as_many_texts(done):
    asked = group(done, "swapped").asked.sel({"method": "behind", "emotion": ["happy", "sad", "calm"]})
    for k in range(4):
        for i in range(2):
            assert sorted(asked.sel({"sample": k, "swap": i}).values.tolist()) == ["calm", "happy", "sad"]
    assert not (group(done, "swapped").asked.sel({"method": ["alone", "read"]}) != "").any()


def test_the_row_says_layer_n_and_interval(done):
    opened = nsteer.open(done)
    table = claims.table(claims.claims(opened, claims.Rules(shuffles=9)))
    (row,) = table[table.claim == "swap"].to_dict("records")
    assert "behind, layer 2" in row["scope"] and 0 < row["n"] <= 12 and row["low"] <= row["value"] <= row["high"]
    assert "2: " in row["control"] and "4: " in row["control"] and "nan" not in row["control"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": {"swap": 3}}, "at most the 2 other emotions"),
        ({"methods": {"read": PLAN["methods"]["read"]}}, "context: with_prompt"),
        (
            {"methods": {"read": {**PLAN["methods"]["read"], "context": "text"}}, "measure": {}},
            "passages are read alone",
        ),
        ({"methods": {"a": {**METHOD, "context": "text", "pooling": "mid_generation"}}, "measure": {}}, "last token"),
    ],
)
def test_what_can_not_be_read_so_is_refused(tmp_path, change, words):
    from nsteer.errors import PlanError
    from nsteer.plan.check import load

    file = tmp_path / "swap.yaml"
    file.write_text(json.dumps({**PLAN, **change, "store": "s.zarr"}))
    with pytest.raises(PlanError, match=words) as caught:
        load(file)
    assert len(caught.value.problems) == 1
