"""Two runs of one plan share its work: no cell twice, no wait for the dead, and the store of one run alone."""

from __future__ import annotations

import signal
import subprocess
import time

import prefork
import pytest
import xarray as xr
from test_runner import STEER, records, results, run, write

from nsteer.store import Store
from nsteer.store.leases import Leases

GRID = [{**STEER[0], "strengths": [0.1, 0.2, 0.3, 0.4], "layers": {"each": [3, 1]}}]
CELLS = 32  # in waves of two: enough for both runs to have their part
CODE = """
import sys, time
from nsteer.runner import runs
runs.WAVE, runs.POLL = 4, 0.05
from nsteer.executors.local import Local
first = Local.run
def slow(self, program):
    time.sleep({seconds})
    return first(self, program)
Local.run = slow
from nsteer.cli import main
main(sys.argv[1:])
"""


def start(plan, seconds: float = 0.05) -> subprocess.Popen:
    code = CODE.format(seconds=seconds)
    return subprocess.Popen(prefork.python(code, "run", plan, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process) -> dict:
    import json

    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    return json.loads(out)


def same(first, second) -> None:
    left, right = ({key: cell.fingerprint for key, cell in records(path).items()} for path in (first, second))
    assert {k: v for k, v in left.items() if k[0] != "runs"} == {k: v for k, v in right.items() if k[0] != "runs"}
    for group in {key[0] for key in left} - {"runs"}:
        a, b = (results(path, group).drop_vars("cell") for path in (first, second))
        xr.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.fixture
def plan(folder, tmp_path):
    return write(tmp_path, folder("llama"), steer=GRID)


def test_two_runs_at_once_share_the_work(plan, folder, tmp_path):
    first, second = start(plan), start(plan)
    first_summary, second_summary = ended(first), ended(second)
    for stage in ("samples", "activations", "vectors", "unsteered", "steering"):
        total = first_summary["done"].get(stage, 0) + second_summary["done"].get(stage, 0)
        wanted = {"samples": 8, "activations": 8, "vectors": 6, "unsteered": 1, "steering": CELLS}[stage]
        assert total == wanted, (stage, first_summary["done"], second_summary["done"])
    assert min(first_summary["done"].get("steering", 0), second_summary["done"].get("steering", 0)) > 3, (
        "both had their part"
    )
    assert not (tmp_path / "plan.zarr.leases").exists()
    runs = {cell.run for key, cell in records(tmp_path / "plan.zarr").items() if key[0] == "generations"}
    assert runs == {0, 1}
    alone = write(tmp_path, folder("llama"), name="alone", steer=GRID)
    assert not run(alone).failures
    same(tmp_path / "plan.zarr", tmp_path / "alone.zarr")


def test_what_a_killed_run_had_in_hand_is_taken_over_at_once(plan, folder, tmp_path):
    first = start(plan, seconds=30)
    leases = tmp_path / "plan.zarr.leases"
    end = time.monotonic() + 120
    while time.monotonic() < end and not any(len(f.read_text()) > 2 for f in leases.glob("*.json")):
        time.sleep(0.05)
    second = start(plan, seconds=0.0)
    time.sleep(3)
    assert second.poll() is None, "it waits for the cells that the first computes"
    first.send_signal(signal.SIGKILL)
    first.communicate()
    summary = ended(second)
    assert not summary["failures"] and summary["done"]["steering"] == CELLS
    assert len(Store(tmp_path / "plan.zarr").committed("generations")) == CELLS and not leases.exists()


# ---- leases -----------------------------------------------------------------------------------------------------

A, B, C = (("group", ("m", 1.5)), ("group", ("m", 2)), ("group", ("m", "x")))


@pytest.fixture
def two(tmp_path):
    pair = [Leases(tmp_path / "s.zarr") for _ in range(2)]
    for leases in pair:
        leases.open()
    yield pair
    for leases in pair:
        leases.close()


def free_of(cells):
    return lambda held, changed: [cell for cell in cells if cell not in held]


def test_what_one_holds_the_other_leaves(two):
    first, second = two
    assert first.take(free_of([A, B])) == [A, B]
    assert second.take(free_of([A, B, C])) == [C]
    first.release()
    assert second.take(free_of([A, B, C])) == [A, B, C]
    assert first.take(free_of([A, B, C])) == []


def test_one_alone_is_not_told_to_look_again_until_another_comes(two, tmp_path):
    first, second = two
    seen = []
    second.close()
    for _ in range(3):
        first.take(lambda held, changed: seen.append(changed) or [])
    assert seen[1:] == [False, False]
    third = Leases(tmp_path / "s.zarr")
    third.open()
    third.close()  # it came, worked and left between two looks
    first.take(lambda held, changed: seen.append(changed) or [])
    assert seen[-1]


def test_the_last_one_out_leaves_nothing(two, tmp_path):
    first, second = two
    first.take(free_of([A]))
    first.close()
    assert (tmp_path / "s.zarr.leases").is_dir() and second.take(free_of([A])) == [A]
    second.close()
    assert not (tmp_path / "s.zarr.leases").exists()
    first.open()
    assert first.take(free_of([A])) == [A]


def test_a_lease_that_is_half_written_holds_nothing(two, tmp_path):
    first, second = two
    first.take(free_of([A]))
    (tmp_path / "s.zarr.leases" / f"{first._name}.json").write_text('[["group", [')
    assert second.take(free_of([A])) == [A]


def test_leases_that_were_never_opened_hold_nothing(tmp_path):
    assert Leases(tmp_path / "s.zarr").take(free_of([A])) == [A]
    assert not list(tmp_path.iterdir())
