"""A steered model in Inspect and in lm-eval is the model of `nsteer.steer`; eval logs hold what the store holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from test_exchange import make
from test_runner import STEER, invoke, judge, run, write
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsteer
from nsteer import zoo
from nsteer.errors import EditError, SteerError
from nsteer.vectors.evals import steered
from nsteer.vectors.evals.steered import Wanted

judge = judge
PROMPTS = ["user: tom walked to the market and\n", "user: the rain fell\n"]
STRENGTH, LAYERS = 0.6, [3, 1]
HAPPY = {"model": "zoo/llama", "method": "generation", "emotion": "happy"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make(tmp_path_factory.mktemp("store") / "s.zarr", "zoo/llama")


@pytest.fixture(scope="module")
def toy():
    """The model, its tokenizer, and what it writes to each of PROMPTS alone, unsteered and under `nsteer.steer`."""
    model = AutoModelForCausalLM.from_pretrained(zoo.path("llama"), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(zoo.path("llama"), padding_side="left")


def written(toy, store, prompt: str, strength: float) -> str:
    model, tokenizer = toy
    vector = nsteer.open(store).sel("vectors", **HAPPY)
    ids = tokenizer(prompt, return_tensors="pt")
    with nsteer.steer(model, vector, layers=LAYERS, strength=strength) if strength else torch.no_grad():
        out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


# ---- Inspect ---------------------------------------------------------------------------------------------------

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import includes
import nsteer.vectors.evals.inspect  # an installed nsteer is found by its entry point

@task
def markets():
    words = ["tom walked to the market and", "the rain fell"]
    return Task(dataset=MemoryDataset([Sample(input=one, target="the") for one in words]), scorer=includes())
"""


def test_inspect_runs_a_task_on_a_steered_model(store, toy, tmp_path):
    pytest.importorskip("inspect_ai")
    (tmp_path / "task.py").write_text(TASK)
    words = [sys.executable, "-m", "inspect_ai", "eval", "task.py", "--model", "nsteer/zoo/llama", "--max-tokens", "8"]
    words += ["-M", f"vector={store}:generation/happy", "-M", f"strength={STRENGTH}", "-M", "layers=3,1"]
    words += [
        "-M",
        "do_sample=false",
        "-M",
        "use_chat_template=false",
        "-M",
        "device=cpu",
        "--log-dir",
        "logs",
        "--display",
        "none",
    ]
    place = {**os.environ, "XDG_DATA_HOME": str(tmp_path / "data")}
    done = subprocess.run(words, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    from inspect_ai.log import read_eval_log

    (file,) = (tmp_path / "logs").glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success" and log.eval.model == "nsteer/zoo/llama"
    for sample, prompt in zip(log.samples, PROMPTS, strict=True):
        completion = sample.output.completion
        assert completion == written(toy, store, prompt, STRENGTH)
        assert completion != written(toy, store, prompt, 0)
        said = sample.output.metadata["nsteer"]
        assert said["layers"] == [1, 3] and said["strength"] == STRENGTH and said["emotion"] == "happy"
        assert said["receipts"]["3"]["relative_change"] > 0.1 and said["receipts"]["3"]["touched"] > 8


def test_the_entry_point_of_inspect_is_there():
    from configparser import ConfigParser
    from importlib import import_module
    from pathlib import Path

    pytest.importorskip("inspect_ai")
    config = ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    name, _, module = config["options.entry_points"]["inspect_ai"].strip().partition(" = ")
    from inspect_ai._util.registry import registry_info

    assert registry_info(import_module(module).nsteer).name.split("/")[-1] == name == "nsteer"


@pytest.fixture(scope="module")
def logs(folder, judge, tmp_path_factory):
    """A store of a grid with a judge and perplexities, and its eval logs."""
    pytest.importorskip("inspect_ai")
    place = tmp_path_factory.mktemp("grid")
    more = {"judge": {"classifier": str(judge), "device": "cpu"}, "measure": {"perplexity": True}}
    assert not run(write(place, folder("llama"), steer=STEER, **more)).failures
    said = invoke("export", place / "plan.zarr", "-o", place / "logs", "--format", "inspect")
    assert said.exit_code == 0, said.output
    return place / "plan.zarr", place / "logs"


def test_inspect_reads_the_logs_of_a_store(logs):
    from inspect_ai.log import list_eval_logs, read_eval_log

    store, folder = logs
    eval_logs = [read_eval_log(file) for file in list_eval_logs(str(folder))]
    results = nsteer.open(store)
    texts = results["generations"].load()
    assert {log.eval.task for log in eval_logs} == {"push made joy", "push made fear", "hold read rage"}
    count = 0
    for log in eval_logs:
        assert log.status == "success" and log.eval.packages["nsteer"] == nsteer.__version__
        for sample in log.samples:
            at = dict(sample.metadata)
            if at["control"] == "unsteered":
                continuation = results["unsteered"].sel({name: at[name] for name in ("model", "op", "prompt", "seed")})
                assert sample.output.completion == continuation.text.item()
                continue
            count += 1
            assert sample.output.completion == texts.sel(at).text.item() == sample.messages[-1].text
            outcome = results["outcomes"].sel(at).perplexity
            assert sample.scores["perplexity"].value == pytest.approx(float(outcome), rel=1e-6)
            judged = results["judged"].score.sel(at).sel(judge="judge")
            for label, value in sample.scores["judge"].value.items():
                assert value == pytest.approx(float(judged.sel({"class": label})), rel=1e-6)
    assert count == int((texts.n_tokens >= 0).sum()) > 0


def test_the_numbers_at_the_head_of_a_log_are_means_over_its_samples(logs):
    from inspect_ai.log import list_eval_logs, read_eval_log

    (log,) = [
        eval_log
        for eval_log in map(read_eval_log, list_eval_logs(str(logs[1])))
        if eval_log.eval.task == "push made joy"
    ]
    (score,) = [eval_score for eval_score in log.results.scores if eval_score.name == "perplexity"]
    mine = [
        sample for sample in log.samples if sample.metadata["strength"] == 0.4 and sample.metadata["control"] == "none"
    ]
    assert score.metrics["strength 0.4"].value == pytest.approx(np.mean([s.scores["perplexity"].value for s in mine]))
    assert {"unsteered", "strength 0", "strength 0.4"} <= set(score.metrics)


def test_logs_of_some_labels_and_of_none(logs, store, tmp_path):
    said = invoke("export", logs[0], "-o", tmp_path / "one", "--format", "inspect", "--emotion", "joy", "--json")
    assert len(json.loads(said.output)["files"]) == 1
    asked = ["export", logs[0], "-o", tmp_path, "--format", "inspect"]
    assert "did you mean 'joy'" in invoke(*asked, "--emotion", "jo").stderr
    assert "no steered continuations" in invoke("export", store, "-o", tmp_path / "x", "--format", "inspect").stderr
    assert "--scale" in invoke(*asked, "--scale", "unit").stderr


# ---- lm-eval ---------------------------------------------------------------------------------------------------

CHOICE = """
task: garden
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/garden.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
LINES = [
    {"text": "tom walked to the", "choices": [" market", " sea", " the the"]},
    {"text": "the rain fell on the garden wall and", "choices": [" it", " the", " was"]},
    {"text": "dora was happy", "choices": [" because", " and then", " ."]},
]


@pytest.fixture
def own_tasks(monkeypatch):
    """The tasks that lm-eval comes with are not looked through: that takes longer than all else here."""
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def garden(tmp_path_factory):
    """A task of multiple choice, whose texts are of unequal length."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "garden.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    (folder / "garden.yaml").write_text(CHOICE.replace("FOLDER", str(folder)))
    return folder


def test_lm_eval_scores_a_steered_model_as_nsteer_steers_it(store, toy, garden, own_tasks, monkeypatch, tmp_path):
    """Every log-likelihood that lm-eval gets, in batches, is that of one text at a time under `nsteer.steer`."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    seen: list[list[tuple[str, str, float]]] = []
    real = HFLM.loglikelihood

    def spied(self, requests, **more):
        likelihoods = real(self, requests, **more)
        seen.append([(*request.args, score) for request, (score, _) in zip(requests, likelihoods, strict=True)])
        return likelihoods

    monkeypatch.setattr(HFLM, "loglikelihood", spied)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["eval", "zoo/llama", "--vector", f"{store}:generation/happy", "--strength", STRENGTH, "--layers", "3,1"]
    more = ["--tasks", "garden", "--include-path", garden, "--device", "cpu", "-o", tmp_path / "out.json"]
    said = invoke(*words, *more)
    assert said.exit_code == 0, said.output
    plain, edited = seen
    assert len(plain) == len(edited) == 9
    model, tokenizer = toy
    vector = nsteer.open(store).sel("vectors", **HAPPY)

    def score(context: str, more: str) -> float:
        whole, before = tokenizer(context + more).input_ids, tokenizer(context).input_ids
        ids = torch.tensor([whole[:-1]])
        logp = model(input_ids=ids).logits[0].log_softmax(-1)
        return sum(float(logp[i - 1, whole[i]]) for i in range(len(before), len(whole)))

    with torch.no_grad():
        for context, more, likelihood in plain:
            assert likelihood == pytest.approx(score(context, more), abs=1e-4)
        with nsteer.steer(model, vector, layers=LAYERS, strength=STRENGTH):
            for context, more, likelihood in edited:
                assert likelihood == pytest.approx(score(context, more), abs=1e-4)
    assert any(abs(a[-1] - b[-1]) > 0.1 for a, b in zip(plain, edited, strict=True))
    kept = json.loads((tmp_path / "out.json").read_text())
    (row,) = [metric_row for metric_row in kept["rows"] if metric_row["metric"] == "acc"]
    assert row["task"] == "garden" and {row["unsteered"], row["steered"]} <= {0, 1 / 3, 2 / 3, 1}
    assert kept["nsteer"]["receipts"]["1"]["relative_change"] > 0.1
    assert "garden" in said.output and "generation/happy × 0.6 stream_norm (add) at layers 1, 3" in said.output


def test_what_is_wrong_is_told_before_a_model_is_loaded(store, garden, own_tasks, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    given = ["eval", "zoo/llama", "--tasks", "garden", "--include-path", garden]
    for words, expected in (
        (["--vector", f"{store}:generation/happpy"], "did you mean 'happy'"),
        (["--vector", f"{store}:generation/sad"], "has no vector generation/sad"),
        (["--vector", "happy"], "expected STORE:METHOD/EMOTION"),
        (["--vector", f"{store}:generation/happy", "--op", "ad"], "did you mean 'add'"),
        (["--vector", f"{store}:generation/happy", "--tasks", "nothing"], "lm-eval has no task 'nothing'"),
    ):
        said = invoke(*given, *words)
        assert said.exit_code == 1 and expected in said.stderr, (words, said.stderr)


# ---- both ------------------------------------------------------------------------------------------------------


def test_a_held_model_is_as_before_once_it_is_let_go(store, toy):
    model, _ = toy
    before = written(toy, store, PROMPTS[0], 0)
    held = steered.hold(model, steered.facts_of("zoo/llama"), Wanted(f"{store}:generation/happy", STRENGTH, "3,1"))
    assert written(toy, store, PROMPTS[0], 0) == written_by(held, toy) != before
    assert held.receipts()["1"]["touched"] > 0
    held.close()
    assert written(toy, store, PROMPTS[0], 0) == before


def written_by(held, toy) -> str:
    model, tokenizer = toy
    ids = tokenizer(PROMPTS[0], return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)


def test_an_edit_that_did_nothing_is_told(store, toy):
    """What is scored is all prompt: an edit of generated positions never acts."""
    model, tokenizer = toy
    wanted = Wanted(f"{store}:generation/happy", 0.5, positions="generated")
    held = steered.hold(model, steered.facts_of("zoo/llama"), wanted)
    with torch.no_grad():
        model(**tokenizer(PROMPTS[0], return_tensors="pt"))
    with pytest.raises(EditError):
        held.receipts()
    with pytest.raises(EditError):
        held.close()


def test_a_vector_of_other_weights_is_refused(store, toy, monkeypatch):
    monkeypatch.setattr(steered, "vector_of", lambda name, label: (None, {"identity": "others"}))
    with pytest.raises(SteerError, match="other weights"):
        steered.hold(toy[0], steered.facts_of("zoo/llama"), Wanted("x:y/z"))
