"""Turns the progress of all workers into one display: a bar a stage of every model, and a line of the workers."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from nsteer.errors import printable
from nsteer.runner.progress import Bars, Lines, Progress


class Display(Progress):
    """Shows nothing; counts for the summary."""

    def of_model(self) -> Progress:
        """The display of one model's stages."""
        return Progress()

    def tick(self, status: Callable[[], str]) -> None:
        """Called several times a second; `status` tells what the workers are at."""


class ModelLines(Lines):
    """Lines of one model among others."""

    def __init__(self, stream: TextIO, lock: threading.Lock):
        super().__init__(stream=stream)
        self.lock = lock

    def note(self, text: str) -> None:
        with self.lock:
            super().note(text)


class Log(Display):
    """Lines of text: those of every model's stages, and of the workers every few seconds."""

    def __init__(self, stream: TextIO = sys.stderr, every: float = 5.0):
        super().__init__()
        self.stream, self.every, self.lock = stream, every, threading.Lock()
        self._last = time.monotonic()

    def of_model(self) -> Progress:
        return ModelLines(self.stream, self.lock)

    def note(self, text: str) -> None:
        with self.lock:
            print(printable(text, lines=False), file=self.stream, flush=True)

    def tick(self, status: Callable[[], str]) -> None:
        if time.monotonic() - self._last >= self.every:
            self._last = time.monotonic()
            self.note(status())


class ModelBars(Bars):
    """The bars of one model among others, on a display that they share."""

    def __init__(self, rich: Any):
        Progress.__init__(self)
        self._rich = rich
        self._tasks: dict[str, Any] = {}
        self._model, self._stage_tokens, self._stage_started = "", 0, 0.0

    def close(self) -> None:
        """The display is the run's to close."""


class Live(Display):
    """A live display on a terminal."""

    def __init__(self, stream: TextIO = sys.stderr):
        super().__init__()
        self._bars = Bars(stream)
        self._workers = self._bars._rich.add_task("workers", total=None, model="", rate="")

    def of_model(self) -> Progress:
        return ModelBars(self._bars._rich)

    def note(self, text: str) -> None:
        self._bars.note(text)

    def tick(self, status: Callable[[], str]) -> None:
        self._bars._rich.update(self._workers, rate=status())

    def close(self) -> None:
        self._bars.close()


def choose(stream: TextIO = sys.stderr) -> Display:
    """Bars on a terminal, lines elsewhere."""
    return Live(stream) if stream.isatty() else Log(stream)
