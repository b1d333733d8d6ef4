"""A store of an older layout comes up to this one, whole, however often the migration is killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from test_store import PATH, assert_true, commit, vectors

from nsteer.cli import main
from nsteer.errors import StoreError, StoreVersionError
from nsteer.store import LAYOUT, Store
from nsteer.store.places import Local
from nsteer.upkeep import migrate as migrations
from nsteer.upkeep.migrate import migrate
from nsteer.upkeep.verify import verify

OLD = Path(__file__).parent / "data" / "layout1.zip"  # written by the last nsteer of layout 1


@pytest.fixture
def old(tmp_path) -> Path:
    shutil.unpack_archive(OLD, tmp_path / "old.zarr")
    return tmp_path / "old.zarr"


def assert_brought_up(path: Path) -> None:
    store = Store(path)
    report = verify(store)
    assert report.clean and not report.leftovers, report
    assert report.unsealed == 2  # (dm, joy) and (pca, joy): committed before layer 9 came in
    records = store.committed(PATH)
    assert {cell: (one.fingerprint, one.run) for cell, one in records.items()} == {
        ("dm", "joy"): (7, 0), ("pca", "joy"): (7, 0), ("dm", "fear"): (7, -1),
    }  # fmt: skip
    assert records["dm", "joy"].seconds == 1.5 and records["dm", "joy"].finished > 1.7e9
    assert_true(store.read(PATH), "dm", "joy", [5, 2])
    assert_true(store.read(PATH), "dm", "fear", [5, 2, 9])
    assert store.read("text").text.sel(prompt="快").item() == "乐"
    tree = xr.open_datatree(path, engine="zarr")
    assert tree.attrs["nsteer_store"] == LAYOUT and tree["runs"].status.values.tolist() == ["complete"]
    assert tree[PATH].cell.sel(cell_field="fingerprint").notnull().sum() == 3


def test_an_older_layout_is_refused_and_the_command_named(old):
    with pytest.raises(
        StoreVersionError, match=r"store layout 1, this nsteer reads layout 2; nsteer migrate .*old.zarr"
    ):
        Store(old).groups()
    done = CliRunner().invoke(main, ["ls", str(old)])
    assert done.exit_code == 1 and "nsteer migrate" in done.output


def test_a_store_of_layout_1_is_brought_up(old):
    done = CliRunner().invoke(main, ["migrate", str(old)])
    assert (done.exit_code, done.output) == (0, f"{old}: layout 1 to 2\n")
    assert_brought_up(old)
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    assert "nothing to do" in CliRunner().invoke(main, ["migrate", str(old)]).output
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    store = Store(old)  # and goes on as any store
    store.prepare([vectors(layers=[5, 2, 9], emotions=["awe"])])
    commit(store, "dm", "awe", layers=[5, 2, 9])
    commit(store, "dm", "joy", layers=[5, 2])
    assert verify(store).clean and verify(store).unsealed == 1
    (old / PATH / "vector/c.0.0.0.0.0").unlink()  # a removed file of an old cell that was whole is not known of


def test_a_damaged_file_of_an_old_cell_is_found_before_and_after(old):
    chunk = old / PATH / "norm/c.0.1.1.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    migrate(Store(old))
    [found] = verify(Store(old)).findings
    assert found.kind == "damaged" and found.cell == {"method": "dm", "emotion": "fear"}


@pytest.mark.parametrize("seed", range(6))
def test_a_migration_killed_anywhere_is_finished_by_another(old, monkeypatch, seed):
    write, chance = Local.write, np.random.default_rng(seed)
    left = 0

    def dying(self, name, content, over=None):
        nonlocal left
        if not left:
            raise KeyboardInterrupt  # what no clean-up of ours catches
        left -= 1
        write(self, name, content, over)

    monkeypatch.setattr(Local, "write", dying)
    kills = 0
    while True:
        left = int(chance.integers(1, 8))
        try:
            migrate(Store(old))
            break
        except KeyboardInterrupt:
            kills += 1
            with pytest.raises(StoreVersionError, match="nsteer migrate"):
                Store(old).groups()
            xr.open_zarr(old / PATH, chunks=None).norm.load()  # the data can be read all the while
    assert kills > 1
    monkeypatch.undo()
    assert_brought_up(old)


def test_layouts_are_migrated_in_order_and_unknown_ones_refused(tmp_path, monkeypatch):
    Store(tmp_path / "s.zarr").prepare([vectors()])
    seen = []
    for module in (migrations, migrations.survey.Store.__init__.__globals__["structure"]):
        monkeypatch.setattr(module, "LAYOUT", LAYOUT + 2)
    monkeypatch.setitem(migrations.MIGRATIONS, LAYOUT, lambda place: seen.append("first"))
    monkeypatch.setitem(migrations.MIGRATIONS, LAYOUT + 1, lambda place: seen.append("second"))
    assert migrate(Store(tmp_path / "s.zarr")) == [f"layout {n} to {n + 1}" for n in (LAYOUT, LAYOUT + 1)]
    assert seen == ["first", "second"] and Store(tmp_path / "s.zarr").attrs()["nsteer_store"] == LAYOUT + 2
    monkeypatch.undo()
    with pytest.raises(
        StoreVersionError, match=f"store layout {LAYOUT + 2}; this nsteer migrates layouts 1 to {LAYOUT}"
    ):
        migrate(Store(tmp_path / "s.zarr"))
    with pytest.raises(StoreError, match="no store at"):
        migrate(Store(tmp_path / "none.zarr"))
