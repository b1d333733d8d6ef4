"""Merging: every cell of every store arrives once under its labels, and nobody's word is taken unasked."""

from __future__ import annotations

import shutil
from datetime import datetime

import numpy as np
import pytest
import xarray as xr
from test_store import PATH, assert_true, commit, sample_data, samples, vectors
from test_upkeep import CHUNKS, run

from nsteer.errors import StoreError
from nsteer.stages import imported
from nsteer.store import Store
from nsteer.store.places import Local
from nsteer.upkeep import diff
from nsteer.upkeep.merge import merge
from nsteer.upkeep.verify import verify
from nsteer.vectors import exchange


def filled_store(path, emotions, layers=(5, 2), plan="x", **changes) -> Store:
    store = Store(path)
    store.prepare([vectors(emotions=emotions, layers=layers, **changes)])
    index = store.add_run(plan=plan, environment={"host": plan}, started="2026-11-23T00:00:00Z")
    for number, emotion in enumerate(emotions):
        commit(
            store, "dm", emotion, layers=layers, number=100 + number if plan == "other" else 7, run=index, seconds=2.5
        )
    store.finish_run(index, "2026-11-23T01:00:00Z", "complete")
    return store


@pytest.fixture
def two(tmp_path) -> list[Store]:
    """Labels in another order, more layers, one shared cell (joy), two runs each."""
    a = filled_store(tmp_path / "a.zarr", ["joy", "fear"])
    a.add_run(plan="again", environment={}, started="2026-11-24T00:00:00Z")
    return [a, filled_store(tmp_path / "b.zarr", ["awe", "joy"], layers=(2, 5), plan="y")]


def test_cells_runs_and_records_arrive(two, tmp_path):
    out = Store(tmp_path / "out.zarr")
    merged = merge(two, out)
    assert merged.copied == {PATH: 3} and merged.same == {} and not merged.conflicts and merged.runs == 3
    assert verify(out).clean
    for emotion in ("joy", "fear", "awe"):
        assert_true(out.read(PATH), "dm", emotion, [5, 2])
    runs = out.read("runs").load()
    assert runs.plan.values.tolist() == ["x", "again", "y"] and runs.status.values.tolist() == [
        "complete",
        "running",
        "complete",
    ]
    records = {emotion: record for (_, emotion), record in out.committed(PATH).items()}
    assert {emotion: record.run for emotion, record in records.items()} == {"joy": 0, "fear": 0, "awe": 2}
    was = two[1].committed(PATH)["dm", "awe"]
    assert (records["awe"].finished, records["awe"].seconds) == (was.finished, 2.5)
    again = merge(two, out)
    assert again.copied == {} and again.same == {PATH: 3} and again.runs == 0


def test_growth_of_axes_of_the_sources_is_no_difference(tmp_path):
    a, b = filled_store(tmp_path / "a.zarr", ["joy"]), filled_store(tmp_path / "b.zarr", ["joy"])
    b.prepare([vectors(layers=[9], emotions=["joy"])])
    commit(b, "dm", "joy")  # now with NaN for layer 9
    assert merge([a, b], Store(tmp_path / "out.zarr")).conflicts == []


@pytest.mark.parametrize("prefer", [None, "first", "last"])
@pytest.mark.parametrize("kind", ["fingerprint", "values"])
def test_conflicts_are_refused_by_name_or_decided(tmp_path, prefer, kind):
    a, b = filled_store(tmp_path / "a.zarr", ["joy", "fear"]), filled_store(tmp_path / "b.zarr", ["joy", "awe"])
    if kind == "fingerprint":
        commit(b, "dm", "joy", number=8)
    else:
        from test_store import vector_data

        data = vector_data("dm", "joy")
        b.commit(PATH, ("dm", "joy"), data.assign(norm=data.norm + 1), fingerprint=7)
    out = tmp_path / "out.zarr"
    code, said = run("merge", a.path, b.path, "-o", out, *(["--prefer", prefer] if prefer else []))
    store = Store(out)
    assert {"fear", "awe"} <= {emotion for _, emotion in store.committed(PATH)}
    if prefer is None:
        assert code == 1 and f"conflict: {PATH} · method dm, emotion joy" in said
        assert ("same fingerprint, other values" in said) == (kind == "values")
        assert ("dm", "joy") not in store.committed(PATH)
        return
    assert code == 0 and "1 conflicts decided as told" in said
    source = a if prefer == "first" else b
    pick = {"method": "dm", "emotion": "joy"}
    xr.testing.assert_equal(
        store.read(PATH).norm.sel(pick).load().drop_vars(["method", "emotion"]).sel(layer=[5, 2]),
        source.read(PATH).norm.sel(pick).load().drop_vars(["method", "emotion"]).sel(layer=[5, 2]),
    )
    assert store.committed(PATH)["dm", "joy"].fingerprint == source.committed(PATH)["dm", "joy"].fingerprint


def test_a_cell_that_is_there_is_kept_when_another_store_contradicts(tmp_path):
    out, b = (
        filled_store(tmp_path / "out.zarr", ["joy"]),
        filled_store(tmp_path / "b.zarr", ["joy", "awe"], plan="other"),
    )
    before = out.committed(PATH)["dm", "joy"]
    assert len(merge([b], out).conflicts) == 1
    assert out.committed(PATH)["dm", "joy"] == before and ("dm", "awe") in out.committed(PATH)


def test_damaged_cells_are_not_merged(two, tmp_path):
    (two[0].path / PATH / "norm/c.0.1.1.0").unlink()  # fear: reads as fill
    merged = merge(two, Store(tmp_path / "out.zarr"))
    assert [str(conflict.cell["emotion"]) for conflict in merged.conflicts] == ["fear"]
    assert "a file of it is gone (vectors/zoo--llama/norm/c.0.1.1.0)" in merged.conflicts[0].what
    assert merged.copied == {PATH: 2}


def test_groups_that_can_not_be_one_are_a_conflict_and_the_rest_is_merged(tmp_path):
    a = filled_store(tmp_path / "a.zarr", ["joy"])
    b = filled_store(tmp_path / "b.zarr", ["joy"], attrs={"product": "vectors", "product_version": 2})
    for store, labels in ((a, list("abc")), (b, list("abcdef"))):
        store.prepare([samples(labels)])
    a.commit(CHUNKS, ("generation", 0), sample_data(list("abc")), fingerprint=1)
    b.commit(CHUNKS, ("generation", 1), sample_data(list("def")), fingerprint=2)
    out = Store(tmp_path / "out.zarr")
    merged = merge([a, b], out)
    assert [(conflict.group, conflict.cell) for conflict in merged.conflicts] == [(PATH, {})]
    assert list(out.committed(CHUNKS)) == [("generation", 0), ("generation", 1)] and verify(out).clean


def test_chunks_of_other_samples_are_a_conflict(tmp_path):
    a, b = Store(tmp_path / "a.zarr"), Store(tmp_path / "b.zarr")
    for store, labels in ((a, "abc"), (b, "dae")):
        store.prepare([samples(list(labels))])
        store.commit(CHUNKS, ("generation", 0), sample_data(list(labels)), fingerprint=1)
    merged = merge([a, b], Store(tmp_path / "out.zarr"))
    assert len(merged.conflicts) == 1 and merged.conflicts[0].cell == {"method": "generation", "sample_chunk": 0}


def test_a_merge_that_was_killed_goes_on(two, tmp_path, monkeypatch):
    write, left = Local.write, 12

    def dying(self, name, content, over=None):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        write(self, name, content, over)

    out, kills = tmp_path / "out.zarr", 0
    monkeypatch.setattr(Local, "write", dying)
    while True:
        try:
            merge(two, Store(out))
            break
        except KeyboardInterrupt:
            kills, left = kills + 1, 12 + kills
            assert verify(Store(out)).clean
    assert kills > 1
    once = tmp_path / "once.zarr"
    monkeypatch.undo()
    merge(two, Store(once))
    for name in (PATH, "runs"):
        a, b = (xr.open_zarr(path / name).load() for path in (out, once))
        xr.testing.assert_equal(a.sortby("emotion") if name == PATH else a, b.sortby("emotion") if name == PATH else b)


def test_a_run_that_ended_since_is_brought_up_to_date(two, tmp_path):
    out = Store(tmp_path / "out.zarr")
    merge(two, out)
    two[0].finish_run(1, "2026-11-24T01:00:00Z", "complete")
    merge(two, out)
    assert out.read("runs").status.values.tolist() == ["complete"] * 3


def test_what_can_not_be_merged_is_said(two, tmp_path):
    with pytest.raises(StoreError, match="is both merged and the result"):
        merge(two, two[0])
    code, said = run("merge", tmp_path / "none.zarr", "-o", tmp_path / "out.zarr")
    assert code == 1 and "no store at" in said
    assert np.isfinite(two[0].read(PATH).norm.sel({"method": "dm"})).all()


def test_of_a_damaged_cell_and_a_whole_one_the_whole_one_is_taken_and_the_other_named(two, tmp_path):
    (two[0].path / PATH / "norm/c.0.1.0.0").unlink()  # joy, which the other store holds too
    for order in (two, two[::-1]):
        out = Store(tmp_path / f"{order[0].path.stem}.zarr.out")
        merged = merge(order, out)
        assert not merged.conflicts and merged.copied == {PATH: 3} and verify(out).clean
        [damaged] = merged.damaged
        assert damaged.cell["emotion"] == "joy" and damaged.stores == [str(two[0].path)]
        assert_true(out.read(PATH), "dm", "joy", [5, 2])
    code, said = run("merge", *(store.path for store in two), "-o", tmp_path / "again.zarr")
    assert code == 0 and "damaged: " in said and "emotion joy" in said


def test_a_damaged_cell_of_the_result_is_made_whole(two, tmp_path):
    out = Store(tmp_path / "out.zarr")
    merge(two, out)
    next((out.path / PATH / "norm").glob("c.*")).unlink()
    assert not verify(out).clean
    merged = merge(two, out)
    assert merged.copied == {PATH: 1} and len(merged.damaged) == 1 and verify(out).clean


def test_diff_counts_damaged_cells(two, tmp_path):
    other = Store(shutil.copytree(two[0].path, tmp_path / "other.zarr"))
    assert diff.stores(two[0], other).equal
    (other.path / PATH / "norm/c.0.1.0.0").unlink()
    difference = diff.stores(two[0], other)
    assert difference.damaged == {PATH: 1} and not difference.equal
    code, said = run("diff", two[0].path, other.path)
    assert code == 1 and f"{PATH}: 1 cells are damaged in one of them" in said


def test_two_imports_of_one_file_are_the_same(tmp_path, monkeypatch):
    np.save(tmp_path / "v.npy", np.ones((2, 96), np.float32))
    (tmp_path / "w.npy").write_bytes((tmp_path / "v.npy").read_bytes())
    stores = [Store(tmp_path / f"{name}.zarr") for name in "abc"]
    for store, file, year in zip(stores, "vwv", (2024, 2025, 2026), strict=True):
        monkeypatch.setattr(imported, "datetime", type("Then", (), {"now": lambda zone, y=year: datetime(y, 1, 1)}))
        exchange.bring_in(
            tmp_path / f"{file}.npy",
            store.path,
            model="zoo/gpt2",
            layers=[4, 2],
            rows="layers",
            method="m",
            emotion="e",
        )
    told = [store.read("imports").provenance.load().item() for store in stores]
    assert len(set(told)) == 3
    out = Store(tmp_path / "out.zarr")
    merged = merge(stores, out)
    assert not merged.conflicts and verify(out).clean
    assert out.read("imports").provenance.load().item() == told[2]  # the latest
    assert diff.stores(stores[0], stores[1]).equal
