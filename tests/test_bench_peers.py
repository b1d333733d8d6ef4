"""The arithmetic of the benchmark against other packages, on made-up seconds whose ratios are known."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import peers
import run


def side(work, *seconds):
    return {"work": work, "cpu": list(seconds), "wall": [3 * cpu for cpu in seconds], "peak_mb": 1.0}


def line(sides, weights=1.0, right=True):
    checks = {name: {"right": right} for name in ("capture", "one_vector", "row_vectors")}
    said = {"peer": "x", "version": "1", "torch": "2", "transformers": "5", "notes": [], "weights": weights}
    return said | {"checks": checks, "sides": sides}


OURS = line(
    {
        "a, same batches": side(256, 8.0),
        "b, same batches": side(256, 4.0),
        "plain forward, same batches": side(256, 10.0),
        "c, a vector a row": side(160, 20.0),
        "plain generate, a vector a row": side(160, 20.0),
    }
)
THEIRS = {
    "a, own batches": side(256, 24.0),
    "plain forward, own batches": side(256, 12.0),
    "c, a vector a batch": side(48, 24.0),
    "plain generate, a vector a batch": side(48, 12.0),
}


def lines(**more):
    by_name = {name: [] for name in peers.PEERS} | {"nsteer": [OURS, OURS]} | more
    return {name: [{"round": n, **fields} for n, fields in enumerate(given)] for name, given in by_name.items()}


def test_throughput_is_compared_by_the_text_and_by_the_row():
    finding = peers.finding("repeng", lines(repeng=[line(THEIRS)] * 2), {})
    assert finding["a: nsteer / whole forward, CPU"]["median"] == 3.0  # 24 s against 8 s
    assert finding["c, a vector a batch: nsteer / peer, CPU"]["median"] == 4.0  # 24 s / 48 rows against 20 s / 160


def test_through_plain_removes_a_slower_machine():
    slow = {name: figures | {"cpu": [5 * s for s in figures["cpu"]]} for name, figures in THEIRS.items()}
    finding = peers.finding("repeng", lines(repeng=[line(slow)]), {})
    assert finding["a: nsteer / whole forward, CPU"]["median"] == 15.0
    assert finding["a: nsteer / whole forward, through plain, CPU"]["median"] == pytest.approx(2.0 / 0.8)
    assert finding["a: peer / plain, CPU"]["median"] == 2.0


def test_a_peer_is_compared_with_the_rounds_that_it_was_in():
    """A cut run: the machine was twice as slow in round 1, which is the only one that the peer has."""
    slow = {name: figures | {"cpu": [2 * s for s in figures["cpu"]]} for name, figures in OURS["sides"].items()}
    ours = [{"round": 1, **line(slow)}, {"round": 0, **OURS}]
    finding = peers.finding("repeng", lines(nsteer=ours, repeng=[{"round": 1, **line(THEIRS)}]), {})
    assert finding["a: nsteer / whole forward, CPU"] == {"median": 1.5, "least": 1.5, "most": 1.5}
    assert finding["rounds"] == 1


def test_what_was_not_measured_is_a_row_with_its_reason(tmp_path):
    (tmp_path / "pyvene.failed.txt").write_text("ERROR: no matching distribution\n")
    failed = {"pyvene": peers.why(tmp_path, "pyvene"), "nnterp": peers.why(tmp_path, "nnterp")}
    other = line(THEIRS, weights=2.0)
    findings = peers.findings(lines(repeng=[other]), failed)
    kept = {"g": {"where": {"device": run.platform.machine()}, "found": findings}}
    table = run.table(kept)
    assert "ERROR: no matching distribution" in table and "nnterp" in table
    assert "its model is another one" in table


def test_the_table_says_what_is_met_and_what_gives_other_numbers():
    findings = peers.findings(lines(repeng=[line(THEIRS, right=False)]), {})
    table = run.table({"g": {"where": {"device": run.platform.machine()}, "found": findings}})
    assert "| peer repeng | a: nsteer / whole forward, CPU | >= 1.5 | 3 | yes |" in table
    assert "| repeng 1 | 3 (2) * |" in table


def test_a_run_that_was_cut_is_read_from_its_lines(tmp_path):
    raw = tmp_path / "raw.jsonl"
    written = [{"round": 0, "name": "nsteer", **OURS}, {"round": 0, "name": "repeng", **line(THEIRS)}]
    raw.write_text("".join(json.dumps(row) + "\n" for row in written))
    findings = peers.findings(peers.kept(raw), {})
    assert [finding["peer"] for finding in findings] == ["nsteer", *peers.PEERS]
    assert findings[1]["rounds"] == 1 and findings[2]["failed"] == "it was never run"


def test_every_target_of_case_g_can_be_found():
    every = {
        **THEIRS,
        "b, own batches": side(256, 9.0),
        "c, a vector a row": side(160, 30.0),
        "plain generate, a vector a row": side(160, 30.0),
    }
    given = lines(repeng=[line(every)], hooks=[line(every)])
    keys = {key for finding in peers.findings(given, {}) for key in finding}
    assert {key for key, _, _ in run.TARGETS["g"]} <= keys


def test_every_peer_has_a_script_and_pinned_requirements():
    for name in peers.PEERS:
        assert (peers.SCRIPTS / f"run_{name}.py").is_file()
        pinned = (peers.SCRIPTS / "requirements" / f"{name}.txt").read_text().split()
        assert "torch==2.13.0" in pinned and all("==" in requirement for requirement in pinned)
