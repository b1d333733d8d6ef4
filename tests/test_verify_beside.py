"""verify and repair: one unreadable file ends nothing, writers beside make no findings, and a killed repair goes on."""

from __future__ import annotations

import os
import shutil

import pytest
from test_store import PATH, commit, vectors
from test_upkeep import CHUNKS, filled

from nsteer.store import Store
from nsteer.store.places import Local
from nsteer.upkeep import whole
from nsteer.upkeep.repair import repair
from nsteer.upkeep.verify import verify


@pytest.fixture
def store(tmp_path) -> Store:
    return filled(tmp_path / "s.zarr")


def test_what_is_no_plain_file_is_a_finding_and_the_rest_is_read(store):
    pipe, other = store.path / PATH / "norm/c.0.1.0.0", store.path / CHUNKS / "cell/c.0.0.0"
    pipe.unlink()
    os.mkfifo(pipe)  # whoever opens it to read waits for ever
    other.unlink()
    other.symlink_to("/dev/zero")
    findings = verify(store).findings
    assert {(finding.group, finding.kind) for finding in findings} == {(PATH, "damaged"), (CHUNKS, "record")}
    assert all("not a regular file" in finding.what for finding in findings)
    report = repair(store)
    assert report.clean and len(report.repaired) == 2


def test_what_the_system_refuses_is_told_and_left_alone(store, monkeypatch):
    stamped = Local.read_stamped

    def refused(self, names):
        if any(name.endswith("norm/c.0.1.0.0") for name in names):
            from nsteer.errors import StoreError

            raise StoreError("norm/c.0.1.0.0 can not be read: Input/output error")
        return stamped(self, names)

    monkeypatch.setattr(Local, "read_stamped", refused)
    before = len(store.committed(PATH))
    report = repair(store)
    assert [finding.kind for finding in report.findings] == ["unreadable"] and not report.repaired
    monkeypatch.undo()
    assert verify(store).clean and len(store.committed(PATH)) == before


def test_a_run_that_begins_while_verify_looks_is_no_finding(store, monkeypatch):
    look, begun = whole.look, []

    def beside(leaf, told=lambda cells: None):
        if leaf.path == PATH and not begun:
            writer = Store(store.path)
            begun.append(writer.add_run(plan="", environment={}, started="2026-11-28T00:00:00Z"))
            writer.prepare([vectors(emotions=["awe"])])
            commit(writer, "dm", "joy", layers=[5, 2, 9, 7, 8], run=begun[0])
        return look(leaf, told)

    monkeypatch.setattr(whole, "look", beside)
    assert verify(store).clean and begun


def test_a_cell_that_is_computed_anew_as_repair_drops_it_stays(store, monkeypatch):
    (store.path / PATH / "norm/c.0.1.0.0").unlink()
    committing, again = Local.committing, []

    def beside(self, group):
        if group == PATH and not again:
            again.append(True)
            commit(Store(store.path), "dm", "joy", layers=[5, 2, 9, 7, 8])
        return committing(self, group)

    monkeypatch.setattr(Local, "committing", beside)
    report = repair(store)
    assert again and report.clean and not report.repaired and ("dm", "joy") in store.committed(PATH)


def test_a_repair_killed_anywhere_and_run_again_ends_as_one_pass(store, tmp_path, monkeypatch):
    for name in ("zarr.json", f"{PATH}/zarr.json", f"{PATH}/norm/zarr.json", f"{CHUNKS}/cell/c.0.0.0"):
        (store.path / name).write_bytes(b"{")
    (store.path / PATH / "norm/c.0.1.0.0").unlink()
    (store.path / "runs/plan/c.0").write_bytes(b"")
    alone = Store(shutil.copytree(store.path, tmp_path / "alone.zarr"))
    assert repair(alone).clean  # in one pass
    write, delete, steps = Local.write, Local.delete, 0

    def counted(act):
        def dying(self, *given, **more):
            nonlocal steps
            steps -= 1
            if steps < 0:
                raise KeyboardInterrupt
            return act(self, *given, **more)

        return dying

    whole_ = {path: sorted(alone.committed(path)) for path in Store(alone.path).groups()}
    for at in range(10):
        copy, steps = Store(shutil.copytree(store.path, tmp_path / f"{at}.zarr")), at
        with monkeypatch.context() as patched:
            patched.setattr(Local, "write", counted(write))
            patched.setattr(Local, "delete", counted(delete))
            try:
                repair(copy)
                break  # it has no more steps
            except KeyboardInterrupt:
                pass
        assert repair(Store(copy.path)).clean
        assert {path: sorted(Store(copy.path).committed(path)) for path in Store(copy.path).groups()} == whole_
    assert at > 3
