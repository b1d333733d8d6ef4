"""Kills writers of a store at random moments and counts what was lost: python bench/kills.py --kills 500

A writer notes each commit that returned in a file that it fsyncs. It is killed by SIGKILL at a random moment; then
the store is opened by plain xarray with warnings as errors, every cell that it shows is compared with what its labels
say, every noted cell must be there, and `nsteer verify` must find nothing. A reader opens the same store all the time.
Writers are forked from a parent that has everything imported and nothing open, so kills fall into the work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from nsteer.errors import StoreError
from nsteer.store import Group, Store, Variable, results
from nsteer.upkeep.verify import verify

VECTORS, TEXTS, AGAIN = "vectors/zoo--llama", "texts", "again"
LAYERS, WIDTH = [5, 2, 3, 0, 1, 4], 64
ROUND = 25  # kills a store: a store that grows for ever would be checked for ever
SCENARIOS = {"fixed": "a", "growing": "a", "recompute": "r", "two": "ab"}


def groups(emotions: list[str], layers: list[int]) -> list[Group]:
    dims = ("model", "emotion", "layer")
    coords = {"model": ["zoo/llama"], "emotion": emotions, "layer": layers}
    numbers = {
        "vector": Variable((*dims, "d_model"), "float32", "vector"),
        "norm": Variable(dims, "float64", "norm", compress=True),
    }
    return [
        Group(VECTORS, {**coords, "d_model": range(WIDTH)}, numbers, ("emotion",)),
        Group(TEXTS, coords, {"text": Variable(dims, "string", "text")}, ("emotion",)),
        Group(AGAIN, {**coords, "emotion": ["e0"], "d_model": range(WIDTH)}, numbers, ("emotion",)),
    ]


def numbers(emotion: str, layers: list[int], version: int) -> xr.Dataset:
    """What labels and version say; float32 holds it exactly."""
    seed = int(emotion[1:])
    norm = np.array([[64.0 * seed + 8 * layer + version % 8 for layer in layers]])
    vector = norm[..., None] + np.arange(WIDTH)[::-1] / 128
    coords = {"model": ["zoo/llama"], "layer": layers, "d_model": range(WIDTH)[::-1]}
    return xr.Dataset({"vector": (("model", "layer", "d_model"), vector), "norm": (("model", "layer"), norm)}, coords)


def texts(emotion: str, layers: list[int]) -> xr.Dataset:
    said = [[f"{emotion}, 层 {layer} " * 40 for layer in layers]]
    return xr.Dataset({"text": (("model", "layer"), said)}, {"model": ["zoo/llama"], "layer": layers})


# ---- writers ----------------------------------------------------------------------------------------------------


def write(path: str, log: str, name: str, scenario: str) -> None:
    """Writes until it is killed. Emotions a0, a1, … of writer a; each is noted once its commits returned."""
    store, turn = Store(path), len(noted(Path(log)))
    with open(log, "a") as notes:
        while True:
            emotion, layers = f"{name}{turn}", LAYERS[: 2 + turn % 5] if scenario in ("growing", "two") else LAYERS
            if scenario == "recompute":
                emotion = f"{name}{turn % 3}"
            store.prepare(groups([emotion] if scenario != "fixed" else [f"a{n}" for n in range(400)], layers))
            version = 1 if scenario != "recompute" else turn + 1
            store.commit(VECTORS, (emotion,), numbers(emotion, layers, version), fingerprint=version)
            store.commit(TEXTS, (emotion,), texts(emotion, layers), fingerprint=1)
            notes.write(json.dumps([turn, emotion, layers]) + "\n")
            notes.flush()
            os.fsync(notes.fileno())
            if name != "b":  # one cell is computed again over and over
                store.commit(AGAIN, ("e0",), numbers("e0", layers, turn), fingerprint=turn)
            turn += 1


def noted(log: Path) -> list[list]:
    """What a writer noted; of a line that it is writing, nothing."""
    return [json.loads(line) for line in log.read_text().split("\n")[:-1]] if log.exists() else []


def await_note(logs: list[Path], seconds: float = 30.0) -> None:
    """Waits until one more commit is noted, or so long."""
    before, end = [len(noted(log)) for log in logs], time.monotonic() + seconds
    while [len(noted(log)) for log in logs] == before and time.monotonic() < end:
        time.sleep(0.01)


def forked(action: Callable[[], object]) -> int:
    """The process id of a fork that does something and ends."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


# ---- checks -----------------------------------------------------------------------------------------------------


def wrong_cells(name: str, data: xr.Dataset) -> list[str]:
    """The finished cells of a loaded group whose values are not what their labels and fingerprint say."""
    faults = []
    for emotion, version in data.cell.sel(cell_field="fingerprint").to_series().dropna().items():
        cell = data.sel(emotion=emotion, model="zoo/llama")
        if name == TEXTS:
            there = [layer for layer in cell.layer.values.tolist() if cell.text.sel(layer=layer).item()]
            fine = there and (cell.text.sel(layer=there).values == texts(emotion, there).text.values[0]).all()
        else:
            present = ~np.isnan(cell.norm.values)
            wanted = numbers(emotion, cell.layer.values[present].tolist(), int(version)).isel(model=0)
            fine = present.any() and (cell.norm.values[present] == wanted.norm.values).all()
            fine = fine and (cell.vector.values[present] == wanted.vector.sel(d_model=cell.d_model).values).all()
            fine = fine and np.isnan(cell.vector.values[~present]).all()
        faults += [] if fine else [f"{name} {emotion}"]
    return faults


def check(path: Path, logs: list[Path]) -> dict[str, int]:
    """What a killed store shows. Runs in a fork of its own."""
    acknowledged = {(emotion, tuple(layers)) for log in logs for _, emotion, layers in noted(log)}
    if not acknowledged:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            xr.open_datatree(path, engine="zarr", chunks=None).load()
            data = {name: xr.open_zarr(path / name, chunks=None).load() for name in (VECTORS, TEXTS, AGAIN)}
        except Exception:
            traceback.print_exc()
            return {"unopenable": 1}
    shown = {name: set(d.emotion.values[d.cell.sel(cell_field="fingerprint").notnull()]) for name, d in data.items()}
    kept = {emotion for emotion, _ in acknowledged}
    recomputed = any(log.name.startswith("r") for log in logs)  # the cell being written again is rightly gone
    lost = sum(max(0, len(kept - shown[name]) - recomputed) for name in (VECTORS, TEXTS))
    wrong = [fault for name, d in data.items() for fault in wrong_cells(name, d)]
    report = verify(Store(path))
    for text in [*wrong, *map(str, report.findings)][:5]:
        print(text, file=sys.stderr)
    seen = sum(map(len, shown.values()))
    partial = sum(leftover.kind == "temporary" for leftover in report.leftovers)
    return {"lost": lost, "wrong": len(wrong), "verify": len(report.findings), "cells": seen, "partial": partial}


def read_forever(path: Path, out: Path, stop: Path, seed: int) -> None:
    """Opens at random moments, as nsteer and as plain xarray do; whatever shows must be right."""
    chance, counts = random.Random(seed), Counter({"opened": 0})
    while not stop.exists():
        time.sleep(chance.uniform(0, 0.1))
        name = chance.choice([VECTORS, TEXTS, AGAIN])
        try:
            if not Store(path).exists or name not in Store(path).groups():
                continue
            if name == VECTORS and chance.random() < 0.5:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    xr.open_datatree(path, engine="zarr", chunks=None)
            data = results.open(path)[name].load()
            bad = wrong_cells(name, data)
            counts["reader_wrong"] += len(bad)
            counts["reader_cells"] += int(data.cell.sel(cell_field="fingerprint").notnull().sum())
        except StoreError as error:
            if "computed again" not in str(error):
                counts["reader_errors"] += 1
                print(error, file=sys.stderr)
            counts["again"] += 1  # the promise: such a read raises
        except Exception:
            traceback.print_exc()
            counts["reader_errors"] += 1
        counts["opened"] += 1
    out.write_text(json.dumps(counts))


# ---- the loop ---------------------------------------------------------------------------------------------------


def one_store(folder: Path, scenario: str, kills: int, chance: random.Random, reader: bool, longest: float) -> Counter:
    """Some kills of the writers of one store."""
    path, stop = folder / "s.zarr", folder / "stop"
    logs = [folder / f"{name}.log" for name in SCENARIOS[scenario]]
    counts: Counter = Counter()
    reading = forked(lambda: read_forever(path, folder / "reader.json", stop, chance.randrange(2**30))) if reader else 0
    for _ in range(kills):
        writers = [
            forked(lambda log=log: write(str(path), str(log), log.stem, scenario))  # type: ignore[misc]
            for log in logs
        ]
        if chance.random() < 0.5:  # every other kill, more or less, falls among commits however slow the machine is
            await_note(logs)
        time.sleep(chance.uniform(0, longest))
        for writer in chance.sample(writers, len(writers)):
            os.kill(writer, signal.SIGKILL)
            status = os.waitpid(writer, 0)[1]
            counts["kills"] += 1
            if os.WTERMSIG(status) != signal.SIGKILL:
                counts["writer_errors"] += 1  # it ended by itself
            time.sleep(chance.uniform(0, 0.05) if len(writers) > 1 else 0)
        file = folder / "check.json"
        checker = forked(lambda file=file: file.write_text(json.dumps(check(path, logs))))  # type: ignore[misc]
        if os.waitpid(checker, 0)[1]:
            counts["check_failed"] += 1
            continue
        told = json.loads(file.read_text())
        cells = told.pop("cells", 0)
        partial = told.pop("partial", 0)
        counts.update(told)
        counts["checks"] += 1
        counts["most_cells"] = max(counts["most_cells"], cells)
        counts["most_partial"] = max(counts["most_partial"], partial)
    counts["noted"] = sum(len(noted(log)) for log in logs)
    if reader:
        stop.touch()
        os.waitpid(reading, 0)
        counts.update(json.loads((folder / "reader.json").read_text()))
    return counts


BAD = (
    "lost",
    "wrong",
    "unopenable",
    "verify",
    "writer_errors",
    "check_failed",
    "reader_wrong",
    "reader_errors",
    "nothing_proved",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500, help="SIGKILLs in all, shared out over the scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.5, help="seconds a writer may live")
    parser.add_argument("--no-reader", action="store_true")
    parser.add_argument("--sabotage", action="store_true", help="leave out the un-commit: the loop must see it")
    parser.add_argument("--folder", default=None, help="where the stores lie; a temporary folder unless given")
    given = parser.parse_args()
    if given.sabotage:
        Store._uncommit = lambda self, record: None  # type: ignore[method-assign]
    chance, start = random.Random(given.seed), time.monotonic()
    total: Counter = Counter()
    for scenario, names in SCENARIOS.items():
        counts: Counter = Counter()
        rounds = -(-given.kills // len(SCENARIOS) // len(names))
        while rounds > 0:
            folder = Path(tempfile.mkdtemp(prefix="kills-", dir=given.folder))
            here = one_store(folder, scenario, min(rounds, ROUND), chance, not given.no_reader, given.longest)
            longest = {name: max(counts[name], here[name]) for name in ("most_cells", "most_partial")}
            counts.update(here)
            counts.update({name: value - counts[name] for name, value in longest.items()})
            rounds -= ROUND
            if any(here[name] for name in BAD):
                print(f"kept for a look: {folder}", file=sys.stderr)
            else:
                shutil.rmtree(folder)
        if not counts["most_cells"]:
            counts["nothing_proved"] = 1  # every kill came before the first commit: nothing could be lost
        print(json.dumps({"scenario": scenario, **counts}), flush=True)
        total.update({name: value for name, value in counts.items() if not name.startswith("most")})
    bad = {name: total[name] for name in BAD}
    print(json.dumps({"scenario": "all", **total, **bad, "seconds": round(time.monotonic() - start)}), flush=True)
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
