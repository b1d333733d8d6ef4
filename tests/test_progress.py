"""What a run says while it works: cells, rows, tokens and the time left, within a batch too."""

from __future__ import annotations

import io

import pytest
from test_runner import METHODS, STEER, write

from nsteer import runner
from nsteer.plan import check
from nsteer.runner import progress
from nsteer.runner.progress import Bars, Lines, Wave, choose, labelled, span
from nsteer.runner.stopping import GOES_ON, progress_message


class Clock:
    """Seconds as the test has them."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def lines(stream) -> list[str]:
    return stream.getvalue().splitlines()


def test_a_batch_moves_by_its_steps_and_tells_the_time_left(clock):
    shown = Lines(stream=(out := io.StringIO()))
    shown.model("tiny", 1, 1)
    shown.stage("steering", 4, 0)
    shown.hold(2)
    shown.rows(10, 1000)
    for _ in range(6):
        clock.now += 1.0
        shown.step("steering", 50)
    # 250 of the 1,000 tokens of half the cells after 5 s: an eighth of the stage, 35 s left
    said = "[1/1] tiny steering: 0 of 4 cells done, 0 of 10 rows back, 250 of 1,000 tokens at most, 50 tokens/s"
    assert lines(out)[1:] == [f"{said}, about 35 s left"]
    shown.back("steering", 10, 400, 1000)
    assert (shown.tokens, shown.wave) == (400, Wave(2, 10, 10, 400, 400, 0)) and shown.wave.share == 1
    clock.now += 10.0
    shown.advance("steering", cells=2)
    assert lines(out)[-1] == "[1/1] tiny steering: 2 of 4 cells done, 25 tokens/s, about 16 s left"


def test_lines_become_seldom(clock):
    shown = Lines(stream=(out := io.StringIO()))
    shown.stage("steering", 4, 0)
    shown.hold(4)
    shown.rows(10, 10**9)
    for _ in range(3600):
        clock.now += 1.0
        shown.step("steering", 50)
    assert 60 < len(lines(out)) < 120


def test_spans_are_rough():
    assert [span(s) for s in (7.4, 200, 7200 * 3)] == ["7 s", "3 min", "6.0 h"]


def test_a_label_stands_once():
    assert labelled("[1/2] tiny", "tiny: one") == labelled("[1/2] tiny", "one") == "[1/2] tiny one"
    assert labelled("", "tiny: one") == "tiny: one"


@pytest.mark.parametrize("display", [Lines, Bars])
def test_a_run_counts_every_row_and_token_once(folder, tmp_path, display):
    seen: list[tuple[int, int]] = []
    steps: dict[str, int] = {}

    class Watched(display):
        def step(self, stage, tokens):
            steps[stage] = steps.get(stage, 0) + 1
            super().step(stage, tokens)

        def back(self, stage, rows, tokens, planned):
            super().back(stage, rows, tokens, planned)
            seen.append((rows, tokens))

    shown = Watched(stream=(out := io.StringIO()))
    steer = [{**STEER[0], "vectors": {"methods": ["read"]}}]
    plan = write(tmp_path, folder("llama"), methods={"read": METHODS["read"]}, steer=steer)
    summary = runner.run(check.load(plan), progress=shown)
    assert not summary.failures and summary.tokens == sum(tokens for _, tokens in seen) > 0
    assert steps["steering"] > 2 and steps["activations"] >= 1, "forward passes, not only batches"
    assert shown.wave.cells == 0 and "steering" in out.getvalue()


def test_what_is_chosen_depends_on_where_it_goes():
    assert isinstance(choose(io.StringIO()), Lines)


LOST = "the rows of cells that were not whole are lost"


def test_what_is_kept_is_what_is_told():
    assert progress_message(12, 0, False) == f"12 cells committed by this run\n{GOES_ON}"
    assert progress_message(1, 9, True) == f"1 cell committed by this run; {LOST}\n{GOES_ON}"
    nothing = "interrupted before this run committed a cell"
    begins = "the same command does them from the start"
    assert progress_message(0, 0, True) == f"{nothing}; {LOST}; nothing is kept: {begins}"
    assert progress_message(0, 3, False) == f"{nothing}; what earlier runs committed is kept: {begins}"
