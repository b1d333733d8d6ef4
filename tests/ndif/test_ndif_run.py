"""Whole plans, here and through a real server, leave equal stores."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import prefork
import pytest

from nsteer import runner, zoo
from nsteer.plan import check
from nsteer.store import Store, slug

ROOT = Path(__file__).parents[2]

HEAD = """
name: remote
texts: zoo
emotions: [happy, sad, angry]
threads: 1
"""
SHIPPED = "".join(
    line
    for line in (ROOT / "plans/quickstart.yaml").read_text().splitlines(keepends=True)
    if not line.startswith("store:")
)
MEASURED = SHIPPED.replace("judge:", "measure: {}\njudge:").replace(
    "  layers: all\n", "  layers: all\n  project: true\n"
)
LESS = (
    "emotions=[happy,sad,angry]",
    "methods.generation.samples=3",
    "methods.generation.generate.max_new_tokens=16",
    "steer.vectors.emotions=[happy,sad]",
    "steer.strengths=[0.15]",
    "steer.generate.max_new_tokens=12",
)
"""The shipped plan with all that it does, of less each."""

CAPTURE = (
    HEAD
    + """
models: [zoo/llama]
methods:
  comprehension: {source: comprehension, samples: 3, pooling: mean, baseline: grand_mean}
batch: {rows: 2}
"""
)
TWO = (
    HEAD
    + """
models: [zoo/gpt2, zoo/gemma]
methods:
  comprehension: {source: comprehension, samples: 3, pooling: mean, baseline: grand_mean}
"""
)


@pytest.fixture
def run(server, tmp_path):
    """Runs a plan into a store, here or there; gives the store."""

    def go(text, name, *settings, host=None):
        plan = tmp_path / f"{name}.yaml"
        plan.write_text(f"{text}store: {tmp_path / name}.zarr\n")
        summary = runner.run(check.load(str(plan), settings, host=host))
        assert not summary.failures
        return Store(f"{tmp_path / name}.zarr")

    return go


@pytest.mark.parametrize(
    ("text", "settings"), [pytest.param(MEASURED, LESS, id="quickstart"), pytest.param(TWO, (), id="two-models")]
)
def test_equal_stores(run, server, text, settings):
    missing = [name for name in zoo.FAMILIES if f"zoo/{name}" in text and not (zoo.path(name) / "config.json").exists()]
    if missing:
        pytest.skip(f"not there: {missing}")
    here = run(text, "here", *settings)
    there = run(text, "there", *settings, "executor=ndif", host=server.url)
    own = ("models", "programs", "runs", "jobs")
    groups = [path for path in here.groups() if path not in own]
    assert groups == [path for path in there.groups() if path not in own]
    assert set(there.read("models").executor.values) == {"ndif"}
    assert set(there.read("jobs").status.values) == {"done"}
    compared = 0
    for path in groups:
        a, b = here.read(path).load(), there.read(path).load()
        if "cell" in a:  # what was computed is the same, by its labels; its bytes are not: batches are cut differently
            a, b = (group.sel(cell_field=["fingerprint", "structure"]) for group in (a, b))
        assert set(a) == set(b), path
        for name in a.data_vars:
            if name.startswith("_") or name in ("seconds", "run", "committed", "source"):
                continue
            assert a[name].dims == b[name].dims
            left, right = a[name].values, b[name].values
            if left.dtype.kind == "f":
                largest = max(np.nanmax(np.abs(left), initial=0), 1e-12)
                np.testing.assert_allclose(right, left, atol=1e-5 * largest, rtol=0, err_msg=f"{path} {name}")
            else:
                assert a[name].equals(b[name]), f"{path} {name}"
            compared += 1
    assert compared > 10


def test_a_killed_run_fetches_what_it_paid_for(run, server, tmp_path):
    """`nsteer run --remote`, killed with SIGKILL while its jobs wait, and run again."""
    plan = tmp_path / "killed.yaml"
    plan.write_text(f"{CAPTURE}store: {tmp_path / 'killed'}.zarr\n")
    command = prefork.nsteer("run", plan, "--remote", "--host", server.url)
    ran = server.ran("zoo/llama")
    with server.turned(slow=3):
        client = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        said = []
        while sum(" received " in line for line in said) < 1:
            line = client.stderr.readline()
            assert line, said
            said.append(line)
        time.sleep(1)
        client.kill()
        client.communicate()  # to the end of what it says: the forked process is gone then
    flying = Store(tmp_path / "killed.zarr").read("jobs")
    assert (flying.status.values == "in flight").any()
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert "resumed" in again.stderr
    jobs = Store(tmp_path / "killed.zarr").read("jobs")
    assert set(jobs.status.values) == {"done"}
    assert server.ran("zoo/llama") == ran + jobs.sizes["job"]  # every job ran once
    here, there = run(CAPTURE, "whole"), Store(tmp_path / "killed.zarr")
    a, b = (store.read(f"activations/{slug('zoo/llama')}").pooled.load() for store in (here, there))
    np.testing.assert_allclose(b.values, a.values, atol=1e-5 * np.nanmax(np.abs(a.values)), rtol=0)
