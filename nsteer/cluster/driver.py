"""Turns a study into tasks for workers and their reports into one run: the stages' order here, their work there.

Every model's stages run in a thread of their own, by the runner's code, except that the cells which a model is
needed for go to the dispatcher, whose loop runs in the main thread and alone touches scheduler and pool.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from nsteer.cluster.cutting import cut
from nsteer.cluster.pool import Death, Pool
from nsteer.cluster.scheduler import DEATHS, Need, Scheduler, Task
from nsteer.cluster.showing import Display
from nsteer.cluster.worker import JUDGE, Loaded, Report, Work
from nsteer.errors import ExecutionError, StoreError
from nsteer.runner.failing import PERMANENT, TRANSIENT
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import LoadError, Run
from nsteer.runner.stopping import Stop
from nsteer.stages import cells
from nsteer.stages.keys import OfModel
from nsteer.stages.table import BY_NAME

K = TypeVar("K", bound=tuple)

TICK = 0.2
"""Seconds after which the dispatcher looks around if nothing happens."""

BESIDE = "resources"


@dataclass(frozen=True)
class Lost:
    """A task that is given up, and why; of which kind the failure is."""

    reason: str
    kind: str = PERMANENT


@dataclass(frozen=True)
class Unloadable:
    """The model of the tasks can not be had."""

    reason: str
    kind: str = TRANSIENT


News = tuple[Task | None, Report | Lost | Unloadable | Loaded]


@dataclass
class Ticket:
    """Cells that a session waits for. News come until all are settled."""

    model: str
    paths: tuple[str, ...]
    stage: str
    fingerprints: Mapping[tuple, int]
    runs: Sequence[Sequence[tuple]]
    left: int = 0
    news: queue.SimpleQueue[News | None] = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.left = sum(map(len, self.runs))

    def tell(self, task: Task | None, what: Report | Lost | Unloadable | Loaded) -> None:
        """News of a task that is settled by them, or of no task."""
        self.news.put((task, what))
        if task is not None:
            self.settle(len(task.cells))

    def settle(self, count: int) -> None:
        self.left -= count
        if self.left <= 0:
            self.news.put(None)

    def work(self, task: Task) -> Work:
        return Work(self.stage, self.paths, {cell: self.fingerprints[cell] for cell in task.cells})

    def __iter__(self) -> Iterator[News]:
        while (news := self.news.get()) is not None:
            yield news


class Dispatcher:
    """Workers of a pool that do tasks for sessions in other threads. Threads talk to its loop through `inbox`."""

    def __init__(
        self, pool: Pool, max_workers: int, need: Callable[[str], Need], stop: Stop, display: Display | None = None
    ):
        self.pool, self.scheduler, self.need, self.stop = pool, Scheduler(max_workers), need, stop
        self.display = display or Display()
        self.inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.loaded: dict[str, Loaded] = {}  # the first of each model
        self.tickets: dict[str, list[Ticket]] = {}
        self.idle: set[int] = set()
        self.dead = self.finished = self.tokens = 0
        self._told = False

    # ---- from the sessions' threads ----------------------------------------------------------------------

    def ask(self, ticket: Ticket) -> Ticket:
        self.inbox.put(("ticket", ticket))
        return ticket

    def expect(self, model: str, tasks: int) -> None:
        """Says how many tasks a model will have at once, later."""
        self.inbox.put(("expect", (model, tasks)))

    # ---- the loop ----------------------------------------------------------------------------------------

    def run(self, jobs: Mapping[str, Callable[[], None]]) -> None:
        """Does jobs, one a model, each in a thread.

        Raises what the first of them raised, when all have ended."""
        threads = max(1, min(len(jobs), self.scheduler.max_workers))
        self._look()
        with ThreadPoolExecutor(threads, "nsteer-model") as pool:
            futures = [pool.submit(self._run_job, model, job) for model, job in jobs.items()]
            try:
                while not all(map(Future.done, futures)) or self.scheduler.busy():
                    self.turn(TICK)
            except BaseException:
                for future in futures:
                    future.cancel()
                self._abandon()
                raise
        while not self.inbox.empty():
            self._message(*self.inbox.get())
        self._stop_workers()
        for future in futures:
            future.result()

    def _run_job(self, model: str, job: Callable[[], None]) -> None:
        self.inbox.put(("open", model))
        try:
            self.stop.check()
            job()
        finally:
            self.inbox.put(("close", model))

    def turn(self, seconds: float) -> None:
        """One look at everything."""
        while not self.inbox.empty():
            self._message(*self.inbox.get())
        if self.stop.asked and not self._told:
            self._told = True
            self.pool.halt()
        if self._told:
            self._release()
        else:
            self._stop_workers()
            self._start_workers()
            for worker in list(self.idle):
                self._give(worker)
        self.display.tick(self.status)
        for event in self.pool.events(seconds):
            self._event(event.worker, event.news)

    def _message(self, kind: str, what: Any) -> None:
        if kind == "open":
            self.scheduler.open(what, self.need(what))
            self.tickets.setdefault(what, [])
        elif kind == "close":
            self.scheduler.close(what)
        elif kind == "expect":
            self.scheduler.expect(*what)
        else:
            self.tickets[what.model].append(what)
            for run in what.runs:
                self.scheduler.add(what.model, run, what)

    def _look(self) -> None:
        there = self.pool.rooms()
        for name, room in there.items():
            if self.scheduler.rooms.get(name) != room:
                self.scheduler.node(name, room)
        for name in set(self.scheduler.rooms) - set(there):
            self.scheduler.forget(name)

    def _start_workers(self) -> None:
        """Starts workers; gives up the tasks of models that no node could hold, or that kill whoever loads them."""
        for model in list(self.scheduler.needs):
            if not self.scheduler.waiting[model]:
                continue
            if self.scheduler.impossible(model):
                self._look()  # a node may have come
                if self.scheduler.impossible(model):
                    self._refuse(model, Unloadable(too_large(self.scheduler.needs[model], self.scheduler.rooms)))
            elif self.scheduler.unloadable(model) and not self.scheduler.of[model]:
                self._refuse(model, Unloadable(f"{DEATHS} workers died while they loaded it"))
        for start in self.scheduler.starts():
            self.pool.start(start)

    def _stop_workers(self) -> None:
        for worker in self.scheduler.spare():
            self.pool.stop(worker)
            self.scheduler.stopped(worker)
            self.idle.discard(worker)

    def _give(self, worker: int) -> None:
        task = self.scheduler.next(worker)
        if task is None:
            self.idle.add(worker)
            return
        self.idle.discard(worker)
        self.pool.give(worker, task.work.work(task), task.deaths > 0)

    def _event(self, worker: int, news: Loaded | Report | Death) -> None:
        if worker not in self.scheduler.workers:
            return
        model = self.scheduler.workers[worker].model
        if isinstance(news, Death):
            self.dead += 1
            self.idle.discard(worker)
            self.display.note(f"worker {worker} ({model}): {news.reason}; its current task is done again")
            self._look()  # its node may be gone
            for task in self.scheduler.died(worker, blame=news.blame):
                task.work.tell(task, Lost(f"{DEATHS} workers died while they did it: {news.reason}"))
        elif isinstance(news, Loaded):
            self._loaded(worker, model, news)
        else:
            task = self.scheduler.done(worker)
            self.finished += 1
            self.tokens += news.tokens
            task.work.tell(task, news)
            self.idle.add(worker)

    def _loaded(self, worker: int, model: str, news: Loaded) -> None:
        if news.reason:
            self.pool.stop(worker)
            self.scheduler.failed(worker)
            if model not in self.loaded:  # where others have it, it is this worker's node
                self._refuse(model, Unloadable(news.reason, news.kind))
            return
        self.scheduler.ready(worker)
        self.idle.add(worker)
        if model not in self.loaded:
            self.loaded[model] = news
            for ticket in self.tickets.get(model, []):
                if ticket.left > 0:
                    ticket.tell(None, news)
                    break

    def _refuse(self, model: str, why: Unloadable) -> None:
        """Gives up every task of a model that no worker has begun."""
        if model not in self.scheduler.waiting:
            return
        for task in self.scheduler.drop(model):
            task.work.tell(task, why)

    def _release(self) -> None:
        """The run was told to stop: what no worker has begun is not begun."""
        for model in list(self.scheduler.waiting):
            for task in self.scheduler.drop(model):
                task.work.tell(task, Report(stopped=True))

    def _abandon(self) -> None:
        """The loop ends by an error: whoever waits is let go."""
        self.stop.asked = self.stop.asked or 2
        for tickets in self.tickets.values():
            for ticket in tickets:
                ticket.news.put(None)

    def status(self) -> str:
        """What all workers are at, in a line."""
        of = {model: len(there) for model, there in self.scheduler.of.items() if there}
        held = ", ".join(f"{model} {count}" for model, count in of.items())
        loading = sum(not worker.ready for worker in self.scheduler.workers.values())
        said = [f"{len(self.scheduler.workers)} workers ({held})" if held else "no worker"]
        said += [f"{self.scheduler.busy()} busy"] + [f"{loading} loading"] * bool(loading)
        said += [f"{self.finished} tasks done, {self.scheduler.queued()} queued"]
        return ", ".join(said + [f"{self.dead} died"] * bool(self.dead))


def too_large(need: Need, rooms: Mapping[str, Need]) -> str:
    """What a model needs beside what the nodes have."""
    largest = Need(
        max((room.cpus for room in rooms.values()), default=0),
        max((room.gpus for room in rooms.values()), default=0),
        max((room.memory for room in rooms.values()), default=0),
    )
    return (
        f"it needs {words(need)}; no node has that (at most {words(largest)}). Give it a smaller `{BESIDE}` in the "
        "plan, or larger nodes"
    )


def words(need: Need) -> str:
    return f"{need.cpus:g} CPU, {need.gpus:g} GPU, {need.memory / 2**30:.1f} GiB"


class Shared:
    """Which cells a run of workers does itself: none that need a model. See `runner.runs.Division`.

    What is found missing is handed to a dispatcher, and is done, or has failed, once `missing` returns.
    """

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher

    def missing(
        self, run: Run, model: ModelRun | None, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]
    ) -> dict[K, int]:
        todo = run.outstanding(stage, paths, wanted)
        record = BY_NAME[stage]
        if not todo or (model is not None and record.per_model and not record.needs_model):
            return todo
        run.stop.check()
        if model is not None:
            model.loadable()
        for wave in run.waves(stage, paths, todo):  # all that no other run computes, then what those give up
            mine: dict[Any, int] = {key: todo[key] for key in wave}
            ticket = Ticket(model.label if model else JUDGE, paths, run.stage, mine, self.tasks(run, stage, mine))
            self._await(run, model, self.dispatcher.ask(ticket), stage)
        return {}

    def own_cells(self, run: Run, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        return dict(wanted)

    def look_ahead(self, model: ModelRun) -> None:
        """Tells the dispatcher what the grid of a model will bring: workers load while the first one samples."""
        steering = BY_NAME["steering"]
        if wanted := model.wanted(steering.cells):
            todo = {key: wanted[key] for key in model.run.store.missing(steering.paths(model.job)[-1], wanted)}
            self.dispatcher.expect(model.label, len(self.tasks(model.run, steering.name, todo)))

    def tasks(self, run: Run, stage: str, todo: Mapping[Any, int]) -> list[list[Any]]:
        """The cells of each task."""
        first = cells.leaders(todo)  # a cell that holds the same as another goes with it, and is copied there
        order = {key: place for place, key in enumerate(todo)}
        together = sorted(todo, key=lambda key: order[first[todo[key]]])
        jobs, rows = {job.label: job for job in run.jobs}, BY_NAME[stage].rows
        sizes = {key: rows(jobs[key.model], key) * (first[todo[key]] == key) for key in together}
        return list(cut(sizes, run.study.plan.batch.rows, self.dispatcher.scheduler.max_workers))

    def _await(self, run: Run, model: ModelRun | None, ticket: Ticket, stage: str) -> None:
        """Takes in what workers report until all cells are settled. Raises what ended one of them."""
        ended: Exception | None = None
        refused: Unloadable | None = None
        for task, news in ticket:
            if isinstance(news, Loaded):
                if model is not None:
                    model.loaded(news)
            elif isinstance(news, Unloadable):
                refused = news
            elif isinstance(news, Lost):
                assert task is not None
                self._lost(run, ticket, stage, task, news)
            elif isinstance(news, Report):
                self._take_in(run, news)
                if news.ended:
                    ended = StoreError(news.ended) if news.ends_run else ExecutionError(news.ended)
        run.book.read()
        run.stop.check()
        if refused is not None:
            self._unloaded(run, model, refused)
        if ended is not None:
            raise ended

    def _unloaded(self, run: Run, model: ModelRun | None, why: Unloadable) -> None:
        if model is not None:
            model.give_up(why.reason, why.kind)
        run.fail("loading", "models", OfModel(JUDGE), 0, why.reason, why.kind)
        raise LoadError(why.reason)

    def _lost(self, run: Run, ticket: Ticket, stage: str, task: Task, lost: Lost) -> None:
        mine = {cell: ticket.fingerprints[cell] for cell in task.cells}
        for cell in run.lacking(ticket.paths, mine):
            run.fail(stage, ticket.paths[-1], cell, mine[cell], lost.reason, lost.kind)

    def _take_in(self, run: Run, report: Report) -> None:
        run.progress.advance(next(iter(report.done), run.stage), tokens=report.tokens)
        for name, count in report.done.items():
            run.done[name] = run.done.get(name, 0) + count
            run.progress.advance(name, cells=count)
        for failure in report.failures:  # in the store already
            run.failures.append(failure)
            run.progress.note(f"{failure.stage} {' / '.join(map(str, failure.cell))}: {failure.reason}")
        for text in report.warnings:
            run.warn(text)
