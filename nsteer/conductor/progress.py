"""Turns what a run does into what a person sees: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO


@dataclass
class Progress:
    """Counts cells, rows and tokens; this base shows nothing (for tests and for use as a library)."""

    tokens: int = 0
    done: dict[str, int] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def model(self, label: str, index: int, total: int) -> None:
        """A model's turn begins."""

    def stage(self, name: str, cells: int, skipped: int) -> None:
        """A stage begins: `cells` to do, `skipped` already in the store."""

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        """Cells were committed or tokens passed through the model."""
        self.done[stage] = self.done.get(stage, 0) + cells
        self.tokens += tokens

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
    """Plain lines, one a stage and one every few seconds: for logs and pipes."""

    stream: TextIO = field(default_factory=lambda: sys.stderr)
    every: float = 5.0
    _model: str = ""
    _total: int = 0
    _last: float = 0.0

    def model(self, label: str, index: int, total: int) -> None:
        self._model = f"[{index}/{total}] {label}"

    def stage(self, name: str, cells: int, skipped: int) -> None:
        self._total = cells
        kept = f", {skipped} already in the store" if skipped else ""
        self.note(f"{name}: {cells} cells to do{kept}")
        self._last = time.monotonic()

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        super().advance(stage, cells, tokens)
        if time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            rate = self.tokens / max(self.seconds, 1e-9)
            self.note(f"{stage}: {self.done[stage]} cells done, {rate:,.0f} tokens/s")

    def job(self, job: str, status: str, words: str) -> None:
        self.note(f"job {job[:8]} {status.lower()} {words}".rstrip())

    def note(self, text: str) -> None:
        print(f"{self._model + ' ' if self._model else ''}{text}", file=self.stream, flush=True)


class Bars(Progress):
    """A live display on a terminal: one bar for the stage at hand, with cells, tokens/s and time left."""

    def __init__(self, stream: TextIO = sys.stderr):
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Rich

        columns = (
            TextColumn("{task.fields[model]}"),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._rich = Rich(*columns, console=Console(file=stream), transient=False)
        self._rich.start()
        self._tasks: dict[str, Any] = {}
        self._model, self._stage_tokens, self._stage_started = "", 0, 0.0

    def model(self, label: str, index: int, total: int) -> None:
        self._model = f"[{index}/{total}] {label}"
        self._tasks = {}

    def stage(self, name: str, cells: int, skipped: int) -> None:
        self._stage_tokens, self._stage_started = 0, time.monotonic()
        if cells:
            self._tasks[name] = self._rich.add_task(name, total=cells, model=self._model, rate="")
        elif skipped:
            self.note(f"{name}: all {skipped} cells are in the store")

    def advance(self, stage: str, cells: int = 0, tokens: int = 0) -> None:
        super().advance(stage, cells, tokens)
        self._stage_tokens += tokens
        if stage in self._tasks:
            rate = self._stage_tokens / max(time.monotonic() - self._stage_started, 1e-9)
            shown = f"{rate:,.0f} tokens/s" if self._stage_tokens else ""
            self._rich.update(self._tasks[stage], advance=cells, rate=shown)

    def job(self, job: str, status: str, words: str) -> None:
        for task in self._rich.tasks:
            if not task.finished:
                self._rich.update(task.id, rate=f"job {job[:8]} {status.lower()} {words[:40]}")

    def note(self, text: str) -> None:
        self._rich.console.print(f"{self._model} {text}".strip(), highlight=False, markup=False)

    def close(self) -> None:
        self._rich.stop()


def choose(stream: TextIO = sys.stderr) -> Progress:
    """Bars on a terminal, lines elsewhere."""
    return Bars(stream) if stream.isatty() else Lines(stream=stream)
