"""The turn of one model in a run: loaded when a cell needs it, and rows put through it."""

from __future__ import annotations

import gc
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError, RemoteError, SiteError, StoreError
from nsteer.executors import Executor, create
from nsteer.models import checkpoints, contexts
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Plan
from nsteer.program.anatomy import multiplied, unknown
from nsteer.program.form import Form, Program, Row, assemble, programs
from nsteer.runner import chats
from nsteer.runner.failing import TRANSIENT, not_loaded
from nsteer.runner.jobs import Jobs
from nsteer.runner.rows import Results, Splitting
from nsteer.runner.runs import LoadError, Run
from nsteer.stages import arrays, cells, products, table
from nsteer.stages.forms import Ends
from nsteer.stages.job import Job
from nsteer.stages.keys import OfModel
from nsteer.system.fingerprints import fingerprint

T = TypeVar("T")


@dataclass
class Loaded:
    """What came of loading a model: what the group `models` keeps of it, or why it is not there."""

    described: xr.Dataset | None = None
    reason: str = ""
    kind: str = TRANSIENT
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Kept:
    """A row that is run again alone to verify it, and what came of it in its batch."""

    stage: str
    form: Form
    row: Row
    result: Mapping[str, Any]


@dataclass
class ModelRun:
    """One model in a run.

    verify_rows : rows to run again one at a time
    make : makes the executor, in place of what the plan says (for simulations)
    encoded : prompts that were encoded last; see `prompting.encoded`
    sides : pooled streams of the texts of contrasts; see `contrasting.shuffled`
    _uncounted : whether tokens could not be counted before the model was loaded
    """

    run: Run
    job: Job
    verify_rows: int = 0
    make: Callable[[Facts], Executor] | None = None
    _executor: Executor | None = None
    _unloadable: LoadError | None = None
    _kept: list[_Kept] = field(default_factory=list)
    _seen: int = 0
    _uncounted: bool = False
    _read: dict[tuple[str, tuple, int], xr.Dataset] = field(default_factory=dict)
    encoded: dict[Any, dict[str, Encoded]] = field(default_factory=dict)
    sides: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.splitting = Splitting(self.warn)

    @property
    def study(self) -> Study:
        return self.job.study

    @property
    def plan(self) -> Plan:
        return self.job.plan

    @property
    def facts(self) -> Facts:
        return self.job.facts

    @property
    def label(self) -> str:
        return self.job.label

    def path(self, product: str) -> str:
        """Where this model's cells of a kind of group lie."""
        return products.path(product, self.label)

    def wanted(self, of: Callable[[Job], T]) -> T:
        """What a function of `cells` wants of this model: worked out once."""
        return self.job.wanted(of)

    def missing(self, stage: str) -> dict[Any, int]:
        """The cells of a stage that are to be done here; see `Run.missing`."""
        known = table.BY_NAME[stage]
        wanted = self.wanted(known.cells)
        return self.run.missing(stage, known.paths(self.job), wanted, self) if wanted else {}

    def warn(self, text: str, now: bool = True) -> None:
        """Something of this model that the summary should tell; see `Run.warn`."""
        label = f"{self.label}: "
        self.run.warn(text if text.startswith(label) else f"{label}{text}", now)

    def kept_input(self, path: str, key: tuple, number: int) -> xr.Dataset:
        """One of `Run.inputs`, kept for this model's turn: small, used often, and right whoever replaces it."""
        if (path, key, number) not in self._read:
            self._read[path, key, number] = self.run.inputs(path, {key: number})[key]
        return self._read[path, key, number]

    # ---- the executor --------------------------------------------------------------------------------------

    def release(self) -> None:
        """Frees the model, and the streams of contrasts that it read."""
        self.sides.clear()
        if self._executor is not None:
            self._executor.close()
            self._executor = None

    @cached_property
    def number(self) -> int:
        """The fingerprint of the model as the plan loads it."""
        return fingerprint(cells.knobs(self.job))

    @property
    def is_loaded(self) -> bool:
        """Whether the model is in memory, or asked for at its server."""
        return self._executor is not None

    @property
    def executor(self) -> Executor:
        """The executor of the model, loaded at its first use. Raises LoadError."""
        if self._executor is None:
            self.loadable()
            self.run.stop.check()
            self.run.progress.note("loading")
            loaded = self.try_to_load()
            if loaded.described is None:  # here, where no traceback holds what did not fit
                self.give_up(loaded.reason, loaded.kind)
            self.loaded(loaded)
        assert self._executor is not None
        return self._executor

    def loaded(self, loaded: Loaded) -> None:
        """Keeps what is known of the model, loaded here or by a worker."""
        for said in loaded.warnings:
            self.warn(said)
        if loaded.described is not None:
            self.run.commit("models", OfModel(self.label), loaded.described, 0, 0.0)

    def give_up(self, reason: str, kind: str) -> None:
        """The model can not be loaded. Raises LoadError."""
        self.run.fail("loading", "models", OfModel(self.label), self.number, reason, kind)
        self._unloadable = LoadError(reason)
        raise self._unloadable

    def loadable(self) -> None:
        """Raises LoadError for a model that can not be loaded, or that failed before and would fail again."""
        if self._unloadable is not None:
            raise self._unloadable
        before = self.run.book.known_failure("models", OfModel(self.label), self.number)
        if before and not self.run.retry:
            self.run.failed_before.append(before)
            self._unloadable = LoadError(before.reason)
            raise self._unloadable

    def try_to_load(self) -> Loaded:
        """Loads the current model. Whatever fails on the way fails this model; a server or a store, the run."""
        started = time.monotonic()
        self._uncounted = not checkpoints.countable(self.facts.name_or_path, self.facts.revision)
        try:
            self._executor = self.make(self.facts) if self.make else self.load()
            said = self._executor.describe()
            described, warnings = self.described(said), said.get("warnings", [])
        except (RemoteError, StoreError):
            raise
        except Exception as error:  # torch, transformers, a driver, a missing extra: each has kinds of its own
            reason, kind = not_loaded(error, self.facts.id, self.job.model.device)
            if self.facts.gguf:  # not where it was converted to
                reason = reason.replace(self.facts.name_or_path, self.facts.id)
        else:
            self.run.stop.waiting = getattr(self._executor, "cancel", None)
            return Loaded(described, seconds=time.monotonic() - started, warnings=warnings)
        self.release()
        gc.collect()  # what was loaded of it may be held in circles
        return Loaded(reason=reason, kind=kind)

    def described(self, said: Mapping[str, Any]) -> xr.Dataset:
        """What the group `models` keeps of the current model, loaded. `said`: what its executor says of it."""
        assert self._executor is not None
        said = {**said, "executor": self.plan.executor}
        said["health"] = {**said.get("health", {}), **chats.look(self.facts, self._executor.tokenizer)}
        said["settings"] = {**said.get("settings", {}), "max_tokens_in_flight": self.in_flight()}
        return arrays.model_data(self.facts, said)

    def in_flight(self) -> dict[str, int]:
        """The most padded tokens in one batch, by stage."""
        assert self._executor is not None
        tokens_by_stage: dict[str, int] = {}
        for stage, form in table.forms_of(self.job, self.ends):
            tokens_by_stage[stage] = min(self.allowed(form), tokens_by_stage.get(stage, self.allowed(form)))
        return tokens_by_stage

    def allowed(self, form: Form) -> int:
        """The most padded tokens in one batch of a form: the plan's word, or what the executor can afford."""
        batch = self.plan.batch
        if batch.max_tokens_in_flight != "auto":
            return batch.max_tokens_in_flight
        return self.executor.afford(form, batch.rows)

    def load(self) -> Executor:
        """The executor that the plan asks for, over this model."""
        plan, spec, facts = self.plan, self.job.model, self.facts
        settings: dict[str, Any] = {}
        if plan.executor == "ndif":
            settings = {
                **plan.remote.model_dump(),
                "journal": Jobs(self.run.store, self.run.number),
                "note": self.run.progress.job,
            }
        elif plan.executor == "vllm":
            settings = plan.vllm.model_dump()
        if facts.adapter:
            settings["peft"] = facts.adapter
        if spec.device_map is not None:
            settings |= {"device_map": spec.device_map, "max_memory": spec.max_memory}
        with models.unchanged(facts, self.run.progress.note):
            return create(
                plan.executor,
                facts.name_or_path,
                # a server's models are keyed by the revision as the user wrote it, mostly none: not by the commit
                revision=spec.revision if plan.executor == "ndif" else facts.revision,
                dtype=spec.dtype,
                device=spec.device,
                attn_implementation=spec.attn_implementation,
                quantization=spec.quantization,
                trust_remote_code=spec.trust_remote_code and self.run.trust,
                threads=plan.threads,
                **settings,
            )

    @property
    def ends(self) -> Ends:
        """The model's ids for end of text and padding."""
        return Ends(self.executor.eos, self.executor.pad)

    # ---- rows -------------------------------------------------------------------------------------------

    def execute(self, stage: str, form: Form, rows: Iterable[Row]) -> Results:
        """What came of rows: the fields of Readouts and `program`, or the error of those that failed.

        Told to stop, it finishes the current program; the rows after it are in neither.
        """
        batch = self.plan.batch
        by_key = {row.key: row for row in rows}
        if why := unknown(self.executor.anatomy, form.sites):
            return Results(failed=dict.fromkeys(by_key, SiteError(why)))
        if said := multiplied(self.executor.anatomy, form.sites):
            self.warn(said)
        long = {key: error for key, row in by_key.items() if (error := self._unfit(form, row))}
        by_key = {key: row for key, row in by_key.items() if key not in long}
        budget = self.splitting.budget(form, self.allowed(form))
        overhead = self.executor.overhead
        batches = programs(
            form,
            by_key.values(),
            budget=budget,
            max_rows=batch.rows,
            overhead=overhead,
            mates=self.executor.batching.mates,
            turn=self._turn(),
        )
        results = Results(failed=long)
        new = form.decoding.max_new_tokens if form.decoding else 0
        planned = {key: len(row.tokens) + new for key, row in by_key.items()}
        self.run.progress.rows(len(planned), sum(planned.values()))
        for program, readouts in self.put(batches, stage):
            if isinstance(readouts, ExecutionError):
                results.failed |= dict.fromkeys(program.keys, readouts)
                continue
            name = self.run.program_name(stage, self.executor.code(program))
            self.run.batches += 1
            passed = 0
            for i, key in enumerate(program.keys):
                result = readouts.row(i)
                self.remember(stage, form, by_key[key], result)
                passed += len(by_key[key].tokens) + len(result.get("tokens", ()))
                results.readouts[key] = {**result, "program": name, "batch": self.run.batches}
            self.run.progress.back(stage, program.rows, passed, sum(planned[key] for key in program.keys))
        return results

    def _turn(self) -> int:
        """Positions of the current model beyond which a text changes with what else is in its batch."""
        context = self.facts.context
        return context.turn if context else 0

    def _unfit(self, form: Form, row: Row) -> ExecutionError | None:
        """What to say of a row that the current model can not read: it has no position, or no embedding, for a token.

        One beyond the positions that the model was made for is told of, once, where the plan's check could not count.
        """
        context, new = self.facts.context, form.decoding.max_new_tokens if form.decoding else 0
        rows = getattr(self.executor, "health", {}).get("vocabulary", 0)
        if 0 < rows <= (token := max(row.tokens, default=0)):
            shown = self.executor.tokenizer.convert_ids_to_tokens(token)
            return ExecutionError(
                f"a text with the token {shown!r} ({token}), and the embedding of {self.label} has {rows:,} rows"
            )
        if context is None or contexts.positions_needed(len(row.tokens), new) <= context.positions:
            return None
        length = f"a text of {len(row.tokens)} tokens" + (f" and {new} new ones" if new else "")
        if context.table:
            return ExecutionError(f"{length}: {self.label} has {context.positions} positions")
        if self._uncounted:
            self._uncounted = False
            self.warn(f"{length} goes beyond the {context.positions} positions that it was made for: texts may be poor")
        return None

    def put(self, batches: Iterable[Program], stage: str = "") -> Iterator[tuple[Program, Any]]:
        """Programs through the current model, split where they fail; none is begun after the run is told to stop."""
        self.settle()  # what came before this call is committed
        self.run.stop.check()
        if (watch := getattr(self.executor, "watch", None)) is not None:
            watch(lambda tokens: self.run.progress.step(stage or self.run.stage, tokens))
        return self.splitting.map(self.executor, self._until_told(batches))

    def _until_told(self, batches: Iterable[Program]) -> Iterator[Program]:
        for program in batches:
            if self.run.stop.asked:
                return
            yield program

    def settle(self) -> None:
        """Everything handed out so far is committed: jobs in the journal may be forgotten."""
        if self._executor is not None:
            self._executor.settle()

    # ---- verification -----------------------------------------------------------------------------------

    def remember(self, stage: str, form: Form, row: Row, result: Mapping[str, Any]) -> None:
        """Keeps a uniform random choice of `verify_rows` rows of this model, with their results."""
        if not self.verify_rows:
            return
        self._seen += 1
        entry = _Kept(stage, form, row, dict(result))
        if len(self._kept) < self.verify_rows:
            self._kept.append(entry)
        elif (place := random.Random(self._seen).randrange(self._seen)) < self.verify_rows:
            self._kept[place] = entry

    def verify(self) -> None:
        """Runs the kept rows again, one at a time, and puts the comparison into the store."""
        if not self._kept:
            return
        self.run.store.prepare([arrays.verification_group(self.study, self.verify_rows)])
        comparisons = [_compare(self.executor, entry) for entry in self._kept]
        self.run.checked += [{"model": self.label, **compared} for compared in comparisons]
        columns = {name: (("row",), [compared[name] for compared in comparisons]) for name in comparisons[0]}
        data = arrays.dataset({"row": range(len(comparisons))}, columns)
        number = self.run.number
        self.run.store.commit("verification", OfModel(self.label), data, fingerprint=number + 1, run=number)


def _compare(executor: Executor, kept: _Kept) -> dict[str, Any]:
    single, batch = executor.run(assemble(kept.form, [kept.row])).row(0), kept.result
    difference = float("nan")
    if "pooled" in single:
        scale = max(float(np.abs(single["pooled"]).max()), 1e-12)
        difference = float(np.abs(single["pooled"] - batch["pooled"]).max()) / scale
    equal = tuple(single.get("tokens", ())) == tuple(batch.get("tokens", ()))
    label = json.dumps(kept.row.key, default=str)
    return {"stage": kept.stage, "label": label, "tokens_equal": equal, "relative_difference": difference}
