"""Turns a study into a filled store: the runner, with no mathematics in it.

    write the samples -> capture activations -> derive vectors -> steer -> judge

Every stage asks the store which cells are missing and fills those; stages meet only in the store. A model is
loaded when the first of its cells needs it, so a run with nothing to do loads none.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import xarray as xr

from nsteer.errors import (
    InputError,
    NsteerError,
    PlanError,
    RemoteAccessError,
    RemoteCancelError,
    RemoteError,
    RemoteLostError,
    StoreError,
)
from nsteer.plan.check import Study, code_of_judges, code_of_models, conditions
from nsteer.runner.failing import TRANSIENT, Failure
from nsteer.runner.model import ModelRun
from nsteer.runner.progress import Progress, here
from nsteer.runner.runs import Division, Everything, LoadError, Run
from nsteer.runner.shards import Shard, Sharded
from nsteer.runner.stopping import Stop, progress_message
from nsteer.science import axis
from nsteer.stages import arrays, notes, sizing
from nsteer.stages.keys import OfModel
from nsteer.stages.table import STAGES
from nsteer.store import Store
from nsteer.system import machine, markup
from nsteer.system.fingerprints import fingerprint

PACKAGES = ("nsteer", "nnsight", "torch", "transformers", "numpy", "xarray", "zarr")


@dataclass(frozen=True)
class Summary:
    """What a run did: cells done and found done by stage, failures, warnings, rows verified, time and tokens.

    failed_before : cells that failed in an earlier run, would fail again, and were not tried
    unloaded : label of each model that could not be loaded -> stage -> cells of it that are still missing
    left : cells of a shard by stage that were not begun, for they rest on cells that other shards have not done yet
    """

    store: str
    done: dict[str, int]
    skipped: dict[str, int]
    failures: list[Failure] = field(default_factory=list)
    failed_before: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verified: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    unloaded: dict[str, dict[str, int]] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        failed = [failure.stage for failure in self.failures]
        stages = dict.fromkeys((*self.skipped, *self.done, *failed))
        rows = [(stage, self.done.get(stage, 0), self.skipped.get(stage, 0), failed.count(stage)) for stage in stages]
        stage_table = markup.table(f"run into {self.store}", rows, ("stage", "done", "already there", "failed"))
        said = [("failed", f"{failure.stage}: {failure.reason}") for failure in self.failures[:10]]
        said += [("failed before", f"{failure.stage}: {failure.reason}") for failure in self.failed_before[:10]]
        said += [("note", text) for text in self.warnings]
        said += [("not loaded", label) for label in self.unloaded]
        return stage_table + markup.table(f"{self.tokens:,} tokens in {self.seconds:.1f} s", said)


def run(
    study: Study,
    *,
    progress: Progress | None = None,
    verify_rows: int = 0,
    only: str = "",
    retry_failed: bool = False,
    trust_remote_code: bool = False,
    trust_judge: bool = False,
    stop: Stop | None = None,
    shard: Shard | None = None,
    wait: float = 0.0,
) -> Summary:
    """Fills the store of a study and says what was done.

    progress : what shows it; in a notebook a bar when left out, elsewhere nothing
    only : "vectors" derives vectors from what the store has and loads no model
    verify_rows : rows of every model to run again one at a time; the comparison goes into the store
    retry_failed : also try cells again that failed before for a reason that lasts
    trust_remote_code : confirms the `trust_remote_code` of the plan's models
    trust_judge : lets the plan's judges run Python functions
    stop : asks the run to stop after the current batch; it then raises KeyboardInterrupt
    shard : does the cells of this part of the study alone; see `runner.shards`
    wait : seconds for which a shard waits, before each stage, for cells of others that the stage rests on
    Raises StoreError when the store can not be written, PlanError for a model whose code is not confirmed; a model or
    cell that fails is a Failure in the summary.
    """
    from nsteer.runner.judging import judge_by_writer

    progress = progress or here()
    how: dict[str, Any] = {"on": f"shard {shard}", "division": Sharded(shard, wait)} if shard else {}
    with begun(
        study, progress, retry_failed, trust_remote_code, stop, only=only, trust_judge=trust_judge, **how
    ) as run:
        for index, job in enumerate(run.jobs):
            progress.model(job.label, index + 1, len(run.jobs))
            model = ModelRun(run, job, verify_rows)
            try:
                one_model(model, only)
                if not only:
                    judge_by_writer(model)
            finally:
                model.release()
        if study.plan.all_judges() and not only:
            attempt_last(run, "judged")
    return summary(run)


@contextlib.contextmanager
def begun(
    study: Study,
    progress: Progress,
    retry_failed: bool,
    trust_remote_code: bool,
    stop: Stop | None,
    *,
    only: str = "",
    on: str = "",
    trust_judge: bool = False,
    division: Division | None = None,
) -> Iterator[Run]:
    """A run, with its record in the store, which tells how it ended.

    on : where programs run, if not in this process; or which part of the study it does
    division : which cells it does, if not all
    """
    confirm(study, trust_remote_code or bool(only), trust_judge or bool(only))  # without a model no code runs
    store = Store(study.plan.store, axis=study.plan.axis)
    store.prepare(arrays.groups(study))
    run = Run(
        study,
        store,
        progress,
        retry=retry_failed,
        trust=trust_remote_code,
        trust_judge=trust_judge,
        stop=stop or Stop(),
        division=division or Everything(),
    )
    run.number = store.add_run(
        plan=study.document.text,
        environment=environment(study) | ({"on": on} if on else {}),
        started=now(),
        argv=[Path(study.document.file).name],
    )
    run.book.run = store.read("runs").run.values.tolist()[run.number]
    run.leases.open()
    status = "failed"
    explain(run)
    foresee(run)
    try:
        with axis.named(study.plan.axis):
            yield run
        status = "failed cells" if run.failures or run.failed_before else "complete"
    except KeyboardInterrupt as error:
        status, wave = "interrupted", progress.wave
        done, before = sum(run.done.values()), sum(run.skipped.values())
        error.words = progress_message(done, before, bool(wave.rows and wave.cells))  # type: ignore[attr-defined]
        raise
    finally:
        run.leases.close()
        progress.close()
        with contextlib.suppress(StoreError):  # a disk that is full: what was raised says so
            run.book.flush()
            store.finish_run(run.number, now(), status)
            store.keep_records()


def summary(run: Run) -> Summary:
    """What a run did."""
    return Summary(
        run.study.plan.store,
        run.done,
        run.skipped,
        run.failures,
        run.failed_before,
        run.warnings,
        run.checked,
        run.progress.seconds,
        run.progress.tokens,
        unloaded(run),
        run.left,
    )


def unloaded(run: Run) -> dict[str, dict[str, int]]:
    """Models that could not be loaded, and what of each is still missing: stage -> cells."""
    gone = {
        label for failure in (*run.failures, *run.failed_before) if failure.stage == "loading" for label in failure.cell
    }
    there = set(run.store.groups()) if gone else set()
    return {
        job.label: {
            size.stage: size.cells - size.done
            for size in sizing.model_stages(job, run.store, there)
            if size.cells > size.done
        }
        for job in run.jobs
        if job.label in gone
    }


def confirm(study: Study, models: bool, judges: bool) -> None:
    """Raises PlanError for models and judges that bring code of their own, unless the caller confirms it."""
    problems = ([] if models else code_of_models(study)) + ([] if judges else code_of_judges(study))
    if problems:
        raise PlanError(problems)


def foresee(run: Run) -> None:
    """Says at once what is sure to leave missing values at the end, and what of the plan one would not guess."""
    from nsteer.runner.judging import unmatched

    for text in (*notes.notes(run.study), *unmatched(run.study), *map(str, run.study.notes)):
        run.warn(text)


def explain(run: Run) -> None:
    """Keeps what the label of each method, steer entry and condition means, wherever that is new."""
    for name, protocol in arrays.protocols(run.study).items():
        keep(run, "methods", name, xr.Dataset({"protocol": ((), json.dumps(protocol))}), protocol)
    for name, spec in run.study.plan.directions.items():
        told = run.study.as_json(spec, "directions", name)
        said = {field: value for field, value in told.items() if value is not None}
        keep(run, "directions", name, xr.Dataset({"settings": ((), json.dumps(said))}), said)
    for entry in run.study.plan.steer:
        label = entry.label
        if run.study.only is not None and (label,) in run.store.committed("ops"):
            continue  # a search walks through strengths of its own: what the label means stands there
        data = arrays.settings_data(run.study, entry)
        keep(run, "ops", label, data, [data.settings.item(), data.prompt_text.values.tolist()])
    for label, edits in conditions(run.study.plan).items() if run.study.plan.edits or run.study.plan.generate else ():
        data = arrays.condition_data(run.study, edits)
        keep(run, "edits", label, data, [data.settings.item(), data.prompt_text.values.tolist()])


def keep(run: Run, group: str, label: str, data: xr.Dataset, of: Any) -> None:
    """Commits what explains a label, unless it is there as made of the same."""
    wanted = fingerprint(of)
    if run.store.missing(group, {(label,): wanted}):
        run.store.commit(group, (label,), data, fingerprint=wanted, run=run.number)


def one_model(model: ModelRun, only: str) -> None:
    """Every stage of a model that the plan wants cells of. One that fails leaves the others their turn."""
    from nsteer.runner.stages import RUN

    for stage in STAGES:
        asked = stage.per_model and (not only or stage.name == only) and model.wanted(stage.cells)
        if asked and not attempt(model, stage.name, RUN[stage.name]):
            return
    if not only and not attempt(model, "verification", ModelRun.verify):
        return
    model.settle()


def attempt(model: ModelRun, name: str, does: Callable[[ModelRun], None]) -> bool:
    """Runs a stage of a model. False when the model's turn is over."""
    try:
        with attempted(model.run, name, OfModel(model.label)):
            does(model)
    except LoadError:
        return False  # said where it was loaded
    return True


def attempt_last(run: Run, name: str) -> None:
    """Runs a stage that comes after the last model."""
    from nsteer.runner.stages import RUN_LAST

    with contextlib.suppress(LoadError), attempted(run, name, ()):
        RUN_LAST[name](run)


@contextlib.contextmanager
def attempted(run: Run, name: str, key: tuple) -> Iterator[None]:
    """What fails in a stage beyond single cells is kept as a Failure. Raises LoadError: the model's turn is over."""
    run.stage = name
    try:
        yield
    except LoadError:
        raise
    except (RemoteLostError, RemoteAccessError, RemoteCancelError):
        run.stop.check()
        raise  # every other stage and model would wait for the same server
    except Exception as error:
        stored = isinstance(error, StoreError) and not isinstance(error, InputError)
        if stored or not (isinstance(error, NsteerError) or machine.out_of_memory(error)):
            raise
        words = str(error) or type(error).__name__
        run.fail(name, f"stage {name}", key, 0, words, TRANSIENT)
        run.book.flush()
        if isinstance(error, RemoteError):
            raise LoadError(words) from error
    else:
        run.book.resolve(f"stage {name}", key)
        run.book.flush()


def environment(study: Study) -> dict[str, Any]:
    """Where it ran, in versions alone: nothing of host, user or paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    python = ".".join(map(str, sys.version_info[:3]))
    resolved = study.as_json(study.plan)
    return {
        "python": python,
        "system": platform.system(),
        **versions,
        "resolved_plan": resolved,
        "seed": study.plan.seed,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
