"""Turns a study into shards that several processes do: disjoint, of about the same size, known beforehand.

Which cells are a shard's follows from the plan alone, never from what a store has: shards need no word of each other.
A cell that is computed from those of the same keys (activations of samples, measures of a continuation) is in its
shard; a stage that rests on cells of other shards is begun when all of those are there, or have failed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nsteer.errors import ArgumentsError, SteerError
from nsteer.runner.runs import Run
from nsteer.stages import cells, sizing
from nsteer.stages.job import Job
from nsteer.stages.table import BY_NAME, STAGES, Stage

if TYPE_CHECKING:
    from nsteer.runner.model import ModelRun

K = TypeVar("K", bound=tuple)

LOOK = 5.0
"""Seconds between two looks at what other shards have done."""

SAME_KEYS = {"activations": "samples", "embeddings": "samples", "responses_judged": "responses"}
"""Stages, beside those that read continuations, whose cells are computed from the cells of the same keys alone."""


@dataclass(frozen=True)
class Shard:
    """The `index`-th of `count` shards, the first 1. Raises ArgumentsError for one that is none."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            said = f"1/{self.count} to {self.count}/{self.count}" if self.count else "1/1 at least"
            raise ArgumentsError([SteerError(f"shard {self}: shards are counted from 1: {said}")])

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parsed(cls, text: str) -> Shard:
        """`2/8`. Raises ArgumentsError."""
        if not (match := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)):
            raise ArgumentsError([SteerError(f"shard {text!r}: expected I/N, as 2/8: the second of eight")])
        return cls(*map(int, match.groups()))


class Sharded:
    """Which cells a shard does: see `runner.runs.Division`.

    seconds : how long it waits for cells of other shards, for each stage that rests on them
    Cells of this shard that were not begun because others' are not there yet are in the run's `left`.
    """

    def __init__(self, shard: Shard, seconds: float = 0.0):
        self.shard, self.seconds = shard, seconds
        self._shards: dict[str, dict[Any, int]] = {}

    def missing(
        self, run: Run, model: ModelRun | None, stage: str, paths: tuple[str, ...], wanted: Mapping[K, int]
    ) -> dict[K, int]:
        mine = self.own_cells(run, stage, wanted)
        todo = run.lacking(paths, mine)
        if todo and model is not None and not self._begins(run, model.job, BY_NAME[stage]):
            run.left[stage] = run.left.get(stage, 0) + len(todo)
            mine = {key: number for key, number in mine.items() if key not in todo}
        return run.outstanding(stage, paths, mine)

    def own_cells(self, run: Run, path: str, wanted: Mapping[K, int]) -> dict[K, int]:
        """Of the cells of a stage those of this shard."""
        shard_of = self._cut(run.jobs)[BY_NAME[path].reads or SAME_KEYS.get(path, path)]
        return {key: number for key, number in wanted.items() if shard_of[getattr(key, "of", key)] == self.shard.index}

    def _cut(self, jobs: Sequence[Job]) -> dict[str, dict[Any, int]]:
        """For every stage that is cut by itself, the shard of each of its cells."""
        if not self._shards:
            own = [stage for stage in STAGES if not stage.reads and stage.name not in SAME_KEYS]
            self._shards = {stage.name: shard_of(jobs, stage, self.shard.count) for stage in own}
        return self._shards

    def _begins(self, run: Run, job: Job, stage: Stage) -> bool:
        """Whether what a stage rests on is settled; waits for it as long as it may."""
        end = time.monotonic() + self.seconds
        told = False
        while open_ := self._open(run, job, stage.after):
            if time.monotonic() >= end:
                return False
            if not told:
                run.progress.note(f"{stage.name}: waiting for {open_}")
                told = True
            run.stop.check()
            time.sleep(min(LOOK, max(0.0, end - time.monotonic())))
            run.book.read()
        return True

    def _open(self, run: Run, job: Job, stages: Iterable[str]) -> str:
        """Of which of these stages a cell of the model is neither there nor known to have failed."""
        for name in stages:
            path = BY_NAME[name].paths(job)[-1]
            lacking = run.lacking(BY_NAME[name].paths(job), job.wanted(BY_NAME[name].cells))
            if any(run.book.open(path, key) is None for key in lacking):
                return f"{name} of other shards"
        return ""


def shard_of(jobs: Sequence[Job], stage: Stage, count: int) -> dict[Any, int]:
    """The shard, from 1, of every cell that a study wants of a stage: runs of neighbours that cost about the same.

    So a shard loads few models, and rows that fit one batch mostly stay together.
    """
    units = [unit for job in jobs for unit in _units(job, stage)]
    total, before = sum(cost for _, cost in units), 0.0
    shard_by_cell: dict[Any, int] = {}
    for some, cost in units:
        middle = (before + cost / 2) / total
        shard_by_cell |= dict.fromkeys(some, min(int(middle * count), count - 1) + 1)
        before += cost
    return shard_by_cell


def _units(job: Job, stage: Stage) -> Iterator[tuple[list[Any], float]]:
    """What of a stage is not cut, each with its cost: rows times the weights of the model.

    A cell whose fingerprint another one has is a copy of it, and stays with it.
    """
    wanted = job.wanted(stage.cells)
    first = cells.leaders(wanted)
    each = float(sizing.weights(job.facts, 1)) if wanted else 1.0
    same: dict[Any, list[Any]] = {}
    for key, number in wanted.items():
        same.setdefault(first[number], []).append(key)
    units = [(some, max(stage.rows(job, key), 1) * each) for key, some in same.items()]
    if stage.together and units:
        yield [key for some, _ in units for key in some], sum(cost for _, cost in units)
    else:
        yield from units
