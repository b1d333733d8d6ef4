"""Which programs are in which remote job: what lets a client that was killed fetch instead of send again."""

from __future__ import annotations

from typing import Protocol


class Journal(Protocol):
    """Which programs are in which job: what a client needs that comes back after it was killed."""

    def record(self, job: str, digests: list[str]) -> None:
        """Job `job` holds the programs of these digests, in this order."""
        ...

    def find(self, digest: str) -> tuple[str, int] | None:
        """The job that holds a program, and its place in it."""
        ...

    def forget(self, job: str) -> None:
        """The job is of no use any more: lost, failed, or its results are safe elsewhere."""
        ...


class Notebook:
    """A journal in memory."""

    def __init__(self) -> None:
        self.jobs: dict[str, list[str]] = {}

    def record(self, job: str, digests: list[str]) -> None:
        self.jobs[job] = list(digests)

    def find(self, digest: str) -> tuple[str, int] | None:
        return next(((job, held.index(digest)) for job, held in self.jobs.items() if digest in held), None)

    def forget(self, job: str) -> None:
        self.jobs.pop(job, None)


class NoJournal:
    """Knows no job: every program is sent."""

    def record(self, job: str, digests: list[str]) -> None: ...

    def find(self, digest: str) -> tuple[str, int] | None:
        return None

    def forget(self, job: str) -> None: ...
