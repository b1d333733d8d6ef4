"""Commit records kept together in one file: what is read from there is what the files of the records say."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from test_store import PATH, assert_true, commit, vectors

import nsteer
from nsteer.errors import StoreError
from nsteer.store import Store, records
from nsteer.store.places import Local
from nsteer.upkeep.verify import verify

KEPT = records.kept_file(PATH)
FOLDER = f"{PATH}/cell"


@pytest.fixture(autouse=True)
def any_is_worth(monkeypatch):
    monkeypatch.setattr(records, "WORTH", 1)


@pytest.fixture
def store(tmp_path) -> Store:
    vector_store = Store(tmp_path / "s.zarr")
    vector_store.prepare([vectors(emotions=("joy", "fear", "awe"))])
    return vector_store


def fresh(store: Store, path: str = PATH) -> list:
    """What the files say, each opened."""
    leaf = Store(store.path).leaf(path)
    return list(leaf.records(fresh=True))


def read(store: Store, path: str = PATH) -> list:
    return list(Store(store.path).leaf(path).records())


def aged(store: Store, seconds: float = 60) -> None:
    """As if everything in the folder of the records had been put so long ago."""
    folder = Path(store.path) / FOLDER
    for path in [*folder.iterdir(), folder]:
        then = path.stat().st_mtime_ns - int(seconds * 1e9)
        os.utime(path, ns=(then, then))


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """The names of the record files that are opened."""
    file_names: list[str] = []
    plain = Local.read_stamped

    def noted(self, names):
        file_names.extend(names)
        return plain(self, names)

    monkeypatch.setattr(Local, "read_stamped", noted)
    return file_names


def filled(store: Store) -> None:
    for number, (method, emotion) in enumerate([("dm", "joy"), ("pca", "awe"), ("pca", "joy")], start=1):
        commit(store, method, emotion, number=number, run=0, seconds=number / 4)


def test_a_group_that_is_as_it_was_kept_opens_no_record(store, opened):
    filled(store)
    aged(store)
    want = fresh(store)
    store.keep_records()
    opened.clear()
    assert read(store) == want and len(want) == 3 and not opened
    group = nsteer.open(store.path)[PATH]
    assert group.cell.sel({"method": "pca", "emotion": "joy", "cell_field": "seconds"}).item() == 0.75
    assert np.isnan(group.norm.sel({"method": "dm", "emotion": "awe"})).all()
    assert_true(group.load(), "pca", "awe", [5, 2])
    assert Store(store.path).missing(PATH, {("dm", "joy"): 1, ("pca", "awe"): 9, ("dm", "awe"): 1}) == [
        ("pca", "awe"),
        ("dm", "awe"),
    ]
    assert not opened and store.keep_records() is None and not opened


def test_what_changed_since_is_opened_and_nothing_else(store, opened):
    filled(store)
    aged(store)
    store.keep_records()
    commit(store, "dm", "joy", number=50)
    commit(store, "dm", "fear", number=51)
    store.drop(PATH, ("pca", "joy"))
    opened.clear()
    fingerprints = {cell: record.fingerprint for cell, record in Store(store.path).committed(PATH).items()}
    assert fingerprints == {("dm", "joy"): 50, ("dm", "fear"): 51, ("pca", "awe"): 2}
    assert len(opened) == 2 and read(store) == fresh(store)


def test_labels_that_came_since_and_were_known_to_others_before_are_read(store):
    """The file keeps all records of the folder, not only those within the axes that its writer had in mind."""
    narrow = Store(store.path)
    assert narrow.leaf(PATH)
    filled(store)
    store.prepare([vectors(emotions=["hope"], methods=["lda"])])
    commit(store, "lda", "hope", number=8)
    aged(store)
    records.keep(store.place, PATH, 2)
    leaf = Store(store.path).leaf(PATH)
    assert records.read(store.place, PATH, [2, 3]) and len(records.read(store.place, PATH, [2, 3])) == 3
    assert leaf is not None and len(leaf.records()) == 4 and read(store) == fresh(store)


def test_a_record_put_again_within_one_tick_is_not_taken_for_the_old_one(store):
    """A clock that does not move between two commits: only what was old when it was kept is believed."""
    filled(store)
    store.keep_records()
    file = Path(store.path) / FOLDER / "c.1.0.0"
    was = file.stat().st_mtime_ns
    commit(store, "dm", "joy", number=99)
    os.utime(file, ns=(was, was))
    assert Store(store.path).committed(PATH)["dm", "joy"].fingerprint == 99


def test_a_folder_that_changed_within_one_tick_is_looked_at_again(store):
    filled(store)
    folder = Path(store.path) / FOLDER
    store.keep_records()
    was = folder.stat().st_mtime_ns
    commit(store, "dm", "fear", number=99)
    os.utime(folder, ns=(was, was))
    assert read(store) == fresh(store) and len(read(store)) == 4


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "other axes", "words", "head only"])
def test_a_damaged_file_is_as_none_and_is_made_anew(store, how, opened):
    filled(store)
    aged(store)
    store.keep_records()
    file = Path(store.path) / KEPT
    content = file.read_bytes()
    broken = {
        "cut": content[:-9],
        "empty": b"",
        "flipped": content[:-20] + bytes([content[-20] ^ 1]) + content[-19:],
        "other axes": content[:8] + (3).to_bytes(8, "little") + content[16:],
        "words": b"not ours" * 30,
        "head only": content[:20],
    }
    file.write_bytes(broken[how])
    assert read(store) == fresh(store)
    store.keep_records()
    assert file.read_bytes()[records.HEAD.size :] == content[records.HEAD.size :]
    opened.clear()
    assert len(read(store)) == 3 and not opened


@pytest.mark.parametrize("keeps_times", [True, False])
def test_a_copy_of_a_store_says_what_the_store_says(store, tmp_path, keeps_times):
    filled(store)
    aged(store)
    store.keep_records()
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy, copy_function=shutil.copy2 if keeps_times else shutil.copyfile)
    assert [record[:2] for record in read(Store(copy))] == [record[:2] for record in fresh(store)]
    commit(Store(copy), "dm", "joy", number=77)
    assert Store(copy).committed(PATH)["dm", "joy"].fingerprint == 77
    assert store.committed(PATH)["dm", "joy"].fingerprint == 1


def test_verify_knows_the_file_and_does_not_believe_it(store):
    filled(store)
    aged(store)
    store.keep_records()
    report = verify(Store(store.path))
    assert report.clean or {finding.kind for finding in report.findings} == {"provenance"}  # no run was recorded
    assert not report.leftovers
    record = Path(store.path) / FOLDER / "c.1.0.0"
    content, times = record.read_bytes(), record.stat()
    record.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(record, ns=(times.st_mtime_ns, times.st_mtime_ns))
    assert "record" in {finding.kind for finding in verify(Store(store.path)).findings}


def test_a_damaged_record_is_named_and_stops_the_keeping(store):
    filled(store)
    record = Path(store.path) / FOLDER / "c.0.2.0"
    record.write_bytes(b"x" * 52)
    with pytest.raises(StoreError, match=r"c\.0\.2\.0: this commit record is damaged"):
        read(store)
    with pytest.raises(StoreError, match=r"c\.0\.2\.0: this commit record is damaged"):
        store.keep_records()
    assert not (Path(store.path) / KEPT).exists()


def test_names_that_are_no_record_are_passed_over(store):
    filled(store)
    folder = Path(store.path) / FOLDER
    for name in ("c.01.0.0", "c.0.0", "c.0.0.0.0", "c.1.1.1", "c.9999999999999999999999.0.0", "c.1.²", "x", "c.7.7.0"):
        (folder / name).write_bytes(b"x")
    assert len(read(store)) == 3
    (folder / "c.7.7.0").unlink()  # beyond the published axes it might be another process's, not yet published
    store.keep_records()
    assert len(read(store)) == 3


def test_few_records_are_not_kept_nor_opened_for_it(store, monkeypatch, opened):
    monkeypatch.setattr(records, "WORTH", 4)
    filled(store)
    store.keep_records()
    assert not (Path(store.path) / KEPT).exists() and not opened
    commit(store, "dm", "fear")
    store.keep_records()
    assert (Path(store.path) / KEPT).exists()


def test_axes_whose_product_no_integer_holds_are_read_all_the_same():
    wide = np.array([[2**30, 2**30, 2**30]])
    assert records._index(wide, wide).tolist() == [-1]
    assert records._index(np.array([[3, 1], [0, 2]]), np.array([[0, 2], [3, 3], [3, 1]])).tolist() == [1, -1, 0]


class Kept(RuleBasedStateMachine):
    """Commits, drops, growing axes, keeping and the passing of time in any order: read as the files say."""

    @initialize()
    def begin(self):
        import tempfile

        self.folder = tempfile.TemporaryDirectory(prefix="records-")
        self.store = Store(Path(self.folder.name) / "s.zarr")
        self.emotions = ["joy", "fear"]
        self.store.prepare([vectors(emotions=self.emotions)])
        self.number = 0

    @rule(method=st.sampled_from(["pca", "dm"]), choice=st.randoms(use_true_random=False))
    def commits(self, method, choice: random.Random):
        self.number += 1
        commit(self.store, method, choice.choice(self.emotions), number=self.number)

    @rule(method=st.sampled_from(["pca", "dm"]), choice=st.randoms(use_true_random=False))
    def drops(self, method, choice: random.Random):
        self.store.drop(PATH, (method, choice.choice(self.emotions)))

    @rule()
    def grows(self):
        self.emotions.append(f"e{len(self.emotions)}")
        self.store.prepare([vectors(emotions=self.emotions)])

    @rule()
    def ages(self):
        if (Path(self.store.path) / FOLDER).is_dir():
            aged(self.store)

    @rule(by_another=st.booleans())
    def keeps(self, by_another):
        (Store(self.store.path) if by_another else self.store).keep_records()

    @invariant()
    def says_what_the_files_say(self):
        if hasattr(self, "store"):
            assert read(self.store) == fresh(self.store)

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()


Kept.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
test_any_order = Kept.TestCase
