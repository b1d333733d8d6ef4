"""Turns tasks whose seconds are known into when they end: the scheduler itself, with a clock in place of workers."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nsteer.cluster.scheduler import Need, Scheduler, Start, Task

Stages = Sequence[Sequence[tuple]]
"""Of one model: stages, each the cells of its tasks. A stage begins when the one before it has ended."""


@dataclass
class Simulated:
    """How it went.

    seconds : on the clock of the simulation
    busy : seconds that all workers spent on tasks; `loading`: with a model on its way
    tasks : done; given_up: of those added
    scheduling : seconds that the scheduler took, really; of those, the most for one event of a worker: `longest`
    adding : and to take the tasks in
    """

    seconds: float = 0.0
    busy: float = 0.0
    loading: float = 0.0
    workers: int = 0
    tasks: int = 0
    given_up: int = 0
    died: int = 0
    scheduling: float = 0.0
    longest: float = 0.0
    adding: float = 0.0


def simulate(
    models: Mapping[str, Stages],
    nodes: Mapping[str, Need],
    needs: Mapping[str, Need],
    max_workers: int,
    seconds_of: Callable[[Task], float],
    load: float = 0.0,
    dies: Callable[[Task], bool] = lambda task: False,
) -> Simulated:
    """Runs the scheduler over a study's tasks.

    seconds_of : how long a worker has a task; load: how long it loads its model
    dies : whether the worker dies with this task, after its seconds
    """
    scheduler, told = Scheduler(max_workers), Simulated()
    for name, room in nodes.items():
        scheduler.node(name, room)
    for model, need in needs.items():
        scheduler.open(model, need)
    stages = {model: list(reversed(tasks)) for model, tasks in models.items()}
    heap: list[tuple[float, int, int, bool]] = []  # when, order, worker, whether it loaded
    current: dict[int, Task] = {}
    idle: set[int] = set()
    order, now = 0, 0.0

    def later(seconds: float, worker: int, loaded: bool) -> None:
        nonlocal order
        order += 1
        heapq.heappush(heap, (now + seconds, order, worker, loaded))

    def begin(start: Start) -> None:
        told.workers += 1
        told.loading += load
        later(load, start.worker, True)

    def add() -> None:
        for model in list(scheduler.needs):
            while not scheduler.left[model] and stages[model]:
                for cells in stages[model].pop():
                    scheduler.add(model, cells)
            if not scheduler.left[model]:
                scheduler.close(model)

    def tend() -> None:
        for worker in scheduler.spare():
            scheduler.stopped(worker)
            idle.discard(worker)
        for start in scheduler.starts():
            begin(start)
        for worker in list(idle) if scheduler.queued() else ():
            if (task := scheduler.next(worker)) is not None:
                idle.discard(worker)
                current[worker] = task
                spent = seconds_of(task)
                told.busy += spent
                later(spent, worker, False)

    def timed(action: Callable[[], object]) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started

    def event(worker: int, loaded: bool) -> None:
        if loaded:
            scheduler.ready(worker)
        elif dies(current.pop(worker)):
            told.died += 1
            told.given_up += len(scheduler.died(worker))
            return
        else:
            scheduler.done(worker)
            told.tasks += 1
        idle.add(worker)

    def settle() -> None:
        told.adding += timed(add)
        told.scheduling += (spent := timed(tend))
        told.longest = max(told.longest, spent)

    settle()
    while heap:
        now, _, worker, loaded = heapq.heappop(heap)
        if worker not in scheduler.workers:  # it was stopped while it loaded
            continue
        told.scheduling += timed(lambda worker=worker, loaded=loaded: event(worker, loaded))  # type: ignore[misc]
        settle()
    told.seconds = now
    return told
