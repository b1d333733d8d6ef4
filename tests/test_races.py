"""Runs, gc, repair, derive and merge at once on one store, signalled at random: a short form of `bench/races.py`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import prefork
import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
BAD = ("wrong", "lost", "unknown", "foreign", "findings", "tracebacks", "hangs", "not_recovered", "check_failed")

SHORT = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import races
races.TRIALS = 3
for plan in ("base", "steps", "neutral"):
    del races.PLANS[plan]
sys.exit(races.main())
"""
"""Fewer trials than the bench has on one store, and three of its plans: of texts, of emotions, of the grid."""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="forks and signals")
def test_every_cell_is_what_its_fingerprint_says_whoever_was_at_work(tmp_path):
    asked = prefork.python(SHORT, BENCH, "--seed", 5, "--stores", 1, "--folder", tmp_path)
    done = subprocess.run(asked, capture_output=True, text=True, timeout=580, check=False)
    counts = json.loads(done.stdout.splitlines()[-1])
    assert {name: counts[name] for name in BAD} == dict.fromkeys(BAD, 0), done.stderr[-4000:]
    assert counts["cells"] > 20 and counts["trials"] == 3
