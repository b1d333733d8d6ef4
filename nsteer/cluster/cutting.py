"""Turns the cells of a stage into tasks: runs of neighbours, large enough for full batches, many enough to share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nsteer.runner.runs import WAVE

SHARE = 4
"""Tasks a worker, at least, where there are rows enough: so that the last ones end together."""


def cut(sizes: Mapping[tuple, int], least: int, workers: int) -> Iterator[list[tuple]]:
    """Cells, whose rows are given, in runs of `least` to WAVE rows: SHARE runs a worker if there are that many.

    A cell without rows, a copy of one before it, stays in the run of that one."""
    max_rows = max(least, min(WAVE, -(-sum(sizes.values()) // (SHARE * max(workers, 1)))))
    run: list[tuple] = []
    held = 0
    for cell, size in sizes.items():
        if run and size and held + size > max_rows:  # a copy is made where its original is
            yield run
            run, held = [], 0
        run.append(cell)
        held += size
    if run:
        yield run
