"""Ways in: plans by their names from anywhere, and what `nsteer init` writes runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from planside import ROOT

import nsteer
from nsteer import cli
from nsteer.errors import PlanError
from nsteer.plan import named, reader


@pytest.fixture(autouse=True)
def stands(tmp_path):
    """In an empty folder (tests/conftest.py)."""


def nsteer_(words: str):
    return CliRunner().invoke(cli.main, words.split(), catch_exceptions=False)


# ---- plans by name -----------------------------------------------------------------------------------------------


def test_the_plans_of_the_repository_are_those_that_come_with_nsteer():
    assert {file.name for file in (ROOT / "plans").glob("*.yaml")} == {f"{name}.yaml" for name in named.shipped()}
    for name, file in named.shipped().items():
        assert file.read_text() == (ROOT / f"plans/{name}.yaml").read_text()
    shown = nsteer_("plans")
    assert [line.partition(":")[0] for line in shown.stdout.splitlines()] == list(named.shipped())
    assert json.loads(nsteer_("plans --json").stdout)["quickstart"].startswith("One embedded model")
    assert reader.parse(nsteer_("plans quickstart").stdout).data == reader.read(ROOT / "plans/quickstart.yaml").data


def test_a_plan_is_taken_by_its_name_and_a_file_of_that_name_wins():
    command = nsteer_("check quickstart --json")
    assert command.exit_code == 0 and command.stderr == (
        "note: quickstart is the plan of that name that comes with nsteer\n"
    )
    assert nsteer.load("quickstart").plan.name == "quickstart" and nsteer.load("jeong2026-zoo").document.bases
    Path("quickstart.yaml").write_text((ROOT / "plans/read-edit.yaml").read_text())
    command = nsteer_("check quickstart")
    assert "note: quickstart is quickstart.yaml of this folder" in command.stderr
    assert nsteer.load("quickstart").plan.reads and nsteer_("show quickstart").exit_code == 0


@pytest.mark.parametrize(("word", "said"), [("quikstart", "did you mean 'quickstart'?"), ("zzz", "known: anthropic")])
def test_an_unknown_name_is_told_the_known_ones(word, said):
    command = nsteer_(f"run {word}")
    assert command.exit_code == 2 and said in command.stderr and "see nsteer plans" in command.stderr
    command = nsteer_(f"plans {word}")
    assert command.exit_code == 2 and "expected a plan that comes with nsteer" in command.stderr
    with pytest.raises(PlanError) as raised:
        nsteer.load(f"sub/{word}.yaml")
    assert "nsteer plans" not in str(raised.value)


# ---- a first plan ------------------------------------------------------------------------------------------------

FIRST = {
    "contrast": ("generations", {"concept": ["honest"], "layer_set": ["2", "3"]}),
    "emotion": ("generations", {"emotion": ["happy", "sad"], "strength": [0.1, 0.2]}),
    "capture": ("reads/zoo--llama", {"read": ["end", "mean"], "prompt": ["market", "rain", "song", "grave"]}),
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_first_plan_runs_as_it_stands(kind):
    shown = nsteer_(f"init mine --kind {kind}")
    assert shown.exit_code == 0
    assert shown.stdout == f"wrote mine/{kind}.yaml and mine/{kind}.csv\nnsteer run mine/{kind}.yaml\n"
    assert Path(f"mine/{kind}.yaml").read_text().count("#") > 4
    summary = nsteer.run(nsteer.load(f"mine/{kind}.yaml"))
    assert summary.done and not summary.failures
    product, labels = FIRST[kind]
    group = nsteer.open(f"{kind}.zarr")[product]
    for dim, wanted in labels.items():
        assert group[dim].values.tolist() == wanted, dim


def test_init_overwrites_nothing():
    assert nsteer_("init").exit_code == 0
    Path("contrast.yaml").write_text("mine")
    again = nsteer_("init")
    assert again.exit_code == 2 and "contrast.yaml, which is there" in again.stderr and "contrast.csv" in again.stderr
    assert Path("contrast.yaml").read_text() == "mine"
    Path("emotion.csv").symlink_to("nowhere")
    assert nsteer_("init --kind emotion").exit_code == 2 and not Path("emotion.yaml").exists()
    Path("file").write_text("")
    assert "a folder that can be written" in nsteer_("init file/mine --kind capture").stderr
