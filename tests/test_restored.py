"""Records and labels compared with each other: what was put there for other labels is no finished cell of these."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from test_store import PATH, assert_true, commit, vectors

import nsteer
from nsteer import cli
from nsteer.errors import StoreError, StoreWarning
from nsteer.store import Store
from nsteer.upkeep.repair import repair
from nsteer.upkeep.verify import verify

METHODS = ("pca", "dm")


def restored(tmp_path, newer, then) -> Store:
    """A store of two emotions, copied; `newer` goes on with it; the copy is put over that; `then` goes on with this."""
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    for method in METHODS:
        commit(store, method, "joy")
    shutil.copytree(tmp_path / "s.zarr", tmp_path / "old")
    newer(Store(tmp_path / "s.zarr"))
    shutil.copytree(tmp_path / "old", tmp_path / "s.zarr", dirs_exist_ok=True)
    store = Store(tmp_path / "s.zarr")
    then(store)
    return store


def finished(store: Store) -> list[tuple]:
    cell = nsteer.open(store.path)[PATH].cell.sel(cell_field="fingerprint")
    return [
        (m, e) for m in cell.method.values for e in cell.emotion.values if cell.sel({"method": m, "emotion": e}) >= 0
    ]


def test_an_emotion_does_not_take_over_what_stood_at_its_place(tmp_path):
    def angry(store):
        store.prepare([vectors(emotions=("joy", "fear", "angry"))])
        commit(store, "dm", "angry")

    store = restored(tmp_path, angry, lambda store: store.prepare([vectors(emotions=("joy", "fear", "calm"))]))
    assert set(store.committed(PATH)) == {("pca", "joy"), ("dm", "joy")}
    assert store.missing(PATH, {("dm", "calm"): 7, ("dm", "joy"): 7}) == [("dm", "calm")]
    assert sorted(finished(store)) == [("dm", "joy"), ("pca", "joy")]
    assert np.isnan(nsteer.open(store.path)[PATH].norm.sel({"emotion": "calm"})).all()


def test_labels_inside_a_cell_count_too(tmp_path):
    """The layer at place 2 was 7, now it is 3: the cells that were computed with 7 are not theirs any more."""

    def deeper(store):
        store.prepare([vectors(layers=(5, 2, 7))])
        commit(store, "dm", "fear", layers=(2, 5, 7))

    store = restored(tmp_path, deeper, lambda store: store.prepare([vectors(layers=(5, 2, 3))]))
    assert ("dm", "fear") not in store.committed(PATH)
    assert store.leaf(PATH).record(store.leaf(PATH).position(("dm", "fear"))) is None
    assert store.leaf(PATH).those([("dm", "fear"), ("dm", "joy")]).keys() == {("dm", "joy")}
    with pytest.warns(StoreWarning, match=f"{PATH} has 1 commit records"):
        shown = CliRunner().invoke(cli.main, ["ls", str(store.path)])
    assert shown.exit_code == 0 and "1 of other labels" in " ".join(shown.stdout.split())
    results = nsteer.open(store.path)
    with pytest.warns(StoreWarning, match=rf"{PATH} has 1 commit records of other labels .* See nsteer verify") as told:
        first, second = results[PATH], results[PATH]
    assert len(told) == 1 and np.isnan(first.cell.sel({"method": "dm", "emotion": "fear"})).all()
    assert first.identical(second)
    findings = verify(store).findings
    assert [finding.kind for finding in findings] == ["record"] and findings[0].cell == {
        "method": "dm",
        "emotion": "fear",
    }
    assert "other labels" in str(findings[0])
    repair(store)
    assert verify(store).clean
    commit(store, "dm", "fear", layers=(2, 5, 3))
    assert_true(nsteer.open(store.path)[PATH], "dm", "fear", [5, 2, 3])


def test_the_same_labels_again_are_theirs(tmp_path):
    """What fits is not thrown away: the emotion comes back at its old place."""

    def angry(store):
        store.prepare([vectors(emotions=("joy", "fear", "angry"))])
        commit(store, "dm", "angry")

    store = restored(tmp_path, angry, lambda store: store.prepare([vectors(emotions=("joy", "fear", "angry"))]))
    assert_true(nsteer.open(store.path)[PATH], "dm", "angry", [5, 2])
    assert verify(store).clean


def test_a_cell_that_grew_since_keeps_its_record(tmp_path):
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    commit(store, "dm", "joy")
    store.prepare([vectors(emotions=("awe",), layers=(7,))])
    assert ("dm", "joy") in store.committed(PATH)
    commit(store, "dm", "awe", layers=(2, 5, 7))
    assert set(Store(store.path).committed(PATH)) == {("dm", "joy"), ("dm", "awe")}
    assert verify(store).clean


def test_labels_of_another_copy_are_seen(tmp_path):
    """One file of labels is put back from another copy: every reading says so, verify too."""
    store, other = (Store(tmp_path / name) for name in ("s.zarr", "o.zarr"))
    for copy_store, emotions in ((store, ("joy", "fear")), (other, ("fear", "joy"))):
        copy_store.prepare([vectors(emotions=emotions)])
        commit(copy_store, "dm", "joy")
    file = f"{PATH}/emotion/c.0"
    shutil.copy(Path(other.path) / file, Path(store.path) / file)
    for reading in (
        lambda: Store(store.path).committed(PATH),
        lambda: nsteer.open(store.path)[PATH],
        lambda: Store(store.path).prepare([vectors(emotions=("awe",))]),
    ):
        with pytest.raises(StoreError, match="labels of 'emotion' are not those that were published"):
            reading()
    assert "labels" in {finding.kind for finding in verify(Store(store.path)).findings}
