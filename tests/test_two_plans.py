"""What a cell was computed from is what its fingerprint says, whatever others do to the store meanwhile.

Interleavings are forced: at the moment when a stage reads a finished cell, another run with other settings has just put
it again, or a disk has just lost a file of it.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from test_runner import STEER, run, write
from test_store import PATH, assert_true, commit, vectors

import nsteer
from nsteer.errors import ChangedError, DamagedError, StoreError
from nsteer.runner import judging
from nsteer.runner.runs import Run
from nsteer.store import Store
from nsteer.store.inputs import read_whole
from nsteer.store.places import Local
from nsteer.upkeep.repair import repair
from nsteer.upkeep.stored import committed_cells
from nsteer.upkeep.verify import verify

BLOCK = {**STEER[0], "layers": {"each": [3, 1]}, "strengths": [0.4], "project": True}
FOUND = {**BLOCK, "name": "found", "strengths": {"kl": [0.02], "tokens": 4}, "controls": [], "layers": [2]}
REFERENCED = {**STEER[1], "layers": {"each": [3]}}
PLAN = {"steer": [BLOCK, FOUND, REFERENCED], "measure": {"perplexity": True, "lens": 2}}
JUDGED = {"steer": [{**STEER[0], "layers": [3], "strengths": [0.4]}], "judge": "zoo/judge"}
DERIVED = ["samples", "activations", "vectors", "calibration", "generations", "unsteered"]
OWN = {"runs", "failures", "models", "programs"}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The store of the plan, run alone."""
    plan = write(tmp_path_factory.mktemp("alone"), folder("llama"), **PLAN)
    assert not run(plan).failures
    return Store(plan.with_suffix(".zarr"))


def differing(store: Store, truth: Store) -> tuple[list, int]:
    """Finished cells that hold others' values under their own fingerprint; how many were compared."""
    wrong, compared = [], 0
    for path in set(truth.groups()) - OWN:
        known = dict(committed_cells(truth, path))
        for key, cell in committed_cells(store, path):
            if key not in known or cell.record.fingerprint != known[key].record.fingerprint:
                continue
            compared += 1
            mine, theirs = cell.values(), known[key].values()
            for name in set(mine) - {"program"}:
                close = mine[name].dtype.kind != "f" or np.allclose(
                    mine[name], theirs[name], 1e-3, 1e-5, equal_nan=True
                )
                if not close or (mine[name].dtype.kind != "f" and mine[name].tolist() != theirs[name].tolist()):
                    wrong.append((path, key, name))
    return wrong, compared


def replaced(store: Store, path: str, key: tuple, number: int) -> None:
    """The cell as a run of other settings makes it: other values, another fingerprint."""
    data = read_whole(store, path, {key: number})[key]
    other = {
        name: array * 2 + 1 if array.dtype.kind == "f" else array[..., ::-1] if name == "token_id" else array
        for name, array in data.data_vars.items()
    }
    store.commit(path, key, data.assign(other), fingerprint=number + 1, partial=True)


def lost(store: Store, path: str, key: tuple, number: int) -> None:
    leaf = store.leaf(path)
    name = {
        **{"samples": "text", "activations": "pooled", "vectors": "vector", "calibration": "found"},
        **dict.fromkeys(("judged", "judged_unsteered"), "score"),
        **dict.fromkeys(("outcomes", "outcomes_unsteered"), "perplexity"),
    }
    variable = name.get(path.split("/")[0], "n_tokens")
    place = ".".join(map(str, leaf.position(key)))
    next(iter((Path(store.path) / path / variable).glob(f"c.{place}*"))).unlink()


@pytest.fixture
def at_reading(monkeypatch):
    """Has something done to the first cell of a product that a stage is about to read."""

    def arrange(product: str, doing) -> list:
        first, met = Run.inputs, []

        def watched(self, path, wanted):
            if path.split("/")[0] == product and not met and wanted:
                met.append(next(iter(wanted)))
                doing(self.store, path, met[0], wanted[met[0]])
            return first(self, path, wanted)

        monkeypatch.setattr(Run, "inputs", watched)
        return met

    return arrange


@pytest.mark.parametrize("product", DERIVED)
def test_a_cell_that_was_put_anew_by_another_plan_is_not_computed_from(
    product, alone, at_reading, folder, tmp_path, monkeypatch
):
    plan = write(tmp_path, folder("llama"), **PLAN)
    met = at_reading(product, replaced)
    summary = run(plan)
    assert met and summary.failures
    first = [failure for failure in summary.failures if "another run with other settings" in failure.reason]
    assert "transient" in (kinds := {failure.kind for failure in first}) and kinds <= {"transient", "waiting"}
    wrong, compared = differing(Store(plan.with_suffix(".zarr")), alone)
    assert not wrong and compared > 5
    monkeypatch.undo()
    assert not run(plan).failures
    wrong, compared = differing(Store(plan.with_suffix(".zarr")), alone)
    assert not wrong and compared == sum(len(alone.committed(path)) for path in set(alone.groups()) - OWN)


@pytest.mark.parametrize("product", DERIVED)
def test_a_lost_file_is_named_and_never_read_as_fill(product, alone, at_reading, folder, tmp_path, monkeypatch):
    plan = write(tmp_path, folder("llama"), **PLAN)
    at_reading(product, lost)
    summary = run(plan)
    assert any(
        "a file of it is gone" in failure.reason and "--repair" in failure.reason for failure in summary.failures
    )
    store = Store(plan.with_suffix(".zarr"))
    broken = {(finding.group, tuple(finding.cell.values())) for finding in verify(store).findings}
    assert len(broken) == 1 and {path.split("/")[0] for path, _ in broken} == {product}
    repair(store)
    assert not differing(store, alone)[0]
    monkeypatch.undo()
    assert not run(plan).failures
    assert not differing(store, alone)[0] and verify(Store(store.path)).clean


# ---- judging


@pytest.fixture(scope="module")
def judged_alone(folder, tmp_path_factory):
    plan = write(tmp_path_factory.mktemp("judged"), folder("llama"), **JUDGED)
    assert not run(plan).failures
    return Store(plan.with_suffix(".zarr"))


@pytest.mark.parametrize("product", ["generations", "unsteered"])
@pytest.mark.parametrize(("doing", "told"), [(replaced, "another run with other settings"), (lost, "a file of it is")])
def test_a_judge_reads_the_texts_that_its_fingerprint_names(
    product, doing, told, judged_alone, folder, tmp_path, monkeypatch
):
    """Only when the judge has begun: what it reads was whole, and as this plan wants it, when it was asked for."""
    plan = write(tmp_path, folder("llama"), **JUDGED)
    first, met = judging.cell_texts, []

    def watched(run, made_from, key, number, continuing):
        if made_from == product and not met:
            met.append(key)
            doing(run.store, made_from, key, number)
        return first(run, made_from, key, number, continuing)

    monkeypatch.setattr(judging, "cell_texts", watched)
    summary = run(plan)
    of = {"generations": "judged", "unsteered": "judged_unsteered"}[product]
    assert met and [(failure.stage, failure.cell) for failure in summary.failures] == [(of, (*met[0], "judge"))]
    assert told in summary.failures[0].reason
    store = Store(plan.with_suffix(".zarr"))
    assert (*met[0], "judge") not in store.committed(of)
    repair(store)
    wrong, compared = differing(store, judged_alone)
    assert not wrong and compared > 5
    monkeypatch.undo()
    assert not run(plan).failures
    wrong, compared = differing(store, judged_alone)
    assert not wrong and compared == sum(len(judged_alone.committed(path)) for path in set(judged_alone.groups()) - OWN)


# ---- the store


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    commit(store, "dm", "joy")
    return store


def test_whole_cells_come_by_their_fingerprint(store):
    cell = read_whole(store, PATH, {("dm", "joy"): 7})[("dm", "joy")]
    cube = cell.expand_dims({"method": ["dm"], "emotion": ["joy"]})
    assert_true(cube, "dm", "joy", [5, 2])
    with pytest.raises(ChangedError, match=r"dm / joy is not there any more .* another run with other settings"):
        read_whole(store, PATH, {("dm", "joy"): 8})
    with pytest.raises(ChangedError):
        read_whole(store, PATH, {("dm", "fear"): 7})


def test_other_bytes_under_a_record_are_damage(store, tmp_path):
    other = Store(tmp_path / "o.zarr")
    other.prepare([vectors()])
    other.commit(
        PATH, ("dm", "joy"), read_whole(store, PATH, {("dm", "joy"): 7})[("dm", "joy")] * 2, fingerprint=7, partial=True
    )
    file = next((Path(other.path) / PATH / "norm").glob("c.*"))
    (Path(store.path) / PATH / "norm" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DamagedError, match="does not hold what was committed"):
        read_whole(store, PATH, {("dm", "joy"): 7})


def test_two_that_commit_one_cell_come_one_after_the_other(store, monkeypatch):
    """The second comes when the first has written its data, and not yet its record."""
    first, met = Local.seal, threading.Event()
    data = {7: read_whole(store, PATH, {("dm", "joy"): 7})[("dm", "joy")]}
    data[8] = data[7] * 2
    other = threading.Thread(
        target=lambda: Store(store.path).commit(PATH, ("dm", "joy"), data[8], fingerprint=8, partial=True)
    )

    def watched(self, name, content):
        if not met.is_set():
            met.set()
            other.start()
            other.join(1)  # ends at once where nobody is kept out
        first(self, name, content)

    monkeypatch.setattr(Local, "seal", watched)
    store.commit(PATH, ("dm", "joy"), data[7], fingerprint=7, partial=True)
    other.join()
    assert Store(store.path).committed(PATH)["dm", "joy"].fingerprint == 8
    assert read_whole(store, PATH, {("dm", "joy"): 8})[("dm", "joy")].equals(data[8])
    assert verify(store).clean


# ---- the reader


def test_a_reader_is_told_of_a_lost_file(store):
    commit(store, "pca", "fear")
    next((Path(store.path) / PATH / "vector").glob("c.0.1.0*")).unlink()
    opened = nsteer.open(store.path)[PATH]
    with pytest.raises(DamagedError, match=r"dm / joy is damaged: a file of it is gone .*nsteer verify --repair"):
        opened.vector.load()
    with pytest.raises(StoreError):
        opened.vector.sel({"method": "dm", "emotion": "joy", "layer": 2}).load()
    assert_true(opened, "pca", "fear", [5, 2])
    assert np.isnan(opened.vector.sel({"method": "dm", "emotion": "fear"})).all()


def test_what_lies_there_of_a_cell_without_a_record_is_not_opened(store):
    """A power loss leaves files of no bytes: of cells that are not finished nobody reads them."""
    for place in ("0.0.0.0.0", "0.1.1.0.0"):
        (Path(store.path) / PATH / "vector" / f"c.{place}").write_bytes(b"")
    opened = nsteer.open(store.path)[PATH]
    assert_true(opened.load(), "dm", "joy", [5, 2])
    assert np.isnan(opened.vector.sel({"method": "pca"})).all()
    some = nsteer.open(store.path)[PATH].vector.sel({"emotion": ["fear", "joy"], "layer": 2})
    assert np.isnan(some.sel({"method": ["pca"]})).all()
    assert some.dims == ("model", "method", "emotion", "d_model")
    assert some.sel({"method": "dm", "emotion": "joy"}).notnull().all()
