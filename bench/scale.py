"""Says what scale costs where no scale is at hand: python bench/scale.py [--cells 1000000] [--workers 1000]

Three parts, each with its own JSON line:

- `scheduler`: the scheduler over a million tasks of four models on 1,000 workers' room, with a clock for workers; some
  die. Its own seconds a task.
- `store`: a group of a million cells whose commit records are put in place as commits do, without arrays beside them;
  then what a run asks of it: open, list, which of 64 cells are missing, which of all.
- `path`: driver, workers and store as they are, in this process, with the fake executor: seconds a cell, all counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nsteer.cluster.scheduler import Need
from nsteer.cluster.simulating import simulate
from nsteer.store import Group, Store, Variable
from nsteer.store.leaf import Cell

GIB = 2**30


def scheduler(cells: int, workers: int, deadly: float) -> dict[str, Any]:
    """One cell a task: the most tasks that so many cells can make."""
    chance = random.Random(0)
    labels = [f"m{n}" for n in range(4)]
    models = {model: [[((model, n),) for n in range(cells // len(labels))]] for model in labels}
    nodes = {f"n{n}": Need(8, 8, 512 * GIB) for n in range(-(-workers // 8))}
    needs = {model: Need(1, 1, 32 * GIB) for model in labels}
    told = simulate(
        models, nodes, needs, workers, lambda task: 1 + chance.random(), 30.0, lambda task: chance.random() < deadly
    )
    return {
        "tasks": told.tasks,
        "died": told.died,
        "stolen": told.stolen,
        "us_a_task": round((told.scheduling + told.adding) / told.tasks * 1e6, 1),
        "simulated_s": round(told.seconds),
        "busy": round(told.busy / told.seconds / workers, 3),
    }


def axes(cells: int) -> dict[str, list]:
    """Labels of a steering grid of so many cells, about."""
    strengths = max(1, cells // 10_000)
    return {
        "model": [f"model{n}" for n in range(5)],
        "op": ["add"],
        "layer_set": [f"{n}" for n in range(25)],
        "method": ["made", "read"],
        "emotion": [f"e{n}" for n in range(20)],
        "strength": [round(0.01 * (n + 1), 4) for n in range(strengths)],
        "control": ["none", "random"],
    }


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    found = action()
    return found, round(time.perf_counter() - started, 2)


def filled(store: Store, coords: dict[str, list]) -> Iterator[tuple]:
    """Puts the record of every cell; yields their labels."""
    dims = tuple(coords)
    group = Group("generations", coords, {"text": Variable(dims, "string", "text")}, dims)
    store.prepare([group])
    leaf = store.leaf("generations")
    assert leaf is not None
    folder = Path(store.path) / leaf.path / "cell"
    folder.mkdir(exist_ok=True)
    for at, labels in zip(
        itertools.product(*(range(len(one)) for one in coords.values())), itertools.product(*coords.values())
    ):
        record = Cell(1, 0, 1.0, 1.0, len(leaf.structures) - 1, 1).pack()
        (Path(store.path) / leaf.record_file(at)).write_bytes(record)
        yield labels


def store(cells: int) -> dict[str, Any]:
    import nsteer

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        path = Path(folder) / "s.zarr"
        coords = axes(cells)
        every, writing = timed(lambda: list(filled(Store(path), coords)))
        some = dict.fromkeys(random.Random(0).sample(every, 64), 1)
        opened, opening = timed(lambda: nsteer.open(path))
        group, reading = timed(lambda: opened["generations"])
        assert int(group.cell.sel(cell_field="fingerprint").notnull().sum()) == len(every)
        _, selecting = timed(lambda: group.isel(strength=0, emotion=3, layer_set=7).text.load())
        gone, few = timed(lambda: Store(path).missing("generations", some))
        none, whole = timed(lambda: Store(path).missing("generations", dict.fromkeys(every, 1)))
        assert not gone and not none
        return {
            "cells": len(every),
            "put_s": writing,
            "open_s": opening,
            "group_s": reading,
            "select_s": selecting,
            "missing_of_64_s": few,
            "missing_of_all_s": whole,
        }


PLAN = """
name: scale
models: [{id: zoo/llama, device: cpu}]
texts: zoo
emotions: [happy, sad, calm]
methods: {reading: jeong2026-comprehension}
layers: [4, 2, 3]
steer:
  layers: {each: [4, 2, 3]}
  strengths: [STRENGTHS]
  prompts: {walk: tom walked to the}
  controls: [random]
  generate: {max_new_tokens: 4}
store: scale.zarr
"""


def path(cells: int, workers: int) -> dict[str, Any]:
    from nsteer import check, cluster
    from nsteer.cluster.here import Here
    from nsteer.executors.local import Local

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        os.chdir(folder)
        strengths = ", ".join(str(round(0.001 * (n + 1), 4)) for n in range(max(1, cells // 18)))
        Path("plan.yaml").write_text(PLAN.replace("STRENGTHS", strengths))
        study = check.load("plan.yaml")
        known: dict[str, Any] = {}

        def executor(facts: Any) -> Any:
            from nsteer.executors.fake import Fake

            real = known.setdefault(facts.label, Local(facts.source, device="cpu", threads=1))
            return Fake(n_layers=facts.n_layers, d_model=facts.d_model, tokenizer=real.tokenizer)

        made: list[Here] = []
        fill = lambda: cluster.fill(  # noqa: E731
            study, lambda hired: made.append(Here(hired, executor=executor)) or made[0], workers=workers
        )
        summary, seconds = timed(fill)
        done = sum(summary.done.values())
        assert not summary.failures, summary.failures[:3]
        return {
            "cells": done,
            "workers": len(made[0].workers),
            "seconds": seconds,
            "ms_a_cell": round(1e3 * seconds / done, 2),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--deadly", type=float, default=1e-4, help="share of tasks with which a worker dies")
    parser.add_argument("--part", action="append", choices=["scheduler", "store", "path"])
    given = parser.parse_args()
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "scheduler": lambda: scheduler(given.cells, given.workers, given.deadly),
        "store": lambda: store(given.cells),
        "path": lambda: path(given.cells // 500, 8),
    }
    for name in given.part or parts:
        print(json.dumps({"part": name, **parts[name]()}), flush=True)


if __name__ == "__main__":
    main()
