"""Directions from a store: `check` knows whether the vector is there, of this model, at the layers that edits use."""

from __future__ import annotations

import json
import os

import pytest
import torch
from click.testing import CliRunner

from nsteer import cli
from nsteer.errors import PlanError
from nsteer.plan import check
from nsteer.runner import directing
from nsteer.stages import cells
from nsteer.stages.job import Job
from nsteer.vectors import exchange

LAYERS = (1, 3)
"""Blocks of zoo/gpt2, which has six, at which the imported vector is a number."""


@pytest.fixture
def store(tmp_path):
    """A store whose vector theirs / evil of zoo/gpt2 has numbers at two layers."""
    torch.save({str(layer): torch.ones(96) * (layer + 1) for layer in LAYERS}, tmp_path / "v.pt")
    words = {"model": "zoo/gpt2", "method": "theirs", "emotion": "evil", "layers_are": "block-index"}
    exchange.bring_in(tmp_path / "v.pt", tmp_path / "theirs.zarr", **words)
    return tmp_path / "theirs.zarr"


def plan(store, *edits, models=("zoo/gpt2",), directions=None, **named):
    """The plan file of these edits, one condition each; `named` in place of the vector's path, method or emotion."""
    fields = {
        "name": "borrowing",
        "models": list(models),
        "texts": "zoo",
        "prompts": ["the old house was"],
        "reads": {"all": {"layers": [-1, 2]}},
        "directions": {
            "evil": {"store": {"path": str(store), "method": "theirs", "emotion": "evil", **named}},
            **(directions or {}),
        },
        "edits": {f"e{i}": [{"op": "add", "direction": "evil", **edit}] for i, edit in enumerate(edits)},
        "store": str(store.parent / "borrowing.zarr"),
    }
    file = store.parent / "borrowing.yaml"
    file.write_text(json.dumps(fields))
    return file


def problems(file) -> list[tuple[str, str, str, str]]:
    try:
        check.load(file, allow_outside=True)
    except PlanError as error:
        return [(problem.path, problem.found, problem.expected, problem.hint) for problem in error.problems]
    return []


def lacking(place: str, layer: int, name: str = "evil") -> tuple[str, str, str, str]:
    absence = f"layer {layer} of zoo/gpt2, at which the store has no vector {name!r}"
    return place, absence, "layers at which it has one", "it has 1,3"


def test_layers_that_the_vector_has_are_no_problem(store):
    assert problems(plan(store, {"layers": [3, 1]}, {"layers": [5, 2], "vector_layer": -3})) == []


def test_each_edit_at_a_layer_that_the_vector_lacks_is_one_problem(store):
    file = plan(store, {"layers": [5, 2]}, {"layers": [3, 1]}, {}, {"layers": 1, "vector_layer": 0.5})
    assert problems(file) == [lacking("edits.e0[0].layers", 2), lacking("edits.e2[0].layers", 0)]
    file = plan(store, {"layers": 1, "vector_layer": -1})
    assert problems(file) == [lacking("edits.e0[0].vector_layer", 5)]


def test_gates_references_and_formulas_are_looked_through(store):
    more = {"twice": "2*half - lot", "half": "0.5*evil", "lot": {"random": 3}, "usual": {"mean": {"texts": ["a b"]}}}
    gate = {"direction": "lot", "layers": 5, "when": {"direction": "half", "above": 0}}
    usual = {"op": "affine", "direction": "lot", "layers": 2, "vector_layer": 1, "reference": "usual"}
    file = plan(store, {"direction": "twice", "layers": [5, 1]}, gate, usual, {"layers": 1}, directions=more)
    assert problems(file) == [lacking("edits.e0[0].layers", 5), lacking("edits.e1[0].layers", 5)]


@pytest.mark.parametrize(
    ("named", "problem"),
    [
        (
            {"method": "thiers"},
            (
                "directions.evil.store.method",
                "'thiers'",
                "a method of zoo/gpt2 in that store",
                "did you mean 'theirs'?",
            ),
        ),
        (
            {"emotion": "joy"},
            ("directions.evil.store.emotion", "'joy'", "a finished vector of theirs in that store", "known: evil"),
        ),
    ],
)
def test_a_vector_that_is_not_there_is_told_where_it_is_named(store, named, problem):
    assert problems(plan(store, {"layers": [5, 2]}, **named)) == [problem]


def test_every_model_of_the_plan_needs_a_vector(store):
    (problem,) = problems(plan(store, {"layers": 1}, models=["zoo/gpt2", "zoo/llama"]))
    assert problem == (
        "directions.evil.store",
        f"{str(store)!r}, without vectors of it",
        "a store with vectors of zoo/llama",
        "",
    )


def test_a_vector_of_another_model_under_the_same_label_is_told(store):
    other = {"id": "zoo/llama", "label": "zoo/gpt2"}
    (problem,) = problems(plan(store, {"layers": 1}, models=[other]))
    assert problem[0] == "directions.evil.store" and problem[1] == "a vector of width 96 where zoo/gpt2 has 112"


def test_a_damaged_vector_and_a_folder_that_is_no_store_are_told(store):
    damaged = max((file for file in (store / "vectors").rglob("*/vector/**/*") if file.is_file()), key=os.path.getsize)
    damaged.write_bytes(damaged.read_bytes()[:-5])
    (problem,) = problems(plan(store, {"layers": 1}))
    assert problem[0] == "directions.evil.store.path" and "is damaged" in problem[1]
    (store.parent / "empty").mkdir()
    (problem,) = problems(plan(store.parent / "empty", {"layers": 1}))
    assert problem[0].startswith("directions.evil.store")


def test_the_command_says_it_in_one_line(store):
    said = CliRunner().invoke(cli.main, ["check", str(plan(store, {"layers": [5, 2]})), "--allow-outside"])
    line, end = said.output.strip().splitlines()
    assert said.exit_code == 2 and end == "1 problem; no model was loaded"
    assert "edits.e0[0].layers" in line and line.endswith("(it has 1,3)")


def test_a_vector_is_read_once_for_its_fingerprint_and_for_its_use(store):
    """Another one is put in its place between the two: cells hold what their fingerprints say."""
    study = check.load(plan(store, {"layers": [3, 1]}), allow_outside=True)
    facts, spec = study.facts[0], study.plan.directions["evil"]
    numbers = cells.reads(Job(study, facts))
    torch.save({str(layer): torch.ones(96) * 7 for layer in LAYERS}, store.parent / "v.pt")
    words = {"model": "zoo/gpt2", "method": "theirs", "emotion": "evil", "layers_are": "block-index"}
    exchange.bring_in(store.parent / "v.pt", store, **words)
    assert directing.stored(study, facts, spec)[list(LAYERS), 0].tolist() == [2, 4]
    assert cells.reads(Job(study, facts)) == numbers
    again = check.load(plan(store, {"layers": [3, 1]}), allow_outside=True)
    assert directing.stored(again, facts, spec)[list(LAYERS), 0].tolist() == [7, 7]
    assert cells.reads(Job(again, facts)) != numbers
