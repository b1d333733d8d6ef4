"""Upkeep: whatever is broken by hand is named by its labels, and mending loses nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from test_store import PATH, assert_true, commit, sample_data, samples, vectors

from nsteer.cli import main
from nsteer.store import Group, Store, Variable
from nsteer.upkeep.repair import repair
from nsteer.upkeep.verify import verify

TEXT = Group("text", {"prompt": ["p", "快"]}, {"text": Variable(("prompt",), "string", "t")}, ("prompt",))
CHUNKS = "activations/zoo--llama"


def filled(path: Path) -> Store:
    """A store with runs, text, chunks, cells older than the axes' growth, and layers [5, 2] over several chunks."""
    store = Store(path)
    run = store.add_run(plan="name: x\n", environment={}, started="2026-11-23T00:00:00Z")
    store.prepare([vectors(), TEXT, samples(list("dbaec"))])
    commit(store, "dm", "joy", run=run)
    store.prepare([vectors(layers=[9, 7, 8]), samples(list("fgh"))])
    commit(store, "pca", "fear", layers=[5, 2, 9, 7, 8], run=run, number=8)
    store.commit("text", ("快",), xr.Dataset({"text": ((), "乐")}), fingerprint=1, run=run)
    store.commit(CHUNKS, ("generation", 0), sample_data(list("bad")), fingerprint=1, run=run)
    store.commit(CHUNKS, ("generation", 1), sample_data(list("cef")), fingerprint=2, run=run)
    store.finish_run(run, "2026-11-23T01:00:00Z", "complete")
    return store


@pytest.fixture
def store(tmp_path) -> Store:
    return filled(tmp_path / "s.zarr")


def run(*arguments) -> tuple[int, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def files(store: Store) -> list[Path]:
    return sorted(path for path in store.path.rglob("*") if path.is_file())


# ---- verify


def test_a_store_that_is_well_is_clean(store):
    report = verify(store)
    assert report.clean and not report.leftovers, report
    assert report.cells == 6 and report.groups == 4 and report.files == len(files(store))
    code, said = run("verify", store.path)
    assert code == 0 and "no problems (4 groups, 6 finished cells" in said
    data = json.loads(run("verify", store.path, "--json")[1])
    assert data["clean"] and data["findings"] == [] and data["cells"] == 6


def test_cells_are_read_as_many_at_once_as_memory_holds(store, monkeypatch):
    from nsteer.upkeep import whole

    leaf = store.leaf(CHUNKS)
    assert whole.together(leaf) == whole.BATCH  # small cells
    at_once, first = [], whole._look_at
    monkeypatch.setattr(whole, "_look_at", lambda *given: at_once.append(len(given[-1])) or first(*given))
    monkeypatch.setattr(whole, "ROOM", 1)
    assert run("verify", store.path)[0] == 0
    assert set(at_once) == {1}


def test_a_removed_chunk_is_found_and_one_that_never_was_is_not_missed(store):
    """The cell (dm, joy) was committed before layers 9, 7, 8 came in: it has no chunk for them."""
    assert not (store.path / PATH / "vector/c.0.1.0.1.0").exists()
    (store.path / PATH / "vector/c.0.0.1.1.0").unlink()
    assert np.isnan(store.read(PATH).vector.sel({"method": "pca", "emotion": "fear"})).any()  # reads as fill
    [finding] = verify(store).findings
    assert (finding.kind, finding.group, finding.variable) == ("missing", PATH, "vector")
    assert finding.cell == {"method": "pca", "emotion": "fear"} and finding.within == {"layer": [9, 7]}
    code, said = run("verify", store.path)
    assert code == 1 and "method pca, emotion fear · vector · layer 9–7: the file is gone" in said


def test_all_fill_cells_have_their_files_and_are_missed_without(store):
    nothing = xr.Dataset({"text": ((), "")})
    store.commit("text", ("p",), nothing, fingerprint=3)
    assert verify(store).clean
    (store.path / "text/text/c.0").unlink()
    assert [(finding.kind, finding.cell) for finding in verify(store).findings] == [("missing", {"prompt": "p"})]


def test_a_damaged_chunk_an_old_one_and_a_foreign_one_are_told(store):
    chunk, other = store.path / PATH / "norm/c.0.1.0.0", store.path / PATH / "norm/c.0.0.1.0"
    right = chunk.read_bytes()
    chunk.write_bytes(right[:3] + bytes([right[3] ^ 1]) + right[4:])
    [finding] = verify(store).findings
    assert (
        finding.kind == "damaged" and finding.cell == {"method": "dm", "emotion": "joy"} and "checksum" in finding.what
    )
    chunk.write_bytes(other.read_bytes())  # a right checksum over wrong values: only the content tells
    [finding] = verify(store).findings
    assert finding.kind == "content" and finding.cell == {"method": "dm", "emotion": "joy"}
    chunk.write_bytes(right)
    assert verify(store).clean


def test_repair_drops_the_broken_cell_and_nothing_else(store):
    (store.path / PATH / "vector/c.0.0.1.1.0").unlink()
    (store.path / "text/text/c.1").write_bytes(b"")
    (store.path / CHUNKS / "cell/c.0.1.0").write_bytes(b"short")
    before = {path: dict(store.committed(path)) for path in (PATH, "runs")}
    code, said = run("verify", store.path, "--repair")
    assert code == 0 and said.count("the next run computes this cell again") == 3
    after = Store(store.path)
    assert after.missing(PATH, {("dm", "joy"): 7, ("pca", "fear"): 8}) == [("pca", "fear")]
    assert after.committed(PATH) == {("dm", "joy"): before[PATH]["dm", "joy"]}
    assert after.committed("text") == {} and list(after.committed(CHUNKS)) == [("generation", 0)]
    assert after.committed("runs") == before["runs"]
    assert_true(after.read(PATH), "dm", "joy", [5, 2])
    commit(after, "pca", "fear", layers=[5, 2, 9, 7, 8], number=8)
    assert verify(after).clean


@pytest.mark.parametrize("file", ["zarr.json", f"{PATH}/zarr.json", f"{PATH}/norm/zarr.json", "vectors/zarr.json"])
@pytest.mark.parametrize("harm", ["gone", "cut", "foreign"])
def test_lost_metadata_are_named_and_put_back(store, file, harm):
    path = store.path / file
    right = json.loads(path.read_text())
    if harm == "gone":
        path.unlink()
    else:
        path.write_text(path.read_text()[:50] if harm == "cut" else "[]")
    findings = verify(Store(store.path)).findings
    assert (
        findings
        and {finding.kind for finding in findings} == {"metadata"}
        and any(file in str(finding) for finding in findings)
    )
    report = repair(Store(store.path))
    assert report.clean and report.repaired, report
    mended = json.loads(path.read_text())
    assert file == "zarr.json" or mended == right
    assert (
        mended["consolidated_metadata"] == right["consolidated_metadata"] if "consolidated_metadata" in right else True
    )
    assert len(Store(store.path).committed(PATH)) == 2
    assert_true(xr.open_zarr(store.path, group=PATH), "pca", "fear", [5, 2, 9, 7, 8])


def test_labels_that_can_not_be_read_cost_their_group_alone(store):
    (store.path / PATH / "emotion/c.0").write_bytes(b"")
    findings = verify(store).findings
    assert [(finding.kind, finding.group, finding.variable) for finding in findings] == [("labels", PATH, "emotion")]
    report = repair(store)
    assert report.clean and any("its labels can not be read" in line for line in report.repaired)
    assert PATH not in store.groups() and len(store.committed(CHUNKS)) == 2
    store.prepare([vectors()])
    commit(store, "dm", "joy")
    assert verify(store).clean


def test_an_auxiliary_array_is_written_again_by_the_next_prepare(store):
    (store.path / PATH / "depth/c.0").unlink()
    assert [finding.kind for finding in verify(store).findings] == ["auxiliary"]
    assert repair(store).clean and len(store.committed(PATH)) == 2
    store.prepare([vectors()])
    assert store.read(PATH).depth.sel(layer=5).item() == 5 / 8


def test_a_run_whose_record_is_lost_is_kept_as_far_as_it_can_be_read(store):
    (store.path / "runs/cell/c.0.0").unlink()
    (store.path / "runs/environment/c.0").write_bytes(b"")
    findings = verify(store).findings
    assert {finding.kind for finding in findings} == {"provenance"} and len(findings) == 5
    report = repair(store)
    assert report.clean and report.repaired == ["run 0: kept; environment could not be read"]
    runs = store.read("runs").load()
    assert (runs.plan.item(), runs.status.item(), runs.environment.item()) == ("name: x\n", "complete", "")
    assert {record.run for record in store.committed(PATH).values()} == {0}


def test_a_cell_whose_run_is_wholly_lost_keeps_its_data(store):
    for file in (store.path / "runs").rglob("c.0*"):
        if file.parent.name not in ("run", "cell_field"):
            file.unlink()
    assert repair(store).clean
    assert {record.run for record in store.committed(PATH).values()} == {-1}
    assert_true(store.read(PATH), "dm", "joy", [5, 2])


def test_leftovers_are_told_and_harmless(store):
    (store.path / PATH / "vector/c.0.0.0.0.0.abc.partial").write_bytes(b"x" * 10)
    store.drop(PATH, ("dm", "joy"))
    (store.path / "notes.txt").write_text("mine")
    report = verify(store)
    assert report.clean
    kinds = [leftover.kind for leftover in report.leftovers]
    assert kinds.count("temporary") == 1 and kinds.count("orphan") == 2 and kinds.count("unknown") == 1
    code, said = run("verify", store.path)
    assert code == 0 and "a write that was killed" in said and "not nsteer's; left alone" in said


def test_there_must_be_a_store(tmp_path):
    code, said = run("verify", tmp_path / "none.zarr")
    assert code == 1 and "no store at" in said
    (tmp_path / "file.zarr").write_text("x")
    for command in ("verify", "ls"):
        code, said = run(command, tmp_path / "file.zarr")
        assert code == 1 and "not an nsteer store" in said
