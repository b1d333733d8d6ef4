"""A store damaged in every way that a seed gives: whatever reads it says one line, never hangs, swells or runs code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import prefork
import pytest

BATCHES = int(os.environ.get("NSTEER_DAMAGED_BATCHES", "1"))
"""Batches of damaged stores, each read by every command: one is of 10 stores, one of each kind of damage, some 70
reads; more are of 19 each, and 36 of those are for a release."""

PLAN = """
name: small
models: [zoo/gpt2]
texts: zoo
emotions: [happy, sad]
methods: {reading: jeong2026-comprehension}
steer: {strengths: [0.1], prompts: {walk: tom walked to the market and}, generate: {max_new_tokens: 4}}
store: store/small.zarr
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A folder with a plan and the store that it made."""
    from nsteer import runner
    from nsteer.plan import check
    from nsteer.report import reporting
    from nsteer.store import results

    folder = tmp_path_factory.mktemp("small")
    (folder / "small.yaml").write_text(PLAN)
    runner.run(check.load(folder / "small.yaml", [f"store={folder / 'small.zarr'}"]))
    opened = results.open(folder / "small.zarr")
    reporting.report(opened, reporting.evidence(opened))
    return folder


def harness(small: Path, folder: Path, first: int, count: int, which: str) -> None:
    script = Path(__file__).with_name("damaging_stores.py")
    words = [small / "small.zarr", first, count, small / "small.yaml", which]
    done = subprocess.run(prefork.file(script, *words), capture_output=True, text=True, timeout=3000, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert not report["bad"], report["bad"][:5]
    assert report["refused"] > count / 2 and report["read"] > count / 2
    assert report["memory"] < 2 * 2**30


def test_damaged_stores_are_read_or_refused_in_one_line(small, tmp_path):
    harness(small, tmp_path, 1, 10, "few")


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 10 + BATCHES))
def test_every_command_reads_damaged_stores_or_refuses_them_in_one_line(small, tmp_path, first):
    harness(small, tmp_path, first, 10 if BATCHES == 1 else 19, "all")
