"""What every stage of a run shares: the study, its store, the model at hand, and how rows are put through it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from nsteer import arrays, cells
from nsteer.check import Study
from nsteer.conductor.jobs import Jobs
from nsteer.conductor.progress import Progress
from nsteer.errors import EditError
from nsteer.executors import Executor, create
from nsteer.models import Facts
from nsteer.program import Form, Row, assemble, programs
from nsteer.store import Store

WAVE = 512
"""Rows after which finished cells are committed: what a kill can cost, and what is held in memory."""


@dataclass(frozen=True)
class Failure:
    """A cell that could not be computed, and why."""

    stage: str
    cell: tuple
    reason: str


@dataclass
class Session:
    """One run of one study. Loads a model only when a cell needs it."""

    study: Study
    store: Store
    progress: Progress
    run: int = -1
    verify_rows: int = 0
    done: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: list[dict[str, Any]] = field(default_factory=list)
    facts: Facts | None = None
    _executor: Executor | None = None
    _sources: set[str] = field(default_factory=set)
    _kept: list[tuple] = field(default_factory=list)
    _seen: int = 0

    # ---- the model at hand -----------------------------------------------------------------------------

    def turn(self, facts: Facts, index: int) -> None:
        """`facts` is the model at hand from now on; the one before is freed."""
        self.release()
        self.facts, self._kept, self._seen = facts, [], 0
        self.progress.model(facts.label, index + 1, len(self.study.facts))

    def release(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    @property
    def executor(self) -> Executor:
        """The executor of the model at hand, loaded at its first use. Raises ModelError."""
        if self._executor is None:
            assert self.facts is not None
            self.progress.note("loading")
            self._executor = self.load(self.facts)
            described = {**self._executor.describe(), "executor": self.study.plan.executor}
            data = arrays.model_data(self.facts, described)
            self.store.commit("models", (self.facts.label,), data, fingerprint=0, run=self.run)
        return self._executor

    def load(self, facts: Facts) -> Executor:
        """The executor that the plan asks for, over one model."""
        plan, spec = self.study.plan, cells.model_of(self.study, facts)
        settings: dict[str, Any] = {}
        if plan.executor == "ndif":
            settings = {**plan.remote.model_dump(), "journal": Jobs(self.store, self.run), "note": self.progress.job}
        return create(
            plan.executor,
            facts.source,
            # a server's models are keyed by the revision as the user wrote it, mostly none: not by the commit
            revision=spec.revision if plan.executor == "ndif" else facts.revision,
            dtype=spec.dtype,
            device=spec.device,
            attn_implementation=spec.attn_implementation,
            quantization=spec.quantization,
            trust_remote_code=spec.trust_remote_code,
            threads=plan.threads,
            **settings,
        )

    # ---- cells ------------------------------------------------------------------------------------------

    def missing(self, stage: str, path: str, wanted: Mapping[tuple, int]) -> dict[tuple, int]:
        """The cells of a group that are absent or stale, counted and announced."""
        todo = {key: wanted[key] for key in self.store.missing(path, wanted)}
        self.skipped[stage] = self.skipped.get(stage, 0) + len(wanted) - len(todo)
        self.progress.stage(stage, len(todo), len(wanted) - len(todo))
        return todo

    def commit(self, stage: str, path: str, key: tuple, data: xr.Dataset, fingerprint: int, seconds: float) -> None:
        self.store.commit(path, key, data, fingerprint=fingerprint, run=self.run, seconds=seconds)

    def finished(self, stage: str, key: tuple) -> None:
        self.done[stage] = self.done.get(stage, 0) + 1
        self.progress.advance(stage, cells=1)

    def fail(self, stage: str, key: tuple, reason: str) -> None:
        self.failures.append(Failure(stage, key, reason))
        self.progress.note(f"{stage} {key}: {reason}")

    # ---- rows -------------------------------------------------------------------------------------------

    def execute(self, stage: str, form: Form, rows: Iterable[Row]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each row's key with what came back for it: the fields of Readouts, and `program`."""
        self.settle()  # what came before this call is committed
        batch = self.study.plan.batch
        by_key = {}
        for row in rows:
            by_key[row.key] = row
        made = programs(form, by_key.values(), budget=batch.tokens, most=batch.rows)
        for program, found in self.executor.map(made):
            name = self.source(stage, self.executor.source(program))
            for i, key in enumerate(program.keys):
                result = found.row(i)
                self.remember(stage, form, by_key[key], result)
                new = len(result.get("tokens", ()))
                self.progress.advance(stage, tokens=len(by_key[key].tokens) + new)
                yield key, {**result, "program": name}

    def source(self, stage: str, text: str) -> str:
        """Keeps a program's text in the store, once; returns its digest."""
        from nsteer.source import digest

        name = digest(text)
        if name not in self._sources:
            self.store.prepare([arrays.programs_group([name])])
            data = xr.Dataset({"source": ((), text), "stage": ((), stage)})
            if (name,) not in self.store.committed("programs"):
                self.store.commit("programs", (name,), data, fingerprint=0, run=self.run)
            self._sources.add(name)
        return name

    def settle(self) -> None:
        """Everything handed out so far is committed: jobs in the journal may be forgotten."""
        if self._executor is not None:
            self._executor.settle()

    def waves(self, todo: Mapping[tuple, int], rows_of: Callable[[tuple], int]) -> Iterator[list[tuple]]:
        """Cells in order, in groups of about WAVE rows."""
        wave: list[tuple] = []
        size = 0
        for key in todo:
            wave.append(key)
            size += rows_of(key)
            if size >= WAVE:
                yield wave
                wave, size = [], 0
        if wave:
            yield wave

    # ---- verification -----------------------------------------------------------------------------------

    def remember(self, stage: str, form: Form, row: Row, result: Mapping[str, Any]) -> None:
        """Keeps a uniform random choice of `verify_rows` rows of this model, with their results."""
        if not self.verify_rows:
            return
        self._seen += 1
        entry = (stage, form, row, dict(result))
        if len(self._kept) < self.verify_rows:
            self._kept.append(entry)
        elif (place := random.Random(self._seen).randrange(self._seen)) < self.verify_rows:
            self._kept[place] = entry

    def verify(self) -> None:
        """Runs the kept rows again, one at a time, and puts the comparison into the store."""
        if not self._kept or self.facts is None:
            return
        self.store.prepare([arrays.verification_group(self.study, self.verify_rows)])
        found = [_compare(self.executor, *entry) for entry in self._kept]
        self.checked += [{"model": self.facts.label, **one} for one in found]
        columns = {name: (("row",), [one[name] for one in found]) for name in found[0]}
        data = arrays.dataset({"row": range(len(found))}, columns)
        key = (self.facts.label,)
        self.store.commit("verification", key, data, fingerprint=self.run + 1, run=self.run)


def _compare(executor: Executor, stage: str, form: Form, row: Row, batch: Mapping[str, Any]) -> dict[str, Any]:
    import json

    single = executor.run(assemble(form, [row])).row(0)
    difference = float("nan")
    if "pooled" in single:
        scale = max(float(np.abs(single["pooled"]).max()), 1e-12)
        difference = float(np.abs(single["pooled"] - batch["pooled"]).max()) / scale
    equal = tuple(single.get("tokens", ())) == tuple(batch.get("tokens", ()))
    label = json.dumps(row.key, default=str)
    return {"stage": stage, "label": label, "tokens_equal": equal, "relative_difference": difference}


class Clock:
    """Seconds since it was made or last read, shared out over cells."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def share(self, cells: int) -> float:
        now = time.monotonic()
        spent, self.last = now - self.last, now
        return spent / max(cells, 1)


def check_receipt(receipt: np.ndarray, tokens: Sequence[int], prompt_positions: bool) -> None:
    """Raises EditError for a receipt [edit, 4] whose edits touched nothing, or changed nothing.

    An edit of generated positions alone has nothing to touch in a text that ended at its first token.
    """
    if not prompt_positions and len(tokens) <= 1:
        return
    if (receipt[:, 0] == 0).any():
        raise EditError("the edit touched no position")
    if (receipt[:, 1] == 0).any():
        raise EditError(
            "the edit changed nothing: its strength is lost in the rounding of the stream, or its vector is 0"
        )
