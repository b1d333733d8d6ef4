"""Turns a study into a filled store by many workers, each with one loaded model: the same plan beyond one machine.

`driver` runs the runner's stages, `scheduler` says who does what, `worker` does it, `ray` is where workers live.
Workers share nothing but the store, and each commits its own cells.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nsteer import runner
from nsteer.cluster.driver import Dispatcher, Shared
from nsteer.cluster.pool import Pool
from nsteer.cluster.scheduler import Need
from nsteer.cluster.showing import Display
from nsteer.cluster.worker import JUDGE, WorkerSetup
from nsteer.errors import ClusterError
from nsteer.plan.check import Study
from nsteer.runner import Summary, judging
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Run
from nsteer.runner.stopping import Stop
from nsteer.stages import judges, sizing
from nsteer.store import Store
from nsteer.system import machine
from nsteer.system.files import is_url

MANY = 10_000
"""Workers at most where nobody says how many: as many as the nodes hold."""


def run(
    study: Study,
    *,
    address: str | None = None,
    workers: int | None = None,
    display: Display | None = None,
    retry_failed: bool = False,
    trust_remote_code: bool = False,
    trust_judge: bool = False,
    stop: Stop | None = None,
) -> Summary:
    """Fills the store of a study by workers on a Ray cluster, and says what was done.

    address : of a cluster that runs; RAY_ADDRESS, else one on this machine for as long as the run lasts
    workers : the most at once; as many as the nodes hold
    Raises as `runner.run` does, and ClusterError for a plan or a cluster with which it can not be done.
    """
    from nsteer.cluster import ray

    fit(study)
    ray.module()
    cpus = max(machine.cores(), workers or 0)
    with ray.connected(address, cpus) as connection:
        return fill(
            study,
            lambda setup: ray.Actors(connection, setup),
            workers=workers or MANY,
            display=display,
            retry_failed=retry_failed,
            trust_remote_code=trust_remote_code,
            trust_judge=trust_judge,
            stop=stop,
            on=f"ray {connection.__version__}",
        )


def fill(
    study: Study,
    pool_of: Callable[[WorkerSetup], Pool],
    *,
    workers: int,
    display: Display | None = None,
    retry_failed: bool = False,
    trust_remote_code: bool = False,
    trust_judge: bool = False,
    stop: Stop | None = None,
    on: str = "workers",
) -> Summary:
    """Fills the store of a study by the workers of a pool."""
    display = display or Display()
    with runner.begun(study, display, retry_failed, trust_remote_code, stop, on=on, trust_judge=trust_judge) as run:
        folder, logs = os.getcwd(), log_folder(study.plan.store, run.book.run)
        setup = WorkerSetup(study, run.number, run.book.run, folder, logs, retry_failed, trust_remote_code, trust_judge)
        pool, runs = pool_of(setup), list[Run]()
        try:
            dispatcher = Dispatcher(pool, workers, partial(need, run, pool), run.stop, display)
            shared = Shared(dispatcher)
            models = {job.label: ModelRun(run_beside(run, shared, display), job) for job in run.jobs}
            runs += [model.run for model in models.values()]
            dispatcher.run({label: partial(one_model, model, shared) for label, model in models.items()})
            if study.plan.all_judges():
                runs.append(run_beside(run, shared, display))
                runs[-1].judged.update(*(model.run.judged for model in models.values()))
                dispatcher.run({JUDGE: partial(judge, runs[-1])})
        finally:
            pool.close()
            for other in runs:
                other.leases.close()
        for other in runs:
            join(run, other)
    return runner.summary(run)


def fit(study: Study) -> None:
    """Raises ClusterError for a plan that can not be shared out."""
    if study.plan.executor != "local":
        raise ClusterError(f"--on ray: the plan's executor is {study.plan.executor}; workers run models themselves")
    for spec in study.plan.models:
        if spec.device.startswith("cuda:"):
            raise ClusterError(
                f"--on ray: model {spec.id} says device {spec.device}; Ray chooses among GPUs: say `cuda` or `auto`, "
                "and how many with `resources: {gpus: …}`"
            )


def run_beside(run: Run, shared: Shared, display: Display) -> Run:
    """A run of one model, beside the run's own. What it hands out no other run begins."""
    store = Store(run.study.plan.store)
    beside = Run(run.study, store, display.of_model(), run.number, run.retry, run.trust, run.stop, division=shared)
    beside.book.run = run.book.run
    beside.leases.open()
    return beside


def one_model(model: ModelRun, shared: Shared) -> None:
    """Every stage of one model."""
    run = model.run
    run.progress.model(model.label, run.study.facts.index(model.facts) + 1, len(run.jobs))
    try:
        shared.look_ahead(model)
        runner.one_model(model, "")
        judging.share_out(model)
    finally:
        run.book.flush()


def judge(run: Run) -> None:
    """The last stage, of all models."""
    try:
        runner.attempt_last(run, "judged")
    finally:
        run.book.flush()


def join(run: Run, other: Run) -> None:
    """Takes a model's run into the whole."""
    for name in ("done", "skipped"):
        mine = getattr(run, name)
        for stage, count in getattr(other, name).items():
            mine[stage] = mine.get(stage, 0) + count
    run.failures += other.failures
    run.failed_before += other.failed_before
    run.warnings += [text for text in other.warnings if text not in run.warnings]
    run.progress.tokens += other.progress.tokens


def need(run: Run, pool: Pool, model: str) -> Need:
    """What a worker with a model takes: as the plan says, else a core, a GPU if there are some, and what it weighs."""
    some, plan = any(room.gpus for room in pool.rooms().values()), run.study.plan
    if model == JUDGE:
        about = [judges.known(spec, run.study) for spec in plan.all_judges().values()]
        weight = max(facts.bytes for facts in about)
        gpus = float(some and any(facts.device not in ("", "cpu") for facts in about))
        return Need(plan.threads or 1, gpus, sizing.BASELINE + 2 * weight)
    job = next(job for job in run.jobs if job.label == model)
    asked = job.model.resources
    gpus = float(some and job.model.device in ("auto", "cuda")) if asked.gpus is None else asked.gpus
    memory = sizing.memory(job) if asked.memory_gib is None else int(asked.memory_gib * 2**30)
    return Need(asked.cpus or plan.threads or 1, gpus, memory)


def log_folder(store: str, run: str) -> str:
    """Where workers write what they do: beside the store, a folder a run; nowhere for a store on object storage."""
    if is_url(store):
        return ""
    return str(Path(f"{store}.logs") / run.replace(":", ""))
