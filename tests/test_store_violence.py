"""The store under SIGKILL, a full disk and several writers: nothing acknowledged is lost, nothing shown is wrong.

A writer notes each commit that returned in a file that it fsyncs; it is killed at a random moment; then the store
is opened by plain xarray, with warnings as errors, and every cell it shows is compared with what its labels say.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from nsteer.errors import StoreError
from nsteer.store import Group, Store, Variable

VECTORS, TEXTS, AGAIN = "vectors/zoo--llama", "texts", "again"
LAYERS, WIDTH = 6, 96
KILLS = int(os.environ.get("NSTEER_KILLS", "12"))
"""Times that the slow tests kill two writers: 60 are for a release."""


def declared(emotions, layers) -> list[Group]:
    dims = ("model", "emotion", "layer")
    coords = {"model": ["zoo/llama"], "emotion": emotions, "layer": layers}
    vector = Variable((*dims, "d_model"), "float32", "vector")
    numbers = {"vector": vector, "norm": Variable(dims, "float64", "norm")}
    wide = coords | {"d_model": range(WIDTH)}
    return [
        Group(VECTORS, wide, numbers, ("emotion",), attrs={"product": "vectors"}),
        Group(TEXTS, coords, {"text": Variable(dims, "string", "text")}, ("emotion",)),
        Group(AGAIN, wide | {"emotion": ["joy"]}, numbers, ("emotion",)),
    ]


def norms_of(emotion: str, layers: list[int], version: int) -> np.ndarray:
    seed = int(emotion[1:] or 0) if emotion[1:].isdigit() else 0
    return np.array([80.0 * seed + 10 * layer + version for layer in layers])  # exact in float32 up to seed 1600


def numbers_of(emotion: str, layers: list[int], version: int) -> xr.Dataset:
    """What the labels say: every value holds emotion, layer and version."""
    norm = norms_of(emotion, layers, version)[None]
    vector = norm[..., None] + np.arange(WIDTH)[::-1] / 128
    coords = {"model": ["zoo/llama"], "layer": layers, "d_model": range(WIDTH)[::-1]}
    return xr.Dataset({"vector": (("model", "layer", "d_model"), vector), "norm": (("model", "layer"), norm)}, coords)


def text_of(emotion: str, layer: int) -> str:
    return f"{emotion}, 层 {layer} " * 40


def write_forever(path: str, log: str, name: str, rounds: int, ready=None) -> None:
    """Grows the store, commits and recomputes, and notes every commit once it returned."""
    store = Store(path)
    if ready:
        ready.set()
    with open(log, "a") as notes:
        start = len(noted(Path(log)))
        for turn in range(start, start + rounds):
            emotion, layers = f"{name}{turn}", [5, 2, 3, 0, 1, 4][: 2 + turn % (LAYERS - 1)]
            store.prepare(declared([emotion], layers))
            store.commit(VECTORS, (emotion,), numbers_of(emotion, layers, 1), fingerprint=1, run=turn)
            texts = [[text_of(emotion, layer) for layer in layers]]
            coords = {"model": ["zoo/llama"], "layer": layers}
            store.commit(TEXTS, (emotion,), xr.Dataset({"text": (("model", "layer"), texts)}, coords), fingerprint=1)
            notes.write(json.dumps([emotion, layers]) + "\n")
            notes.flush()
            os.fsync(notes.fileno())
            if name == "a":  # one writer recomputes one cell over and over
                store.commit(AGAIN, ("joy",), numbers_of("joy", layers, turn + 2), fingerprint=turn + 2)


def write_remotely(env: dict, url: str, log: str, name: str, rounds: int, ready=None) -> None:
    """For test_store_remote, here because every child imports the module of what it runs, and that one's is dear."""
    from nsteer.store import remote

    os.environ.update(env)
    remote.LEASE = 6.0
    write_forever(url, log, name, rounds, ready)


def noted(log: Path) -> dict[str, list[int]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return dict(json.loads(line) for line in lines)


def check(path: Path, logs: list[Path], live: bool = False) -> int:
    """Everything acknowledged is there and right; everything committed is right. Returns how many cells were seen.

    `live`: writers are at work, so the cell that they compute again again and again may change while it is read.
    """
    acknowledged = {emotion: layers for log in logs for emotion, layers in noted(log).items()}
    if not acknowledged:
        return 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tree = xr.open_datatree(path, engine="zarr", chunks=None)
        groups = {name: xr.open_zarr(path / name, chunks=None) for name in (VECTORS, TEXTS, AGAIN)}
        for data in groups.values():
            data.cell.load()  # before the values: a cell that is committed in between must not pass for read
            data.load()
    assert {VECTORS, TEXTS, AGAIN} <= {node.path.strip("/") for node in tree.leaves}
    seen = 0
    for name, data in groups.items():
        if live and name == AGAIN:
            continue
        seen += check_group(name, data, acknowledged if name != AGAIN else None)
    return seen


def check_group(name: str, data: xr.Dataset, acknowledged: dict[str, list[int]] | None) -> int:
    """What a group shows is what its labels say; all that was acknowledged is shown. How many cells were seen.

    Labels are turned to places once for all cells: xarray's `sel` takes milliseconds, and there are thousands.
    """
    emotions = data.emotion.values.tolist()
    assert len(set(emotions)) == len(emotions)
    records = data.cell.sel(cell_field="fingerprint").to_series().dropna()
    assert set(acknowledged or ()) <= set(records.index), "an acknowledged cell is lost"
    held = data.sel(model="zoo/llama").transpose("emotion", "layer", ...)
    values = {key: held[key].values for key in ("text", "norm", "vector") if key in held}
    layers = held.layer.values.tolist()
    widths = held.d_model.values if "vector" in values else None
    places = {emotion: place for place, emotion in enumerate(emotions)}
    for emotion, version in records.items():
        cell = {key: array[places[emotion]] for key, array in values.items()}
        check_cell(cell, layers, widths, emotion, int(version), (acknowledged or {}).get(emotion))
    return len(records)


def check_cell(cell: dict, layers: list[int], widths, emotion: str, version: int, known: list[int] | None) -> None:
    """`cell`: text [layer], or norm [layer] and vector [layer, d_model]; `widths`: the labels of d_model."""
    if widths is None:
        present = {layer: text for layer, text in zip(layers, cell["text"].tolist(), strict=True) if text}
        assert present == {layer: text_of(emotion, layer) for layer in present} and present
    else:
        there = ~np.isnan(cell["norm"])
        present = [layer for layer, is_there in zip(layers, there, strict=True) if is_there]
        norm = norms_of(emotion, present, version)
        assert present and (cell["norm"][there] == norm).all()
        assert (cell["vector"][there] == norm[:, None] + widths / 128).all()
        assert np.isnan(cell["vector"][~there]).all()
    assert known is None or sorted(present) == sorted(known)


@pytest.fixture(scope="module")
def forkserver():
    """Children that have everything imported: a kill then falls into the work, not into the imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsteer.store"])
    return context


def kill_loop(context, tmp_path: Path, kills: int, names: str, longest: float, seed: int) -> None:
    chance, path = random.Random(seed), tmp_path / "s.zarr"
    logs = {name: tmp_path / f"{name}.log" for name in names}
    seen = 0
    for _ in range(kills):
        ready = [context.Event() for _ in names]
        writers = [
            context.Process(target=write_forever, args=(str(path), str(log), name, 10**6, event))
            for (name, log), event in zip(logs.items(), ready, strict=True)
        ]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in ready)
        time.sleep(chance.uniform(0, longest))
        for writer in writers:
            writer.kill()
            writer.join()
            assert writer.exitcode == -signal.SIGKILL, "the writer ended by itself"
        seen = check(path, list(logs.values()))
    assert seen > 2, "no cell was committed: the kills came too early to prove anything"
    for name, log in logs.items():  # and the store goes on as if nothing had happened
        write_forever(str(path), str(log), name, 2)
    check(path, list(logs.values()))
    xr.open_datatree(path, engine="zarr", consolidated=False).close()


def test_kills_lose_nothing_and_show_nothing_wrong(forkserver, tmp_path):
    kill_loop(forkserver, tmp_path, kills=10, names="a", longest=0.5, seed=1)


@pytest.mark.slow
def test_many_kills_of_two_writers_lose_nothing_and_show_nothing_wrong(forkserver, tmp_path):
    kill_loop(forkserver, tmp_path, kills=KILLS, names="ab", longest=0.6, seed=2)


def test_two_writers_that_grow_at_once_lose_nothing(forkserver, tmp_path):
    path = tmp_path / "s.zarr"
    logs = [tmp_path / f"{name}.log" for name in "ab"]
    writers = [
        forkserver.Process(target=write_forever, args=(str(path), str(log), name, 5))
        for name, log in zip("ab", logs, strict=True)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):  # a reader that keeps looking
        check(path, logs, live=True)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert check(path, logs) == 21


def hold_the_lock(path: str, held) -> None:
    with Store(path).place.lock():
        held.set()
        time.sleep(600)


def test_the_kernel_frees_the_lock_of_a_killed_process(forkserver, tmp_path):
    held = forkserver.Event()
    holder = forkserver.Process(target=hold_the_lock, args=(str(tmp_path / "s.zarr"), held))
    holder.start()
    assert held.wait(60)
    holder.kill()
    holder.join()
    assert (tmp_path / "s.zarr.lock").exists()
    start = time.monotonic()
    Store(tmp_path / "s.zarr").prepare(declared(["joy"], [5, 2]))
    assert time.monotonic() - start < 30


def write_under_a_limit(path: str) -> None:
    """The data of the second cell are larger than any file may be; with the limit lifted they are not."""
    store = Store(path)
    store.prepare(declared(["e1", "e2"], [5, 2]))
    store.commit(VECTORS, ("e1",), numbers_of("e1", [5, 2], 1), fingerprint=1)
    store.commit(VECTORS, ("e2",), numbers_of("e2", [5, 2], 8), fingerprint=8)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
    with pytest.raises(StoreError, match=r"can not commit vectors/zoo--llama \('e2',\): File too large\. Committed"):
        store.commit(VECTORS, ("e2",), numbers_of("e2", [5, 2], 2), fingerprint=2)
    with pytest.raises(StoreError, match="can not prepare: File too large"):
        store.prepare(declared(["e3"], [5, 2]))
    assert store.missing(VECTORS, {("e1",): 1, ("e2",): 2}) == [("e2",)]


def test_a_disk_that_refuses_leaves_what_was_committed(forkserver, tmp_path):
    path = tmp_path / "s.zarr"
    writer = forkserver.Process(target=write_under_a_limit, args=(str(path),))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert list(Store(path).committed(VECTORS)) == [("e1",)]
    (tmp_path / "log").write_text(json.dumps(["e1", [5, 2]]) + "\n")
    store = Store(path)
    store.prepare(declared(["e1", "e2", "e3"], [5, 2]))
    for emotion in ("e2", "e3"):
        store.commit(VECTORS, (emotion,), numbers_of(emotion, [5, 2], 1), fingerprint=1)
    read = xr.open_zarr(path / VECTORS, chunks=None).load()
    assert check_group(VECTORS, read, {emotion: [5, 2] for emotion in ("e1", "e2", "e3")}) == 3
    assert not list(path.rglob("zarr.*.partial"))


@pytest.mark.slow
def test_a_full_disk_leaves_what_was_committed(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not allowed here")
    try:
        fill_and_resume(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill_and_resume(disk: Path) -> None:
    store, emotions = Store(disk / "s.zarr"), [f"e{n}" for n in range(400)]
    (disk / "ballast").write_bytes(bytes(600_000))
    store.prepare(declared(emotions, [5, 2]))
    with pytest.raises(StoreError, match="No space left on device"):
        for emotion in emotions:
            store.commit(VECTORS, (emotion,), numbers_of(emotion, [5, 2], 1), fingerprint=1)
    done = store.missing(VECTORS, {(emotion,): 1 for emotion in emotions})
    assert 0 < len(done) < len(emotions)
    (disk / "ballast").unlink()
    store.commit(VECTORS, done[0], numbers_of(*done[0], [5, 2], 1), fingerprint=1)
    read = xr.open_zarr(store.path / VECTORS, chunks=None).load()
    layers = {emotion: [5, 2] for (emotion,) in store.committed(VECTORS)}
    assert check_group(VECTORS, read, layers) == len(layers)
