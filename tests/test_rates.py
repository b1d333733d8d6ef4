"""How long a plan takes, as `check` says: by what its store has measured, else by an estimate that is called one."""

from __future__ import annotations

import json
import math

import pytest
import tinies
from click.testing import CliRunner
from test_runner import METHODS, write

from nsteer import cli
from nsteer.executors.local import Local
from nsteer.plan import check
from nsteer.stages import rates, sizing

PLAN = """
name: r
models: [{id: %s, label: m}]
prompts: {a: the cat sat on the mat, b: tom}
reads: {whole: {layers: [3, 1]}}
generate: {max_new_tokens: 4}
threads: 1
store: r.zarr
"""


def invoke(*words):
    return CliRunner().invoke(cli.main, list(words), catch_exceptions=False)


@pytest.fixture
def plan(folder, tmp_path):
    (tmp_path / "p.yaml").write_text(PLAN % folder("llama"))
    return "p.yaml"


def test_without_a_store_it_is_an_estimate_by_the_model_s_size(plan):
    result = invoke("check", plan)
    assert "on this CPU (an estimate: not measured in this store yet)" in " ".join(result.output.split())
    estimate = json.loads(invoke("check", plan, "--json").output)
    tokens = sum(stage["tokens"] for stage in estimate["stages"])
    numbers = sum(p.numel() for p in tinies.model("llama").parameters())
    assert estimate["measured"] is False
    assert math.isclose(estimate["seconds"], tokens * 2 * numbers / rates.SPEED, rel_tol=1e-6)


def test_with_one_it_is_by_what_was_measured(plan):
    assert invoke("run", plan).exit_code == 0
    again = ["check", plan, "--set", "generate.max_new_tokens=8", "--json"]
    estimate = json.loads(invoke(*again).output)
    study = check.load(plan, ["generate.max_new_tokens=8"])
    known = rates.measured(study)
    left = [stage for stage in sizing.size(study).stages if stage.tokens]
    assert [stage.stage for stage in left] == ["edited"] and ("m", "edited") in known
    assert estimate["measured"] is True
    assert math.isclose(estimate["seconds"], left[0].tokens / known["m", "edited"], rel_tol=1e-6)
    assert "by tokens/s that this store has measured" in " ".join(invoke(*again[:-1]).output.split())


def test_nothing_to_do_takes_no_time(plan):
    assert invoke("run", plan).exit_code == 0
    assert json.loads(invoke("check", plan, "--json").output)["seconds"] == 0


def test_disk_is_what_pooled_streams_and_vectors_take(tmp_path):
    (tmp_path / "q.yaml").write_text(
        "name: q\nmodels: [zoo/llama]\ntexts: zoo\nemotions: [happy, sad]\nlayers: [4, 2]\n"
        "methods: {c: {source: comprehension, samples: 3}}\nstore: q.zarr\n"
    )
    study = check.load("q.yaml")
    width = study.facts[0].d_model
    texts, vectors = 3 * 3, 2  # neutral ones too
    assert rates.disk(study, sizing.size(study).stages) == (texts + vectors) * 2 * width * 4


def test_what_is_counted_goes_through_the_model(folder, tmp_path, monkeypatch):
    """Given texts pass through it once, to be read; those that it writes twice."""
    rows, run = {"written": 0, "read": 0}, Local.run

    def counted(self, program):
        rows["read" if program.form.decoding is None else "written"] += len(program.keys)
        return run(self, program)

    monkeypatch.setattr(Local, "run", counted)
    method = {"pooling": "mean", "baseline": "grand_mean"}
    drawn = {"max_new_tokens": 4, "sample": True}  # greedy rows that are alike would be one
    methods = {
        "given": {**METHODS["read"], **method, "samples": 2},
        "made": {**METHODS["made"], **method, "samples": 2, "generate": drawn},
    }
    path = write(tmp_path, folder("llama"), methods=methods, steer=None)
    stages = {stage.stage: stage for stage in sizing.size(check.load(path)).stages}
    assert invoke("run", str(path)).exit_code == 0
    assert rows == {"written": 4 * 2, "read": 4 * 2 + 4 * 2}  # three emotions and the neutral texts
    assert {"written": stages["samples"].rows, "read": stages["activations"].rows} == rows
    assert stages["activations"].tokens > stages["samples"].tokens > 0
