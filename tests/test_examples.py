"""The example analyses: they need xarray alone, and find what nsteer finds by other code."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import zoo_corpus

EXAMPLES = Path(__file__).parent.parent / "docs/examples"
NAMES = sorted(file.name for file in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="session")
def store(quickstart):
    return str(quickstart[0] / "store/quickstart.zarr")


def names(script: str) -> dict:
    return runpy.run_path(str(EXAMPLES / script))


def test_there_are_three():
    assert NAMES == ["best_layer.py", "dose_response.py", "neighbours.py"]


@pytest.mark.parametrize("script", NAMES)
def test_a_script_runs_as_it_stands_without_nsteer_or_torch(script, quickstart):
    code = (
        "import runpy, sys; path = sys.argv.pop(); runpy.run_path(path, run_name='__main__')\n"
        "assert not {'nsteer', 'torch', 'nnsight', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(EXAMPLES / script)]
    done = subprocess.run(command, cwd=quickstart[0], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 4


def test_best_layer_is_what_nsteer_measures(store):
    from nsteer.science import separation
    from nsteer.store import results

    table = names("best_layer.py")["table"](store, "zoo/llama")
    opened = results.open(store)
    pooled = opened["activations", "zoo/llama"].pooled.sel({"model": ["zoo/llama"]})
    text = opened["samples", "zoo/llama"].text.load()
    ours = separation.measure(pooled, baseline="neutral_mean", text=text, shuffles=0, seed=0)
    for (method, layer), row in table.iterrows():
        metrics = ours.sel({"model": "zoo/llama", "method": method, "layer": layer})
        assert np.isclose(row["mean pairwise cosine"], float(metrics.mean_pairwise_cosine), atol=1e-5)
        assert np.isclose(row["held-out accuracy"], float(metrics.accuracy), atol=1e-6)
    assert (table.loc["generation"]["held-out accuracy"] > 0.9).all()
    assert table.loc["generation"]["held-out accuracy"].max() > table.loc["comprehension"]["held-out accuracy"].max()


def test_dose_response_rises_and_the_random_direction_does_not(store):
    table = names("dose_response.py")["table"](store)
    target, random = table["P(target)"]["none"], table["P(target)"]["random"]
    assert target.is_monotonic_increasing and target.iloc[-1] > 0.6
    assert (random < 0.2).all()
    assert (table["n"] == 40).all(axis=None)
    assert (table["rise"]["none"] < target).all()


def test_neighbours_are_the_planted_kin_and_the_texts_are_twins(store):
    script = names("neighbours.py")
    cosines = script["cosines"](store, "zoo/llama", "generation", 3)
    assert np.allclose(np.diag(cosines), 1, atol=1e-5) and list(cosines.index) == list(cosines.columns)
    kin = {frozenset(pair) for pair in zoo_corpus.kin_pairs()}
    first = script["nearest"](cosines)["nearest 1"].str.split().str[0]
    assert np.mean([frozenset(pair) in kin for pair in first.items()]) > 0.8
    assert abs(list(cosines.index).index("happy") - list(cosines.index).index("sad")) > 8
    texts = script["texts"](store, "zoo/llama", "generation")
    assert len(texts) == 5 * 8 and (texts.unsteered != texts.steered).mean() > 0.9
    assert (texts.groupby("prompt").unsteered.nunique() == 1).all()


def test_the_root_still_opens_with_plain_xarray_after_a_report(quickstart, tmp_path):
    import shutil

    import xarray as xr

    shutil.copytree(quickstart[0] / "store", tmp_path / "store")
    command = [str(Path(sys.executable).parent / "nsteer"), "report", "store/quickstart.zarr", "--claims"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert "summary" in xr.open_datatree(tmp_path / "store/quickstart.zarr", engine="zarr").children
