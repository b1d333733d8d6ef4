"""Workers in this process, which take turns: a pool of which a test or a simulation decides who dies when."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nsteer.cluster.pool import Death, Event
from nsteer.cluster.scheduler import Need, Start
from nsteer.cluster.worker import Work, Worker, WorkerSetup
from nsteer.models.facts import Facts

Fate = Callable[[int, Work], "Death | None"]
"""What becomes of a worker given a task: None, or its death before the task is begun."""


class Here:
    """A pool of workers in this process.

    nodes : what each has in all
    executor : makes a worker's executor in place of what the plan says
    fate : who dies; a worker's death may be preceded by a task half done, which is for `fate` to do
    """

    def __init__(
        self,
        setup: WorkerSetup,
        nodes: dict[str, Need] | None = None,
        executor: Callable[[Facts], Any] | None = None,
        fate: Fate = lambda worker, work: None,
    ):
        self.setup = replace(setup, folder="", logs="")  # it stands there already, and has a log of its own
        self.executor, self.fate = executor, fate
        self.nodes = nodes or {"here": Need(64.0, 0.0, 1 << 40)}
        self.workers: dict[int, Worker] = {}
        self.where: dict[int, str] = {}
        self.turns: deque[Callable[[], Event]] = deque()

    def rooms(self) -> dict[str, Need]:
        return self.nodes

    def start(self, start: Start) -> None:
        worker = Worker(self.setup, f"worker-{start.worker}", start.model, self.executor)
        self.workers[start.worker], self.where[start.worker] = worker, start.node
        self.turns.append(lambda: Event(start.worker, worker.load()))

    def give(self, worker: int, work: Work, again: bool) -> None:
        self.turns.append(lambda: self._turn(worker, work, again))

    def _turn(self, worker: int, work: Work, again: bool) -> Event:
        if (death := self.fate(worker, work)) is not None:
            del self.workers[worker]
            return Event(worker, death)
        return Event(worker, self.workers[worker].do(work, again))

    def stop(self, worker: int) -> None:
        self.workers.pop(worker).release()

    def halt(self) -> None:
        for worker in self.workers.values():
            worker.stop()

    def events(self, seconds: float) -> list[Event]:
        if not self.turns:
            time.sleep(0.001)
            return []
        return [self.turns.popleft()()]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.release()
