"""Says what upkeep costs where a store is large: python bench/upkeep.py [--cells 100000] [--profile]

A store of a plan whose steering grid has that many cells, in its two groups `generations` and `steering` together. One
cell of each group is committed; the files of the others are copies of its own under their places, each with a record
bound to its labels. Then `verify`, and `gc` with the plan that wants every other strength, told and then deleted. One
JSON line a part: seconds, and CPU seconds of this process, which count on a machine that does other work besides.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsteer.plan import check
from nsteer.stages import arrays, cells
from nsteer.stages.job import Job
from nsteer.store import Store, chunks
from nsteer.system.names import chunk_index, chunk_name
from nsteer.upkeep import gc
from nsteer.upkeep.collect import collect
from nsteer.upkeep.verify import verify

GROUPS = ("generations", "steering")
EMOTIONS = ["happy", "sad", "afraid", "angry"]


def study(folder: Path, store: Path, strengths: list[float]) -> check.Study:
    """A plan with a grid of 4 emotions, 5 layer sets, and these strengths."""
    plan = {
        "name": "grid",
        "models": ["zoo/llama"],
        "texts": "zoo",
        "emotions": EMOTIONS,
        "methods": {"read": {"source": "comprehension", "samples": 2, "pooling": "mean"}},
        "steer": {
            "vectors": {"emotions": EMOTIONS},
            "layers": {"each": "all"},
            "strengths": strengths,
            "controls": [],
            "prompts": {"walk": "tom ran to the"},
            "generate": {"max_new_tokens": 4},
        },
        "store": str(store),
    }
    file = folder / f"plan{len(strengths)}.yaml"
    file.write_text(json.dumps(plan))
    return check.load(file)


def fill(store: Store, wanted: Mapping[tuple, int]) -> None:
    """Every wanted cell of both groups: one by a commit, the others as copies of its files."""
    first, *others = wanted
    for path in GROUPS:
        store.commit(path, first, xr.Dataset(), fingerprint=wanted[first], partial=True)
        leaf = store.leaf(path)
        assert leaf is not None
        at = leaf.position(first)
        record = leaf.record(at)
        assert record is not None
        files = [
            (chunk.variable, chunk_index(chunk.name.rpartition("/")[2]) or (), store.place.read(chunk.name) or b"")
            for chunk in chunks.of_cell(leaf, at, leaf.structures[record.structure])
        ]
        positions = [tuple(leaf.where[a][x] for a, x in zip(leaf.cell, key, strict=True)) for key in others]
        numbers = leaf.bound(np.array(positions), record.structure).tolist()
        root = Path(str(store.path)) / path
        for key, place, number in zip(others, positions, numbers, strict=True):
            where = dict(zip(leaf.cut, place, strict=True))
            for variable, index, content in files:
                dims = leaf.arrays[variable]["dimension_names"]
                name = chunk_name([where.get(dim, i) for dim, i in zip(dims, index, strict=True)])
                (root / variable / name).write_bytes(content)
            own = record._replace(fingerprint=wanted[key], labels=number)
            (Path(str(store.path)) / leaf.record_file(place)).write_bytes(own.pack())


def timed(part: str, action: Callable[[], Any], profile: bool) -> Any:
    """Does it, and prints what it took."""
    start, cpu, watch = time.perf_counter(), time.process_time(), cProfile.Profile()
    answer = watch.runcall(action) if profile else action()
    line = {"part": part, "s": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
    print(json.dumps({key: round(value, 1) if isinstance(value, float) else value for key, value in line.items()}))
    if profile:
        pstats.Stats(watch).sort_stats("tottime").print_stats(18)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        each = max(2, given.cells // (len(GROUPS) * len(EMOTIONS) * 5))
        strengths = [round(0.01 * (n + 1), 2) for n in range(each)]
        store, checked_plan = Store(place / "s.zarr"), study(place, place / "s.zarr", strengths)
        store.prepare(arrays.groups(checked_plan))
        timed("fill", lambda: fill(store, cells.steering(Job(checked_plan, checked_plan.facts[0]))), False)
        report = timed("verify", lambda: verify(Store(store.path)), given.profile)
        assert report.clean, report.findings[:3]
        print(json.dumps({"cells": report.cells, "files": report.files, "bytes": report.bytes}))
        less = study(place, place / "s.zarr", strengths[::2])
        gc_plan = timed("gc, told", lambda: gc.plan(Store(store.path), [less], older=0), given.profile)
        print(json.dumps({"goes": len(gc_plan.cells), "stays": gc_plan.kept}))
        timed("gc, deleted", lambda: collect(Store(store.path), gc_plan), given.profile)


if __name__ == "__main__":
    main()
