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
    found = nsteer_("check quickstart --json")
    assert found.exit_code == 0 and found.stderr == (
        "note: quickstart is the plan of that name that comes with nsteer\n"
    )
    assert nsteer.load("quickstart").plan.name == "quickstart" and nsteer.load("jeong2026-zoo").document.bases
    Path("quickstart.yaml").write_text((ROOT / "plans/read-edit.yaml").read_text())
    found = nsteer_("check quickstart")
    assert "note: quickstart is quickstart.yaml of this folder" in found.stderr
    assert nsteer.load("quickstart").plan.reads and nsteer_("show quickstart").exit_code == 0


@pytest.mark.parametrize(("word", "said"), [("quikstart", "did you mean 'quickstart'?"), ("zzz", "known: anthropic")])
def test_an_unknown_name_is_told_the_known_ones(word, said):
    found = nsteer_(f"run {word}")
    assert found.exit_code == 2 and said in found.stderr and "see nsteer plans" in found.stderr
    found = nsteer_(f"plans {word}")
    assert found.exit_code == 2 and "expected a plan that comes with nsteer" in found.stderr
    with pytest.raises(PlanError) as raised:
        nsteer.load(f"sub/{word}.yaml")
    assert "nsteer plans" not in str(raised.value)
