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
from nsteer.cluster.driver import Crew, Sharing
from nsteer.cluster.pool import Pool
from nsteer.cluster.scheduler import Need
from nsteer.cluster.showing import Display
from nsteer.cluster.worker import JUDGE, Hired
from nsteer.errors import ClusterError
from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.runner import Summary
from nsteer.runner.judging import judge_facts
from nsteer.runner.session import Session
from nsteer.runner.stopping import Stop
from nsteer.stages import cells, sizing
from nsteer.store import Store
from nsteer.store.places import is_url
from nsteer.system import machine

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
            lambda hired: ray.Actors(connection, hired),
            workers=workers or MANY,
            display=display,
            retry_failed=retry_failed,
            trust_remote_code=trust_remote_code,
            stop=stop,
            on=f"ray {connection.__version__}",
        )


def fill(
    study: Study,
    pool_of: Callable[[Hired], Pool],
    *,
    workers: int,
    display: Display | None = None,
    retry_failed: bool = False,
    trust_remote_code: bool = False,
    stop: Stop | None = None,
    on: str = "workers",
) -> Summary:
    """Fills the store of a study by the workers of a pool."""
    display = display or Display()
    with runner.begun(study, display, retry_failed, trust_remote_code, stop, on=on) as session:
        folder, logs = os.getcwd(), log_folder(study.plan.store, session.book.run)
        hired = Hired(study, session.run, session.book.run, folder, logs, retry_failed, trust_remote_code)
        pool, parts = pool_of(hired), dict[str, Sharing]()
        try:
            crew = Crew(pool, workers, partial(need, study, pool), session.stop, display)
            parts |= {facts.label: part(session, crew, display) for facts in study.facts}
            crew.run({facts.label: partial(one_model, parts[facts.label], facts) for facts in study.facts})
            if study.plan.judge is not None:
                parts[JUDGE] = part(session, crew, display)
                crew.run({JUDGE: partial(judge, parts[JUDGE])})
        finally:
            pool.close()
            for one in parts.values():
                one.leases.close()
        for one in parts.values():
            join(session, one)
    return runner.summary(session)


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


def part(session: Session, crew: Crew, display: Display) -> Sharing:
    """A session of one model, beside the run's own. What it hands out no other run begins."""
    made = Sharing(
        session.study,
        Store(session.study.plan.store),
        display.part(),
        session.run,
        retry=session.retry,
        trust=session.trust,
    )
    made.crew, made.stop, made.book.run = crew, session.stop, session.book.run
    made.leases.open()
    return made


def one_model(session: Sharing, facts: Facts) -> None:
    """Every stage of one model."""
    session.turn(facts, session.study.facts.index(facts))
    try:
        session.look_ahead()
        runner.one_model(session, "")
    finally:
        session.book.flush()


def judge(session: Sharing) -> None:
    """The last stage, of all models."""
    try:
        runner.attempt(session, "judged", runner.judge)
    finally:
        session.book.flush()


def join(session: Session, part: Session) -> None:
    """Takes a model's session into the run's."""
    for name in ("done", "skipped"):
        mine = getattr(session, name)
        for stage, count in getattr(part, name).items():
            mine[stage] = mine.get(stage, 0) + count
    session.failures += part.failures
    session.held += part.held
    session.warnings += [text for text in part.warnings if text not in session.warnings]
    session.progress.tokens += part.progress.tokens


def need(study: Study, pool: Pool, model: str) -> Need:
    """What a worker with a model takes: as the plan says, else a core, a GPU if there are some, and what it weighs."""
    some = any(room.gpus for room in pool.rooms().values())
    if model == JUDGE:
        assert study.plan.judge is not None
        weight = judge_facts(study.plan.judge).bytes
        gpus = float(some and study.plan.judge.device != "cpu")
        return Need(study.plan.threads or 1, gpus, sizing.BASELINE + 2 * weight)
    facts = next(one for one in study.facts if one.label == model)
    spec = cells.model_of(study, facts)
    asked = spec.resources
    gpus = float(some and spec.device in ("auto", "cuda")) if asked.gpus is None else asked.gpus
    memory = sizing.memory(study, facts) if asked.memory_gib is None else int(asked.memory_gib * 2**30)
    return Need(asked.cpus or study.plan.threads or 1, gpus, memory)


def log_folder(store: str, run: str) -> str:
    """Where workers write what they do: beside the store, a folder a run; nowhere for a store on object storage."""
    if is_url(store):
        return ""
    return str(Path(f"{store}.logs") / run.replace(":", ""))
