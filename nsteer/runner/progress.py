"""Turns what a run does into what a person sees: a live bar on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TextIO

from nsteer.errors import printable
from nsteer.system import markup


@dataclass
class Wave:
    """The current wave of a run: the cells that are committed next, and the rows and tokens that they take.

    planned : tokens of all rows so far, as many as they may become; passed : of rows that came back
    live : tokens that went through the model for rows that have not come back
    """

    cells: int = 0
    rows: int = 0
    back: int = 0
    planned: int = 0
    passed: int = 0
    live: int = 0

    @property
    def share(self) -> float:
        """How much of it is done, from 0 to 1."""
        return min((self.passed + self.live) / self.planned, 1.0) if self.planned else 0.0


@dataclass
class Progress:
    """Counts cells, rows and tokens; this base shows nothing (for tests and for use as a library)."""

    tokens: int = 0
    done: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    wave: Wave = field(default_factory=Wave)

    def model(self, label: str, index: int, total: int) -> None:
        """A model's turn begins."""

    def stage(self, name: str, cells: int, skipped: int) -> None:
        """A stage begins: `cells` to do, `skipped` already in the store."""

    def hold(self, cells: int) -> None:
        """So many cells are in the current wave."""
        self.wave = Wave(cells)

    def rows(self, rows: int, tokens: int) -> None:
        """Rows of the current wave go to the model; they and what they write have `tokens` tokens at most."""
        self.wave.rows, self.wave.planned = self.wave.rows + rows, self.wave.planned + tokens

    def back(self, stage: str, rows: int, tokens: int, planned: int) -> None:
        """Rows came back, of `tokens` tokens where `planned` were planned."""
        wave = self.wave
        wave.back, wave.passed, wave.live = wave.back + rows, wave.passed + tokens, 0
        wave.planned += tokens - planned
        self.advance(stage, tokens=tokens)

    def step(self, stage: str, tokens: int) -> None:
        """A forward pass of so many tokens, padding with them, has ended; their rows have not come back."""
        self.wave.live += tokens

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        """Cells were committed or tokens passed through the model."""
        self.done[stage] = self.done.get(stage, 0) + cells
        self.tokens += tokens
        self.wave.cells = max(0, self.wave.cells - cells)

    def note(self, text: str) -> None:
        """Something worth a line."""

    def job(self, job: str, status: str, words: str) -> None:
        """News of a remote job: its status, and its place in the queue where the server tells."""

    def close(self) -> None:
        """The run is over."""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


@dataclass
class Lines(Progress):
    """Lines of text, one a stage and one now and then, ever more seldom: for logs, pipes and notebooks."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every: float = 5.0
    _model: str = ""
    _total: int = 0
    _begun: float = 0.0
    _last: float = 0.0
    _before: int = 0
    _done: int = 0

    def model(self, label: str, index: int, total: int) -> None:
        self._model = f"[{index}/{total}] {label}"

    def stage(self, name: str, cells: int, skipped: int) -> None:
        self._total, self._before, self._done, self.wave = cells, self.tokens, self.done.get(name, 0), Wave()
        kept = f", {skipped} already in the store" if skipped else ""
        self.note(f"{name}: {cells} cell{'' if cells == 1 else 's'} to do{kept}")
        self._last = self._begun = time.monotonic()

    def step(self, stage: str, tokens: int) -> None:
        super().step(stage, tokens)
        self._now_and_then(stage)

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        super().advance(stage, cells, tokens)
        self._now_and_then(stage)

    def _now_and_then(self, stage: str) -> None:
        spent = time.monotonic() - self._begun
        if time.monotonic() - self._last < max(self.every, min(60.0, spent / 10)):
            return
        self._last = time.monotonic()
        self.note(f"{stage}: {self._words(stage)}")

    def _share(self, stage: str) -> float:
        """How much of a stage is done, from 0 to 1."""
        done = self.done.get(stage, 0) - self._done
        return (done + self.wave.cells * self.wave.share) / self._total if self._total else 0.0

    def _words(self, stage: str) -> str:
        """What of a stage is done, how fast, and how long it will last."""
        spent = time.monotonic() - self._begun
        done, wave = self.done.get(stage, 0) - self._done, self.wave
        said = [f"{done} of {self._total} cell{'' if self._total == 1 else 's'} done"]
        if wave.cells and wave.rows:
            said.append(f"{wave.back} of {wave.rows} rows back")
            said.append(f"{wave.passed + wave.live:,} of {wave.planned:,} tokens at most")
        rate = (self.tokens - self._before + wave.live) / max(spent, 1e-9)
        said += [f"{rate:,.0f} tokens/s"] if rate else []
        share = self._share(stage)
        said += [f"about {span(spent / share - spent)} left"] if 0.01 < share < 1 else []
        return ", ".join(said)

    def job(self, job: str, status: str, words: str) -> None:
        self.note(f"job {job[:8]} {status.lower()} {words}".rstrip())

    def note(self, text: str) -> None:
        print(printable(labelled(self._model, text), lines=False), file=self.stream, flush=True)


def labelled(model: str, text: str) -> str:
    """A line with the current model (`[1/2] zoo/llama`) before it, whose label it may have before it already."""
    label = model.partition("] ")[2]
    return f"{model} {text.removeprefix(f'{label}: ') if label else text}".strip()


def span(seconds: float) -> str:
    """A time to wait, roughly: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Bars(Progress):
    """A live display on a terminal: one bar for the current stage, with cells, tokens/s and time left."""

    def __init__(self, stream: TextIO = sys.stderr):
        super().__init__()
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        from nsteer.report.terminal import Out, Told

        columns = (
            Told("{task.fields[model]}"),
            Told("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Told("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._rich = Rich(*columns, console=Out(file=stream), transient=False)
        self._rich.start()
        self._tasks: dict[str, Any] = {}
        self._cells: dict[str, int] = {}
        self._model, self._stage_tokens, self._stage_started = "", 0, 0.0

    def model(self, label: str, index: int, total: int) -> None:
        self._model = f"[{index}/{total}] {label}"
        self._tasks = {}
        self._cells = {}

    def stage(self, name: str, cells: int, skipped: int) -> None:
        self._stage_tokens, self._stage_started, self.wave = 0, time.monotonic(), Wave()
        if cells:
            self._tasks[name] = self._rich.add_task(name, total=cells, model=self._model, rate="")
        elif skipped:
            self.note(f"{name}: {f'all {skipped} cells are' if skipped > 1 else 'its cell is'} in the store")

    def step(self, stage: str, tokens: int) -> None:
        super().step(stage, tokens)
        self._draw(stage)

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        super().advance(stage, cells, tokens)
        self._stage_tokens += tokens
        self._cells[stage] = self._cells.get(stage, 0) + cells
        self._draw(stage)

    def _draw(self, stage: str) -> None:
        """Cells done, and the share of the current wave that is done: the bar moves, and shows a time, within a
        wave."""
        if stage not in self._tasks:
            return
        wave, tokens = self.wave, self._stage_tokens + self.wave.live
        rate = tokens / max(time.monotonic() - self._stage_started, 1e-9)
        shown = f"{rate:,.0f} tokens/s" if tokens else ""
        if wave.cells and wave.rows:
            shown += f", {wave.back} of {wave.rows} rows back"
        completed = self._cells.get(stage, 0) + wave.cells * wave.share
        self._rich.update(self._tasks[stage], completed=completed, rate=shown)

    def job(self, job: str, status: str, words: str) -> None:
        for task in self._rich.tasks:
            if not task.finished:
                self._rich.update(task.id, rate=f"job {job[:8]} {status.lower()} {words[:40]}")

    def note(self, text: str) -> None:
        self._rich.console.print(printable(labelled(self._model, text), lines=False))

    def close(self) -> None:
        self._rich.stop()


class Notebook(Lines):
    """A bar in a notebook, of the current stage, and the latest notes below it; plain text where HTML is not shown."""

    NOTES = 8

    def __init__(self, display: Callable[..., Any]):
        super().__init__(every=0.3)
        self._stage, self._notes = "", list[str]()
        self._shown = display(self, display_id=True)

    def stage(self, name: str, cells: int, skipped: int) -> None:
        self._stage = name
        super().stage(name, cells, skipped)

    def _now_and_then(self, stage: str) -> None:
        if time.monotonic() - self._last >= self.every:
            self._draw()

    def _draw(self) -> None:
        self._last = time.monotonic()
        self._shown.update(self)

    def note(self, text: str) -> None:
        self._notes.append(labelled(self._model, text))
        self._draw()

    def close(self) -> None:
        self._draw()

    def __repr__(self) -> str:
        return printable("\n".join([*self._notes[-self.NOTES :], *self._now()]))

    def _now(self) -> list[str]:
        return [labelled(self._model, f"{self._stage}: {self._words(self._stage)}")] if self._stage else []

    def _repr_html_(self) -> str:
        lines = "".join(f"{markup.text(note)}<br>" for note in self._notes[-self.NOTES :])
        return "".join(markup.bar(self._share(self._stage), now) for now in self._now()) + f"<small>{lines}</small>"


def here() -> Progress:
    """What shows a run where Python is at work: a bar in a notebook; elsewhere a library shows nothing."""
    if "IPython" in sys.modules:
        from IPython import get_ipython
        from IPython.display import display

        if getattr(get_ipython(), "kernel", None) is not None:
            return Notebook(display)
    return Progress()


def choose(stream: TextIO = sys.stderr) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars(stream) if stream.isatty() else Lines(stream=stream)
