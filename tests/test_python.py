"""Plans from Python: a mapping is checked as a file is; what notebooks show is text, whatever the texts hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import nsteer
from nsteer.errors import PlanError
from nsteer.plan import reader
from nsteer.runner import Summary
from nsteer.runner.failing import Failure
from nsteer.runner.progress import Notebook
from nsteer.system import markup

HOSTILE = "<img src=x onerror=alert(1)>&\x1b[31m"

FILE = """
name: pair
models: [zoo/llama]
directions: {d: {random: 3}}
steer: {layers: [3, 1], strengths: [0.1, 0.2], prompts: {1: tom walked}, generate: {max_new_tokens: 2}}
store: pair.zarr
"""


def fields(**more):
    """The plan of FILE, as Python would write it."""
    steer = {"layers": (3, 1), "strengths": np.array([0.1, 0.2]), "prompts": {1: "tom walked"}}
    steer["generate"] = {"max_new_tokens": np.int64(2)}
    made = {"name": "pair", "models": ("zoo/llama",), "directions": {"d": {"random": 3}}, "steer": steer}
    return {**made, "store": Path("pair.zarr"), **more}


@pytest.fixture(autouse=True)
def stands(tmp_path):
    """In an empty folder (tests/conftest.py)."""


# ---- plans -------------------------------------------------------------------------------------------------------


def test_a_mapping_is_the_plan_that_its_file_would_be():
    Path("pair.yaml").write_text(FILE)
    from_file, from_python = nsteer.load("pair.yaml"), nsteer.plan(fields())
    assert from_python.plan == from_file.plan
    assert reader.parse(from_python.document.text).data == from_file.document.data  # what the store keeps of it
    assert nsteer.load(fields(), ["steer.strengths=[0.5]"]).plan.steer[0].strengths == [0.5]


WRONG = {
    "name": "pair",
    "models": ["zoo/lama"],
    "emotions": {"a", "b"},
    "directions": {"d": {"random": object()}},
    "steer": [{"strengths": [0.1, "high"], "prompts": ["x"]}],
    "store": 5,
    "stor": "x.zarr",
}


def test_every_problem_of_a_mapping_is_named_by_its_path():
    with pytest.raises(PlanError) as raised:
        nsteer.load(WRONG)
    paths = {one.path for one in raised.value.problems}
    assert {"models[0]", "emotions", "directions.d.random", "steer[0].strengths[1]", "store", "stor"} <= paths
    assert all(not one.file and not one.line for one in raised.value.problems)
    assert "steer[0].strengths[1]: expected a number, found 'high'" in str(raised.value)


def test_a_mapping_extends_a_file_and_each_problem_is_where_it_stands():
    Path("base.yaml").write_text(FILE.replace("random: 3", "randam: 3"))
    with pytest.raises(PlanError) as raised:
        nsteer.load({"extends": "base.yaml", "seed": "x", "steer": {"strengths": [[]], "prompts": ["x"]}})
    places = {one.path: (one.file, one.line) for one in raised.value.problems}
    assert places["directions.d.randam"] == ("base.yaml", 4)
    assert places["seed"] == places["steer.strengths[0]"] == ("", 0)
    Path("base.yaml").write_text(FILE)
    found = nsteer.load({"extends": "base.yaml", "seed": 4}).plan
    assert (found.seed, found.name) == (4, "pair")


def test_what_no_person_would_write_is_refused():
    circle: dict = {}
    circle["steer"] = circle
    with pytest.raises(PlanError, match="inside itself"):
        nsteer.load(circle)
    with pytest.raises(PlanError, match="values"):
        nsteer.load({"name": "x", "steer": {"strengths": np.zeros(300_000)}})
    with pytest.raises(PlanError, match="'1' given twice"):
        nsteer.load(fields(judge={"map": {1: None, "1": None}}))


def test_a_mapping_may_name_no_more_than_a_file():
    outside = {"d": {"store": {"path": str(Path.cwd().parent), "method": "a", "emotion": "b"}}}
    with pytest.raises(PlanError, match="outside"):
        nsteer.load(fields(directions=outside))


# ---- what notebooks show -----------------------------------------------------------------------------------------


def tags(html: str) -> set[str]:
    return set(re.findall(r"<\s*/?\s*([a-z]+)", html, re.I))


def test_no_text_becomes_markup():
    failure = Failure("steering", ("m", HOSTILE), HOSTILE)
    summary = Summary(f"{HOSTILE}.zarr", {"steering": 1}, {HOSTILE: 2}, [failure], [failure], [HOSTILE])
    study = nsteer.load(fields(about=HOSTILE, steer={"strengths": [0.1], "prompts": {HOSTILE: HOSTILE}}))
    for one in (study, summary):
        html = one._repr_html_()
        assert tags(html) <= {"table", "caption", "b", "tr", "td", "th"}
        assert "&lt;img src=x onerror=alert(1)&gt;&amp;" in html and "\x1b" not in html and "\\x1b[31m" in html
    assert "\x1b" not in repr(study) and "zoo/llama (5 layers of width 112)" in repr(study)
    assert len(repr(study)) < 2000  # of the texts of its set nothing


def test_a_run_of_a_notebook_shows_its_bar_and_what_came_of_it():
    shown = []

    class Handle:
        def update(self, one):
            shown.append((one._repr_html_(), repr(one)))

    study = nsteer.load(fields())
    summary = nsteer.run(study, progress=Notebook(lambda one, display_id: Handle()))
    assert summary.done["steering"] == 4 and not summary.failures
    html, plain = shown[-1]
    assert "<progress max='1' value='1.000'>" in html and "4 of 4 cells done" in plain
    assert tags(html) <= {"progress", "br", "small"}
    values = [
        float(re.search(r"value='([\d.]+)'", one)[1]) for one, _ in shown if "steering: " in one and "value" in one
    ]
    assert values and max(values) <= 1
    assert "<td" in summary._repr_html_() and ">4</td>" in summary._repr_html_()
    opened = nsteer.open("pair.zarr")
    assert "<td style='text-align: left; vertical-align: top; white-space: pre-wrap'>steering<" in opened._repr_html_()


def test_a_bar_of_hostile_words_is_a_bar():
    class Handle:
        def update(self, one):
            self.html = one._repr_html_()

    handle = Handle()
    bar = Notebook(lambda one, display_id: handle)
    bar.model(HOSTILE, 1, 1)
    bar.stage("steering", 2, 0)
    bar.note(HOSTILE)
    assert "<img" not in handle.html and "\x1b" not in handle.html
    assert tags(markup.bar(7.0, HOSTILE)) == {"progress", "br"}


def test_the_plan_of_a_call_and_the_room_are_one_name():
    import nsteer.plan.layers  # binds nsteer.plan to the room

    assert nsteer.plan(fields()).plan.name == "pair" and nsteer.plan.layers.resolve([2], 5)
