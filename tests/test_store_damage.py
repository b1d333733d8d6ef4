"""The store after a power loss, without permission, and where no store can be: one message, nothing else lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
import xarray as xr
from test_store import PATH, assert_true, commit, sample_data, samples, vectors
from test_upkeep import CHUNKS, TEXT, filled, run

import nsteer
from nsteer.errors import StoreError
from nsteer.store import Store
from nsteer.upkeep.repair import repair
from nsteer.upkeep.verify import verify

# ---- files cut off, as a power loss leaves them

KINDS = {
    "root": "zarr.json",
    "product": "vectors/zarr.json",
    "group": f"{PATH}/zarr.json",
    "array": f"{PATH}/vector/zarr.json",
    "records": f"{PATH}/cell/zarr.json",
    "labels": f"{PATH}/emotion/c.0",
    "fields": f"{PATH}/cell_field/c.0",
    "auxiliary": f"{PATH}/depth/c.0",
    "numbers": f"{PATH}/vector/c.0.0.1.1.0",
    "text": "text/text/c.1",
    "packed": f"{CHUNKS}/pooled/c.0.1.0",
    "record": f"{PATH}/cell/c.1.0.0",
    "run": "runs/plan/c.0",
    "run record": "runs/cell/c.0.0",
}


LOST = {"labels": 2, "fields": 2, "numbers": 1, "text": 1, "packed": 1, "record": 1}
"""Cells that a repair costs."""


def rerun(store: Store) -> None:
    """What a plan would do: everything that is missing, and nothing else."""
    store.prepare([vectors(), vectors(layers=[9, 7, 8]), TEXT, samples(list("dbaecfgh"))])
    run = store.add_run(plan="name: x\n", environment={}, started="2026-11-24T00:00:00Z")
    layers = {("dm", "joy"): [5, 2], ("pca", "fear"): [5, 2, 9, 7, 8]}
    for key in store.missing(PATH, {("dm", "joy"): 7, ("pca", "fear"): 8}):
        commit(store, *key, layers=layers[key], number=7 if key[0] == "dm" else 8, run=run)
    for key in store.missing("text", {("快",): 1}):
        store.commit("text", key, xr.Dataset({"text": ((), "乐")}), fingerprint=1, run=run)
    wanted = {("generation", 0): 1, ("generation", 1): 2}
    for key in store.missing(CHUNKS, wanted):
        labels = list("bad" if key[1] == 0 else "cef")
        store.commit(CHUNKS, key, sample_data(labels), fingerprint=wanted[key], run=run)


def opens(path: Path, group: str) -> bool:
    try:
        nsteer.open(path)[group].load()
        xr.open_zarr(path / group, chunks=None).load()
    except (StoreError, ValueError):
        return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return filled(tmp_path_factory.mktemp("whole") / "s.zarr").path


@pytest.mark.parametrize("left", [0.0, 0.5], ids=["emptied", "halved"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_was_cut_off_is_named_the_rest_opens_and_a_rerun_recovers(whole, tmp_path, kind, left):
    store = Store(shutil.copytree(whole, tmp_path / "s.zarr"))
    before = {path: store.committed(path) for path in store.groups()}
    file = store.path / KINDS[kind]
    os.truncate(file, int(file.stat().st_size * left))
    findings = verify(Store(store.path)).findings
    assert findings and any(
        KINDS[kind] in (finding.file, *finding.what.split()) or KINDS[kind] in finding.what for finding in findings
    ), findings
    broken = KINDS[kind].rsplit("/", 2)[0] if "/" in KINDS[kind] else ""
    for group in before:
        if kind != "root" and not KINDS[kind].startswith(group):
            assert opens(store.path, group), f"{group} does not open, though {broken} is what broke"
        elif kind == "root":
            xr.open_zarr(store.path / group, chunks=None).load()
    assert run("verify", store.path)[0] == 1
    report = repair(Store(store.path))
    assert report.clean and report.repaired, report
    kept = {path: Store(store.path).committed(path) for path in before if path in Store(store.path).groups()}
    lost = sum(len(before[path]) - len(kept.get(path, {})) for path in before)
    assert lost == LOST.get(kind, 0)
    assert Store(store.path).committed("runs") and all(
        record.run == 0 for path in kept for record in kept[path].values()
    ), "which run made a cell is still known"
    again = Store(store.path)
    rerun(again)
    assert verify(again).clean
    assert_true(again.read(PATH), "dm", "joy", [5, 2])
    assert_true(again.read(PATH), "pca", "fear", [5, 2, 9, 7, 8])
    assert again.read("text").text.sel(prompt="快").item() == "乐"
    assert again.read(PATH).depth.sel(layer=5).item() == 5 / 8
    assert again.read(CHUNKS).pooled.sel(sample=list("bad")).notnull().all()


# ---- permissions


@contextlib.contextmanager
def nobody():
    """Root may do everything: stand back for a while. Imports must have happened before."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """A folder that everybody may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def use(path: Path) -> None:
    """Everything once, so that whatever is imported late is there."""
    run("ls", path)
    run("verify", path)
    with contextlib.suppress(StoreError):
        Store(path).prepare([vectors(emotions=["awe"])])


def test_a_store_that_may_not_be_written_is_read_and_says_so(open_folder):
    store = filled(open_folder / "s.zarr")
    use(store.path)
    with nobody():
        if os.access(store.path, os.W_OK, effective_ids=True):
            pytest.skip("this user may write everything")
        assert run("ls", store.path)[0] == 0 and run("verify", store.path)[0] == 0
        assert_true(nsteer.open(store.path)[PATH].load(), "dm", "joy", [5, 2])
        with pytest.raises(StoreError, match=r"can not prepare: Permission denied\. Committed cells are kept"):
            Store(store.path).prepare([vectors(emotions=["new"])])
        with pytest.raises(StoreError, match=r"can not commit .*: Permission denied"):
            commit(Store(store.path), "dm", "joy", number=9)
    assert verify(Store(store.path)).clean and Store(store.path).committed(PATH)["dm", "joy"].fingerprint == 7


@pytest.mark.parametrize(
    "what", ["", "zarr.json", f"{PATH}/zarr.json", PATH, f"{PATH}/norm/c.0.1.0.0", f"{PATH}/emotion/c.0"]
)
def test_what_may_not_be_read_is_said_in_a_line(whole, open_folder, what):
    store = Store(shutil.copytree(whole, open_folder / "s.zarr"))
    use(store.path)
    target = store.path / what
    mode = target.stat().st_mode
    target.chmod(0)
    with nobody():
        if os.access(target, os.R_OK, effective_ids=True):
            pytest.skip("this user may read everything")
        with pytest.raises(StoreError, match=r"can not be read: .*Permission denied"):
            nsteer.open(store.path)[PATH].load()
        for command in ("ls", "verify"):
            code, said = run(command, store.path)
            if code == 1:
                assert "Permission denied" in said and "Traceback" not in said
            else:
                assert command == "ls" and "norm" in what  # it reads no values
    target.chmod(stat.S_IMODE(mode))


@pytest.mark.slow
def test_a_store_on_a_disk_that_can_not_be_written(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        store = filled(disk / "s.zarr")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert run("ls", store.path)[0] == 0 and run("verify", store.path)[0] == 0
        assert_true(nsteer.open(store.path)[PATH].load(), "dm", "joy", [5, 2])
        with pytest.raises(StoreError, match="can not prepare: Read-only file system"):
            Store(store.path).prepare([vectors(emotions=["new"])])
        with pytest.raises(StoreError, match=r"can not commit .*: Read-only file system"):
            commit(Store(store.path), "dm", "joy", number=9)
        code, said = run("verify", store.path, "--repair")
        assert code == 0 or "Read-only file system" in said
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "file.zarr").write_text("mine")
    for command in (["ls"], ["verify"], ["report"], ["merge", "-o", tmp_path / "out.zarr"]):
        code, said = run(*command, tmp_path / "file.zarr")
        assert code == 1 and "not an nsteer store" in said and len(said.splitlines()) == 1
    assert (tmp_path / "file.zarr").read_text() == "mine" and not (tmp_path / "out.zarr").exists()
