"""A plan run on vLLM gives the store that it gives here, whatever is killed, and whoever did a part of it before."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from conftest import ROOT

import nsteer

PLAN = "plans/quickstart.yaml"
ABOUT = {"/programs", "/models", "/runs", "/failures"}
HOW = ("cell", "program", "batches")
"""Groups of the store, and variables in others, that tell how results came about."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory, command):
    """A folder with the store of the quickstart as it is run here, and on vLLM, where it is killed in the middle."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(ROOT / "plans", folder / "plans")
    done = command(folder, "run", PLAN, "--set", "store=local.zarr")
    assert done.returncode == 0, done.stderr
    words = ["run", PLAN, "--set", "store=vllm.zarr", "--set", "executor=vllm"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "nsteer", *words]
    with subprocess.Popen(
        line, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as first:
        assert first.stdout is not None
        assert any("steering: 30 cells to do" in said for said in first.stdout), "it never came to steer"
        first.send_signal(signal.SIGKILL)
    again = command(folder, *words)
    assert again.returncode == 0, again.stderr
    return folder, again.stdout


def stage(printed: str, name: str) -> list[int]:
    """Cells done, already there and failed, of the summary."""
    [line] = [line for line in printed.splitlines() if line.split()[:1] == [name] and line.split()[-1].isdigit()]
    return [int(word) for word in line.split()[1:4]]


def test_a_killed_run_goes_on(stores):
    _, printed = stores
    assert stage(printed, "samples") == [0, 42, 0] and stage(printed, "activations") == [0, 42, 0]
    done, there, failed = stage(printed, "steering")
    assert done + there == 30 and done and not failed


def test_the_stores_are_equal(stores):
    folder, _ = stores
    local, other = (xr.open_datatree(folder / f"{name}.zarr", engine="zarr") for name in ("local", "vllm"))
    paths = {path for path in local.groups if "cell" in local[path].data_vars} - ABOUT
    assert {"/samples", "/activations", "/vectors", "/steering", "/unsteered", "/judged"} <= {
        path if path.count("/") == 1 else f"/{path.split('/')[1]}" for path in paths
    }
    same = ["fingerprint", "labels"]
    for path in sorted(paths):
        mine, its = local[path].to_dataset().load(), other[path].to_dataset().load()
        xr.testing.assert_equal(mine.cell.sel(cell_field=same), its.cell.sel(cell_field=same))
        rest = [name for name in mine.data_vars if name not in ("cell", "program")]
        exact = [name for name in rest if mine[name].dtype.kind != "f"]
        xr.testing.assert_equal(mine[exact], its[exact])  # texts, tokens, counts
        for name in set(rest) - set(exact):
            size = float(np.abs(mine[name]).max())
            xr.testing.assert_allclose(mine[name], its[name], rtol=0, atol=1e-4 * size)
    [steered] = [group.text for path in paths if path.startswith("/generations") and "text" in (group := local[path])]
    assert (steered != local["/unsteered"].text).mean() > 0.5  # else equal texts would say little


def test_who_did_it_is_told(stores):
    folder, _ = stores
    model = nsteer.open(folder / "vllm.zarr").tree["models"].to_dataset().sel(model="zoo/llama")
    assert model.executor == "vllm" and model.device == "cpu"
    settings = json.loads(str(model.settings.values))
    assert settings["vllm"] and max(settings["difference_from_transformers"].values()) < 1e-5


def test_what_is_shown_is_what_ran(stores, command):
    folder, _ = stores
    shown = command(folder, "show", PLAN, "--set", "executor=vllm", "--source")
    assert shown.returncode == 0, shown.stderr
    ran = xr.open_zarr(folder / "vllm.zarr", group="programs", consolidated=False).source.load()
    for text in map(str, ran.values):
        assert text in shown.stdout and "def run(model, rows):" in text


def test_what_was_done_here_is_not_done_again(stores, command):
    folder, _ = stores
    shutil.copytree(folder / "local.zarr", folder / "both.zarr")
    done = command(folder, "run", PLAN, "--set", "store=both.zarr", "--set", "executor=vllm")
    assert done.returncode == 0, done.stderr
    for name, cells in (("samples", 42), ("activations", 42), ("vectors", 40), ("unsteered", 1), ("steering", 30)):
        assert stage(done.stdout, name) == [0, cells, 0]
    assert "loading" not in done.stdout + done.stderr


SMALL = """
name: small
models: [zoo/gpt2, zoo/mistral]
texts: zoo
emotions: [happy, sad]
executor: vllm
methods:
  spoken:
    {source: generation, samples: 4, generate: {max_new_tokens: 12, sample: true}, pooling: mean, baseline: grand_mean}
steer:
  vectors: {layer: 0.5}
  layers: [0.5]
  strengths: {kl: [0.1]}
  prompts: scenarios-8
  controls: [zero]
  generate: {max_new_tokens: 12, sample: true}
measure: {lens: 3}
store: small.zarr
threads: 1
"""


def test_a_model_that_vllm_lacks_fails_alone_and_the_others_are_those_of_here(tmp_path, command):
    """Sampled texts, calibration, perplexity, lens and anisotropy besides."""
    (tmp_path / "small.yaml").write_text(SMALL)
    done = command(tmp_path, "run", "small.yaml")
    printed = done.stdout + done.stderr
    assert re.search("zoo/gpt2.*vLLM can not serve '.*gpt2': ValueError: Following weights", printed), printed
    assert "Traceback" not in printed
    alone = command(
        tmp_path,
        "run",
        "small.yaml",
        "--set",
        "executor=local",
        "--set",
        "store=here.zarr",
        "--set",
        "models=[zoo/mistral]",
    )
    assert alone.returncode == 0, alone.stderr
    local, other = (nsteer.open(tmp_path / f"{name}.zarr").tree for name in ("here", "small"))
    compared = set()
    for group in (path for path in local.groups if "cell" in local[path].data_vars and path not in ABOUT):
        mine, its = (tree[group].to_dataset().load() for tree in (local, other))
        its = its.sel({dim: mine[dim] for dim in mine.dims if dim in mine.indexes})  # without the other model's labels
        for name in (name for name in mine.data_vars if name not in HOW):
            compared.add(f"{group.split('/')[1]}.{name}")
            if mine[name].dtype.kind == "f":
                xr.testing.assert_allclose(
                    mine[name], its[name], rtol=1e-3, atol=1e-4 * float(np.abs(mine[name]).max())
                )
            else:
                xr.testing.assert_equal(mine[name], its[name])
    drawn = {"samples.token_id", "generations.token_id", "unsteered.token_id"}
    assert compared >= drawn | {"activations.pooled", "calibration.value", "outcomes.perplexity", "lens.logit"}
