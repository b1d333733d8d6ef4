"""One run of one study: its store, the cells that are to do, what became of them, and what other runs compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import xarray as xr

from nsteer.errors import ExecutionError, InputError, ModelError, ProgramError, RemoteError
from nsteer.plan.check import Study
from nsteer.runner.failing import PERMANENT, WAITING, Book, Failure, kind_of
from nsteer.runner.progress import Progress
from nsteer.runner.rows import Results
from nsteer.runner.stopping import Stop
from nsteer.stages import arrays
from nsteer.stages.job import Job, jobs
from nsteer.store import Group, Store
from nsteer.store.inputs import read_whole
from nsteer.store.leases import Leases

if TYPE_CHECKING:
    from nsteer.runner.model import ModelRun

K = TypeVar("K", bound=tuple)

WAVE = 512
"""Rows after which finished cells are committed: what a kill can cost, and what is held in memory."""

POLL = 0.5
"""Seconds between two looks at cells that another run computes."""


class LoadError(ModelError):
    """The current model can not be loaded: nothing that needs it can be done."""


class Division(Protocol):
    """Which of a study's cells a run does itself."""

    def missing(
        self, run: Run, model: ModelRun | None, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]
    ) -> dict[K, int]:
        """The cells to do here, of those wanted; see `Run.missing`."""

    def own_cells(self, run: Run, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        """Those of the cells of a group that are this run's concern."""


class Everything:
    """A run alone: what is missing is to be done here."""

    def missing(
        self, run: Run, model: ModelRun | None, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]
    ) -> dict[K, int]:
        return run.outstanding(stage, paths, wanted)

    def own_cells(self, run: Run, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        return dict(wanted)


@dataclass
class Run:
    """One run of one study.

    number : of its record in the group `runs`
    retry : whether cells are tried again whose failure is permanent
    trust : whether the user confirmed that models may bring code
    trust_judge : whether they confirmed that judges may
    division : which cells are done here
    left : cells that were not begun, for they rest on some that other runs have not done yet, by stage
    judges : label -> the judge, once a cell needed it
    judged : (judge, model) of texts that were judged while the model that wrote them was loaded
    lent : asks language models for judges, once one needed it
    """

    study: Study
    store: Store
    progress: Progress
    number: int = -1
    retry: bool = False
    trust: bool = False
    stop: Stop = field(default_factory=Stop)
    division: Division = field(default_factory=Everything)
    done: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    failed_before: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: list[dict[str, Any]] = field(default_factory=list)
    stage: str = ""
    judges: dict[str, Any] = field(default_factory=dict)
    judged: set[tuple[str, str]] = field(default_factory=set)
    trust_judge: bool = False
    lent: Any = None
    batches: int = 0
    _programs: set[str] = field(default_factory=set)
    _prepared: dict[str, dict[str, list]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.book = Book(self.store)
        self.leases = Leases(self.store.path)
        self.jobs: list[Job] = jobs(self.study, self.store)

    # ---- cells ------------------------------------------------------------------------------------------

    def missing(
        self, stage: str, paths: str | tuple[str, ...], wanted: Mapping[K, int], model: ModelRun | None = None
    ) -> dict[K, int]:
        """The cells to do here: absent or stale in one of the groups at `paths`; counted and announced.

        Cells whose failure is permanent are held back, or with `retry` done again. `model`: whose turn it is.
        """
        return self.division.missing(self, model, stage, (paths,) if isinstance(paths, str) else paths, wanted)

    def own_cells(self, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        """Those of the cells of a group that are this run's concern: here all, unless they are shared out."""
        return self.division.own_cells(self, path, wanted)

    def outstanding(self, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]) -> dict[K, int]:
        """What is missing of a study, whoever does it; see `missing`."""
        gone = self.lacking(paths, wanted)
        before = {key: self.book.known_failure(paths[-1], key, number) for key, number in wanted.items()}
        failed = {key: failure for key, failure in before.items() if failure is not None}
        if not self.retry:
            self.failed_before += failed.values()
        todo = {
            key: number
            for key, number in wanted.items()
            if (key in gone and key not in failed) or (self.retry and key in failed)
        }
        there = sum(key not in gone for key in wanted if key not in todo)
        self.skipped[stage] = self.skipped.get(stage, 0) + there
        self.progress.stage(stage, len(todo), there)
        return todo

    def lacking(self, paths: str | tuple[str, ...], wanted: Mapping[K, int]) -> set[K]:
        """The wanted cells that are absent from one of the groups, or stale there."""
        paths = (paths,) if isinstance(paths, str) else paths
        return {key for path in paths for key in self.store.missing(path, wanted)}

    def inputs(self, path: str, wanted: Mapping[K, int]) -> dict[K, xr.Dataset]:
        """Finished cells to compute from, by the fingerprints that the plan gives them; see
        `store.inputs.read_whole`."""
        return read_whole(self.store, path, wanted)

    def prepare(self, groups: Sequence[Group]) -> None:
        """Has the store hold these groups; asked for again, they are there."""
        asked = {
            group.path: {"": list(group.variables)} | {dim: list(labels) for dim, labels in group.coords.items()}
            for group in groups
        }
        if any(self._prepared.get(path) != labels for path, labels in asked.items()):
            self.store.prepare(groups)
            self._prepared |= asked

    def commit(self, path: str, key: tuple, data: xr.Dataset, fingerprint: int, seconds: float) -> None:
        self.store.commit(path, key, data, fingerprint=fingerprint, run=self.number, seconds=seconds)
        self.book.resolve(path, key)

    def finished(self, stage: str, key: tuple) -> None:
        self.done[stage] = self.done.get(stage, 0) + 1
        self.progress.advance(stage, cells=1)

    def fail(self, stage: str, path: str, key: tuple, number: int, reason: str, kind: str = PERMANENT) -> None:
        """A cell of the group at `path`, wanted with the fingerprint `number`, can not be computed."""
        failure = Failure(stage, key, reason, kind)
        self.failures.append(failure)
        self.book.add(path, failure, number)
        self.progress.note(f"{stage} {' / '.join(map(str, key))}: {reason}")

    def wait_for(self, stage: str, path: str, key: tuple, number: int, other: str, first: tuple) -> None:
        """A cell can not be computed because one that it rests on, of the group `other`, is not there."""
        entry = self.book.open(other, first)
        why = f"which failed: {entry.failure.reason}" if entry else "which is missing"
        self.fail(stage, path, key, number, f"rests on {other} {' / '.join(map(str, first))}, {why}", WAITING)

    @contextmanager
    def guarded(self, stage: str, path: str, key: tuple, number: int) -> Iterator[None]:
        """What fails inside fails this cell alone."""
        try:
            yield
        except (LoadError, RemoteError):
            raise
        except (ModelError, ExecutionError, ProgramError, InputError) as error:
            self.fail(stage, path, key, number, str(error), kind_of(error))

    def came_back(self, stage: str, path: str, key: tuple, number: int, rows: Iterable[Any], results: Results) -> bool:
        """Whether every row of a cell came back. A row that failed fails the cell; one not run leaves it to do."""
        rows = list(rows)
        failed = [results.failed[row] for row in rows if row in results.failed]
        if failed:
            more = f" (and {len(failed) - 1} more of its rows)" if len(failed) > 1 else ""
            permanent = [error for error in failed if kind_of(error) == PERMANENT]
            first = (permanent or failed)[0]
            self.fail(stage, path, key, number, f"{first}{more}", kind_of(first))
            return False
        return all(row in results.readouts for row in rows)

    def warn(self, text: str, now: bool = True) -> None:
        """Something that the summary should tell, once; `now`: whether it is said at once, too."""
        if text not in self.warnings:
            self.warnings.append(text)
            if now:
                self.progress.note(text)

    def program_name(self, stage: str, text: str) -> str:
        """Keeps a program's text in the store, once; returns its digest."""
        from nsteer.program.code import digest

        name = digest(text)
        if name not in self._programs:
            data = xr.Dataset({"source": ((), text), "stage": ((), stage)})
            if (name,) not in self.store.committed("programs"):
                self.store.prepare([arrays.programs_group([name])])
                self.store.commit("programs", (name,), data, fingerprint=0, run=self.number)
            self._programs.add(name)
        return name

    def waves(
        self,
        stage: str,
        paths: str | tuple[str, ...],
        todo: Mapping[K, int],
        rows_of: Callable[[K], int] = lambda key: 0,
    ) -> Iterator[list[K]]:
        """Cells in order, in groups of about WAVE rows. What another run fills meanwhile, or computes now, is left out.

        Waits for cells that another run computes until they are there or given up: a stage ends when all are.
        Raises Interrupted between two groups.
        """
        paths = (paths,) if isinstance(paths, str) else paths
        left = dict(todo)
        try:
            while left:
                self.stop.check()
                wave = self._take(stage, paths, left, rows_of)
                if wave:
                    self.progress.hold(len(wave))
                    yield wave
                    for key in wave:
                        del left[key]
                    self.book.flush()  # before the lease ends: who waits for these cells must see what became of them
                    self.leases.release()
                elif left:
                    time.sleep(POLL)
                    self.book.read()
        finally:
            self.leases.release()
        self.stop.check()

    def _take(self, stage: str, paths: tuple[str, ...], left: dict[K, int], rows_of: Callable[[K], int]) -> list[K]:
        """The next cells that no other run computes; drops from `left` what another run has settled."""

        chosen: list[K] = []

        def choose(held: set[tuple[str, tuple]], changed: bool) -> list[tuple[str, tuple]]:
            if changed:
                gone = self.lacking(paths, left)
                for key in list(left):
                    before = self.book.known_failure(paths[-1], key, left[key])
                    if key not in gone and not self.retry:
                        self.skipped[stage] = self.skipped.get(stage, 0) + 1
                        self.progress.advance(stage, cells=0)
                        del left[key]
                    elif before and not self.retry:
                        self.failed_before.append(before)
                        del left[key]
            size = 0
            for key in left:
                if (paths[-1], key) not in held:
                    chosen.append(key)
                    size += rows_of(key)
                    if size >= WAVE:
                        break
            return [(paths[-1], key) for key in chosen]

        self.leases.take(choose)
        return chosen


class Clock:
    """Seconds since it was made or last read, shared out over cells."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def share(self, cells: int) -> float:
        now = time.monotonic()
        spent, self.last = now - self.last, now
        return spent / max(cells, 1)
