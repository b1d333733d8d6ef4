"""Turns tasks and rooms into who does what: a queue a model, attempts, placement by need. Pure bookkeeping.

It starts nothing and waits for nothing: who calls it starts workers, hands tasks over and says what became of them.
A worker holds one loaded model and does one task at a time: whichever is the next of its model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

DEATHS = 3
"""Workers that die while they do a task before it is given up; of a model, workers that fail to load it."""


@dataclass(frozen=True)
class Need:
    """What a worker takes of a node, or a node has: CPU cores, GPUs (a share of one is possible), bytes of memory."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0

    def fits(self, room: Need) -> bool:
        """Whether it fits into a room; sums of shares may be off by rounding."""
        close = 1e-9
        return self.cpus <= room.cpus + close and self.gpus <= room.gpus + close and self.memory <= room.memory

    def __add__(self, other: Need) -> Need:
        return Need(self.cpus + other.cpus, self.gpus + other.gpus, self.memory + other.memory)

    def __sub__(self, other: Need) -> Need:
        return Need(self.cpus - other.cpus, self.gpus - other.gpus, self.memory - other.memory)


@dataclass(frozen=True)
class Task:
    """Some cells of one stage of one model.

    number : tells tasks apart
    work : what they are, for who does them; not looked at here
    deaths : workers that died with it, or with the task it was cut from
    """

    number: int
    model: str
    cells: tuple
    work: Any = None
    deaths: int = 0


@dataclass
class Worker:
    """One worker: where it is, what it holds, and its current task."""

    number: int
    model: str
    node: str
    need: Need
    task: Task | None = None
    ready: bool = False


@dataclass(frozen=True)
class Start:
    """A worker to be started: its model is to be loaded on a node."""

    worker: int
    model: str
    node: str
    need: Need


class Scheduler:
    """Who does what.

    max_workers : workers at once
    """

    def __init__(self, max_workers: int):
        self.max_workers = max_workers
        self.rooms: dict[str, Need] = {}  # what a node has in all
        self.free: dict[str, Need] = {}
        self.needs: dict[str, Need] = {}  # models that are open
        self.waiting: dict[str, deque[Task]] = {}  # tasks that no worker has begun, in order
        self.workers: dict[int, Worker] = {}
        self.of: dict[str, dict[int, Worker]] = {}  # the workers of a model
        self.left: dict[str, int] = {}  # tasks of a model that are not done
        self.ahead: dict[str, int] = {}  # tasks that a model will have at once, as far as is known
        self.loads: dict[str, int] = {}  # workers that died while they loaded a model
        self._tasks = self._started = self._busy = 0

    # ---- what there is -----------------------------------------------------------------------------------

    def node(self, name: str, room: Need) -> None:
        """A node is there, with so much room in all."""
        used = self.rooms[name] - self.free[name] if name in self.rooms else Need(0, 0, 0)
        self.rooms[name], self.free[name] = room, room - used

    def forget(self, name: str) -> None:
        """A node is gone. Its workers are to be told `died`, each, without blame."""
        self.rooms.pop(name, None)
        self.free.pop(name, None)

    def open(self, model: str, need: Need) -> None:
        """A model will have tasks: a place among the workers is kept for it."""
        self.needs[model] = need
        self.waiting.setdefault(model, deque())
        self.of.setdefault(model, {})
        self.left.setdefault(model, 0)

    def expect(self, model: str, tasks: int) -> None:
        """An open model will have so many tasks at once: as many workers may load it as soon as it has one."""
        if model in self.needs:
            self.ahead[model] = tasks

    def close(self, model: str) -> None:
        """A model has no more tasks: its workers may go."""
        self.needs.pop(model, None)
        self.ahead.pop(model, None)
        self.waiting.pop(model, None)

    def impossible(self, model: str) -> bool:
        """Whether no node could hold a worker of the model, were it empty."""
        return not any(self.needs[model].fits(room) for room in self.rooms.values())

    def add(self, model: str, cells: Iterable[tuple], work: Any = None, deaths: int = 0) -> Task:
        """One more task of an open model."""
        self._tasks += 1
        task = Task(self._tasks, model, tuple(cells), work, deaths)
        self.waiting[model].append(task)
        self.left[model] += 1
        return task

    def queued(self) -> int:
        """Tasks that no worker has begun."""
        return sum(self.left[model] for model in self.waiting) - self._busy

    def busy(self) -> int:
        """Workers that do a task now."""
        return self._busy

    # ---- workers -----------------------------------------------------------------------------------------

    def starts(self) -> Iterator[Start]:
        """Workers to start now. Each counts as there once it is yielded."""
        while (model := self._neediest()) is not None:
            node = self._place(self.needs[model])
            assert node is not None
            self._started += 1
            worker = Worker(self._started, model, node, self.needs[model])
            self.workers[worker.number] = self.of[model][worker.number] = worker
            self.free[node] -= self.needs[model]
            yield Start(worker.number, model, node, self.needs[model])

    def spare(self) -> list[int]:
        """Workers to stop now: those of closed models."""
        closed = [there.values() for model, there in self.of.items() if there and model not in self.needs]
        return [worker.number for there in closed for worker in there if worker.task is None]

    def ready(self, worker: int) -> None:
        """A worker has loaded its model."""
        self.workers[worker].ready = True

    def stopped(self, worker: int) -> None:
        """A worker is gone, as it was told to."""
        state = self.workers.pop(worker)
        del self.of[state.model][worker]
        if state.node in self.free:
            self.free[state.node] += state.need

    def died(self, worker: int, *, blame: bool = True) -> list[Task]:
        """A worker is gone by itself. Its current task is to be done again, by another.

        A task that a second worker died with is cut into its cells, so that one of them alone is given up: the tasks
        returned, which three died with. Without `blame` (its node died) nothing is counted.
        Raises KeyError for a worker that is not there.
        """
        state = self.workers[worker]
        task, state.task = state.task, None
        self._busy -= task is not None
        self.stopped(worker)
        if blame and not state.ready:
            self.loads[state.model] = self.loads.get(state.model, 0) + 1
        if task is None or state.model not in self.waiting:
            return []
        again = replace(task, deaths=task.deaths + blame)
        if again.deaths >= DEATHS:
            self.left[state.model] -= 1
            return [again]
        if again.deaths == DEATHS - 1 and len(again.cells) > 1:
            self.left[state.model] -= 1
            for cell in again.cells:
                self.add(again.model, [cell], again.work, again.deaths)
        else:
            self.waiting[state.model].appendleft(again)
        return []

    def failed(self, worker: int) -> None:
        """A worker could not load its model, and is gone."""
        model = self.workers[worker].model
        self.stopped(worker)
        self.loads[model] = self.loads.get(model, 0) + 1

    def unloadable(self, model: str) -> bool:
        """Whether so many workers died loading a model that it is given up."""
        return self.loads.get(model, 0) >= DEATHS

    def drop(self, model: str) -> list[Task]:
        """Takes back every task of a model that no worker has begun."""
        dropped = [*self.waiting[model]]
        self.waiting[model].clear()
        self.left[model] -= len(dropped)
        return dropped

    # ---- tasks -------------------------------------------------------------------------------------------

    def next(self, worker: int) -> Task | None:
        """The task that a ready worker is to do now, which it has from here on: the next of its model."""
        state = self.workers[worker]
        waiting = self.waiting.get(state.model)
        if not state.ready or state.task is not None or not waiting:
            return None
        state.task = waiting.popleft()
        self._busy += 1
        return state.task

    def done(self, worker: int) -> Task:
        """The current task of a worker is done."""
        state = self.workers[worker]
        task, state.task = state.task, None
        assert task is not None
        self._busy -= 1
        self.left[state.model] -= 1
        return task

    # ---- placement ---------------------------------------------------------------------------------------

    def _neediest(self) -> str | None:
        """The open model that should have one more worker now; None when none should, or has room.

        Each open model keeps a place for its first worker; beyond those, whoever has most tasks a worker. Of equals
        the larger model goes first: small ones fit where it leaves room.
        """
        left = self.max_workers - len(self.workers)
        if left <= 0:
            return None
        without = [model for model in self.needs if not self.of[model] and not self.impossible(model)]
        asking = [
            model
            for model in self.needs
            if self.waiting[model]
            and len(self.of[model]) < self._prospect(model)
            and not self.unloadable(model)
            and (not self.of[model] or left > len(without))
            and self._place(self.needs[model]) is not None
        ]
        return max(asking, key=self._urgency, default=None)

    def _urgency(self, model: str) -> tuple[bool, float, float, int]:
        there, need = len(self.of[model]), self.needs[model]
        return not there, self._prospect(model) / (there + 1), need.gpus, need.memory

    def _prospect(self, model: str) -> int:
        """Tasks of a model that there are, or will be."""
        return max(self.left[model], self.ahead.get(model, 0))

    def _place(self, need: Need) -> str | None:
        """The node with room whose room it uses best: no GPU is kept from others in vain, and least is left over."""
        rooms = {name: room for name, room in self.free.items() if need.fits(room)}
        return min(
            rooms,
            key=lambda name: (rooms[name].gpus - need.gpus, rooms[name].memory - need.memory, name),
            default=None,
        )
