"""A run that is told to stop commits what it finished, says how to go on, and does; a second word stops it now."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time

import prefork
import pytest
import xarray as xr
from test_runner import METHODS, STEER, records, results, run, write

from nsteer.runner.stopping import Interrupted, Stop, progress_message
from nsteer.store import Store

CODE = """
import sys, time
from nsteer.runner import runs
runs.WAVE = 2
from nsteer.executors.local import Local
run = Local.run
def slow(self, program):
    print("BATCH", flush=True)
    time.sleep({seconds})
    found = run(self, program)
    print("DONE", flush=True)
    return found
Local.run = slow
from nsteer.cli import main
main(sys.argv[1:])
"""
GOES_ON = "interrupted; what was committed is kept: the same command goes on from there"


READ = {"made": METHODS["read"]}  # nothing is written before the grid: that is where runs are stopped
GRID = [
    {
        **STEER[0],
        "strengths": [0.1, 0.2, 0.3, 0.4],
        "layers": {"each": [3, 1, 2]},
        "controls": [],
        "generate": {"max_new_tokens": 3},
    }
]
CELLS = 24


@pytest.fixture
def plan(folder, tmp_path):
    return write(tmp_path, folder("llama"), steer=GRID, methods=READ)


def start(plan, *words, seconds: float = 0.0, **more) -> subprocess.Popen:
    code = CODE.format(seconds=seconds)
    started = [sys.executable, "-c", code, "run", plan] if "preexec_fn" in more else prefork.python(code, "run", plan)
    return subprocess.Popen([*started, *words], stdout=subprocess.PIPE, **more)


def steering(plan, process, least: int = 5) -> None:
    """Waits until the run has some cells of the grid."""
    store, end = Store(plan.parent / "plan.zarr"), time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        if (store.path / "generations").is_dir() and len(store.committed("generations")) >= least:
            return
        time.sleep(0.02)
    raise AssertionError("the run ended, or did not get so far")


def ended(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.decode(), (err or b"").decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_batch_and_the_same_command_goes_on(plan, folder, tmp_path, number):
    process = start(plan, "--quiet", stderr=subprocess.PIPE, seconds=0.05)
    steering(plan, process)
    process.send_signal(number)
    code, out, err = ended(process)
    assert code == 128 + number and err.strip().splitlines()[-1] == GOES_ON
    assert re.search(r"^[0-9]+ cells committed by this run", err, re.MULTILINE)
    assert "stopping after the current batch" in err and "Traceback" not in err
    assert out.count("BATCH") == out.count("DONE"), "the current batch was finished"
    path = tmp_path / "plan.zarr"
    assert results(path, "runs").status.values.tolist() == ["interrupted"]
    assert not (tmp_path / "plan.zarr.leases").exists()
    before = records(path)
    half = {key for key in before if key[0] == "generations"}
    assert 5 <= len(half) < CELLS
    summary = run(plan)
    assert not summary.failures and summary.done["steering"] == CELLS - len(half) and "samples" not in summary.done
    after = records(path)
    assert {key: after[key] for key in half} == {key: before[key] for key in half}
    whole = write(tmp_path, folder("llama"), name="whole", steer=GRID, methods=READ)
    assert not run(whole).failures
    generations, true = (
        results(tmp_path / f"{name}.zarr", "generations").drop_vars("cell") for name in ("plan", "whole")
    )
    xr.testing.assert_equal(generations, true)


def test_a_second_signal_stops_now(folder, tmp_path):
    plan = write(tmp_path, folder("llama"), steer=GRID)  # it begins with writing: no cell is there before a batch is
    process = start(plan, "--quiet", stderr=subprocess.PIPE, seconds=60)
    while process.stdout.readline().strip() != b"BATCH":
        pass
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for the batch"
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert time.monotonic() - began < 50
    assert code == 130 and "DONE" not in out and "Traceback" not in err
    assert err.strip().splitlines()[-1] == progress_message(0, 0, True)
    assert results(tmp_path / "plan.zarr", "runs").status.values.tolist() == ["interrupted"]
    assert not run(plan).failures


def test_ctrl_c_on_a_terminal_with_the_live_display(plan, tmp_path):
    """The key itself: the terminal sends SIGINT to the whole foreground group, while the bars are drawn."""
    ours, theirs = pty.openpty()
    settings = dict(stdin=theirs, stderr=theirs, start_new_session=True, env={**os.environ, "TERM": "xterm"})
    process = start(plan, seconds=0.05, preexec_fn=_take_terminal, **settings)
    os.close(theirs)
    shown: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, shown))
    reader.start()
    try:
        steering(plan, process)
        os.write(ours, b"\x03")
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
        reader.join()
        os.close(ours)
    text = b"".join(shown).decode(errors="replace")
    assert process.returncode == 130 and GOES_ON in text and "Traceback" not in text
    assert "stopping after the current batch" in text and "steering" in text
    assert out.count(b"BATCH") == out.count(b"DONE")
    assert "\x1b[?25h" in text, "the cursor is shown again"
    assert results(tmp_path / "plan.zarr", "runs").status.values.tolist() == ["interrupted"]


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_all(end: int, shown: list[bytes]) -> None:
    """What the terminal shows, until the other end is closed."""
    with contextlib.suppress(OSError):
        while part := os.read(end, 65536):
            shown.append(part)


# ---- as a library -----------------------------------------------------------------------------------------------


def test_a_caller_may_ask_too(plan, tmp_path):
    stop = Stop()
    stop.ask()
    with pytest.raises(KeyboardInterrupt):
        run(plan, stop=stop)
    assert not run(plan).failures


def test_handlers_are_put_back_and_nothing_is_asked_without_a_signal():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop().listen() as stop:
        assert signal.getsignal(signal.SIGINT) != before[0]
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            stop.check()
        assert caught.value.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_wait_for_others_is_ended_from_another_thread():
    ended = threading.Event()
    stop = Stop()
    stop.waiting = ended.set
    stop.ask()
    assert ended.wait(10)
