"""What every stage of a run shares: the study, its store, the model at hand, and how rows are put through it."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import (
    EditError,
    ExecutionError,
    InputError,
    ModelError,
    ProgramError,
    RemoteError,
    SiteError,
    StoreError,
)
from nsteer.executors import Executor, create
from nsteer.models import contexts
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.program.anatomy import multiplied, unknown
from nsteer.program.form import Form, Program, Row, assemble, programs
from nsteer.program.ops import receipt_problem
from nsteer.runner import chats
from nsteer.runner.failing import LASTING, PASSING, WAITING, Book, Failure, kind_of, not_loaded
from nsteer.runner.jobs import Jobs
from nsteer.runner.progress import Progress
from nsteer.runner.rows import Results, Splitting
from nsteer.runner.stopping import Stop
from nsteer.stages import arrays, cells, forms
from nsteer.store import Group, Store
from nsteer.store.inputs import whole
from nsteer.store.leases import Leases
from nsteer.system.fingerprints import fingerprint

WAVE = 512
"""Rows after which finished cells are committed: what a kill can cost, and what is held in memory."""

POLL = 0.5
"""Seconds between two looks at cells that another run has in hand."""


class LoadError(ModelError):
    """The model at hand can not be loaded: nothing that needs it can be done."""


@dataclass
class Loaded:
    """What came of loading a model: what the group `models` keeps of it, or why it is not there."""

    described: xr.Dataset | None = None
    reason: str = ""
    kind: str = PASSING
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass
class Session:
    """One run of one study. Loads a model only when a cell needs it.

    retry : whether cells are tried again whose failure is lasting
    trust : whether the user confirmed that models may bring code
    """

    study: Study
    store: Store
    progress: Progress
    run: int = -1
    verify_rows: int = 0
    retry: bool = False
    trust: bool = False
    stop: Stop = field(default_factory=Stop)
    done: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    held: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: list[dict[str, Any]] = field(default_factory=list)
    facts: Facts | None = None
    stage: str = ""
    _executor: Executor | None = None
    _unloadable: LoadError | None = None
    _sources: set[str] = field(default_factory=set)
    _kept: list[tuple] = field(default_factory=list)
    _seen: int = 0
    _batches: int = 0
    _wanted: dict[tuple[Callable, str], cells.Cells] = field(default_factory=dict)
    _prepared: dict[str, dict[str, list]] = field(default_factory=dict)
    _read: dict[tuple[str, tuple, int], xr.Dataset] = field(default_factory=dict)
    judge: Any = None  # the classifier, once a cell needed it

    def __post_init__(self) -> None:
        self.book = Book(self.store)
        self.leases = Leases(self.store.path)
        self.splitting = Splitting(self.warn)

    # ---- the model at hand -----------------------------------------------------------------------------

    def turn(self, facts: Facts, index: int) -> None:
        """`facts` is the model at hand from now on; the one before is freed."""
        self.release()
        self.facts, self._kept, self._seen, self._unloadable, self._read = facts, [], 0, None, {}
        self.splitting = Splitting(self.warn)
        self.progress.model(facts.label, index + 1, len(self.study.facts))

    def leave(self) -> None:
        """The last model's turn is over."""
        self.release()
        self.facts = None

    def wanted(self, of: Callable[[Study, Facts], cells.Cells], facts: Facts | None = None) -> cells.Cells:
        """What a function of `cells` wants of a model, the one at hand unless given: worked out once."""
        facts = facts or self.facts
        assert facts is not None
        key = (of, facts.label)
        if key not in self._wanted:
            self._wanted[key] = of(self.study, facts)
        return self._wanted[key]

    def mine(self, paths: str, wanted: cells.Cells) -> cells.Cells:
        """The cells of a group that are this session's to do, of those wanted: here all."""
        return wanted

    def release(self) -> None:
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    @property
    def executor(self) -> Executor:
        """The executor of the model at hand, loaded at its first use. Raises LoadError."""
        if self._unloadable is not None:
            raise self._unloadable
        if self._executor is None:
            assert self.facts is not None
            self.stop.check()
            number = fingerprint(cells.knobs(self.study, self.facts))
            self._loadable(number)
            self.progress.note("loading")
            loaded = self.try_to_load()
            if loaded.described is None:  # here, where no traceback holds what did not fit
                self.fail("loading", "models", (self.facts.label,), number, loaded.reason, loaded.kind)
                self._unloadable = LoadError(loaded.reason)
                raise self._unloadable
            for said in loaded.warnings:
                self.warn(said)
            self.commit("loading", "models", (self.facts.label,), loaded.described, 0, 0.0)
        assert self._executor is not None
        return self._executor

    def try_to_load(self) -> Loaded:
        """Loads the model at hand. Whatever fails on the way fails this model; a server or a store, the run."""
        assert self.facts is not None
        started = time.monotonic()
        try:
            self._executor = self.load(self.facts)
            said = self._executor.describe()
            described, warnings = self.described(said), [self._executor.batching.note, *said.get("warnings", [])]
        except (RemoteError, StoreError):
            raise
        except Exception as error:  # torch, transformers, a driver, a missing extra: each has kinds of its own
            device = cells.model_of(self.study, self.facts).device
            reason, kind = not_loaded(error, self.facts.id, device)
        else:
            self.stop.waiting = getattr(self._executor, "cancel", None)
            told = [one for one in warnings if one]
            return Loaded(described, seconds=time.monotonic() - started, warnings=told)
        self.release()
        gc.collect()  # what was loaded of it may be held in circles
        return Loaded(reason=reason, kind=kind)

    def described(self, said: Mapping[str, Any]) -> xr.Dataset:
        """What the group `models` keeps of the model at hand, loaded. `said`: what its executor says of it."""
        assert self.facts is not None and self._executor is not None
        said = {**said, "executor": self.study.plan.executor}
        said["health"] = {**said.get("health", {}), **chats.look(self.facts, self._executor.tokenizer)}
        said["settings"] = {**said.get("settings", {}), "max_tokens_in_flight": self.in_flight()}
        return arrays.model_data(self.facts, said)

    def in_flight(self) -> dict[str, int]:
        """The most padded tokens in one batch, by stage."""
        assert self.facts is not None and self._executor is not None
        found: dict[str, int] = {}
        for stage, form in forms.all_of(self.study, self.facts, self._executor.eos, self._executor.pad):
            found[stage] = min(self.allowed(form), found.get(stage, self.allowed(form)))
        return found

    def allowed(self, form: Form) -> int:
        """The most padded tokens in one batch of a form: the plan's word, or what the executor can afford."""
        batch = self.study.plan.batch
        if batch.max_tokens_in_flight != "auto":
            return batch.max_tokens_in_flight
        return self.executor.afford(form, batch.rows)

    def _loadable(self, number: int) -> None:
        """Raises LoadError for a model that failed before and would fail again."""
        assert self.facts is not None
        before = self.book.held("models", (self.facts.label,), number)
        if before and not self.retry:
            self.held.append(before)
            self._unloadable = LoadError(before.reason)
            raise self._unloadable

    def load(self, facts: Facts) -> Executor:
        """The executor that the plan asks for, over one model."""
        plan, spec = self.study.plan, cells.model_of(self.study, facts)
        settings: dict[str, Any] = {}
        if plan.executor == "ndif":
            settings = {**plan.remote.model_dump(), "journal": Jobs(self.store, self.run), "note": self.progress.job}
        elif plan.executor == "vllm":
            settings = plan.vllm.model_dump()
        with models.unchanged(facts, self.progress.note):
            return create(
                plan.executor,
                facts.source,
                # a server's models are keyed by the revision as the user wrote it, mostly none: not by the commit
                revision=spec.revision if plan.executor == "ndif" else facts.revision,
                dtype=spec.dtype,
                device=spec.device,
                attn_implementation=spec.attn_implementation,
                quantization=spec.quantization,
                trust_remote_code=spec.trust_remote_code and self.trust,
                threads=plan.threads,
                **settings,
            )

    # ---- cells ------------------------------------------------------------------------------------------

    def missing(self, stage: str, paths: str | tuple[str, ...], wanted: Mapping[tuple, int]) -> dict[tuple, int]:
        """The cells to do: absent or stale in one of the groups at `paths`; counted and announced.

        Cells whose failure is lasting are held back, or with `retry` done again.
        """
        paths = (paths,) if isinstance(paths, str) else paths
        gone = self.lacking(paths, wanted)
        before = {key: self.book.held(paths[-1], key, number) for key, number in wanted.items()}
        failed = {key: failure for key, failure in before.items() if failure is not None}
        if not self.retry:
            self.held += failed.values()
        todo = {
            key: number
            for key, number in wanted.items()
            if (key in gone and key not in failed) or (self.retry and key in failed)
        }
        there = sum(key not in gone for key in wanted if key not in todo)
        self.skipped[stage] = self.skipped.get(stage, 0) + there
        self.progress.stage(stage, len(todo), there)
        return todo

    def lacking(self, paths: str | tuple[str, ...], wanted: Mapping[tuple, int]) -> set[tuple]:
        """The wanted cells that are absent from one of the groups, or stale there."""
        paths = (paths,) if isinstance(paths, str) else paths
        return {key for path in paths for key in self.store.missing(path, wanted)}

    def inputs(self, path: str, wanted: Mapping[tuple, int]) -> dict[tuple, xr.Dataset]:
        """Finished cells to compute from, by the fingerprints that the plan gives them; see `store.inputs.whole`."""
        return whole(self.store, path, wanted)

    def kept_input(self, path: str, key: tuple, number: int) -> xr.Dataset:
        """One of `inputs`, kept in memory for this model's turn: small, used often, and right whoever replaces it."""
        if (path, key, number) not in self._read:
            self._read[path, key, number] = self.inputs(path, {key: number})[key]
        return self._read[path, key, number]

    def prepare(self, groups: Sequence[Group]) -> None:
        """Has the store hold these groups; asked for again, they are there."""
        asked = {group.path: {dim: list(labels) for dim, labels in group.coords.items()} for group in groups}
        if any(self._prepared.get(path) != labels for path, labels in asked.items()):
            self.store.prepare(groups)
            self._prepared |= asked

    def commit(self, stage: str, path: str, key: tuple, data: xr.Dataset, fingerprint: int, seconds: float) -> None:
        self.store.commit(path, key, data, fingerprint=fingerprint, run=self.run, seconds=seconds)
        self.book.resolve(path, key)

    def finished(self, stage: str, key: tuple) -> None:
        self.done[stage] = self.done.get(stage, 0) + 1
        self.progress.advance(stage, cells=1)

    def fail(self, stage: str, path: str, key: tuple, number: int, reason: str, kind: str = LASTING) -> None:
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
            lasting = [error for error in failed if kind_of(error) == LASTING]
            first = (lasting or failed)[0]
            self.fail(stage, path, key, number, f"{first}{more}", kind_of(first))
            return False
        return all(row in results.found for row in rows)

    def warn(self, text: str, now: bool = True) -> None:
        """Something that the summary should tell, once; `now`: whether it is said at once, too."""
        label = f"{self.facts.label}: " if self.facts else ""
        text = text if text.startswith(label) else f"{label}{text}"
        if text not in self.warnings:
            self.warnings.append(text)
            if now:
                self.progress.note(text)

    # ---- rows -------------------------------------------------------------------------------------------

    def execute(self, stage: str, form: Form, rows: Iterable[Row]) -> Results:
        """What came of rows: the fields of Readouts and `program`, or the error of those that failed.

        Told to stop, it finishes the program in hand; the rows after it are in neither.
        """
        batch = self.study.plan.batch
        by_key = {row.key: row for row in rows}
        if why := unknown(self.executor.anatomy, form.sites):
            return Results(failed=dict.fromkeys(by_key, SiteError(why)))
        if said := multiplied(self.executor.anatomy, form.sites):
            self.warn(said)
        long = {key: error for key, row in by_key.items() if (error := self._too_long(form, row))}
        by_key = {key: row for key, row in by_key.items() if key not in long}
        budget = self.splitting.budget(form, self.allowed(form))
        overhead = self.executor.overhead
        made = programs(
            form,
            by_key.values(),
            budget=budget,
            most=batch.rows,
            overhead=overhead,
            mates=self.executor.batching.mates,
            turn=self._turn(),
        )
        results = Results(failed=long)
        new = form.decoding.max_new_tokens if form.decoding else 0
        planned = {key: len(row.tokens) + new for key, row in by_key.items()}
        self.progress.rows(len(planned), sum(planned.values()))
        for program, found in self.put(made, stage):
            if isinstance(found, ExecutionError):
                results.failed |= dict.fromkeys(program.keys, found)
                continue
            name = self.source(stage, self.executor.source(program))
            self._batches += 1
            passed = 0
            for i, key in enumerate(program.keys):
                result = found.row(i)
                self.remember(stage, form, by_key[key], result)
                passed += len(by_key[key].tokens) + len(result.get("tokens", ()))
                results.found[key] = {**result, "program": name, "batch": self._batches}
            self.progress.back(stage, program.rows, passed, sum(planned[key] for key in program.keys))
        return results

    def _turn(self) -> int:
        """Positions of the model at hand beyond which a batch's longest text decides how all positions are coded."""
        context = self.facts.context if self.facts else None
        return context.turn if context else 0

    def _too_long(self, form: Form, row: Row) -> ExecutionError | None:
        """What to say of a row that has more positions than the model at hand, which looks them up in a table."""
        assert self.facts is not None
        context, new = self.facts.context, form.decoding.max_new_tokens if form.decoding else 0
        if context is None or not context.table or contexts.needed(len(row.tokens), new) <= context.positions:
            return None
        more = f" and {new} new ones" if new else ""
        return ExecutionError(
            f"a text of {len(row.tokens)} tokens{more}: {self.facts.label} has {context.positions} positions"
        )

    def put(self, made: Iterable[Program], stage: str = "") -> Iterator[tuple[Program, Any]]:
        """Programs through the model at hand, split where they fail; none is begun after the run is told to stop."""
        self.settle()  # what came before this call is committed
        self.stop.check()
        if (watch := getattr(self.executor, "watch", None)) is not None:
            watch(lambda tokens: self.progress.step(stage or self.stage, tokens))
        return self.splitting.map(self.executor, self._until_told(made))

    def _until_told(self, made: Iterable[Program]) -> Iterator[Program]:
        for program in made:
            if self.stop.asked:
                return
            yield program

    def source(self, stage: str, text: str) -> str:
        """Keeps a program's text in the store, once; returns its digest."""
        from nsteer.program.source import digest

        name = digest(text)
        if name not in self._sources:
            data = xr.Dataset({"source": ((), text), "stage": ((), stage)})
            if (name,) not in self.store.committed("programs"):
                self.store.prepare([arrays.programs_group([name])])
                self.store.commit("programs", (name,), data, fingerprint=0, run=self.run)
            self._sources.add(name)
        return name

    def settle(self) -> None:
        """Everything handed out so far is committed: jobs in the journal may be forgotten."""
        if self._executor is not None:
            self._executor.settle()

    def waves(
        self,
        stage: str,
        paths: str | tuple[str, ...],
        todo: Mapping[tuple, int],
        rows_of: Callable[[tuple], int] = lambda key: 0,
    ) -> Iterator[list[tuple]]:
        """Cells in order, in groups of about WAVE rows. What another run fills meanwhile, or has in hand, is left out.

        Waits for cells that another run has in hand until they are there or given up: a stage ends when all are.
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

    def _take(
        self, stage: str, paths: tuple[str, ...], left: dict[tuple, int], rows_of: Callable[[tuple], int]
    ) -> list[tuple]:
        """The next cells that no other run has in hand; drops from `left` what another run has settled."""

        def choose(held: set[tuple[str, tuple]], changed: bool) -> list[tuple[str, tuple]]:
            if changed:
                gone = self.lacking(paths, left)
                for key in list(left):
                    before = self.book.held(paths[-1], key, left[key])
                    if key not in gone and not self.retry:
                        self.skipped[stage] = self.skipped.get(stage, 0) + 1
                        self.progress.advance(stage, cells=0)
                        del left[key]
                    elif before and not self.retry:
                        self.held.append(before)
                        del left[key]
            chosen, size = [], 0
            for key in left:
                if (paths[-1], key) not in held:
                    chosen.append((paths[-1], key))
                    size += rows_of(key)
                    if size >= WAVE:
                        break
            return chosen

        return [key for _, key in self.leases.take(choose)]

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


def check_receipt(
    receipt: np.ndarray, tokens: Sequence[int], prompt_positions: bool, conditional: bool = False
) -> None:
    """Raises EditError for a receipt [edit, 4] whose edits touched nothing, or changed nothing.

    An edit of generated positions alone has nothing to touch in a text that ended at its first token; a conditional one
    may never find its condition.
    """
    if not prompt_positions and len(tokens) <= 1:
        return
    if why := receipt_problem(receipt, conditional):
        raise EditError(why)
