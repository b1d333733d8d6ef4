"""What a driver asks of those who run its workers: Ray, or for tests and simulations this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from nsteer.cluster.scheduler import Need, Start
from nsteer.cluster.worker import Loaded, Report, Work


@dataclass(frozen=True)
class Death:
    """A worker that is gone by itself.

    blame : whether its current task may be the cause: not where its node went down
    """

    reason: str
    blame: bool = True


@dataclass(frozen=True)
class Event:
    """News of a worker: its model is loaded (or is not), its task came back, or it died."""

    worker: int
    news: Loaded | Report | Death


class Pool(Protocol):
    """Somewhere that workers live."""

    def rooms(self) -> dict[str, Need]:
        """The nodes that are up, and what each has in all."""
        ...

    def start(self, start: Start) -> None:
        """Starts a worker, which loads its model."""
        ...

    def give(self, worker: int, work: Work, again: bool) -> None:
        """Has a worker do a task."""
        ...

    def stop(self, worker: int) -> None:
        """Ends a worker that does nothing."""
        ...

    def halt(self) -> None:
        """Asks every worker to stop after the current batch."""
        ...

    def events(self, seconds: float) -> list[Event]:
        """What has happened; waits so long for something to."""
        ...

    def close(self) -> None:
        """Ends every worker, at once."""
        ...
