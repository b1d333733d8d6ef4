"""What fails costs the cells it touches, is kept in the store by name, and is tried again when that can help."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import test_runner
import tinies
import torch
import transformers
from click.testing import CliRunner
from test_runner import EMOTIONS, METHODS, NEUTRAL, STEER, TEXTS, results, run, write

import nsteer
from nsteer import cli
from nsteer.errors import (
    EditError,
    EngineError,
    ExecutionError,
    ModelError,
    OutOfMemoryError,
    RemoteDeadlineError,
    RemoteProgramError,
)
from nsteer.report import claims
from nsteer.runner.failing import kind_of
from nsteer.store import Store

judge = test_runner.judge
READ = {"read": {**METHODS["read"], "baseline": "neutral_mean"}}
BAD = TEXTS["passages"]["fear"][1]


def invoke(*words):
    return CliRunner().invoke(cli.main, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def poisoned(monkeypatch):
    """Makes models fail on one text: raise, or give a stream at one layer that is not finite."""
    from nsteer.executors.local import Local

    counted = {"models": 0, "on": True}
    first = Local.__init__

    def poison(text: str, layer: int | None = None, what: str = "a kernel that does not know this text"):
        ids = tinies.tokenizer(bos=True)(text)["input_ids"]

        def init(self, *arguments, **named):
            first(self, *arguments, **named)
            counted["models"] += 1
            seen: dict[str, list[bool]] = {}

            def look(module, given):
                rows = [[int(t) for t in row] for row in given[0]]
                seen["bad"] = [row[-len(ids) :] == ids or row[: len(ids)] == ids for row in rows]
                if layer is None and counted["on"] and any(seen["bad"]):
                    raise ValueError(what)

            def spoil(module, given, named):
                if counted["on"] and any(seen["bad"]):
                    stream = given[0].clone()
                    stream[seen["bad"]] = float("inf")
                    return (stream, *given[1:]), named
                return None

            self.module.get_input_embeddings().register_forward_pre_hook(look)
            if layer is not None:
                block = tinies.blocks("llama", self.module)[layer]
                block.register_forward_pre_hook(spoil, with_kwargs=True)

        monkeypatch.setattr(Local, "__init__", init)
        return counted

    return poison


def failed(path) -> dict[tuple, dict]:
    """The records of the group failures: (group, *labels) -> its fields."""
    data = nsteer.open(path)["failures"].load()
    records = {}
    for label in data.failure.values:
        record = data.sel({"failure": label})
        assert label.startswith(record.group.item() + ":")
        fields = {name: record[name].item() for name in data.data_vars if name != "cell"}
        records[(record.group.item(), *json.loads(record.labels.item()))] = fields
    return records


# ---- one bad text -----------------------------------------------------------------------------------------------


def test_a_text_that_breaks_the_model_fails_its_cell_and_no_other(folder, tmp_path, poisoned):
    counted = poisoned(BAD)
    path = tmp_path / "plan.zarr"
    steer = [{**STEER[0], "vectors": {}, "strengths": [0.4], "controls": ["zero"]}]
    plan = write(tmp_path, folder("llama"), methods=READ, steer=steer)
    done = invoke("run", plan, "--quiet")
    assert done.exit_code == 1
    assert "failed: activations tiny / read / fear / 0: program " in done.stdout
    assert "ValueError: a kernel that does not know this text" in done.stdout
    assert "failed: vectors tiny / read / fear: rests on activations/tiny tiny / read / fear / 0, which" in done.stdout
    store = Store(path)
    assert {key[2] for key in store.committed("activations/tiny")} == {"joy", "rage", NEUTRAL}
    assert {key[2] for key in store.committed("vectors/tiny")} == {"joy", "rage"}
    assert {key[4] for key in store.committed("generations")} == {"joy", "rage"} and store.committed("unsteered")
    kept = failed(path)
    bad = kept["activations/tiny", "tiny", "read", "fear", 0]
    assert (bad["stage"], bad["model"], bad["kind"], bad["attempts"]) == ("activations", "tiny", "permanent", 1)
    assert not bad["resolved"] and bad["run"] in results(path, "runs").run.values
    assert kept["vectors/tiny", "tiny", "read", "fear"]["kind"] == "waiting"
    assert results(path, "runs").status.values.tolist() == ["failed cells"]
    missing = nsteer.open(path)["vectors/tiny"].sel({"emotion": "fear"})
    assert np.isnan(missing.vector.values).all()
    listed = invoke("ls", path).stdout
    assert "3/4, 1 failed" in listed and "2/3, 1 failed" in listed
    assert json.loads(invoke("ls", path, "--json").stdout)["activations/tiny"]["failed"] == 1

    # again: not tried, no model loaded
    models = counted["models"]
    done = invoke("run", plan, "--quiet")
    assert done.exit_code == 1 and counted["models"] == models
    assert "failed before: activations tiny / read / fear / 0: program" in done.stdout
    assert "1 cell failed before: it is tried again only with --retry-failed" in done.stdout
    assert failed(path)["activations/tiny", "tiny", "read", "fear", 0]["attempts"] == 1
    # with the flag it is, and fails again
    assert invoke("run", plan, "--quiet", "--retry-failed").exit_code == 1 and counted["models"] == models + 1
    assert failed(path)["activations/tiny", "tiny", "read", "fear", 0]["attempts"] == 2
    # and when it can succeed, all that waited is done, and the record says so
    counted["on"] = False
    summary = json.loads(invoke("run", plan, "--json", "--retry-failed").stdout)
    assert not summary["failures"] and not summary["failed_before"]
    assert summary["done"] == {"activations": 1, "vectors": 1, "steering": 1}
    assert all(record["resolved"] for record in failed(path).values())
    assert "failed" not in invoke("ls", path).stdout.replace("failures", "")
    assert invoke("run", plan, "--quiet").exit_code == 0


def test_a_changed_knob_tries_what_failed(folder, tmp_path, poisoned):
    counted = poisoned(BAD)
    plan = write(tmp_path, folder("llama"), methods=READ, steer=None)
    assert run(plan).failures
    counted["on"] = False
    assert run(plan).failed_before and not run(plan).done
    summary = run(plan, "methods.read.pooling=last")
    assert not summary.failures and not summary.failed_before and summary.done["activations"] == 4


def test_a_grand_mean_waits_for_every_emotion(folder, tmp_path, poisoned):
    poisoned(BAD)
    methods = {"read": {**METHODS["read"], "baseline": "grand_mean"}, "other": {**METHODS["read"], "samples": 1}}
    summary = run(write(tmp_path, folder("llama"), methods=methods, steer=None))
    assert {(failure.stage, failure.cell[1:3]) for failure in summary.failures} == {
        ("activations", ("read", "fear")),
        *(("vectors", ("read", emotion)) for emotion in EMOTIONS),
    }
    assert summary.done["vectors"] == 3, "the other method has its vectors"


def test_old_vectors_are_not_used_for_a_new_plan(folder, tmp_path, poisoned):
    """A vector that is in the store under another knob is no stand-in for the one that failed."""
    steer = [{**STEER[0], "vectors": {"methods": ["read"]}, "strengths": [0.4], "controls": []}]
    plan = write(tmp_path, folder("llama"), methods=READ, steer=steer)
    assert not run(plan).failures
    poisoned(BAD)
    summary = run(plan, "methods.read.pooling=last")
    waited = {failure.cell[4] for failure in summary.failures if failure.stage == "steering"}
    assert waited == {"fear"} and summary.done["steering"] == 2


def test_a_stream_that_is_not_finite_is_a_named_hole(folder, tmp_path, poisoned):
    poisoned(BAD, layer=2)
    plan = write(tmp_path, folder("llama"), methods=READ, steer=None, layers=[3, 2, 0])
    done = invoke("run", plan, "--quiet")
    assert done.exit_code == 1
    named = "failed: activations tiny / read / fear / 0: a residual stream that is not finite in float32 (sample 1 at "
    assert named in done.stdout and "layer 2, 3): a missing value in its place" in done.stdout
    path = tmp_path / "plan.zarr"
    read = results(path, "activations/tiny").sel({"model": "tiny", "method": "read", "emotion": "fear"})
    assert np.isnan(read.pooled.sel({"sample": 1}).values).all() and read.positions.sel({"sample": 1}) == 0
    assert np.isfinite(read.pooled.sel({"sample": 0, "layer": [0, 2, 3]}).values).all()
    vectors = results(path, "vectors/tiny").sel({"model": "tiny", "method": "read"})
    assert vectors.n_samples.to_series().to_dict() == {"joy": 2, "fear": 1, "rage": 2}
    assert np.isfinite(vectors.vector.sel({"layer": [0, 2, 3]}).values).all()
    assert "note: tiny: read: the vector of fear rests on one text" in done.stdout
    again = invoke("run", plan, "--quiet")
    assert again.exit_code == 1 and "failed before: activations tiny / read / fear / 0" in again.stdout
    assert "2/3, 1 failed" not in invoke("ls", path).stdout and "4/4, 1 failed" in invoke("ls", path).stdout


def test_an_edit_that_overflows_fails_its_cell(folder, tmp_path):
    steer = [{**STEER[0], "scale": "unit", "strengths": [3e38, 0.4], "controls": []}]
    model = {"id": str(folder("llama")), "label": "tiny", "device": "cpu", "dtype": "float16"}
    summary = run(write(tmp_path, folder("llama"), models=[model], steer=steer))
    assert {(failure.stage, failure.cell[5]) for failure in summary.failures} == {("steering", 3e38)}
    assert "not finite" in summary.failures[0].reason
    evidence = claims.Evidence(nsteer.open(tmp_path / "plan.zarr"), claims.Rules(), None)
    broken = [{**row, "strength": float(row["strength"])} for row in evidence.not_finite]
    assert {row["strength"] for row in broken} == {3e38} and len(broken) == len(summary.failures)
    table = claims.table(claims.table_of(evidence))
    (code,) = table[table.what.str.contains("author's later code")].itertuples()
    written = int((nsteer.open(tmp_path / "plan.zarr")["generations"].n_tokens >= 0).sum())
    assert code.ours.endswith("apart not finite") and code.n == written
    assert code.control.endswith(f"something was not finite, {written}"), "as many at the other strength"
    (top,) = table[table.what.str.startswith("regimes of continuations")].itertuples()
    assert "strength 3e+38" in top.scope or "not finite" not in top.ours


# ---- one bad model ----------------------------------------------------------------------------------------------


def test_a_model_that_does_not_load_is_tried_again_and_the_others_go_on(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder("llama"), broken)
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    models = [{"id": str(m), "label": n, "device": "cpu"} for n, m in (("broken", broken), ("tiny", folder("llama")))]
    plan = write(tmp_path, None, models=models, methods=READ, steer=None)
    summary = run(plan)
    assert [(failure.stage, failure.cell, failure.kind) for failure in summary.failures] == [
        ("loading", ("broken",), "transient")
    ]
    store = Store(tmp_path / "plan.zarr")
    assert len(store.committed("vectors/tiny")) == 3 and not store.committed("activations/broken")
    assert results(tmp_path / "plan.zarr", "runs").status.values.tolist() == ["failed cells"]
    weights.write_bytes(whole)
    summary = run(plan)
    assert not summary.failures and summary.done["vectors"] == 3
    assert all(record["resolved"] for record in failed(tmp_path / "plan.zarr").values())


def test_a_model_that_does_not_load_is_told_with_what_is_missing_of_it(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder("llama"), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    plan = write(tmp_path, broken, methods=READ, steer=None)
    done = invoke("run", plan, "--quiet")
    assert done.exit_code == 1 and "nothing was missing" not in done.stdout
    assert "0 cells done: what was missing failed" in done.stdout
    assert "tiny could not be loaded; still missing: 4 cells of samples, 4 cells of activations, 3 cells" in done.stdout


def _no_memory_while_proving(patch, fails):
    from nsteer.errors import AnatomyError
    from nsteer.program import anatomy

    prove = anatomy.prove

    def proved(module):
        try:
            fails(module)
        except RuntimeError as error:
            raise AnatomyError(f"fails on dummy tokens: {error}") from error
        return prove(module)

    patch.setattr(anatomy, "prove", proved)


NOT_LOADED = {
    "moved": {
        "llama": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB."),
        "qwen": RuntimeError("MPS backend out of memory"),
        "mistral": AssertionError("Torch not compiled with CUDA enabled"),
        "gemma": ImportError("requires the package `tiktoken`"),
    },
    "proved": {"llama": RuntimeError("DefaultCPUAllocator: can't allocate memory")},
    "described": {"llama": AttributeError("'Config' object has no attribute 'x'")},
}
"""Where models fail on their way in: the family of each -> what it fails with."""


@pytest.mark.parametrize("where", NOT_LOADED)
def test_whatever_a_model_fails_with_on_its_way_in_costs_that_model_alone(folder, tmp_path, monkeypatch, where):
    from nsteer.executors.local import Local

    errors = NOT_LOADED[where]
    by_type = {tinies.ALL[name][0]: error for name, error in errors.items()}

    def fails(module):
        if module.config.model_type in by_type:
            raise by_type[module.config.model_type]

    if where == "proved":
        _no_memory_while_proving(monkeypatch, fails)
    elif where == "described":
        plain = Local.describe
        monkeypatch.setattr(Local, "describe", lambda self: (fails(self.module), plain(self))[1])
    else:
        to = transformers.PreTrainedModel.to
        monkeypatch.setattr(transformers.PreTrainedModel, "to", lambda self, *a: (fails(self), to(self, *a))[1])
    models = [{"id": str(folder(name)), "label": name, "device": "cpu"} for name in (*errors, "gpt2")]
    plan = write(tmp_path, None, models=models, methods=READ, steer=None)
    summary = run(plan)
    assert [(failure.stage, failure.cell, failure.kind) for failure in summary.failures] == [
        ("loading", (name,), "transient") for name in errors
    ]
    for failure, error in zip(summary.failures, errors.values(), strict=True):
        assert str(error) in failure.reason and "\n" not in failure.reason
    assert summary.done["vectors"] == 3
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = run(plan)
    assert not again.failures and not again.failed_before and again.done["vectors"] == 3 * len(errors)


def test_a_device_that_is_not_there_is_told_before_anything_runs_and_fails_its_model(folder, tmp_path, monkeypatch):
    from nsteer.system import machine

    monkeypatch.setattr(machine, "lacks", lambda device: "no driver" if device == "cuda:1" else "")
    models = [
        {"id": str(folder("llama")), "label": "tiny", "device": "cpu"},
        {"id": str(folder("gpt2")), "label": "far", "device": "cuda:1"},
    ]
    plan = write(tmp_path, None, models=models, methods=READ, steer=None)
    told = "models[1].device: expected a device of this machine, found 'cuda:1': no driver (device: auto)"
    assert told in invoke("check", plan).stdout
    assert [told in note for note in json.loads(invoke("check", plan, "--json").stdout)["notes"]] == [True]
    summary = run(plan)
    assert [told in warning for warning in summary.warnings] == [True]
    assert [(failure.stage, failure.cell, failure.kind) for failure in summary.failures] == [
        ("loading", ("far",), "transient")
    ]
    assert summary.failures[0].reason.startswith("device 'cuda:1': no driver (")
    assert summary.done["vectors"] == 3


def test_a_chat_template_that_refuses_is_one_problem_of_the_plan(folder, tmp_path):
    """A method with a system prompt, on a model whose template takes none: one line, before anything runs."""
    strict = tmp_path / "strict"
    shutil.copytree(folder("llama"), strict)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(template + "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    config = json.loads((strict / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (strict / "tokenizer_config.json").write_text(json.dumps(config))
    methods = {"ruled": {**METHODS["made"], "system_prompt": "be brief"}, **READ}
    done = invoke("run", write(tmp_path, strict, methods=methods, steer=None))
    (line, count) = done.stderr.strip().splitlines()
    assert done.exit_code == 2 and count == "1 problem; no model was loaded"
    assert (
        "methods.ruled.system_prompt: expected none, or models that take one, found a system turn, with tiny: " in line
    )
    assert "System role not supported (put it into the templates)" in line
    assert not (tmp_path / "plan.zarr").exists()
    (strict / "chat_template.jinja").write_text(
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    )
    silent = invoke("check", write(tmp_path, strict, methods=methods, steer=None))
    assert silent.exit_code == 2 and "the chat template leaves out the system turn 'be brief'" in silent.stderr
    methods["ruled"].pop("system_prompt")
    assert invoke("check", write(tmp_path, strict, methods=methods, steer=None)).exit_code == 0


def test_a_model_without_a_chat_template_is_told_before_anything_runs(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder("llama"), bare)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config))
    methods = {"made": {**METHODS["made"], "chat": "always"}}
    done = invoke("run", write(tmp_path, bare, methods=methods, steer=None))
    assert done.exit_code == 2 and "tiny, which has no chat template (chat: auto)" in done.stderr
    assert not (tmp_path / "plan.zarr").exists()


def test_a_text_that_ends_at_once_is_told_by_name(folder, tmp_path):
    """A model that writes the end of text first: the sample's text is empty, and the judge has nothing to read."""
    mute = tmp_path / "mute"
    shutil.copytree(folder("llama"), mute)
    from safetensors.torch import load_file, save_file

    weights = load_file(mute / "model.safetensors")
    weights["model.norm.weight"] = torch.zeros_like(weights["model.norm.weight"])  # logits are all equal: id 0 wins
    save_file(weights, mute / "model.safetensors", {"format": "pt"})
    generation = json.loads((mute / "generation_config.json").read_text())
    (mute / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": 0}))
    summary = run(write(tmp_path, mute, methods={"made": METHODS["made"]}, steer=None))
    assert "tiny: made, joy: the text of sample 0, 1, 2 is empty" in summary.warnings


def test_emotions_without_a_class_are_told_before_the_judge_is_loaded(folder, judge, tmp_path):
    settings = {"classifier": str(judge), "device": "cpu", "map": {"joy": "bliss", "fear": None}}
    steer = [{**STEER[0], "vectors": {"methods": ["read"]}, "strengths": [0.4], "controls": []}]
    plan = write(tmp_path, folder("llama"), methods=READ, steer=steer, judge=settings)
    done = invoke("run", plan)
    assert done.exit_code == 0, done.output
    said = (
        f"the judge {judge} has no class for joy (bliss): a missing value in its rates (its classes: joy, fear, rage)"
    )
    assert f"note: {said}" in done.stdout
    from nsteer.science import analysis

    rates = analysis.target_rate(nsteer.open(tmp_path / "plan.zarr")["judged"].score, settings["map"])
    assert int(rates.n.sum()) == 2, "rage alone counts: two prompts"


# ---- kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError("x"), "transient"),
        (MemoryError(), "transient"),
        (OSError(28, "No space left on device"), "transient"),
        (RemoteDeadlineError("x"), "transient"),
        (EngineError("vLLM's engine died"), "transient"),
        (RemoteProgramError("x"), "permanent"),
        (ExecutionError("program x failed: RuntimeError: CUDA error: device-side assert"), "transient"),
        (ExecutionError("program x failed: ValueError: no"), "permanent"),
        (EditError("the edit changed nothing"), "permanent"),
        (ModelError("the text '' has no tokens"), "permanent"),
    ],
)
def test_what_may_pass_is_told_from_what_lasts(error, kind):
    assert kind_of(error) == kind


def test_a_full_disk_ends_the_run_in_words_and_the_next_goes_on(folder, tmp_path, monkeypatch):
    plan = write(tmp_path, folder("llama"), methods=READ, steer=None)
    commit, full = Store.commit, {"left": 5}

    def fills(self, path, cell, data, **more):
        full["left"] -= 1
        with self._reporting(f"commit {path}"):
            if full["left"] < 0:
                raise OSError(28, "No space left on device")
        commit(self, path, cell, data, **more)

    monkeypatch.setattr(Store, "commit", fills)
    done = invoke("run", plan, "--quiet")
    assert done.exit_code == 1 and "No space left on device" in done.stderr and "Traceback" not in done.output
    full["left"] = 10**6
    assert invoke("run", plan, "--quiet").exit_code == 0
