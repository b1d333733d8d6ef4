"""Turns what a store has measured into what the rest takes on so many workers: hours, and money at a price.

Tokens a second are those of the cells that are done: their records say how long each took. The rest is the scheduler
with a clock in place of workers, so stages wait for one another and the last tasks leave workers idle.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nsteer.cluster.cutting import SHARE
from nsteer.cluster.scheduler import Need
from nsteer.cluster.simulating import simulate
from nsteer.plan.check import Study
from nsteer.report.terminal import duration
from nsteer.runner.runs import WAVE
from nsteer.stages import rates as timing
from nsteer.stages import sizing

LOADING = 60.0
"""Seconds that a worker is assumed to take to start and load its model."""


@dataclass(frozen=True)
class Forecast:
    """What is left of a study on `workers` workers.

    rates : (model, stage) -> tokens a second of one worker, measured
    unknown : (model, stage) with tokens to do and nothing measured; the rest does not count them
    seconds : until the last cell; worker_seconds : of all workers, idle ones too
    cost : worker hours times the price of one, None without a price
    """

    workers: int
    rates: dict[tuple[str, str], float] = field(default_factory=dict)
    unknown: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    worker_seconds: float = 0.0
    cost: float | None = None


def forecast(study: Study, size: sizing.Size, workers: int, price: float | None = None) -> Forecast:
    """What the rest of a study takes.

    price : of one worker for an hour
    """
    rates = timing.measured(study)
    stages: dict[str, list[list[tuple]]] = {}
    unknown: list[tuple[str, str]] = []
    seconds: dict[tuple, float] = {}
    left = 0
    for stage in size.stages:
        if not stage.tokens:
            continue
        where = (stage.model, stage.stage)
        left += stage.tokens
        # unsteered continuations are made by the same programs, without edits
        rate = rates.get(where) or (rates.get((stage.model, "steering")) if stage.stage == "unsteered" else None)
        if rate is None:
            unknown.append(where)
            continue
        least = max(1, min(WAVE, max(study.plan.batch.rows, stage.rows // (SHARE * workers))))
        count = -(-stage.rows // least)
        turn = len(stages.setdefault(stage.model, []))
        stages[stage.model].append([((stage.model, turn, n),) for n in range(count)])
        seconds[stage.model, turn] = stage.tokens / rate / count
    needs = {model: Need() for model in stages}
    nodes = {"all": Need(float(workers), 0, 0)}
    told = simulate(stages, nodes, needs, workers, lambda task: seconds[task.cells[0][:2]], LOADING)
    hours = workers * told.seconds / 3600
    cost = None if price is None else hours * price
    return Forecast(workers, rates, unknown, left, told.seconds, workers * told.seconds, cost)


def words(estimate: Forecast) -> list[str]:
    """A forecast as lines."""
    said = [f"on {estimate.workers} workers, by tokens/s that the store has measured (one worker):"]
    said += [f"  {model} {stage}: {rate:,.0f} tokens/s" for (model, stage), rate in sorted(estimate.rates.items())]
    if estimate.unknown:
        names = ", ".join(f"{model} {stage}" for model, stage in estimate.unknown)
        said.append(f"  not measured yet, and not counted: {names}; run a cut of the plan into the same store first")
    if estimate.seconds:
        said.append(
            f"about {duration(estimate.seconds)} for the rest, {estimate.worker_seconds / 3600:,.1f} worker hours "
            f"({LOADING:.0f} s assumed to load a model)"
        )
    if estimate.cost is not None and estimate.seconds:
        said.append(f"about {estimate.cost:,.2f} at the price given")
    return said
