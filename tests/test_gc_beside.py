"""gc beside whatever commits: what came in since it looked stays, and what it removes was unwanted as it went."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from nsteer.models import facts as models
from nsteer.plan import check
from nsteer.plan.schema import Model
from nsteer.stages import arrays, cells
from nsteer.stages.job import Job
from nsteer.stages.products import product_of
from nsteer.store import Store, records
from nsteer.store.leases import Leases
from nsteer.store.places import Local
from nsteer.upkeep import gc
from nsteer.upkeep.collect import collect
from nsteer.upkeep.merge import merge
from nsteer.upkeep.verify import verify
from nsteer.vectors import exchange

PLAN = {
    "name": "beside",
    "models": ["zoo/llama"],
    "texts": "zoo",
    "emotions": ["happy", "sad"],
    "methods": {"read": {"source": "comprehension", "samples": 2, "pooling": "mean"}},
    "steer": {
        "vectors": {"emotions": ["happy", "sad"]},
        "layers": [4, 2],
        "strengths": [0.1, 0.2],
        "controls": [],
        "prompts": {"walk": "tom ran to the"},
        "generate": {"max_new_tokens": 4},
    },
    "threads": 1,
}
CUBES = ("generations", "steering")


def study(folder: Path, name: str = "plan", new: int = 4) -> check.Study:
    plan = {**PLAN, "store": str(folder / "s.zarr")}
    plan["steer"] = {**PLAN["steer"], "generate": {"max_new_tokens": new}}
    (folder / f"{name}.yaml").write_text(json.dumps(plan))
    return check.load(folder / f"{name}.yaml")


def fill(store: Store, checked_study: check.Study, groups=CUBES, keys=None) -> dict[tuple, int]:
    """Commits cells as a run of the study would, but for what stands in them."""
    wanted = cells.steering(Job(checked_study, checked_study.facts[0]))
    for path in groups:
        for key in wanted if keys is None else keys:
            store.commit(path, key, xr.Dataset(), fingerprint=wanted[key], partial=True)
    return wanted


@pytest.fixture(scope="module")
def studies(tmp_path_factory) -> tuple[check.Study, check.Study]:
    """The plan as it was, and as it is now."""
    folder = tmp_path_factory.mktemp("plans")
    return study(folder), study(folder, "later", new=5)


@pytest.fixture
def store(tmp_path, studies) -> Store:
    """Filled by the plan as it was."""
    store = Store(tmp_path / "s.zarr")
    store.prepare(arrays.groups(studies[0]))
    fill(store, studies[0])
    return store


def whole(store: Store, wanted: dict[tuple, int]) -> None:
    """Every wanted cell is there, and every file of it."""
    assert wanted and all(not Store(store.path).missing(path, wanted) for path in CUBES)
    report = verify(Store(store.path))
    assert report.clean, report.findings


def test_cells_that_a_run_commits_after_the_look_stay(store, studies):
    later = studies[1]
    gc_plan = gc.plan(store, [later])
    planned = len(gc_plan.cells)
    assert planned == 2 * 4
    some = list(cells.steering(Job(later, later.facts[0])))[:3]
    wanted = fill(Store(store.path), later, keys=some)
    collect(store, gc_plan)
    assert (gc_plan.spared, len(gc_plan.cells)) == (2 * 3, 2)
    whole(store, {key: wanted[key] for key in some})
    fill(Store(store.path), later)
    whole(store, wanted)


def test_a_commit_waits_while_its_cell_is_removed(store, studies, monkeypatch):
    later, delete, threads = studies[1], Local.delete, []
    gc_plan = gc.plan(store, [later])
    wanted = cells.steering(Job(later, later.facts[0]))

    def beside(self, name):
        if "/text/" in name and not threads:  # the record is gone, the files are going: the moment that lost cells
            threads.append(threading.Thread(target=fill, args=(Store(store.path), later)))
            threads[0].start()
            threads[0].join(0.3)
            assert threads[0].is_alive() and len(Store(store.path).missing("generations", wanted)) == len(wanted)
        return delete(self, name)

    monkeypatch.setattr(Local, "delete", beside)
    collect(store, gc_plan)
    threads[0].join()
    whole(store, wanted)


def test_a_commit_between_two_groups_of_removals_is_looked_at_again(store, studies, monkeypatch):
    later, first = studies[1], True
    gc_plan, changing = gc.plan(store, [later]), Store.changing
    monkeypatch.setattr("nsteer.upkeep.collect.BATCH", 3)
    wanted = {}

    def between(self, doing):
        nonlocal first
        if doing == "collect" and not first and not wanted:
            wanted.update(fill(Store(store.path), later))
        first = False
        return changing(self, doing)

    monkeypatch.setattr(Store, "changing", between)
    collect(store, gc_plan)
    assert len(gc_plan.cells) == 3 and gc_plan.spared >= 5
    whole(store, wanted)


def test_what_a_living_run_prepared_and_explained_stays_until_it_ended(store, studies):
    data = arrays.settings_data(studies[0], studies[0].plan.steer[0])
    store.commit("ops", (store.leaf("ops").labels["op"][0],), data, fingerprint=1, partial=True)
    other = {**PLAN, "store": str(store.path), "steer": {**PLAN["steer"], "name": "other"}}
    file = store.path.parent / "other.yaml"
    file.write_text(json.dumps(other))
    plan = [check.load(file)]
    run = Leases(store.path)
    run.open()
    gc_plan = gc.plan(store, plan, older=0)
    assert {cell.group for cell in gc_plan.cells} == {*CUBES, "ops"}
    collect(store, gc_plan)
    assert {cell.group for cell in gc_plan.cells} == set(CUBES) and gc_plan.waiting >= 1
    assert store.committed("ops") and set(CUBES) <= set(Store(store.path).groups())
    run.close()
    gc_plan = gc.plan(store, plan, older=0)
    collect(store, gc_plan)
    assert not gc_plan.waiting and not Store(store.path).committed("ops")


def test_leftovers_that_a_commit_has_taken_since_stay(store, studies):
    cell = next(iter(cells.steering(Job(studies[0], studies[0].facts[0]))))
    store.drop("generations", cell)  # what is left of a commit that was killed
    gc_plan = gc.plan(store, [studies[0]], older=0)
    assert gc_plan.leftovers and {leftover.kind for leftover in gc_plan.leftovers} == {"orphan"}
    fill(Store(store.path), studies[0], ["generations"], [cell])
    collect(store, gc_plan)
    assert not gc_plan.leftovers and gc_plan.spared
    whole(store, cells.steering(Job(studies[0], studies[0].facts[0])))


def test_a_run_that_came_and_went_since_the_look_keeps_the_programs(store, studies):
    store.prepare([arrays.programs_group(["abc"])])
    data = xr.Dataset({"source": ((), "x"), "stage": ((), "y")})
    store.commit("programs", ("abc",), data, fingerprint=0, run=5)
    gc_plan = gc.plan(store, [studies[0]], older=0)
    assert [cell.group for cell in gc_plan.cells] == ["programs"]
    Store(store.path).add_run(plan="", environment={}, started="2026-11-28T00:00:00Z")  # its cells may name the program
    collect(store, gc_plan)
    assert gc_plan.waiting == 1 and store.committed("programs")


def test_two_collections_at_once_remove_what_one_would(store, studies, tmp_path):
    alone = Store(shutil.copytree(store.path, tmp_path / "alone.zarr"))
    collect(alone, gc.plan(alone, [studies[1]], older=0))
    plans = [gc.plan(Store(store.path), [studies[1]], older=0) for _ in range(2)]
    threads = [threading.Thread(target=collect, args=(Store(store.path), plan)) for plan in plans]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    left = [sorted(name for name, _ in Store(path).place.walk()) for path in (store.path, alone.path)]
    assert left[0] == left[1] and verify(Store(store.path)).clean
    assert sum(len(plan.cells) for plan in plans) == 8


def test_a_run_that_was_killed_holds_up_nobody(store, studies):
    gc_plan = gc.plan(store, [studies[1]], older=0)
    run = Leases(store.path)
    run.open()
    run._own.release()  # what the system does when it dies
    collect(store, gc_plan)
    assert len(gc_plan.cells) == 8 and not gc_plan.waiting


def collecting(monkeypatch, path, plans) -> list[gc.Plan]:
    """Has a whole gc come in right before the first cell of results of whoever else commits."""
    commit, gc_plans = Store.commit, []

    def between(self, group, *given, **more):
        if not gc_plans and product_of(group).wanted:
            gc_plans.append(gc.plan(Store(path), plans, older=0))
            gc_plans[0].young = len(gc_plans[0].groups)
            collect(Store(path), gc_plans[0])
        return commit(self, group, *given, **more)

    monkeypatch.setattr(Store, "commit", between)
    return gc_plans


def foreign(folder: Path) -> check.Study:
    """A plan that wants nothing of this store."""
    plan = {**PLAN, "models": ["zoo/gpt2"], "store": str(folder / "s.zarr")}
    (folder / "foreign.yaml").write_text(json.dumps({key: value for key, value in plan.items() if key != "steer"}))
    return check.load(folder / "foreign.yaml")


def test_groups_that_a_merge_has_just_prepared_stay(store, studies, tmp_path, monkeypatch):
    out = Store(tmp_path / "out.zarr")
    gc_plans = collecting(monkeypatch, out.path, [foreign(tmp_path)])
    merged = merge([store], out)
    assert not merged.conflicts and sum(merged.copied.values()) >= 8
    assert gc_plans[0].young and gc_plans[0].waiting and not gc_plans[0].groups
    monkeypatch.undo()
    whole(out, cells.steering(Job(studies[0], studies[0].facts[0])))
    assert not Leases(out.path).folder.exists()


def test_groups_that_an_import_has_just_prepared_stay(tmp_path, monkeypatch):
    np.save(tmp_path / "v.npy", np.ones((2, models.facts(Model(id="zoo/llama")).d_model), np.float32))
    store = Store(tmp_path / "s.zarr")
    gc_plans = collecting(monkeypatch, store.path, [foreign(tmp_path)])
    exchange.bring_in(
        tmp_path / "v.npy", store.path, model="zoo/llama", layers=[4, 2], rows="layers", method="m", emotion="e"
    )
    monkeypatch.undo()
    assert gc_plans[0].young and gc_plans[0].waiting and not gc_plans[0].groups
    assert set(store.committed("vectors/zoo--llama")) == {("zoo/llama", "m", "e")} == set(store.committed("imports"))
    assert verify(Store(store.path)).clean and not Leases(store.path).folder.exists()


def test_a_chunk_that_was_seen_while_its_cell_was_committed_stays(store, studies, monkeypatch):
    """Whatever adds: its chunks lie there before its record does, and are as they were when gc removes leftovers."""
    later, seal, gc_plans = studies[1], Local.seal, []

    def between(self, name, content):
        if not gc_plans:
            gc_plans.append(gc.plan(Store(store.path), list(studies), older=0))
        return seal(self, name, content)

    monkeypatch.setattr(Local, "seal", between)
    wanted = fill(Store(store.path), later)
    monkeypatch.undo()
    assert {leftover.kind for leftover in gc_plans[0].leftovers} == {"orphan"}
    collect(store, gc_plans[0])
    assert gc_plans[0].spared and not gc_plans[0].leftovers
    whole(store, wanted)


def test_records_are_kept_together_beside_gc(store, studies, monkeypatch):
    """A run that ends keeps the records of large groups in one file, of which gc takes some in that moment."""
    monkeypatch.setattr(records, "WORTH", 2)
    later, write = studies[1], Local.write
    some = list(cells.steering(Job(later, later.facts[0])))[:3]
    wanted = fill(store, later, keys=some)
    gc_plan = gc.plan(store, [later])

    def between(self, name, content, over=None):
        if name.endswith(f"/{records.KEPT}") and not gc_plan.deleted:
            collect(Store(store.path), gc_plan)
        return write(self, name, content, over)

    monkeypatch.setattr(Local, "write", between)
    store.keep_records()
    assert gc_plan.deleted and len(gc_plan.cells) == 2
    for path in CUBES:
        assert set(Store(store.path).committed(path)) == set(some)
    store.keep_records()
    assert set(Store(store.path).committed("steering")) == set(some)
    whole(store, {key: wanted[key] for key in some})
