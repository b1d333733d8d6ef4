"""Turns what a store has measured, and else a model's size, into how long the rest of a study takes, and its disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from nsteer.models import facts as models
from nsteer.models import gguf
from nsteer.plan.check import Study
from nsteer.stages import sizing
from nsteer.stages.job import Job, jobs
from nsteer.stages.table import STAGES
from nsteer.system import machine

if TYPE_CHECKING:
    from nsteer.store import Store

SPEED = 3e10
"""Operations a second of a CPU core, assumed where nothing is measured: SmolLM2-135M took 2 to 6e10 of one."""

NUMBER = 4
"""Bytes of a number in a store."""


def measured(study: Study) -> dict[tuple[str, str], float]:
    """Tokens a second, by model and stage, of the cells that the store has."""
    store = sizing.opened(study, fetch=True)
    rates: dict[tuple[str, str], float] = {}
    if store is None:
        return {}
    for job in jobs(study, store):
        typical = means(job, store)
        for stage in STAGES:
            if typical.get(stage.name):
                seconds, count = spent(store, job.label, stage.paths(job)[-1])
                if seconds > 0:
                    rates[job.label, stage.name] = typical[stage.name] * count / seconds
    return rates


def spent(store: Store, model: str, path: str) -> tuple[float, int]:
    """Seconds of a model's cells in a group, and how many have a time."""
    done = store.committed(path).items()
    times = [cell.seconds for (whose, *_), cell in done if whose == model and cell.seconds > 0]
    return sum(times), len(times)


def means(job: Job, store: Store) -> Mapping[str, float]:
    """Tokens of the mean cell of each stage, were all to do."""
    return {stage.stage: stage.tokens / stage.cells for stage in sizing.model_stages(job, store, set()) if stage.tokens}


def timed(study: Study, size: sizing.Size) -> sizing.Size:
    """A job's size with its time and disk."""
    rates = measured(study) if size.looked else {}  # a URL in a plan that is only checked is not asked
    todo = [stage for stage in size.stages if stage.tokens]
    known = bool(todo) and all((stage.model, stage.stage) in rates for stage in todo)
    return replace(size, seconds=seconds(study, todo, rates), measured=known, disk=disk(study, size.stages))


def seconds(study: Study, stages: Iterable[sizing.StageSize], rates: Mapping[tuple[str, str], float]) -> float:
    """Seconds for what is left, by tokens a second of its stage where they are measured, else by the model's size.

    On a CPU, with the plan's threads or all cores; a GPU is faster.
    """
    cores = study.plan.threads or machine.cores()
    guessed = {
        job.label: SPEED * cores / (2 * max(sizing.weights(job.facts, NUMBER) / NUMBER, 1)) for job in jobs(study)
    }
    return sum(
        stage.tokens / rates.get((stage.model, stage.stage), guessed[stage.model]) for stage in stages if stage.tokens
    )


def disk(study: Study, stages: Iterable[sizing.StageSize]) -> int:
    """Bytes that are written at most, before compression: pooled streams and vectors, and converted GGUF files."""
    jobs_by_label = {job.label: job for job in jobs(study)}
    total = 0
    for stage in stages:
        job = jobs_by_label[stage.model]
        stream = len(job.layers) * job.facts.d_model * NUMBER
        total += {"activations": stage.rows, "vectors": stage.cells - stage.done}.get(stage.stage, 0) * stream
    for job in jobs_by_label.values():
        if job.facts.gguf and not gguf.is_there(models.converted(job.facts)):
            total += sizing.weights(job.facts, NUMBER)
    return total
