"""Turns the cells of a stage into tasks: runs of neighbours, large enough for full batches, many enough to share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import prompt_set
from nsteer.runner.session import WAVE
from nsteer.stages import cells

SHARE = 4
"""Tasks a worker, at least, where there are rows enough: so that the last ones end together."""


BLOCKS = ("samples", "activations")
"""Stages whose cells are blocks of samples, which may differ in size."""


def rows(study: Study, facts: Facts | None, stage: str, keys: Iterable[tuple]) -> dict[tuple, int]:
    """Rows that each cell puts through a model; of a judge, texts. Counted once for all that can not differ."""
    counted: dict[tuple, int] = {}
    found = {}
    for key in keys:
        kind = key if stage in BLOCKS else key[1:2]
        if kind not in counted:
            counted[kind] = _rows(study, facts, stage, key)
        found[key] = counted[kind]
    return found


def _rows(study: Study, facts: Facts | None, stage: str, key: tuple) -> int:
    plan = study.plan
    if stage in BLOCKS:
        return len(cells.blocks(cells.counts(study, plan.methods[key[1]])[key[2]])[key[3]])
    if stage == "lens":
        assert facts is not None
        return len(resolve(plan.layers, facts.n_layers))
    if stage == "anisotropy":
        return len(study.texts.neutral_sentences) if study.texts else 1
    if stage in ("reads", "streams", "edited"):
        return len(prompt_set(plan.prompts, study.texts))
    block = next(one for one in plan.steer if cells.op_label(one) == key[1])
    return len(prompt_set(block.prompts, study.texts)) * len(block.seeds)


def cut(sizes: Mapping[tuple, int], least: int, workers: int) -> Iterator[list[tuple]]:
    """Cells, whose rows are given, in runs of `least` to WAVE rows: SHARE runs a worker if there are that many.

    A cell without rows, a copy of one before it, stays in the run of that one."""
    most = max(least, min(WAVE, -(-sum(sizes.values()) // (SHARE * max(workers, 1)))))
    run: list[tuple] = []
    held = 0
    for cell, size in sizes.items():
        if run and size and held + size > most:  # a copy is made where its twin is
            yield run
            run, held = [], 0
        run.append(cell)
        held += size
    if run:
        yield run
