"""`--json` of every command: one JSON value on standard output, with the keys that docs/report.md promises."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import textstore
from click.testing import CliRunner
from planside import PLAN, STEER

from nsteer import cli
from nsteer.report import figures

DOC = (Path(__file__).parent.parent / "docs/report.md").read_text(encoding="utf-8")


def promised(row: str) -> list[str]:
    """The keys in a row of the document's tables; what is said in brackets, or after a semicolon, is not counted."""
    [line] = [line for line in DOC.splitlines() if line.startswith(f"| {row} |")]
    keys = line.split(" | ", 1)[1].split(";")[0]
    return re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", keys))


def said(*arguments: str):
    done = CliRunner().invoke(cli.main, [*arguments, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "s.zarr"
    textstore.make(path, models=1)
    return str(path)


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "plan.yaml").write_text(PLAN + STEER)
    return "plan.yaml"


def test_run(plan, monkeypatch):
    from nsteer.runner import Summary

    monkeypatch.setattr("nsteer.runner.run", lambda study, **named: Summary(study.plan.store, {"vectors": 1}, {}))
    assert list(said("run", plan)) == promised("`run`")


def test_check_and_show_of_a_plan(plan):
    assert list(said("check", plan)) == promised("`check`")
    shown = said("show", plan)
    assert sorted(shown) == sorted(promised("`show` of a plan")) and shown["programs"] == {}


def test_show_of_a_store(store):
    shown = said("show", store)
    assert list(shown) == promised("`show` of a store")
    assert shown["separation"] == [] and set(shown["dose"][0]) == set(promised("`dose`"))
    assert set(shown["texts"][0]) == set(promised("`texts`"))


def test_separation_and_programs_of_a_store(tmp_path):
    import numpy as np
    import xarray as xr
    from test_claims import derived

    from nsteer.stages import arrays
    from nsteer.store import Store

    store = Store(tmp_path / "d.zarr")
    derived(store, "zoo/llama", np.random.default_rng(0))
    store.prepare([arrays.programs_group(["abc"])])
    store.commit("programs", ("abc",), xr.Dataset({"source": ((), "x"), "stage": ((), "s")}), fingerprint=0)
    shown = said("show", "d.zarr")
    assert list(shown["programs"][0]) == promised("`programs`")
    assert list(said("show", "d.zarr", "--source")["programs"][0]) == ["program", "source", "stage"]
    assert set(shown["separation"][0]) - set(promised("`separation`")) == set()
    best = shown["separation"][0]["best"]["accuracy"]
    assert set(promised("`separation`")) >= set(shown["separation"][0]) and set(best) == {"layer", "depth", "value"}


def test_ls(store):
    listed = said("ls", store)
    assert set(promised("`ls`")) == set(listed["generations"])
    assert (listed["generations"]["done"], listed["generations"]["cells"]) == (12, 12)


def test_report(store):
    rows = said("report", store)
    assert set(rows[0]) == set(promised("`report`"))


def test_every_figure_function_is_in_the_table():
    own = [n for n in figures.__all__ if inspect.isfunction(getattr(figures, n)) and n not in ("svg", "pictures")]
    assert (
        sorted(re.findall(r"^\| `(\w+)` \| .* \| .* \|$", DOC.split("## Figures")[1].split("## The terminal")[0], re.M))
        == own
    )
    for name in own:
        assert len(inspect.getdoc(getattr(figures, name)) or "") > 60, name
