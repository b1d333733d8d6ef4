"""Turns tasks into committed cells, in one process that holds one loaded model. Knows nothing of Ray."""

from __future__ import annotations

import faulthandler
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from nsteer.errors import NsteerError, RemoteError, StoreError
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.runner import stages
from nsteer.runner.failing import Failure
from nsteer.runner.judging import judge_by_writer
from nsteer.runner.model import Loaded, ModelRun
from nsteer.runner.progress import Progress
from nsteer.runner.runs import Run
from nsteer.runner.stopping import Interrupted
from nsteer.stages import arrays
from nsteer.store import Store

K = TypeVar("K", bound=tuple)

JUDGE = "the judge"
"""The model of the stage `judged`: no label of a model has a space."""

NOT_SHARED = (
    "a worker does not find the store, or the folder where the run was started: all nodes must share that folder, or "
    "the store lie in object storage"
)


@dataclass(frozen=True)
class Work:
    """What a task's cells are: of which stage, and the groups in which they are to be; their fingerprints."""

    stage: str
    paths: tuple[str, ...]
    fingerprints: Mapping[tuple, int]


@dataclass(frozen=True)
class WorkerSetup:
    """What every worker of a run is told.

    folder : where the driver stands: plans name their stores and models from there
    logs : where workers write what they do, in files of their own
    """

    study: Study
    run: int
    run_label: str
    folder: str
    logs: str
    retry: bool = False
    trust: bool = False
    trust_judge: bool = False


@dataclass
class Report:
    """What came of a task.

    ended : what ended it before its cells were through: an error that is no cell's own
    ends_run : whether every other task would end so too
    stopped : whether it was told to stop before it was through
    """

    done: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    ended: str = ""
    ends_run: bool = False
    stopped: bool = False


class Assigned:
    """Which cells a worker does: those that it is given, whatever else is missing. See `runner.runs.Division`."""

    def __init__(self) -> None:
        self.cells: dict[str, Mapping[tuple, int]] = {}
        self.again = False

    def assign(self, paths: tuple[str, ...], wanted: Mapping[tuple, int], again: bool) -> None:
        """Cells of one stage; `again`: a worker died with them, so that some may be there."""
        self.cells, self.again = {paths[-1]: wanted}, again

    def missing(
        self, run: Run, model: ModelRun | None, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]
    ) -> dict[K, int]:
        mine = self.own_cells(run, paths[-1], wanted)
        gone = run.lacking(paths, mine) if self.again and mine else mine
        return {key: number for key, number in mine.items() if key in gone}

    def own_cells(self, run: Run, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        given = self.cells.get(path, {})
        return {key: number for key, number in wanted.items() if key in given}


class Worker:
    """Does tasks of one model of a study, one at a time; `stop` may be called meanwhile, from another thread."""

    def __init__(self, setup: WorkerSetup, name: str, model: str, executor: Callable[[Facts], Any] | None = None):
        """executor : makes the executor, in place of what the plan says (for simulations)"""
        self.setup, self.name, self.model, self.executor = setup, name, model, executor
        self.progress = Progress()
        self.told = False
        self.log = logging.getLogger(f"nsteer.worker.{name}")

    def _open(self) -> None:
        setup = self.setup
        if setup.folder:
            os.chdir(setup.folder)
        if setup.logs:
            self._write_log(Path(setup.logs), self.name)
        self.log.info("%s: process %d begins", self.model, os.getpid())
        study = relocated(setup.study)
        store = Store(study.plan.store)
        store.check_version()
        store.declare(arrays.groups(study))
        self.assigned = Assigned()
        self.run = Run(study, store, self.progress, setup.run, setup.retry, setup.trust, division=self.assigned)
        self.run.trust_judge = setup.trust_judge
        self.run.book.run = setup.run_label
        job = next((job for job in self.run.jobs if job.label == self.model), None)
        self.turn = None if job is None else ModelRun(self.run, job, make=self.executor)
        if self.told:
            self.run.stop.ask()

    def _write_log(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"{name}.log").open("a", encoding="utf-8")
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        faulthandler.enable(file)  # a crash leaves its stack here

    def load(self) -> Loaded:
        """Loads the model, once."""
        try:
            self._open()
        except (OSError, StoreError):
            self.log.exception("the store")
            return Loaded(reason=NOT_SHARED)
        loaded = self._hold()
        self.log.info(f"not loaded: {loaded.reason}" if loaded.reason else f"loaded in {loaded.seconds:.1f} s")
        return loaded

    def _hold(self) -> Loaded:
        """Loads the model. What fails is said, not recorded: other workers may have failed with it too."""
        try:
            return Loaded() if self.turn is None else self.turn.try_to_load()
        except RemoteError as error:
            return Loaded(reason=str(error))

    def release(self) -> None:
        """Frees the model, if it was loaded."""
        turn: ModelRun | None = getattr(self, "turn", None)
        if turn is not None:
            turn.release()

    def do(self, work: Work, again: bool) -> Report:
        """Does a task's cells and commits them. Failures of cells are in the store when it returns."""
        run, report = self.run, Report()
        started, before = time.monotonic(), self.progress.tokens
        self.assigned.assign(work.paths, work.fingerprints, again)
        run.done, run.failures, run.warnings, run.failed_before = {}, [], [], []
        self.log.info("%s: %d cells of %s from %s", work.stage, len(work.fingerprints), work.paths[-1], first(work))
        try:
            run.stop.check()
            self._stage(work.stage)
        except Interrupted:
            report.stopped = True
        except (NsteerError, MemoryError) as error:
            report.ended, report.ends_run = str(error) or type(error).__name__, isinstance(error, StoreError)
        except Exception as error:  # a fault of nsteer: its traceback is in the log, and the others go on
            self.log.exception("%s", work.stage)
            report.ended = f"{type(error).__name__}: {error}"
        if not report.ends_run:
            run.book.flush()
        report.done, report.failures, report.warnings = run.done, run.failures, run.warnings
        report.tokens, report.seconds = self.progress.tokens - before, time.monotonic() - started
        said = (report.ended or ("stopped" if report.stopped else "done"), sum(report.done.values()), report.seconds)
        self.log.info("%s: %d cells in %.1f s", *said)
        for failure in report.failures:
            self.log.info("%s %s: %s", failure.stage, " / ".join(map(str, failure.cell)), failure.reason)
        return report

    def _stage(self, name: str) -> None:
        if self.turn is None:
            stages.RUN_LAST[name](self.run)
        elif name in stages.RUN_LAST:
            judge_by_writer(self.turn)
        else:
            stages.RUN[name](self.turn)

    def stop(self) -> None:
        """Asks it to stop after the current batch."""
        self.told = True
        if hasattr(self, "run"):
            self.run.stop.ask()


def first(work: Work) -> str:
    return " / ".join(map(str, next(iter(work.fingerprints))))


def relocated(study: Study) -> Study:
    """The study with models of the zoo, and those made of GGUF files, where this installation has them."""
    facts_here = []
    for facts in study.facts:
        folder = models.local_folder(facts.id) if facts.id.startswith("zoo/") else None
        folder = models.converted(facts) if facts.gguf else folder
        facts_here.append(replace(facts, name_or_path=str(folder)) if folder else facts)
    return replace(study, facts=tuple(facts_here))
