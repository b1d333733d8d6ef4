"""`nsteer report` sets the claims beside a store, prints them, and keeps them where the analyst finds them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

import nsteer

CODE = (
    "import sys; from nsteer.cli import main\n"
    "try: main(sys.argv[1:])\n"
    "except SystemExit as e: assert not e.code\n"
    "assert 'torch' not in sys.modules"
)


@pytest.fixture(scope="module")
def reported(quickstart, tmp_path_factory):
    """A copy of the quickstart's store with a report made of it, and what was printed."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(quickstart[0] / "store/quickstart.zarr", folder / "q.zarr")
    done = subprocess.run(
        [sys.executable, "-c", CODE, "report", "q.zarr", "--json"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_all_six_claims_have_rows(reported):
    assert {row["claim"][0] for row in reported[1]} >= set("123456")


def test_what_the_store_lacks_is_a_hole_that_says_so(reported):
    """The quickstart measures no anisotropy: the row is there, and says what is missing."""
    rows = [row for row in reported[1] if row["claim"].startswith("3")]
    assert rows and all(row["verdict"] == "cannot be compared" and "anisotropy" in row["why"] for row in rows)


def test_the_table_is_in_the_store(reported):
    table = nsteer.open(reported[0] / "q.zarr").claims
    assert table.verdict.values.tolist() == [row["verdict"] for row in reported[1]]
    assert all(json.loads(text) is not None for text in table.inputs.values.tolist())


def test_the_same_store_gives_the_same_table(reported):
    command = [sys.executable, "-m", "nsteer", "report", "q.zarr", "--json"]
    done = subprocess.run(command, cwd=reported[0], capture_output=True, text=True)
    assert json.loads(done.stdout) == reported[1]
    assert nsteer.open(reported[0] / "q.zarr")["claims"].sizes["report"] == 1
