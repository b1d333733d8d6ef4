"""Says what scale costs where there is no large machine: python bench/scale.py [--cells 1000000] [--workers 1000]

Parts, each with its own JSON line:

- `scheduler`: the scheduler over a million tasks of four models on 1,000 workers' room, with a clock for workers; some
  die. Its own seconds a task.
- `store`: a group of a million cells whose commit records are put in place as commits do, without arrays beside them;
  then what a run asks of it: open, list, which of 64 cells are missing, which of all. Once with each record in a file
  of its own, as a killed run leaves them; then as a run that ends keeps them, unchanged and with one cell changed.
- `path`: driver, workers and store as they are, in this process, with the fake executor: seconds a cell, its
  two commits and the rest of nsteer's own work counted, a model's not: there is none.
- `speedup`, when asked for: a cut of `plans/families.yaml` with one worker and with two on a local Ray cluster, one
  thread each, and the ratio of their wall times. For a machine with two quiet cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.cluster.scheduler import Need
from nsteer.cluster.simulating import simulate
from nsteer.store import Group, Store, Variable
from nsteer.store.records import Cell

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
    answer = action()
    return answer, round(time.perf_counter() - started, 2)


def filled(store: Store, coords: dict[str, list]) -> Iterator[tuple]:
    """Puts the record of every cell; yields their labels."""
    dims = tuple(coords)
    group = Group("generations", coords, {"text": Variable(dims, "string", "text")}, dims)
    store.prepare([group])
    leaf = store.leaf("generations")
    assert leaf is not None
    folder = Path(store.path) / leaf.path / "cell"
    folder.mkdir(exist_ok=True)
    places, now = list(itertools.product(*(range(len(axis)) for axis in coords.values()))), len(leaf.structures) - 1
    bound = leaf.bound(np.array(places), now).tolist()
    for at, number, labels in zip(places, bound, itertools.product(*coords.values())):
        (Path(store.path) / leaf.record_file(at)).write_bytes(Cell(1, 0, 1.0, 1.0, now, 1, number).pack())
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
        _, keeping = timed(Store(path).keep_records)
        _, again = timed(Store(path).keep_records)
        again_open, opening_kept = timed(lambda: nsteer.open(path))
        group, reading_kept = timed(lambda: again_open["generations"])
        assert int(group.cell.sel(cell_field="fingerprint").notnull().sum()) == len(every)
        none, whole = timed(lambda: Store(path).missing("generations", dict.fromkeys(every, 1)))
        Store(path).drop("generations", every[len(every) // 2])
        missing, whole_changed = timed(lambda: Store(path).missing("generations", dict.fromkeys(every, 1)))
        _, reading_changed = timed(lambda: nsteer.open(path)["generations"])
        assert not gone and not none and len(missing) == 1
        return {
            "cells": len(every),
            "put_s": writing,
            "open_s": opening,
            "group_s": reading,
            "select_s": selecting,
            "missing_of_64_s": few,
            "keep_s": keeping,
            "keep_again_s": again,
            "kept": {
                "open_s": opening_kept,
                "group_s": reading_kept,
                "missing_of_all_s": whole,
            },
            "kept, one changed": {"group_s": reading_changed, "missing_of_all_s": whole_changed},
            "load": os.getloadavg()[0],
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
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from workers_here import Here

    from nsteer import cluster
    from nsteer.executors.local import Local
    from nsteer.plan import check

    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        os.chdir(folder)
        strengths = ", ".join(str(round(0.001 * (n + 1), 4)) for n in range(max(1, cells // 18)))
        Path("plan.yaml").write_text(PLAN.replace("STRENGTHS", strengths))
        study = check.load("plan.yaml")
        known: dict[str, Any] = {}

        def executor(facts: Any) -> Any:
            from nsteer.executors.fake import Fake

            return Fake(n_layers=facts.n_layers, d_model=facts.d_model, tokenizer=known[facts.label])

        for facts in study.facts:  # and with it what Python imports: not counted
            known[facts.label] = Local(facts.name_or_path, device="cpu", threads=1).tokenizer
        began: set[int] = set()
        tasks: list[int] = []

        def fate(worker: int, work: Any) -> None:
            began.add(worker)
            tasks.append(len(work.fingerprints))

        fill = lambda: cluster.fill(  # noqa: E731
            study, lambda setup: Here(setup, executor=executor, fate=fate), workers=workers
        )
        cpu = time.process_time()
        summary, seconds = timed(fill)
        cpu = time.process_time() - cpu
        assert not summary.failures, summary.failures[:3]
        done = sum(summary.done.values())
        return {
            "cells": done,
            "tasks": len(tasks),
            "workers": len(began),
            "seconds": seconds,
            "cpu_seconds": round(cpu, 2),
            "cpu_ms_a_cell": round(1e3 * cpu / done, 2),
        }


SPEEDUP = (
    "models=[zoo/llama]",
    "emotions=[happy,sad,calm,angry]",
    "steer.vectors.emotions=[happy,sad,calm,angry]",
    "steer.strengths=[0.05,0.1,0.15,0.2,0.25,0.3,0.35,0.4]",
    "steer.seeds=[0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15]",
    "steer.generate={max_new_tokens: 48, sample: true, temperature: 1.0}",
    "judge=null",
    "threads=1",
)


def speedup(rounds: int) -> dict[str, Any]:
    """One worker and two, one after the other, each in a new store: the wall time of the whole command.

    A cluster of each is started and its workers load their models: counted, and told apart by a run with nothing to do.
    """
    code = "import sys; from nsteer.cli import main; main(sys.argv[1:])"
    plan = Path(__file__).resolve().parent.parent / "plans" / "families.yaml"
    settings = [word for setting in SPEEDUP for word in ("--set", setting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    times: dict[str, list[float]] = {"one_s": [], "two_s": [], "nothing_to_do_s": []}
    cells = 0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="scale-") as folder:

            def wall(name: str, workers: int, at: str = folder) -> tuple[dict[str, Any], float]:
                words = ["run", plan, *settings, "--set", f"store={at}/{name}.zarr"]
                words += ["--on", "ray", "--workers", workers, "--json"]
                command = [sys.executable, "-c", code, *map(str, words)]
                told, seconds = timed(
                    lambda: subprocess.run(command, cwd=at, env=environment, check=True, stdout=subprocess.PIPE).stdout
                )
                summary = json.loads(told)
                assert not summary["failures"], summary["failures"][:3]
                return summary, seconds

            summary, seconds = wall("one", 1)
            cells = sum(summary["done"].values())
            times["one_s"].append(seconds)
            times["two_s"].append(wall("two", 2)[1])
            times["nothing_to_do_s"].append(wall("two", 2)[1])
    ratios = [round(single / double, 2) for single, double in zip(times["one_s"], times["two_s"], strict=True)]
    return {"cells": cells, **times, "one_over_two": ratios, "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--deadly", type=float, default=1e-4, help="share of tasks with which a worker dies")
    parser.add_argument("--part", action="append", choices=["scheduler", "store", "path", "speedup"])
    parser.add_argument("--path-cells", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3, help="of `speedup`")
    parser.add_argument("--out", type=Path, help="a file to which every line is added too")
    given = parser.parse_args()
    out = given.out.resolve() if given.out else None  # parts go to folders of their own
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "scheduler": lambda: scheduler(given.cells, given.workers, given.deadly),
        "store": lambda: store(given.cells),
        "path": lambda: path(given.path_cells, 8),
        "speedup": lambda: speedup(given.rounds),
    }
    for name in given.part or ("scheduler", "store", "path"):
        line = json.dumps({"part": name, **parts[name]()})
        print(line, flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
