"""Runs of small plans, from YAML to store: what stands there is what hooks compute, and nothing is done twice."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import prefork
import pytest
import tinies
import xarray as xr
from click.testing import CliRunner
from oracle import Push

from nsteer import cli, runner
from nsteer.plan import check
from nsteer.program.randomness import rotated, uniforms, unit_vector
from nsteer.store import Store

NEUTRAL = "neutral"
EMOTIONS = ["joy", "fear", "rage"]
TEXTS = {
    "name": "small",
    "emotions": {"joy": "positive", "fear": "negative", "rage": "negative"},
    "story_templates": ["tell of {emotion} .", "a day of {emotion} and rain"],
    "neutral_story_templates": ["tell of a day .", "a day and the garden wall"],
    "passages": {
        "joy": ["a happy girl sang in the sun", "the dog ran to the warm fire"],
        "fear": ["a sad boy wept at night", "rain fell on the old house and they were afraid"],
        "rage": ["the old wall fell", "tom ran at the dog"],
    },
    "neutral_passages": ["the cat sat on the mat", "tom read a book by the wall"],
    "neutral_sentences": ["the cat sat on the warm mat", "tom read"],
    "prompts": {"two": {"walk": "tom ran to the", "night": "at night the old house was"}},
}
NEW = 6
STEER = [
    {
        "name": "push",
        "op": "add",
        "scale": "stream_norm",
        "vectors": {"methods": ["made"], "emotions": ["joy", "fear"]},
        "layers": "all",
        "strengths": [0.0, 0.4],
        "prompts": "two",
        "generate": {"max_new_tokens": NEW},
    },
    {
        "name": "hold",
        "op": "clamp",
        "scale": "reference_norm",
        "vectors": {"methods": ["read"], "emotions": ["rage"], "layer": 2},
        "layers": {"each": [3, 1]},
        "positions": "generated",
        "strengths": [0.5],
        "controls": [],
        "prompts": {"here": "the sun and the rain"},
        "seeds": [0, 7],
        "generate": {"max_new_tokens": NEW, "sample": True, "temperature": 0.8, "top_k": 50},
    },
]
METHODS = {
    "made": {
        "source": "generation",
        "samples": 3,
        "neutral_samples": 2,
        "generate": {"max_new_tokens": NEW},
        "pooling": "mean",
        "baseline": "grand_mean",
    },
    "read": {"source": "comprehension", "samples": 2, "chat": "never", "pooling": {"kind": "mean_from", "k": 1}},
}
VECTOR_CELLS = {"made": 3, "read": 3}


def write(folder: Path, model, name: str = "plan", **changes) -> Path:
    """A plan file; JSON is YAML. A change of None removes the field."""
    (folder / "texts.yaml").write_text(json.dumps(TEXTS))
    plan = {
        "name": "small",
        "models": [{"id": str(model), "label": "tiny", "device": "cpu"}],
        "texts": str(folder / "texts.yaml"),
        "emotions": EMOTIONS,
        "methods": METHODS,
        "steer": STEER,
        "threads": 1,
        "store": str(folder / f"{name}.zarr"),
    }
    plan = {key: value for key, value in {**plan, **changes}.items() if value is not None}
    (folder / f"{name}.yaml").write_text(json.dumps(plan))
    return folder / f"{name}.yaml"


def run(plan: Path, *settings: str, **more) -> runner.Summary:
    return runner.run(check.load(plan, settings), **more)


def finished(folder: Path, plan: dict, model: Path) -> tuple[Store, Path]:
    """The store of a plan that ran over one model without a failure, and the plan's file."""
    file = folder / f"{plan['name']}.yaml"
    place = file.with_suffix(".zarr")
    file.write_text(json.dumps({**plan, "models": [str(model)], "store": str(place)}))
    summary = run(file)
    assert not summary.failures, summary.failures
    return Store(place), file


def command(*words, **more) -> subprocess.CompletedProcess:
    code = "import sys; from nsteer.cli import main; main(sys.argv[1:])"
    return subprocess.run(prefork.python(code, *words), capture_output=True, text=True, **more)


def invoke(*words):
    """The command in this process: for what it says and does, where a process of its own adds nothing."""
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


def records(path: Path) -> dict[tuple, tuple]:
    """The commit record of every cell of a store."""
    store = Store(path)
    return {(group, *labels): cell for group in store.groups() for labels, cell in store.committed(group).items()}


def results(path: Path, group: str):
    return Store(path).read(group).load()


@pytest.fixture(scope="module")
def filled(folder, tmp_path_factory):
    """A finished run of the plan: (folder, summary). Tests that change it copy it."""
    place = tmp_path_factory.mktemp("filled")
    return place, run(write(place, folder("llama")), verify_rows=3)


@pytest.fixture
def copied(filled, folder, tmp_path):
    shutil.copytree(filled[0] / "plan.zarr", tmp_path / "plan.zarr")
    return write(tmp_path, folder("llama"))


class Truth:
    """The study computed by hand from hooks: texts one at a time, means, differences."""

    def __init__(self, family: str = "llama"):
        self.module = tinies.model(family)
        self.blocks = tinies.blocks(family, self.module)
        self.words = tinies.tokenizer(bos=tinies.BOS[family], chat=True)

    def plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.words(text)["input_ids"])

    def chat(self, text: str) -> tuple[int, ...]:
        return tuple(self.words(f"<s><user>{text}<model>", add_special_tokens=False)["input_ids"])

    def generate(self, tokens, pushes=(), **more):
        return oracle.generate(self.module, self.blocks, tokens, pushes, new=NEW, eos=[tinies.END], **more)

    def streams(self, tokens, pushes=()):
        return oracle.forward(self.module, self.blocks, tokens, pushes).streams

    def sample(self, emotion: str, k: int):
        """(prompt, continuation) of a generated sample: templates turn, and start again."""
        key = "neutral_story_templates" if emotion == NEUTRAL else "story_templates"
        prompt = self.chat(TEXTS[key][k % 2].replace("{emotion}", emotion))
        return prompt, self.generate(prompt).tokens

    def pooled_made(self, emotion: str, k: int) -> np.ndarray:
        prompt, new = self.sample(emotion, k)
        return np.stack([s[len(prompt) :].mean(0).numpy() for s in self.streams(prompt + new)])

    def pooled_read(self, emotion: str, k: int) -> np.ndarray:
        group = TEXTS["neutral_passages"] if emotion == NEUTRAL else TEXTS["passages"][emotion]
        return np.stack([s[2:].mean(0).numpy() for s in self.streams(self.plain(group[k]))])  # BOS, then k = 1

    def vectors(self) -> dict[str, dict[str, np.ndarray]]:
        generated_means = {e: np.mean([self.pooled_made(e, k) for k in range(3)], 0) for e in EMOTIONS}
        grand = np.mean(list(generated_means.values()), 0)
        read = {e: np.mean([self.pooled_read(e, k) for k in range(2)], 0) for e in [*EMOTIONS, NEUTRAL]}
        return {
            "made": {e: generated_means[e] - grand for e in EMOTIONS},
            "read": {e: read[e] - read[NEUTRAL] for e in EMOTIONS},
        }


@pytest.fixture(scope="module")
def truth():
    return Truth()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def close(actual, true, relative=1e-5) -> None:
    np.testing.assert_allclose(actual, true, rtol=0, atol=relative * np.abs(true).max())


# ---- the store against hooks -----------------------------------------------------------------------------


def test_the_run_did_every_cell_once(filled):
    _, summary = filled
    assert not summary.failures
    done = {"samples": 8, "activations": 8, "vectors": 6, "unsteered": 1, "steering": 8 + 2}
    assert {stage: summary.done[stage] for stage in done} == done
    assert not any(summary.skipped.values())


def test_samples_and_activations(filled, truth):
    texts, read = (results(filled[0] / "plan.zarr", f"{group}/tiny") for group in ("samples", "activations"))
    for emotion in [*EMOTIONS, NEUTRAL]:
        for k in range(3 if emotion != NEUTRAL else 2):
            sample = texts.sel({"model": "tiny", "method": "made", "emotion": emotion, "sample": k})
            prompt, new = truth.sample(emotion, k)
            assert sample.prompt_tokens == len(prompt) and sample.generated_tokens == len(new)
            assert sample.token_id.values[: len(new)].tolist() == list(new)
            assert sample.text.item() == truth.words.decode(new, skip_special_tokens=True)
            activation = read.sel({"model": "tiny", "method": "made", "emotion": emotion, "sample": k})
            close(activation.pooled.values, truth.pooled_made(emotion, k))
            assert activation.positions == len(new)
            norms = [s[1:].norm(dim=1).mean() for s in truth.streams(prompt + new)]  # the chat template begins with BOS
            close(activation.token_norm.values, np.array(norms))
        for k in range(2):
            activation = read.sel({"model": "tiny", "method": "read", "emotion": emotion, "sample": k})
            close(activation.pooled.values, truth.pooled_read(emotion, k))


def test_vectors_are_differences_of_means(filled, truth):
    data = results(filled[0] / "plan.zarr", "vectors/tiny")
    for method, vectors in truth.vectors().items():
        for emotion, vector in vectors.items():
            cell = data.sel({"model": "tiny", "method": method, "emotion": emotion})
            close(cell.vector.values, unit(vector), 1e-4)
            close(cell.norm.values, np.linalg.norm(vector, axis=-1), 1e-4)
    assert data.n_samples.sel({"method": "made"}).values.ravel().tolist() == [3, 3, 3]
    assert data.n_distinct.sel({"method": "made"}).values.max() <= 2, "two templates, greedy: at most two texts"


def stored_vector(path: Path, method: str, emotion: str, layer: int) -> np.ndarray:
    where = {"model": "tiny", "method": method, "emotion": emotion, "layer": layer}
    return results(path, "vectors/tiny").vector.sel(where).values


def same_texts(texts, receipts, where: dict, true: oracle.Continuation, layers) -> None:
    """A continuation of the store, and its receipts at each layer, are the oracle's."""
    continuation, receipts = texts.sel(where), receipts.sel(where)
    assert continuation.token_id.values[: int(continuation.n_tokens)].tolist() == list(true.tokens)
    for i, layer in enumerate(layers):
        receipt = receipts.sel({"layer": layer})
        touched, change, cosine, _ = true.receipts[i]
        assert receipt.touched == touched
        if touched:
            assert receipt.relative_change.item() == pytest.approx(change / touched, rel=1e-3, abs=1e-6)
            assert receipt.cosine.item() == pytest.approx(cosine / touched, rel=1e-3)


def test_steering_all_layers_by_the_live_norm(filled, truth):
    path = filled[0] / "plan.zarr"
    layers = range(4)
    vectors = results(path, "vectors/tiny").vector.sel({"model": "tiny", "method": "made"})
    plain = results(path, "unsteered").text.sel({"model": "tiny", "op": "push", "seed": 0})
    texts = results(path, "generations")
    groups = (texts, results(path, "steering"))
    changed = 0
    for control in ("none", "random"):
        for emotion in ("joy", "fear"):
            for strength in (0.0, 0.4):
                pushes = []
                for layer in layers:
                    vector = vectors.sel({"emotion": emotion, "layer": layer}).values
                    if control == "random":
                        vector = rotated(vectors.sel({"emotion": emotion}).values, 0, "made", emotion)[layer]
                    pushes.append(Push(layer, "add", vector, strength, live=True))
                for label, prompt in TEXTS["prompts"]["two"].items():
                    where = {"model": "tiny", "op": "push", "layer_set": "all", "method": "made", "emotion": emotion}
                    where |= {"strength": strength, "control": control, "prompt": label, "seed": 0}
                    true = truth.generate(truth.plain(prompt), pushes)
                    same_texts(*groups, where, true, layers)
                    same = plain.sel({"prompt": label}).item() == texts.text.sel(where).item()
                    assert same or strength
                    changed += not same
    assert changed


def test_steering_one_layer_with_anothers_vector_sampled(filled, truth):
    path = filled[0] / "plan.zarr"
    neutral = [truth.streams(truth.plain(text)) for text in TEXTS["neutral_passages"]]
    vector = stored_vector(path, "read", "rage", 2)
    prompt = truth.plain("the sun and the rain")
    texts, groups = set(), (results(path, "generations"), results(path, "steering"))
    for layer in (1, 3):
        reference = float(np.mean([s[layer][1:].norm(dim=1).mean() for s in neutral]))
        push = Push(layer, "clamp", vector, 0.5 * reference, positions="generated")
        for seed in (0, 7):
            numbers = uniforms(NEW, 0, "here", seed)
            true = truth.generate(prompt, [push], sampling=(0.8, 50, 1.0), uniform=numbers)
            where = {"model": "tiny", "op": "hold", "layer_set": str(layer), "method": "read", "emotion": "rage"}
            where |= {"strength": 0.5, "control": "none", "prompt": "here", "seed": seed}
            same_texts(*groups, where, true, [layer])
            texts.add(true.tokens)
    assert len(texts) > 1
    receipts = results(path, "steering").sel({"op": "hold", "layer_set": "1", "method": "read", "emotion": "rage"})
    assert np.isnan(receipts.relative_change.sel({"layer": 3, "strength": 0.5, "control": "none"}).values).all()


def test_ops_about_the_neutral_mean_and_rotation(folder, tmp_path, truth):
    """The reference is the mean of the method's neutral samples, pooled as it pools, at the edited layer."""
    common = {
        "vectors": {"methods": ["read"], "emotions": ["joy"]},
        "layers": [3, 1],
        "controls": ["random"],
        "prompts": "two",
        "generate": {"max_new_tokens": NEW},
    }
    strengths = {"set_mean": 0.5, "affine": 1.5, "rotate": 25.0}
    steer = [{**common, "op": op, "strengths": [strength]} for op, strength in strengths.items()]
    steer[1] |= {"scale": "raw", "vectors": {**common["vectors"], "layer": 2}}
    gated = {"when": {"direction": "fear", "below": 0.5}, "schedule": {"linear": 4}, "scale": "unit"}
    steer.append({**common, "op": "add", "strengths": [4.0], **gated})
    plan = write(tmp_path, folder("llama"), methods={"read": METHODS["read"]}, steer=steer)
    summary = run(plan)
    assert not summary.failures
    path = tmp_path / "plan.zarr"
    usual = np.mean([truth.pooled_read(NEUTRAL, k) for k in range(2)], 0)
    vectors = {layer: truth.vectors()["read"]["joy"][layer] for layer in (1, 2, 3)}
    groups = (results(path, "generations"), results(path, "steering"))
    fear = unit(truth.vectors()["read"]["fear"])
    for op, strength in {**strengths, "add": 4.0}.items():
        for control in ("none", "random"):
            pushes = []
            for layer in (1, 3):
                source = 2 if op == "affine" else layer
                vector = unit(vectors[source])
                if control == "random":
                    edited = [2] if op == "affine" else [1, 3]
                    drawn = rotated(np.stack([vectors[edited_layer] for edited_layer in edited]), 0, "read", "joy")
                    vector = unit(drawn[edited.index(source)])
                more = {"gate": fear[layer], "high": 0.5, "linear": 4} if op == "add" else {}
                pushes.append(Push(layer, op, vector, strength, mean=usual[layer], **more))  # `raw`: left at length 1
            for label, prompt in TEXTS["prompts"]["two"].items():
                where = {"model": "tiny", "op": op, "layer_set": "1,3", "method": "read", "emotion": "joy"}
                where |= {"strength": strength, "control": control, "prompt": label, "seed": 0}
                same_texts(*groups, where, truth.generate(truth.plain(prompt), pushes), [1, 3])
    assert not any(run(plan).done.values())


def test_rows_run_again_one_at_a_time_are_in_the_store(filled):
    path, summary = filled[0] / "plan.zarr", filled[1]
    data = results(path, "verification")
    assert data.sizes["row"] == 3 == len(summary.verified)
    assert data.tokens_equal.values.all()
    differences = data.relative_difference.values
    assert (np.isnan(differences) | (differences < 1e-5)).all()
    assert all(json.loads(label) for label in data.label.values.ravel())


def test_every_text_names_a_program_that_the_store_keeps(filled):
    from nsteer.program.code import digest

    programs = results(filled[0] / "plan.zarr", "programs")
    for label in programs.program.values:
        assert digest(programs.source.sel({"program": label}).item()) == label
    texts = results(filled[0] / "plan.zarr", "generations").program.values.ravel()
    assert set(texts) - {""} <= set(programs.program.values)


def test_what_a_run_computed_with_is_recorded(filled):
    settings = json.loads(results(filled[0] / "plan.zarr", "models").settings.sel({"model": "tiny"}).item())
    assert settings["threads"] >= 1 and settings["grad"] == "no_grad"
    assert {"samples", "activations", "unsteered", "steering"} <= set(settings["max_tokens_in_flight"])
    assert set(settings["max_tokens_in_flight"].values()) == {8192}  # a model so small: the ceiling


def test_threads_of_the_command_line_override_the_plan_and_are_recorded(copied):
    done = command("run", copied, "--quiet", "--threads", "2", "--set", "methods.made.generate.max_new_tokens=4")
    assert done.returncode == 0, done.stderr
    folder = copied.parent / "plan.zarr"
    assert json.loads(results(folder, "runs").environment.values[-1])["resolved_plan"]["threads"] == 2
    assert json.loads(results(folder, "models").settings.item())["threads"] == 2
    assert invoke("run", copied, "--threads", "0").exit_code == 2


# ---- nothing twice ---------------------------------------------------------------------------------------


def test_the_second_run_does_nothing_and_loads_no_torch(copied):
    before = records(copied.parent / "plan.zarr")
    code = "import sys; from nsteer.cli import main; main(sys.argv[1:], standalone_mode=False); "
    code += "print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "run", str(copied), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary, loaded = done.stdout.strip().splitlines()
    assert not any(json.loads(summary)["done"].values()) and loaded == "False False"
    after = records(copied.parent / "plan.zarr")
    assert {key: cell for key, cell in after.items() if key[0] != "runs"} == {
        key: cell for key, cell in before.items() if key[0] != "runs"
    }


MADE, READ = 8, 2  # steering cells of the two entries
KNOBS = {
    "batch.rows=1": {},
    "batch.max_tokens_in_flight=64": {},
    "threads=2": {},
    "about=another purpose": {},
    "methods.read.baseline=none": {"vectors": 3, "steering": READ},
    "methods.made.unit_norm=false": {"vectors": 3, "steering": MADE},
    "methods.made.pooling=last": {"activations": 4, "vectors": 3, "steering": MADE},
    "methods.read.pooling.k=0": {"activations": 4, "vectors": 3, "steering": READ},
    "methods.made.neutral_samples=1": {"samples": 1, "activations": 1},
    "methods.made.generate.max_new_tokens=4": {"samples": 4, "activations": 4, "vectors": 3, "steering": MADE},
    "seed=1": {"steering": READ + MADE // 2},
    "steer[0].strengths=[0.0, 0.4, 0.6]": {"steering": 4},
    "steer[0].positions=last": {"steering": MADE},
    "steer[0].generate.max_new_tokens=5": {"steering": MADE, "unsteered": 1},
    "steer[1].layers={each: [1]}": {},
    "steer[1].seeds=[0, 8]": {"steering": READ},
    "steer[1].vectors.layer=1": {"steering": READ},
    "layers=[0, 1, 2, 3]": {},
    "models[0].dtype=bfloat16": {"samples": 8, "activations": 8, "vectors": 6, "steering": 10, "unsteered": 1},
}


@pytest.mark.parametrize("knob", KNOBS)
def test_a_changed_knob_recomputes_what_depends_on_it_and_nothing_else(copied, knob):
    from nsteer.stages import cells
    from nsteer.stages.job import Job

    study, changed = check.load(copied), check.load(copied, [knob])
    facts = changed.facts[0]
    store = Store(copied.parent / "plan.zarr")
    paths = {"samples": "samples/tiny", "activations": "activations/tiny", "vectors": "vectors/tiny"}
    counts = {}
    for stage in ("samples", "activations", "vectors", "unsteered", "steering"):
        wanted = getattr(cells, stage)(Job(changed, facts))
        if missing := store.missing(paths.get(stage, stage), wanted):
            counts[stage] = len(missing)
    assert counts == KNOBS[knob]
    assert study.plan != changed.plan


def test_a_run_after_a_changed_knob_does_just_that(copied):
    before = records(copied.parent / "plan.zarr")
    summary = run(copied, "methods.read.baseline=none")
    assert {stage: n for stage, n in summary.done.items() if n} == {"vectors": 3, "steering": READ}
    assert not summary.failures
    after = records(copied.parent / "plan.zarr")
    again = {key[:4] for key in before if after[key] != before[key] and key[0] not in ("runs", "methods")}
    assert {key[0] for key in again} >= {"vectors/tiny", "generations", "steering"}
    assert all("read" in key or "read" in str(key) for key in again if key[0] == "vectors/tiny")
    kept = {key for key in before if key[0] in ("samples/tiny", "activations/tiny") or "push" in key}
    assert kept and all(after[key] == before[key] for key in kept)


def test_a_killed_run_loses_nothing_and_repeats_nothing(folder, tmp_path):
    steer = [{**STEER[0], "strengths": [0.1, 0.4], "layers": {"each": [3, 1]}}]
    methods = {"made": {**METHODS["made"], "samples": 2, "neutral_samples": 1}}
    plan = write(tmp_path, folder("llama"), methods=methods, steer=steer)
    code = "import sys; from nsteer.runner import runs; runs.WAVE = 2; "  # a commit every few rows
    code += "from nsteer.cli import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, "run", str(plan), "--quiet"], stdout=-3, stderr=-3)
    store, end = Store(tmp_path / "plan.zarr"), time.monotonic() + 600
    try:
        while time.monotonic() < end and process.poll() is None:
            if (tmp_path / "plan.zarr" / "generations").is_dir() and len(store.committed("generations")) >= 3:
                break
            time.sleep(0.02)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    before = records(tmp_path / "plan.zarr")
    half = len(store.committed("generations"))
    assert 3 <= half < 16
    summary = run(plan)
    assert not summary.failures
    after = records(tmp_path / "plan.zarr")
    finished = {key[1:] for key in before if key[0] == "generations"}  # the last group that a cell is written to
    kept = {key for key in before if key[0] not in ("runs", "models", "steering", "projections") or key[1:] in finished}
    assert len(kept) > 2 * half
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert len(store.committed("generations")) == 16 == summary.done["steering"] + summary.skipped["steering"]
    assert summary.skipped["steering"] == half and "samples" not in summary.done
    whole = write(tmp_path, folder("llama"), name="whole", methods=methods, steer=steer)
    assert not run(whole).failures
    for group in ("generations", "steering"):  # waves cut elsewhere: batches of other rows, numbers equal to rounding
        resumed, true = (results(tmp_path / f"{name}.zarr", group).drop_vars("cell") for name in ("plan", "whole"))
        xr.testing.assert_allclose(resumed, true, rtol=1e-4)
        assert group == "steering" or resumed.equals(true)
    runs = results(tmp_path / "plan.zarr", "runs")
    assert runs.status.values.tolist() == ["running", "complete"]


def test_vectors_are_derived_again_where_torch_is_not(copied):
    code = """
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "transformers", "nnsight"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from nsteer.cli import main
main(sys.argv[1:])
"""
    words = ["derive", str(copied), "--quiet", "--set", "methods.read.baseline=none"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    truth = Truth()
    mean = np.mean([truth.pooled_read("joy", k) for k in range(2)], 0)
    cell = results(copied.parent / "plan.zarr", "vectors/tiny").sel(
        {"model": "tiny", "method": "read", "emotion": "joy"}
    )
    close(cell.vector.values, unit(mean), 1e-4)


def test_deriving_from_nothing_says_what_is_missing(folder, tmp_path):
    done = invoke("derive", write(tmp_path, folder("llama")), "--quiet")
    assert done.exit_code == 1
    assert "cells of activations are missing" in done.output and "nsteer run" in done.output


# ---- what fails ------------------------------------------------------------------------------------------


def test_an_edit_that_changes_nothing_is_a_failure_of_that_cell_alone(folder, tmp_path):
    steer = [{**STEER[0], "strengths": [1e-6, 0.4], "controls": []}]
    model = {"id": str(folder("llama")), "label": "tiny", "device": "cpu", "dtype": "bfloat16"}
    plan = write(tmp_path, folder("llama"), models=[model], steer=steer)
    done = invoke("run", plan, "--json")
    assert done.exit_code == 1, done.output
    failures = json.loads(done.stdout)["failures"]
    assert len(failures) == 2 and all("changed nothing" in json.dumps(failure) for failure in failures)
    done = {key[5] for key in Store(tmp_path / "plan.zarr").committed("generations")}
    assert done == {0.4}


def test_an_edit_that_touches_nothing_is_a_failure(folder, tmp_path, monkeypatch):
    from nsteer.plan import editing

    original = editing.row_edit

    def untouching(edit, compiled_edit, prompt, *rest):
        return replace(
            original(edit, compiled_edit, prompt, *rest), prompt=np.zeros(len(prompt.tokens), bool), generated=False
        )

    monkeypatch.setattr(editing, "row_edit", untouching)
    summary = run(write(tmp_path, folder("llama"), steer=[{**STEER[0], "strengths": [0.4], "controls": []}]))
    assert [failure.reason for failure in summary.failures] == [
        "layer 0, prompt 'walk': the edit touched no position"
    ] * 2
    assert not Store(tmp_path / "plan.zarr").committed("generations")


def test_an_emotion_whose_texts_are_too_short_fails_alone(folder, tmp_path):
    """The passages of `rage` are the shortest: from position k on there is nothing of them."""
    words = tinies.tokenizer(bos=True)
    lengths = {e: max(len(words(t)["input_ids"]) for t in TEXTS["passages"][e]) for e in EMOTIONS}
    assert lengths["rage"] < min(lengths["joy"], lengths["fear"])
    method = {**METHODS["read"], "pooling": {"kind": "mean_from", "k": lengths["rage"] - 1}, "baseline": "grand_mean"}
    steer = [{**STEER[0], "vectors": {}, "strengths": [0.4], "controls": []}]
    summary = run(write(tmp_path, folder("llama"), methods={"read": method}, steer=steer))
    assert {(failure.stage, "rage" in failure.cell) for failure in summary.failures} == {
        ("vectors", True),
        ("steering", True),
    }
    store = Store(tmp_path / "plan.zarr")
    assert {key[2] for key in store.committed("vectors/tiny")} == {"joy", "fear"}
    assert {key[4] for key in store.committed("generations")} == {"joy", "fear"}
    read = results(tmp_path / "plan.zarr", "activations/tiny").sel({"emotion": "rage", "method": "read"})
    assert np.isnan(read.pooled.values).all() and (read.positions.values == 0).all()


def test_neutral_texts_that_are_all_too_short_fail_in_words(folder, tmp_path):
    method = {**METHODS["read"], "pooling": {"kind": "mean_from", "k": 60}, "project_out": {"variance": 0.5}}
    summary = run(write(tmp_path, folder("llama"), methods={"read": method}, steer=None))
    assert summary.failures and not Store(tmp_path / "plan.zarr").committed("vectors/tiny")


# ---- what is kept ----------------------------------------------------------------------------------------


def test_a_run_records_nothing_of_host_user_or_folders(filled):
    runs = results(filled[0] / "plan.zarr", "runs")
    kept = {name: str(runs[name].values.ravel()[0]) for name in runs.data_vars if runs[name].dtype.kind in "OTU"}
    environment = json.loads(kept["environment"])
    assert {"python", "torch", "nnsight", "transformers", "seed"} <= set(environment)
    beside = {name: text for name, text in kept.items() if name not in ("plan", "environment")}
    environment.pop("resolved_plan")
    said = json.dumps(beside) + json.dumps(environment)
    for private in (socket.gethostname(), str(Path.home()), str(filled[0]), f"/{getpass.getuser()}/"):
        assert private not in said, private


def test_methods_and_blocks_are_explained(filled):
    path = filled[0] / "plan.zarr"
    ops = results(path, "ops")
    assert json.loads(ops.settings.sel({"op": "hold"}).item())["scale"] == "reference_norm"
    assert ops.prompt_text.sel({"op": "push", "prompt": "walk"}).item() == "tom ran to the"


# ---- judging ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A tiny random text classifier of three classes."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    place = tmp_path_factory.mktemp("judge")
    torch.manual_seed(3)
    shape = dict(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, initializer_range=0.5
    )
    labels = dict(enumerate(EMOTIONS))
    config = BertConfig(vocab_size=tinies.VOCAB, id2label=labels, label2id={v: k for k, v in labels.items()}, **shape)
    BertForSequenceClassification(config).save_pretrained(place)
    tinies.tokenizer().save_pretrained(place)
    return place


def test_a_judge_reads_every_continuation(copied, judge, folder):
    import torch
    from transformers import AutoModelForSequenceClassification

    plan = write(copied.parent, folder("llama"), judge={"classifier": str(judge), "device": "cpu"})
    summary = run(plan)
    assert summary.done["judged"] == 10 and summary.done["judged_unsteered"] == 1
    model, words = AutoModelForSequenceClassification.from_pretrained(judge).eval(), tinies.tokenizer()
    texts = results(copied.parent / "plan.zarr", "generations").text
    scores = results(copied.parent / "plan.zarr", "judged").score
    where = {"model": "tiny", "op": "push", "layer_set": "all", "method": "made", "emotion": "joy", "strength": 0.4}
    where |= {"control": "none", "seed": 0}
    assert scores.unit.item() == "probability of the class among all of them" and np.isnan(scores.threshold.item())
    seen = 0
    for label in ("walk", "night"):
        text = texts.sel({**where, "prompt": label}).item()
        probability = scores.sel({**where, "judge": "judge", "prompt": label})
        if not text.strip():
            assert np.isnan(probability).all()
            continue
        with torch.no_grad():
            true = model(**words(text, return_tensors="pt")).logits[0].softmax(-1)
        close(probability.sel({"class": EMOTIONS}).values, true.numpy(), 1e-4)
        seen += 1
    assert seen
    assert not any(run(plan).done.values())
    assert {k: n for k, n in run(plan, "judge.over=all").done.items() if n} == {"judged": 10, "judged_unsteered": 1}


# ---- reads and edits without emotions --------------------------------------------------------------------

GENERAL = {
    "methods": None,
    "steer": None,
    "emotions": None,
    "prompts": {"walk": "tom ran to the", "night": "at night the old house was warm"},
    "reads": {
        "mean": {"layers": [3, 1], "pooling": "mean"},
        "last": {"layers": [2], "pooling": "last"},
        "all": {"layers": [-1, 0]},
    },
    "directions": {
        "noise": {"random": 4},
        "contrast": {"contrast": {"positive": ["a happy girl", "the sun"], "negative": ["a sad boy"]}},
        "usual": {"mean": {"texts": ["tom read", "the dog"]}},
    },
    "edits": {
        "ablate": [{"op": "project_out", "direction": "contrast", "layers": [1], "vector_layer": 2}],
        "both": [
            {
                "op": "add",
                "direction": "noise",
                "layers": [3],
                "scale": "stream_norm",
                "strength": 0.5,
                "positions": "last",
            },
            {"op": "clamp", "direction": "contrast", "layers": [0, 2], "scale": "unit", "strength": 3.0},
            {"op": "add", "direction": "contrast", "layers": [0], "strength": -0.7, "norm_skip": 0},
        ],
        "gated": [
            {
                "op": "add",
                "direction": "noise",
                "layers": [3],
                "strength": 4.0,
                "when": {"direction": "contrast", "below": 0.02, "of": "cosine"},
            },
            {"op": "add", "direction": "noise", "layers": [3], "strength": 4.0, "when": {"after": [" the"]}},
        ],
        "paced": [
            {
                "op": "add",
                "direction": "noise",
                "layers": [3],
                "strength": 5.0,
                "schedule": {"first": 3, "half_life": 1.5},
            }
        ],
        "about": [
            {"op": "rotate", "direction": "contrast", "layers": [2], "strength": 40.0},
            {"op": "affine", "direction": "contrast", "layers": [2], "reference": "usual", "strength": 1.5},
            {"op": "set_mean", "direction": "noise", "layers": [3], "reference": "usual", "strength": 0.5},
        ],
    },
    "generate": {"max_new_tokens": NEW},
}


def test_reads_and_edits_without_emotions(folder, tmp_path, truth):
    summary = run(write(tmp_path, folder("llama"), **GENERAL), verify_rows=2)
    assert not summary.failures
    path = tmp_path / "plan.zarr"
    last = {
        side: [np.stack([s[-1].numpy() for s in truth.streams(truth.plain(text))]) for text in texts]
        for side, texts in GENERAL["directions"]["contrast"]["contrast"].items()
    }
    contrast = np.mean(last["positive"], 0) - np.mean(last["negative"], 0)
    noise = unit_vector(32, 4, "noise")
    usual = [truth.streams(truth.plain(text)) for text in ("tom read", "the dog")]
    usual = np.mean([[stream[-1].numpy() for stream in streams] for streams in usual], 0)
    # in forward order, and at one layer in the plan's order
    conditions = {
        "none": [],
        "ablate": [Push(1, "project_out", unit(contrast[2]), 1.0)],
        "both": [
            Push(0, "clamp", unit(contrast[0]), 3.0),
            Push(0, "add", contrast[0], -0.7),
            Push(2, "clamp", unit(contrast[2]), 3.0),
            Push(3, "add", noise, 0.5, live=True, positions="last"),
        ],
        "gated": [
            Push(3, "add", noise, 4.0, gate=unit(contrast[3]), high=0.02, cosine=True),
            Push(3, "add", noise, 4.0, after=truth.words(" the", add_special_tokens=False)["input_ids"]),
        ],
        "paced": [Push(3, "add", noise, 5.0, first=3, half_life=1.5)],
        "about": [
            Push(2, "rotate", unit(contrast[2]), 40.0),
            Push(2, "affine", unit(contrast[2]), 1.5 * np.linalg.norm(contrast[2]), mean=usual[2]),
            Push(3, "set_mean", noise, 0.5, mean=usual[3]),
        ],
    }
    entries = {
        "gated": [(0, 3), (1, 3)],
        "paced": [(0, 3)],
        "about": [(0, 2), (1, 2), (2, 3)],
        "ablate": [(0, 1)],
        "both": [(1, 0), (2, 0), (1, 2), (0, 3)],
        "none": [],
    }
    reads, whole = results(path, "reads/tiny").stream, results(path, "streams/tiny").stream
    texts, receipts = (results(path, group).isel({"seed": 0}) for group in ("edited", "edited_receipts"))
    labels = {"none": 0.0, "ablate": 1.0, "both": 0.5, "gated": 4.0, "paced": 5.0, "about": 40.0}
    for condition, pushes in conditions.items():
        for label, prompt in GENERAL["prompts"].items():
            tokens = truth.plain(prompt)
            where = {"model": "tiny", "edit": condition, "strength": labels[condition], "prompt": label}
            streams = truth.streams(tokens, pushes)
            for layer in (1, 3):
                close(
                    reads.sel({**where, "read": "mean", "layer": layer}).values,
                    streams[layer][1:].mean(0).numpy(),
                    1e-4,
                )
            close(reads.sel({**where, "read": "last", "layer": 2}).values, streams[2][-1].numpy(), 1e-4)
            assert np.isnan(reads.sel({**where, "read": "last", "layer": 1}).values).all()
            for layer in (0, 3):
                stream = whole.sel({**where, "read": "all", "layer": layer}).values
                close(stream[: len(tokens)], streams[layer].numpy(), 1e-4)
                assert np.isnan(stream[len(tokens) :]).all()
            true = truth.generate(tokens, pushes)
            continuation = texts.sel(where)
            assert continuation.token_id.values[: int(continuation.n_tokens)].tolist() == list(true.tokens)
            for i, (entry, layer) in enumerate(entries[condition]):
                receipt = receipts.sel({**where, "entry": entry, "layer": layer})
                assert receipt.touched == true.receipts[i, 0]
                assert receipt.relative_change.item() == pytest.approx(
                    true.receipts[i, 1] / true.receipts[i, 0], rel=1e-3
                )
    assert not any(run(write(tmp_path, folder("llama"), **GENERAL)).done.values())


def test_a_word_of_two_tokens_is_refused_in_words(folder, tmp_path):
    general = {**GENERAL, "edits": {"e": [{"op": "add", "direction": "noise", "when": {"after": [" the cat"]}}]}}
    summary = run(write(tmp_path, folder("llama"), **general))
    assert len(summary.failures) == 4 and all("e" in failure.cell for failure in summary.failures)
    assert all("tokens of this model" in failure.reason for failure in summary.failures)


def test_directions_from_a_store(copied, folder, tmp_path, truth):
    direction = {"path": str(copied.parent / "plan.zarr"), "method": "made", "emotion": "joy"}
    general = {**GENERAL, "directions": {"joy": {"store": direction}}, "generate": None}
    general["edits"] = {"push": [{"op": "add", "direction": "joy", "layers": [1], "strength": 3.0}]}
    summary = run(write(tmp_path, folder("llama"), name="second", **general))
    assert not summary.failures
    vector = stored_vector(copied.parent / "plan.zarr", "made", "joy", 1)
    tokens = truth.plain("tom ran to the")
    streams = results(tmp_path / "second.zarr", "reads/tiny").stream
    where = {"model": "tiny", "edit": "push", "strength": 3.0, "prompt": "walk", "read": "mean", "layer": 3}
    close(streams.sel(where).values, truth.streams(tokens, [Push(1, "add", vector, 3.0)])[3][1:].mean(0).numpy(), 1e-4)
