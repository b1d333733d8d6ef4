"""Vectors of every source have the same rights: kept, steered over a grid, calibrated, judged, exported."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from oracle import Push
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsteer
from nsteer import zoo
from nsteer.errors import PlanError
from nsteer.program.randomness import generator, rotated, unit_vector
from nsteer.science.directions import sides_shuffled
from nsteer.vectors import chat, exchange

HONESTY = """\
name: honesty
models: [zoo/llama]
texts: zoo
directions:
  honest:
    contrast:
      positive: [tom told the truth ., anna told it all ., he said so .]
      negative: [tom told a lie ., anna hid it .]
steer:
  layers: {each: [3, 1]}
  strengths: {kl: [0.3, 0.1]}
  prompts: {a: tom walked to the market and, b: the rain fell on the old house and}
judge: {classifier: zoo/judge, map: {honest: proud}}
store: honesty.zarr
"""
FEW = ["steer.generate={max_new_tokens: 5}"]
POSITIVE = ("tom told the truth .", "anna told it all .", "he said so .")
NEGATIVE = ("tom told a lie .", "anna hid it .")


def write(folder: Path, text: str, **changes: str) -> Path:
    file = folder / "plan.yaml"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    file.write_text(text)
    return file


@cache
def llama():
    folder = str(zoo.path("llama"))
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return module, list(module.model.layers), AutoTokenizer.from_pretrained(folder)


def last(text: str) -> np.ndarray:
    """The streams of a text's last token, [layer, d_model]: by hooks, one text at a time."""
    module, blocks, words = llama()
    streams = oracle.forward(module, blocks, words(text)["input_ids"]).streams
    return np.stack([stream[-1].numpy() for stream in streams])


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


@pytest.fixture(scope="module")
def honesty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("honesty")
    file = write(folder, HONESTY, **{"honesty.zarr": str(folder / "honesty.zarr")})
    summary = nsteer.run(nsteer.load(file, FEW))
    assert not summary.failures and not summary.failed_before
    return file, summary, nsteer.open(folder / "honesty.zarr")


def test_the_plan_of_a_contrast_is_short():
    assert len(HONESTY.splitlines()) <= 15


def test_a_contrast_is_kept_as_a_vector_under_its_source_and_its_name(honesty):
    _, _, results = honesty
    kept = results["vectors", "zoo/llama"].sel({"model": "zoo/llama", "method": "contrast", "concept": "honest"})
    true = np.mean([last(text) for text in POSITIVE], 0) - np.mean([last(text) for text in NEGATIVE], 0)
    np.testing.assert_allclose(kept.vector.values, true, atol=2e-5)
    np.testing.assert_allclose(kept.norm.values, np.linalg.norm(true, axis=-1), rtol=1e-5)
    assert int(kept.n_samples) == 5 and int(kept.n_distinct) == 5
    assert "anna hid it" in results["directions"].settings.sel({"direction": "honest"}).item()


@pytest.mark.parametrize("control", ["none", "random"])
def test_what_a_contrast_writes_is_what_hooks_write_at_the_strength_that_was_found(honesty, control):
    _, _, results = honesty
    module, blocks, words = llama()
    kept = results["vectors", "zoo/llama"].vector.sel({"model": "zoo/llama", "method": "contrast", "concept": "honest"})
    where = {"model": "zoo/llama", "op": "add", "method": "contrast", "concept": "honest", "strength": 0.3}
    prompts = {"a": "tom walked to the market and", "b": "the rain fell on the old house and"}
    for layer in (3, 1):
        mine = {**where, "layer_set": str(layer)}
        strength = float(results["calibration"].found.sel({**mine, "control": "none"}))
        own = unit(kept.sel({"layer": layer}).values)
        if control == "random":
            own = unit(rotated(kept.sel({"layer": [layer]}).values, 0, "contrast", "honest"))[0]
        for label, text in prompts.items():
            continuation = results["generations"].sel({**mine, "control": control, "prompt": label, "seed": 0})
            tokens = tuple(continuation.token_id.values[: int(continuation.n_tokens)].tolist())
            push = [Push(layer, "add", own.astype(np.float32), strength, live=True)]
            prompt = tuple(words(text)["input_ids"])
            true = oracle.generate(module, blocks, prompt, push, new=len(tokens))
            assert tokens == true.tokens


@pytest.mark.parametrize("more", [[], ["anna told a lie ."]], ids=["sides of 3 and 2", "three pairs"])
def test_shuffled_sides_steer_as_hooks_do_at_the_length_of_the_vector(more, tmp_path):
    text = HONESTY.replace("[tom told a lie ., anna hid it .]", json.dumps([*NEGATIVE, *more]))
    text = text.replace("{kl: [0.3, 0.1]}", "[0.2]\n  controls: [zero, {shuffled: 2}]").replace("judge:", "# judge:")
    file = write(tmp_path, text, **{"honesty.zarr": str(tmp_path / "s.zarr")})
    assert not nsteer.run(nsteer.load(file, FEW)).failures
    results = nsteer.open(tmp_path / "s.zarr")
    module, blocks, words = llama()
    positive, negative = ([last(text) for text in side] for side in (POSITIVE, [*NEGATIVE, *more]))
    prompt, together, seen = "tom walked to the market and", np.stack([*positive, *negative]), set()
    for number, control in enumerate(("shuffled", "shuffled-2"), 1):
        draw = generator("shuffled", 0, "contrast", "honest", *([number] if number > 1 else []))
        here = sides_shuffled(len(positive), len(negative), draw)
        assert here.sum() == len(positive)
        vector = together[here].mean(0) - together[~here].mean(0)
        for layer in (3, 1):
            where = {"model": "zoo/llama", "op": "add", "layer_set": str(layer), "method": "contrast", "prompt": "a"}
            cell = results["generations"].sel(
                {**where, "concept": "honest", "strength": 0.2, "control": control, "seed": 0}
            )
            tokens = tuple(cell.token_id.values[: int(cell.n_tokens)].tolist())
            push = [Push(layer, "add", unit(vector[layer]).astype(np.float32), 0.2, live=True)]
            assert tokens == oracle.generate(module, blocks, words(prompt)["input_ids"], push, new=len(tokens)).tokens
        seen.add(tuple(here.tolist()))
    assert len(seen) == 2, "two draws are two ways to stand"
    assert not nsteer.run(nsteer.load(file, FEW)).done


@pytest.mark.parametrize(("positive", "negative"), [(6, 6), (2, 5), (5, 2)])
def test_shuffled_sides_keep_their_numbers_and_pairs_stay_apart(positive, negative):
    draws = np.stack([sides_shuffled(positive, negative, generator("sides", k)) for k in range(2000)])
    assert (draws.sum(1) == positive).all()
    np.testing.assert_allclose(draws.mean(0), positive / (positive + negative), atol=0.05)
    if positive == negative:
        assert (draws[:, :positive] != draws[:, positive:]).all()


def test_shuffled_sides_are_cells_of_their_own(tmp_path):
    from nsteer.stages import cells
    from nsteer.stages.job import jobs

    def fingerprints(*settings: str) -> dict:
        text = HONESTY.replace("steer:\n", "steer:\n  controls: [zero, random, {shuffled: 2}]\n")
        (job,) = jobs(nsteer.load(write(tmp_path, text), list(settings)))
        return {key.control: number for key, number in job.wanted(cells.steering).items() if key.layer_set == "3"}

    own, other = fingerprints(), fingerprints("seed=1")
    assert len(set(own.values())) == len(own) and {"none", "shuffled", "shuffled-2"} <= set(own)
    assert {control for control in own if own[control] != other[control]} == {"random", "shuffled", "shuffled-2"}


def test_it_is_calibrated_and_judged_like_any_other_vector(honesty):
    _, summary, results = honesty
    assert {"directions": 1, "calibration": 4, "steering": 8, "judged": 8}.items() <= summary.done.items()
    assert results["calibration"].met.sel({"control": "none"}).all()
    assert results["judged"].score.notnull().all()


def test_a_second_run_does_nothing_and_a_changed_text_does_it_again(honesty, tmp_path):
    file, _, _ = honesty
    assert not nsteer.run(nsteer.load(file, FEW)).done
    text = file.read_text().replace("anna hid it .", "anna hid it all .")
    changed = write(tmp_path, text)
    study = nsteer.load(changed)
    from nsteer.stages import cells
    from nsteer.stages.job import jobs

    (before,), (after,) = jobs(nsteer.load(file)), jobs(study)
    for of in (cells.directions, cells.calibration, cells.steering):
        assert set(of(before).values()).isdisjoint(of(after).values())
    assert cells.unsteered(before) == cells.unsteered(after)


def test_it_is_exported_and_talked_with(honesty, tmp_path):
    import gguf

    _, _, results = honesty
    exchange.export(results.path, str(tmp_path / "honest.gguf"), methods=["contrast"], emotions=["honest"])
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "honest.gguf").tensors}
    kept = results["vectors", "zoo/llama"].vector.sel({"model": "zoo/llama", "method": "contrast", "concept": "honest"})
    assert any(np.allclose(data, kept.sel({"layer": 3}).values, atol=1e-6) for data in tensors.values())
    talk = chat.start("zoo/llama", vector=f"{results.path}:contrast/honest", chat="never", strength=0.4, new_tokens=6)
    reply = talk.reply("tom walked to the old house and")
    assert reply.steered != reply.unsteered


MIXED = """\
name: mixed
models: [zoo/llama]
texts: zoo
emotions: [happy, sad]
methods: {made: {source: comprehension, samples: 3, baseline: rest, pooling: mean, chat: never}}
directions:
  honest: {contrast: {positive: [tom told the truth .], negative: [tom told a lie .]}}
  mild: 0.5*honest - happy
  noise: {random: 7}
steer:
  vectors: {emotions: [sad], directions: [mild, noise, honest]}
  layers: [3, 1]
  strengths: [0.2]
  project: true
  prompts: {a: tom walked to the market and}
  controls: [zero]
  generate: {max_new_tokens: 5}
prompts: {a: tom walked to the market and}
edits: {less: [{op: project_out, direction: mild, layers: [3, 1]}]}
reads: {all: {layers: [3, 1], pooling: last}}
store: mixed.zarr
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    file = write(folder, MIXED, **{"mixed.zarr": str(folder / "mixed.zarr")})
    summary = nsteer.run(nsteer.load(file))
    assert not summary.failures
    return nsteer.open(folder / "mixed.zarr")


def test_methods_and_directions_steer_side_by_side(mixed):
    done = {
        (method, emotion)
        for method in mixed["generations"].method.values
        for emotion in mixed["generations"].emotion.values
        if (mixed["generations"].text.sel({"method": method, "emotion": emotion}) != "").any()
    }
    assert done == {("made", "sad"), ("formula", "mild"), ("random", "noise"), ("contrast", "honest")}


def test_a_formula_rests_on_the_vectors_that_it_names(mixed):
    kept = mixed["vectors", "zoo/llama"].vector.sel({"model": "zoo/llama"})
    honest, happy, mild = (
        kept.sel({"method": method, "emotion": emotion}).values
        for method, emotion in (("contrast", "honest"), ("made", "happy"), ("formula", "mild"))
    )
    np.testing.assert_allclose(mild, 0.5 * honest - happy, atol=1e-5)
    noise = kept.sel({"method": "random", "emotion": "noise"}).values
    np.testing.assert_allclose(noise, np.repeat(unit_vector(kept.sizes["d_model"], 7, "noise")[None], len(noise), 0))


def test_streams_are_projected_on_the_vectors_of_the_same_source(mixed):
    kept = mixed["projections"].projection.squeeze()
    there = kept.notnull().any([dim for dim in kept.dims if dim not in ("method", "target")])
    pairs = {
        (method, target)
        for method in there.method.values
        for target in there.target.values
        if there.sel({"method": method, "target": target})
    }
    assert pairs == {
        *(("made", emotion) for emotion in ("happy", "sad")),
        *(("formula", "mild"), ("random", "noise"), ("contrast", "honest")),
    }


def test_a_condition_by_hand_takes_the_same_vector(mixed):
    module, blocks, words = llama()
    mild = mixed["vectors", "zoo/llama"].vector.sel({"model": "zoo/llama", "method": "formula", "emotion": "mild"})
    tokens = words("tom walked to the market and")["input_ids"]
    pushes = [Push(layer, "project_out", unit(mild.sel({"layer": layer}).values), 1.0) for layer in (3, 1)]
    with torch.no_grad():
        true = oracle.forward(module, blocks, tokens, pushes).streams
    kept = (
        mixed["reads", "zoo/llama"]
        .stream.sel({"read": "all", "edit": "less", "strength": 1.0, "prompt": "a"})
        .squeeze("model")
    )
    for layer in (3, 1):
        np.testing.assert_allclose(kept.sel({"layer": layer}).values, true[layer][-1].numpy(), atol=2e-4)


WRONG = [
    ("directions: [mild, noise, honest]", "directions: [mild, noises]", "did you mean 'noise'?"),
    ("directions: [mild, noise, honest]", "directions: [mild, mild]", "a second time"),
    ("controls: [zero]", "controls: [shuffled]", "with the direction 'mild' (formula)"),
    ("project: true", "scale: reference_norm", "no neutral samples"),
    ("project: true", "op: set_mean", "no neutral samples"),
]


@pytest.mark.parametrize(("old", "new", "said"), WRONG)
def test_what_a_direction_has_not_is_told_before_any_model_loads(old, new, said, tmp_path):
    with pytest.raises(PlanError) as error:
        nsteer.load(write(tmp_path, MIXED, **{old: new}))
    assert any(said in str(problem) for problem in error.value.problems), str(error.value)
    assert all(problem.path.startswith("steer") for problem in error.value.problems)


def test_a_plan_without_methods_steers_formulas_over_its_directions(tmp_path):
    text = HONESTY.replace("steer:\n", "steer:\n  vectors: {emotions: [], formulas: {honesty: 2*honest}}\n")
    text = "".join(line for line in text.splitlines(True) if not line.startswith("judge"))
    text = text.replace("{kl: [0.3, 0.1]}", "[0.2]")
    study = nsteer.load(write(tmp_path, text, **{"honesty.zarr": str(tmp_path / "s.zarr")}), FEW)
    assert not nsteer.run(study).failures
    generations = nsteer.open(tmp_path / "s.zarr")["generations"]
    assert generations.method.values.tolist() == ["formula"] and generations.emotion.values.tolist() == ["honesty"]


PAIR = """\
name: honesty
emotions: {honest: positive, dishonest: negative}
passages:
  honest: [tom told the truth ., anna told it all ., he said so .]
  dishonest: [tom told a lie ., anna hid it ., he said no more .]
"""
PAIR_NO = ("tom told a lie .", "anna hid it .", "he said no more .")
TWO = """\
name: two
models: [zoo/llama]
texts: pair.yaml
emotions: [honest, dishonest]
methods: {caa: {source: comprehension, samples: 3, baseline: rest, pooling: last, chat: never}}
store: two.zarr
"""


def test_two_concepts_without_neutral_texts_have_an_accuracy_by_layer(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from nsteer import cli

    monkeypatch.chdir(tmp_path)
    Path("pair.yaml").write_text(PAIR)
    Path("two.yaml").write_text(TWO)
    assert not nsteer.run(nsteer.load("two.yaml")).failures
    shown = CliRunner().invoke(cli.main, ["show", "two.zarr", "--json"], catch_exceptions=False)
    (line,) = json.loads(shown.stdout)["separation"]
    accuracy = line["accuracy"]
    assert len(accuracy) == 5 and all(0 <= rate <= 1 for rate in accuracy)
    results = nsteer.open("two.zarr")
    own = results.sel(model="zoo/llama", method="caa", emotion="honest")
    true = unit(np.mean([last(text) for text in POSITIVE], 0)[3] - np.mean([last(t) for t in PAIR_NO], 0)[3])
    np.testing.assert_allclose(unit(own.sel({"layer": 3}).values), true, atol=1e-4)
