"""Turns a study into a filled store: the conductor, with no mathematics in it.

    write the samples -> capture activations -> derive vectors -> steer -> judge

Every stage asks the store which cells are missing and fills those; stages meet only in the store. A model is
loaded when the first of its cells needs it, so a run with nothing to do loads none.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import xarray as xr

from nsteer import arrays
from nsteer.check import Study
from nsteer.conductor.progress import Progress
from nsteer.conductor.session import Failure, Session
from nsteer.errors import ExecutionError, ModelError, RemoteAccessError, RemoteCancelError, RemoteLostError
from nsteer.fingerprints import fingerprint
from nsteer.store import Store

PACKAGES = ("nsteer", "nnsight", "torch", "transformers", "numpy", "xarray", "zarr")


@dataclass(frozen=True)
class Summary:
    """What a run did: cells done and found done by stage, failures, warnings, rows verified, time and tokens."""

    store: str
    done: dict[str, int]
    skipped: dict[str, int]
    failures: list[Failure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    verified: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0


def run(study: Study, *, progress: Progress | None = None, verify_rows: int = 0, only: str = "") -> Summary:
    """Fills the store of a study and says what was done.

    only : "vectors" derives vectors from what the store has and loads no model
    verify_rows : rows of every model to run again one at a time; the comparison goes into the store
    Raises StoreError when the store can not be written; a model or cell that fails is a Failure in the summary.
    """
    progress = progress or Progress()
    store = Store(study.plan.store)
    store.prepare(arrays.groups(study))
    session = Session(study, store, progress, verify_rows=verify_rows)
    session.run = store.add_run(
        plan=study.document.text, environment=environment(study), started=now(), argv=[Path(study.document.file).name]
    )
    status = "failed"
    explain(session)
    try:
        for index, facts in enumerate(study.facts):
            session.turn(facts, index)
            one_model(session, only)
        session.release()
        if study.plan.judge is not None and not only:
            attempt(session, "judged", _judge)
        status = "failed cells" if session.failures else "complete"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        session.release()
        progress.close()
        store.finish_run(session.run, now(), status)
    return Summary(
        study.plan.store,
        session.done,
        session.skipped,
        session.failures,
        session.warnings,
        session.checked,
        progress.seconds,
        progress.tokens,
    )


def explain(session: Session) -> None:
    """Keeps what each method's label means, wherever that is new."""
    for name, protocol in arrays.protocols(session.study).items():
        wanted = fingerprint(protocol)
        if session.store.missing("methods", {(name,): wanted}):
            data = xr.Dataset({"protocol": ((), json.dumps(protocol))})
            session.store.commit("methods", (name,), data, fingerprint=wanted, run=session.run)


def one_model(session: Session, only: str) -> None:
    """Every stage of the model at hand. What fails ends this model's turn, not the run."""
    from nsteer.conductor import capturing, deriving, measuring, recording, steering, writing

    plan = session.study.plan
    stages: list[tuple[str, Callable[[Session], None]]] = []
    if plan.methods:
        if not only:
            stages += [("samples", writing.write), ("activations", capturing.capture)]
        stages.append(("vectors", deriving.derive))
    if plan.steer and not only:
        stages.append(("steering", steering.steer))
    if plan.measure is not None and not only:
        stages.append(("measure", measuring.measure))
    if plan.prompts is not None and not only:
        stages.append(("reads", recording.record))
    if not only:
        stages.append(("verification", Session.verify))
    for name, stage in stages:
        if not attempt(session, name, stage):
            return
    session.settle()


def attempt(session: Session, name: str, stage: Callable[[Session], None]) -> bool:
    """Runs a stage; a model or program that fails is kept as a Failure."""
    try:
        stage(session)
    except (RemoteLostError, RemoteAccessError, RemoteCancelError):
        raise  # every other stage and model would wait for the same server
    except (ModelError, ExecutionError) as error:
        session.fail(name, (session.facts.label,) if session.facts else (), str(error))
        return False
    return True


def _judge(session: Session) -> None:
    from nsteer.conductor.judging import judge

    judge(session)


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
