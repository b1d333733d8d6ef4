"""From a CSV of forty pairs and no other file to a judged grid, a page and a vector; as a plan and in Python."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from planside import ROOT

import nsteer
from nsteer import cli
from nsteer.report import overview, reporting

PLAN = """\
name: honesty
models: [zoo/llama]
directions:
  honest: {contrast: {file: honesty.csv, positive: honest, negative: dishonest}}
steer:
  layers: {each: [3, 1]}
  strengths: {kl: [0.1, 0.5]}
  prompts: {file: honesty.csv, text: "{question} i", limit: 3}
  controls: [zero, random, prompted]
  generate: {max_new_tokens: 6}
judges:
  words: {rule: {words: {honest: [i, my, yes, he], dishonest: [never, nobody, they]}}}
  asked: {choices: {question: "{text} . it was", answers: {honest: [the, a], dishonest: [not, he]}, chat: never}}
measure: {lens: 0}
store: plan.zarr
"""

PYTHON = """\
import csv, nsteer
with open("honesty.csv", encoding="utf-8") as file:
    rows = list(csv.DictReader(file))
honest = nsteer.contrast("zoo/llama", [r["honest"] for r in rows], [r["dishonest"] for r in rows], name="honest")
found = nsteer.sweep("zoo/llama", honest, {"kl": [0.1, 0.5]}, [r["question"] + " i" for r in rows[:3]],
    layers={"each": [3, 1]}, controls=["zero", "random", "prompted"], generate={"max_new_tokens": 6},
    store="python.zarr", measure={"lens": 0}, judges={
        "words": {"rule": {"words": {"honest": ["i", "my", "yes", "he"], "dishonest": ["never", "nobody", "they"]}}},
        "asked": {"choices": {"question": "{text} . it was", "chat": "never",
                              "answers": {"honest": ["the", "a"], "dishonest": ["not", "he"]}}}})
nsteer.page(found, "python.html")
nsteer.export(found, "python.npz", methods=["store"], emotions=["honest"])
"""


@pytest.fixture(scope="module")
def stands(tmp_path_factory):
    """A folder with the CSV alone, in which the plan ran by the commands, then the Python."""
    folder = tmp_path_factory.mktemp("honesty")
    shutil.copy(ROOT / "docs/examples/honesty.csv", folder)
    (folder / "honesty.yaml").write_text(PLAN)
    commands = [
        "run honesty.yaml --quiet",
        "report plan.zarr -o plan.html",
        "export plan.zarr -o plan.npz --method contrast --concept honest",
    ]
    with pytest.MonkeyPatch.context() as at:
        at.chdir(folder)
        for words in commands:
            done = CliRunner().invoke(cli.main, words.split(), catch_exceptions=False)
            assert done.exit_code == 0, done.output
        exec(compile(PYTHON, "notebook", "exec"), {})
    return folder


def test_they_are_short():
    assert len(PLAN.splitlines()) <= 20 and len(PYTHON.splitlines()) <= 15


def test_the_grid_is_calibrated_and_judged_by_both_with_controls(stands):
    results = nsteer.open(stands / "plan.zarr")
    judged = results["judged"]
    assert set(judged.judge.values.tolist()) == {"words", "asked"}
    assert judged.control.values.tolist() == [
        "none",
        "random",
    ]
    assert judged.layer_set.values.tolist() == ["1", "3"] and len(judged.prompt) == 3
    assert judged.score.sel({"class": ["honest", "dishonest"]}).notnull().all()
    texts = results["generations"].text
    words = judged.score.sel({"judge": "words", "class": "honest"})
    for spot in np.ndindex(texts.shape):
        at = dict(zip(texts.dims, spot, strict=True))
        said = re.findall(r"\w+", texts.isel(at).item().lower())
        assert words.isel(at).item() == float(bool({"i", "my", "yes", "he"} & set(said)))
    asked = judged.score.sel({"judge": "asked", "class": ["honest", "dishonest"]})
    np.testing.assert_allclose(asked.sum("class"), 1, atol=1e-5)
    told = [line for line in overview.overview_of(reporting.evidence(results)).asked if "steered to" in line]
    assert told and all(line.endswith("controls: unsteered, random, prompted.") for line in told)
    calibration = results["calibration"].sel({"control": "none"})
    assert calibration.found.notnull().all() and float(calibration.found.max()) > float(calibration.found.min())
    for control in ("unsteered", "prompted"):
        asked = {"asked": "towards"} if control == "prompted" else {}
        assert (results[control].text.sel(asked) != "").all() and len(results[control].prompt) == 3
        assert results[f"judged_{control}"].score.sel({"class": "honest", **asked}).notnull().all()


def test_python_gives_the_same_numbers(stands):
    """Of the vector itself: a random rotation is drawn by its labels, and `method` is another."""
    plan, python = nsteer.open(stands / "plan.zarr"), nsteer.open(stands / "python.zarr")
    for product, name in (("generations", "text"), ("judged", "score"), ("calibration", "found")):
        from_plan, from_python = (opened[product][name].sel({"control": ["none"]}) for opened in (plan, python))
        assert (
            from_plan.dims == from_python.dims
            and from_plan.method.values == ["contrast"]
            and from_python.method.values == ["store"]
        )
        if name == "text":
            assert (from_plan.values == from_python.values).all()
        else:
            np.testing.assert_allclose(from_plan.values, from_python.values, rtol=1e-4, atol=1e-6)


def test_the_page_and_the_vector_are_there(stands):
    for name in ("plan", "python"):
        html = (stands / f"{name}.html").read_text(encoding="utf-8")
        assert "honest" in html and "Did you eat the last cake?" in html and "words" in html
    with np.load(stands / "plan.npz") as plan, np.load(stands / "python.npz") as python:
        np.testing.assert_allclose(plan["contrast/honest"], python["store/honest"], atol=1e-6)
        vector = nsteer.open(stands / "plan.zarr").sel(model="zoo/llama", concept="honest", layer=3).values.squeeze()
        np.testing.assert_array_equal(plan["contrast/honest"][3], vector)
    assert {file.name for file in Path(stands).iterdir() if file.suffix == ".csv"} == {"honesty.csv"}
