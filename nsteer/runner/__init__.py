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
from nsteer.plan.check import Study, code_of_models
from nsteer.plan.schema import Calibrated
from nsteer.runner.failing import PASSING, Failure
from nsteer.runner.progress import Progress
from nsteer.runner.session import LoadError, Session
from nsteer.runner.stopping import Stop, told
from nsteer.stages import arrays, notes, sizing
from nsteer.store import Store
from nsteer.system import machine
from nsteer.system.fingerprints import fingerprint

PACKAGES = ("nsteer", "nnsight", "torch", "transformers", "numpy", "xarray", "zarr")


@dataclass(frozen=True)
class Summary:
    """What a run did: cells done and found done by stage, failures, warnings, rows verified, time and tokens.

    held : cells that failed in an earlier run, would fail again, and were not tried
    unloaded : label of each model that could not be loaded -> stage -> cells of it that are still missing
    """

    store: str
    done: dict[str, int]
    skipped: dict[str, int]
    failures: list[Failure] = field(default_factory=list)
    held: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verified: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    unloaded: dict[str, dict[str, int]] = field(default_factory=dict)


def run(
    study: Study,
    *,
    progress: Progress | None = None,
    verify_rows: int = 0,
    only: str = "",
    retry_failed: bool = False,
    trust_remote_code: bool = False,
    stop: Stop | None = None,
) -> Summary:
    """Fills the store of a study and says what was done.

    only : "vectors" derives vectors from what the store has and loads no model
    verify_rows : rows of every model to run again one at a time; the comparison goes into the store
    retry_failed : also try cells again that failed before for a reason that lasts
    trust_remote_code : confirms the `trust_remote_code` of the plan's models
    stop : asks the run to stop after the batch in hand; it then raises KeyboardInterrupt
    Raises StoreError when the store can not be written, PlanError for a model whose code is not confirmed; a model or
    cell that fails is a Failure in the summary.
    """
    progress = progress or Progress()
    with begun(study, progress, retry_failed, trust_remote_code, stop, only=only) as session:
        session.verify_rows = verify_rows
        for index, facts in enumerate(study.facts):
            session.turn(facts, index)
            one_model(session, only)
        session.leave()
        if study.plan.judge is not None and not only:
            attempt(session, "judged", judge)
    return summary(session)


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
) -> Iterator[Session]:
    """A run's session, with its record in the store, which tells how it ended.

    on : where programs run, if not in this process
    """
    confirm(study, trust_remote_code or bool(only))  # without a model no code of one runs
    store = Store(study.plan.store)
    store.prepare(arrays.groups(study))
    session = Session(study, store, progress, retry=retry_failed, trust=trust_remote_code)
    session.stop = stop or session.stop
    session.run = store.add_run(
        plan=study.document.text,
        environment=environment(study) | ({"on": on} if on else {}),
        started=now(),
        argv=[Path(study.document.file).name],
    )
    session.book.run = store.read("runs").run.values.tolist()[session.run]
    session.leases.open()
    status = "failed"
    explain(session)
    foresee(session)
    try:
        yield session
        status = "failed cells" if session.failures or session.held else "complete"
    except KeyboardInterrupt as error:
        status, hand = "interrupted", progress.hand
        error.words = told(sum(session.done.values()), sum(session.skipped.values()), bool(hand.rows and hand.cells))  # type: ignore[attr-defined]
        raise
    finally:
        session.release()
        session.leases.close()
        progress.close()
        with contextlib.suppress(StoreError):  # a disk that is full: what was raised says so
            session.book.flush()
            store.finish_run(session.run, now(), status)
            store.keep_records()


def summary(session: Session) -> Summary:
    """What a session did."""
    return Summary(
        session.study.plan.store,
        session.done,
        session.skipped,
        session.failures,
        session.held,
        session.warnings,
        session.checked,
        session.progress.seconds,
        session.progress.tokens,
        unloaded(session),
    )


def unloaded(session: Session) -> dict[str, dict[str, int]]:
    """Models that could not be loaded, and what of each is still missing: stage -> cells."""
    gone = {one.cell[0] for one in (*session.failures, *session.held) if one.stage == "loading"}
    found: dict[str, dict[str, int]] = {label: {} for label in sorted(gone)}
    there = set(session.store.groups()) if gone else set()
    for facts in session.study.facts:
        if facts.label in gone:
            left = found[facts.label]
            for stage in sizing.model_stages(session.study, facts, session.store, there):
                if count := stage.cells - stage.done:
                    left[stage.stage] = left.get(stage.stage, 0) + count
    return found


def confirm(study: Study, trusted: bool) -> None:
    """Raises PlanError for models that may bring code of their own, unless the caller confirms it."""
    if problems := [] if trusted else code_of_models(study):
        raise PlanError(problems)


def foresee(session: Session) -> None:
    """Says at once what is sure to leave holes at the end, and what of the plan one would not guess."""
    from nsteer.runner.judging import unmatched

    for text in (*notes.notes(session.study), *unmatched(session.study), *map(str, session.study.notes)):
        session.warn(text)


def explain(session: Session) -> None:
    """Keeps what each method's label means, wherever that is new."""
    for name, protocol in arrays.protocols(session.study).items():
        wanted = fingerprint(protocol)
        if session.store.missing("methods", {(name,): wanted}):
            data = xr.Dataset({"protocol": ((), json.dumps(protocol))})
            session.store.commit("methods", (name,), data, fingerprint=wanted, run=session.run)


def one_model(session: Session, only: str) -> None:
    """Every stage of the model at hand. A cell or stage that fails leaves the others their turn."""
    from nsteer.runner.stages import STAGES

    plan = session.study.plan
    names = ["samples", "activations", "vectors"] if plan.methods else []
    names += ["calibration"] * any(isinstance(block.strengths, Calibrated) for block in plan.steer)
    names += ["steering"] * bool(plan.steer) + ["measure"] * (plan.measure is not None)
    names += ["reads"] * (plan.prompts is not None)
    for name in names:
        if (not only or name == only) and not attempt(session, name, STAGES[name]):
            return
    if not only and not attempt(session, "verification", Session.verify):
        return
    session.settle()


def attempt(session: Session, name: str, stage: Callable[[Session], None]) -> bool:
    """Runs a stage; what fails in it beyond single cells is kept as a Failure. False when the model's turn is over."""
    goes_on, key, session.stage = True, (session.facts.label,) if session.facts else (), name
    try:
        stage(session)
    except LoadError:
        goes_on = False  # said where it was loaded
    except (RemoteLostError, RemoteAccessError, RemoteCancelError):
        session.stop.check()
        raise  # every other stage and model would wait for the same server
    except Exception as error:
        stored = isinstance(error, StoreError) and not isinstance(error, InputError)
        if stored or not (isinstance(error, NsteerError) or machine.out_of_memory(error)):
            raise
        words = str(error) or type(error).__name__
        session.fail(name, f"stage {name}", key, 0, words, PASSING)
        goes_on = not isinstance(error, RemoteError)
    else:
        session.book.resolve(f"stage {name}", key)
    session.book.flush()
    return goes_on


def judge(session: Session) -> None:
    """The last stage, of all models."""
    from nsteer.runner.stages import STAGES

    STAGES["judged"](session)


def environment(study: Study) -> dict[str, Any]:
    """Where it ran, in versions alone: nothing of host, user or paths."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    python = ".".join(map(str, sys.version_info[:3]))
    resolved = study.plan.model_dump(mode="json")
    return {
        "python": python,
        "system": platform.system(),
        **versions,
        "resolved_plan": resolved,
        "seed": study.plan.seed,
    }


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
