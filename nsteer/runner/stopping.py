"""Turns signals into a request to stop: the first lets the current batch finish, the second ends the run at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))
WORDS = b"\nstopping after the current batch (once more to stop now)\n"


GOES_ON = "interrupted; what was committed is kept: the same command goes on from there"


class Interrupted(KeyboardInterrupt):
    """A run stopped as it was told to; what was finished is committed. `signal`: which one told it."""

    def __init__(self, number: int = int(signal.SIGINT)):
        super().__init__("interrupted")
        self.signal = number


def progress_message(committed: int, before: int, lost: bool) -> str:
    """What an interrupted run says of itself.

    committed, before : cells that it committed, and that earlier runs had
    lost : whether rows of cells that are not committed had gone to the model
    """
    gone = "; the rows of cells that were not whole are lost" if lost else ""
    if committed:
        cells = "1 cell" if committed == 1 else f"{committed:,} cells"
        return f"{cells} committed by this run{gone}\n{GOES_ON}"
    kept = "what earlier runs committed is kept" if before else "nothing is kept"
    return f"interrupted before this run committed a cell{gone}; {kept}: the same command does them from the start"


class Stop:
    """Whether a run was told to stop. `listen` lets signals tell it; a caller may as well, with `ask`."""

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self.waiting: Callable[[], None] | None = None  # ends a wait for others, from any thread
        self._times = 0

    def ask(self, number: int = int(signal.SIGINT)) -> None:
        """Asks the run to stop after the current batch."""
        self.asked = number
        if self.waiting is not None:  # not here: a handler must not touch the locks of what it interrupted
            threading.Thread(target=self.waiting, daemon=True).start()

    def check(self) -> None:
        """Raises Interrupted when the run was asked to stop: called where nothing is half done."""
        if self.asked:
            raise Interrupted(self.asked)

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        self._times += 1
        if self._times == 1:
            self.ask(number)
            with contextlib.suppress(OSError):  # not print: the handler may have interrupted one
                os.write(2, WORDS)
        elif self._times == 2:
            raise Interrupted(number)
        else:
            os._exit(128 + number)

    @contextlib.contextmanager
    def listen(self) -> Iterator[Stop]:
        """Takes SIGINT and SIGTERM while it lasts; in a thread that can not, it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._signalled) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
