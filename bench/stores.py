"""Case e: commits, opening and selecting, and gigabytes, against np.save and np.load of the same arrays."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

OPEN = """
import sys, time
from pathlib import Path
t = time.perf_counter()
import nsteer
nsteer.open
loaded = time.perf_counter() - t
t = time.perf_counter()
results = nsteer.open(sys.argv[1])
value = results.sel(model=sys.argv[2], method="generation", emotion="happy", layer=5).values
print(loaded, time.perf_counter() - t, value.sum())
"""


def group(path: str, coords: dict[str, Any], cell: tuple[str, ...], variable: str, dims: tuple[str, ...]) -> Any:
    from nsteer.store import Group, Variable

    return Group(
        path, coords, {variable: Variable(dims, "float32", variable)}, cell, attrs={"product": path.split("/")[0]}
    )


def commits(folder: Path, count: int) -> dict[str, Any]:
    """`count` cells of 40 numbers each into one cube, one commit a cell, as steering writes them."""
    from nsteer.store import Store

    store = Store(folder / "commits.zarr")
    labels = {
        "emotion": [f"e{i}" for i in range(100)],
        "strength": [float(i) for i in range(count // 100)],
        "prompt": list(range(40)),
    }
    store.prepare([group("outcomes", labels, ("emotion", "strength"), "perplexity", tuple(labels))])
    data = xr.Dataset({"perplexity": (("prompt",), np.ones(40, np.float32))}, coords={"prompt": labels["prompt"]})
    took = []
    for emotion in labels["emotion"]:
        for strength in labels["strength"]:
            began = time.perf_counter()
            store.commit("outcomes", (emotion, strength), data, fingerprint=1)
            took.append(time.perf_counter() - began)
    half = len(took) // 2
    return {
        "cells": count,
        "median_ms": round(statistics.median(took) * 1000, 3),
        "p99_ms": round(sorted(took)[int(0.99 * len(took))] * 1000, 3),
        "second_half_over_first": round(statistics.median(took[half:]) / statistics.median(took[:half]), 3),
        "total_s": round(sum(took), 2),
    }


def opening(folder: Path, models: int) -> dict[str, Any]:
    """A fresh process opens a store of `models` groups and reads one vector."""
    from nsteer.store import Store, slug

    path = folder / f"open-{models}.zarr"
    store = Store(path)
    names = [f"m{i}" for i in range(models)]
    own = {"method": ["generation"], "emotion": ["happy", "sad"], "layer": [2, 5], "d_model": list(range(64))}
    groups = [
        group(
            f"vectors/{slug(name)}", {"model": [name], **own}, ("model", "method", "emotion"), "vector", ("model", *own)
        )
        for name in names
    ]
    store.prepare(groups)
    data = xr.Dataset(
        {"vector": (("layer", "d_model"), np.ones((2, 64), np.float32))},
        coords={k: own[k] for k in ("layer", "d_model")},
    )
    for name in (names[0], names[-1]):
        store.commit(f"vectors/{slug(name)}", (name, "generation", "happy"), data, fingerprint=1)
    loaded, took = [], []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", OPEN, str(path), names[-1]], capture_output=True, text=True, check=True
        )
        words = done.stdout.split()
        loaded.append(float(words[0]))
        took.append(float(words[1]))
    return {
        "groups": models,
        "import_s": round(statistics.median(loaded), 3),
        "open_and_select_s": round(statistics.median(took), 3),
    }


def gigabytes(folder: Path, gigabytes_: float, repeats: int) -> dict[str, Any]:
    """Pooled activations, cell by cell, written and read lazily, against np.save and np.load of the same arrays."""
    from nsteer.store import Store, results

    layers, width, samples = 32, 2048, 16
    cell = np.random.default_rng(0).normal(size=(samples, layers, width)).astype(np.float32)
    count = max(2, round(gigabytes_ * 2**30 / cell.nbytes))
    labels = {
        "model": ["m"],
        "method": ["g"],
        "emotion": [f"e{i}" for i in range(count)],
        "sample": list(range(samples)),
    }
    labels |= {"layer": list(range(layers)), "d_model": list(range(width))}
    took: dict[str, list[float]] = {name: [] for name in ("write", "np.save", "read", "np.load")}
    data = xr.Dataset(
        {"pooled": (("sample", "layer", "d_model"), cell)},
        coords={k: labels[k] for k in ("sample", "layer", "d_model")},
    )
    for k in range(repeats):
        store = Store(folder / f"big-{k}.zarr")
        store.prepare([group("activations/m", labels, ("model", "method", "emotion"), "pooled", tuple(labels))])
        began = time.perf_counter()
        for emotion in labels["emotion"]:
            store.commit("activations/m", ("m", "g", emotion), data, fingerprint=1)
        os.sync()
        took["write"].append(time.perf_counter() - began)
        plain = folder / f"plain-{k}"
        plain.mkdir()
        began = time.perf_counter()
        for i in range(count):
            np.save(plain / f"{i}.npy", cell)
        os.sync()
        took["np.save"].append(time.perf_counter() - began)
        opened = results.open(folder / f"big-{k}.zarr")["activations/m"].pooled
        began = time.perf_counter()
        for emotion in labels["emotion"]:
            opened.sel({"model": "m", "method": "g", "emotion": emotion}).values.sum()
        took["read"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for i in range(count):
            np.load(plain / f"{i}.npy").sum()
        took["np.load"].append(time.perf_counter() - began)
        for path in plain.iterdir():
            path.unlink()
        subprocess.run(["rm", "-rf", str(folder / f"big-{k}.zarr")], check=True)
    median = {name: statistics.median(seconds) for name, seconds in took.items()}
    return {
        "gigabytes": round(count * cell.nbytes / 2**30, 2),
        "cell_mb": round(cell.nbytes / 2**20, 1),
        "seconds": {name: round(seconds, 2) for name, seconds in median.items()},
        "write / np.save": round(median["write"] / median["np.save"], 2),
        "read / np.load": round(median["read"] / median["np.load"], 2),
    }
