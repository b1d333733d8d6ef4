"""What a cell was computed from is what its fingerprint says, whatever others do to the store meanwhile.

Interleavings are forced: at the moment when a stage reads a finished cell, another run with other settings has just put
it again, or a disk has just lost a file of it.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from test_runner import METHODS, STEER, run, write
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

FEW = {
    "emotions": ["joy", "fear"],
    "methods": {"made": {**METHODS["made"], "generate": {"max_new_tokens": 3}}, "read": METHODS["read"]},
}
SHORT = {"controls": ["zero"], "generate": {"max_new_tokens": 3}}
BLOCK = {**STEER[0], **SHORT, "layers": {"each": [3, 1]}, "strengths": [0.4], "project": True}
FOUND = {**BLOCK, "name": "found", "strengths": {"kl": [0.02], "tokens": 4}, "controls": [], "layers": [2]}
REFERENCED = {**STEER[1], "vectors": {**STEER[1]["vectors"], "emotions": ["fear"]}, "layers": {"each": [3]}}
PLAN = {**FEW, "steer": [BLOCK, FOUND, REFERENCED], "measure": {"perplexity": True, "lens": 2}}
JUDGED = {**FEW, "steer": [{**STEER[0], **SHORT, "layers": [3], "strengths": [0.4]}], "judge": "zoo/judge"}
STAGES = [
    *(("samples",), ("activations",), ("vectors",), ("calibration",)),
    *(("generations", "steering", "projections"), ("unsteered", "projections_unsteered")),
]
"""Products that are finished together, none of which rests on a later one; what is not named comes after all."""
OWN = {"runs", "failures", "models", "programs"}


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """The store of the plan, run alone."""
    plan = write(tmp_path_factory.mktemp("alone"), folder("llama"), **PLAN)
    assert not run(plan).failures
    return Store(plan.with_suffix(".zarr"))


def up_to(product: str) -> list[str]:
    """A product and those that come before it."""
    last = next(at for at, stage in enumerate(STAGES) if product in stage)
    return [name for stage in STAGES[: last + 1] for name in stage]


def stopped_after(store: Store, place: Path, kept: list[str]) -> Store:
    """A copy of a store in which these products alone are finished."""
    copy = Store(shutil.copytree(store.path, place))
    for path in set(copy.groups()) - OWN - {"methods", "ops"}:
        for key in [] if path.split("/")[0] in kept else copy.committed(path):
            copy.drop(path, key)
    return copy


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
    """Has something done to each of the first cells of a product when a stage is about to read it."""

    def arrange(product: str, harms) -> list:
        first, met = Run.inputs, []

        def watched(self, path, wanted):
            for key in wanted if path.split("/")[0] == product else ():
                if len(met) < len(harms) and (path, key) not in met:
                    met.append((path, key))
                    harms[len(met) - 1](self.store, path, key, wanted[key])
            return first(self, path, wanted)

        monkeypatch.setattr(Run, "inputs", watched)
        return met

    return arrange


TOLD = {
    replaced: "{} is not there any more as this plan wants it: another run with other settings",
    lost: "{} is damaged: a file of it is gone",
}
BOTH = ("samples", "activations", "vectors", "calibration", "generations")
HARMED = [*((product, (replaced, lost)) for product in BOTH), ("unsteered", (replaced,)), ("unsteered", (lost,))]
"""One cell is put again by another plan, the next one loses a file; of `unsteered` there is one cell."""


@pytest.mark.parametrize(("product", "harms"), HARMED)
def test_what_others_replaced_or_a_disk_lost_is_named_and_not_computed_from(
    product, harms, alone, at_reading, folder, tmp_path, monkeypatch
):
    plan = write(tmp_path, folder("llama"), **PLAN)
    stopped_after(alone, plan.with_suffix(".zarr"), up_to(product))
    met = at_reading(product, harms)
    summary = run(plan)
    assert len(met) == len(harms)
    for (_, key), harm in zip(met, harms, strict=True):
        words = TOLD[harm].format(" / ".join(map(str, key)))
        kinds = {failure.kind for failure in summary.failures if words in failure.reason}
        assert kinds if harm is lost else "transient" in kinds and kinds <= {"transient", "waiting"}
        assert harm is replaced or any("--repair" in f.reason for f in summary.failures if words in f.reason)
    store = Store(plan.with_suffix(".zarr"))
    broken = {(finding.group, tuple(finding.cell.values())) for finding in verify(store).findings}
    assert broken == {cell for cell, harm in zip(met, harms, strict=True) if harm is lost}
    repair(store)
    wrong, compared = differing(store, alone)
    assert not wrong and compared > 3
    monkeypatch.undo()
    assert not run(plan).failures
    wrong, compared = differing(store, alone)
    assert not wrong and compared == sum(len(alone.committed(path)) for path in set(alone.groups()) - OWN)
    assert verify(Store(store.path)).clean


# ---- judging


@pytest.fixture(scope="module")
def judged_alone(folder, tmp_path_factory):
    plan = write(tmp_path_factory.mktemp("judged"), folder("llama"), **JUDGED)
    assert not run(plan).failures
    return Store(plan.with_suffix(".zarr"))


@pytest.mark.parametrize(
    "harms",
    [{"generations": [replaced, lost], "unsteered": [replaced]}, {"generations": [], "unsteered": [lost]}],
    ids=["generations", "unsteered"],
)
def test_a_judge_reads_the_texts_that_its_fingerprint_names(harms, judged_alone, folder, tmp_path, monkeypatch):
    """Only when the judge has begun: what it reads was whole, and as this plan wants it, when it was asked for."""
    plan = write(tmp_path, folder("llama"), **JUDGED)
    store = stopped_after(judged_alone, plan.with_suffix(".zarr"), up_to("unsteered"))
    first, met = judging.cell_texts, {}
    left = {product: list(some) for product, some in harms.items()}

    def watched(run, made_from, key, number, continuing):
        if left[made_from] and (made_from, key) not in met:
            met[made_from, key] = left[made_from].pop(0)
            met[made_from, key](run.store, made_from, key, number)
        return first(run, made_from, key, number, continuing)

    monkeypatch.setattr(judging, "cell_texts", watched)
    summary = run(plan)
    of = {"generations": "judged", "unsteered": "judged_unsteered"}
    told = {(failure.stage, failure.cell): failure.reason for failure in summary.failures}
    assert not any(left.values()) and len(told) == len(summary.failures)
    assert set(told) == {(of[product], (*key, "judge")) for product, key in met}
    for (product, key), harm in met.items():
        assert TOLD[harm].format(" / ".join(map(str, key))) in told[of[product], (*key, "judge")]
        assert (*key, "judge") not in store.committed(of[product])
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
