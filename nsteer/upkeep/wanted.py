"""Turns studies into the cells that they want of a store: group path -> key -> the fingerprints wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from nsteer.plan.check import HELD, Study, tuned
from nsteer.stages.job import jobs
from nsteer.stages.table import STAGES
from nsteer.store import Store

Wanted = Mapping[str, Mapping[tuple, set[int]]]


def wanted_cells(studies: Iterable[Study], store: Store) -> Wanted:
    """The cells of results that any of these studies would ask a store for."""
    by_path: dict[str, dict[tuple, set[int]]] = defaultdict(lambda: defaultdict(set))
    for job in (job for study in studies for job in jobs(study, store)):
        for stage in STAGES:
            for path in stage.all_paths(job):
                for key, number in job.wanted(stage.cells).items():
                    by_path[path][key].add(number)
    return by_path


def searched(study: Study) -> set[str]:
    """The labels on the axis `op` under which a search of this study keeps its cells."""
    entry = tuned(study.plan) if study.plan.tune is not None else None
    return set() if entry is None else {entry.label, f"{entry.label}{HELD}"}


def names(study: Study) -> dict[str, set[str]]:
    """The labels of a study that the store explains, by the group that does."""
    plan = study.plan
    return {
        "methods": set(plan.methods),
        "ops": {entry.label for entry in plan.steer} | searched(study),
        "directions": set(plan.directions),
        "edits": {"none", *plan.edits} if plan.edits or plan.generate is not None else set(),
        "judges": set(plan.all_judges()),
        "judge_passages": set(plan.all_judges()),
        "models": {facts.label for facts in study.facts},
    }
