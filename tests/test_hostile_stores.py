"""A store that a stranger filled runs nothing, takes no memory, and is refused in one line of ours."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import xarray as xr
import zstandard
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.errors import RoomError, StoreError
from nsteer.store import Store, room
from nsteer.store.group import Group, Variable
from nsteer.store.regular import MAX_UNPACKED, bounded
from nsteer.upkeep.verify import verify


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "x.zarr")
    coords = {"emotion": ["joy", "fear"], "layer": [5, 2]}
    store.prepare([Group("scores", coords, {"auc": Variable(("emotion", "layer"), "float32", "auc")}, ("emotion",))])
    for emotion in coords["emotion"]:
        data = xr.Dataset({"auc": ("layer", np.float32([1, 2]))}, {"layer": [5, 2]})
        store.commit("scores", (emotion,), data, fingerprint=1)
    return tmp_path / "x.zarr"


def put(store, name, change):
    """Changes an array's document wherever it is published."""
    for file, key in (("zarr.json", f"scores/{name}"), ("scores/zarr.json", name)):
        document = json.loads((store / file).read_text())
        members = document["consolidated_metadata"]["metadata"]
        members[key] = {**members[key], **change}
        (store / file).write_text(json.dumps(document))


PICKLE = {"zarr_format": 2, "filters": [{"id": "vlen-utf8"}, {"id": "pickle"}], "dtype": "|O", "chunks": [2]}
CHANGES = {
    "zarr 2 with a pickle": PICKLE,
    "zarr 2": {"zarr_format": 2},
    "a foreign codec": {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]},
    "a foreign type": {"data_type": "object"},
    "storage transformers": {"storage_transformers": [{"name": "x"}]},
    "a huge shape": {"shape": [2**31 - 1]},
    "no sizes": {"shape": ["many"]},
    "a huge chunk": {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2**31]}}},
    "another grid": {"chunk_grid": {"name": "rectilinear"}},
    "no dimensions": {"dimension_names": None},
    "a fill of another kind": {"fill_value": [1]},
    "attributes that are none": {"attributes": 3},
    "another node": {"node_type": "reference"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_document_that_is_not_ours_never_reaches_zarr(store, tmp_path, name):
    put(store, "emotion", CHANGES[name])
    for file in ("0", "c.0"):
        (store / "scores" / "emotion" / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(StoreError, match="damaged"):
        nsteer.open(store)["scores"].load()
    done = CliRunner().invoke(cli.main, ["ls", str(store)])
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit) and len(done.output.splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
@pytest.mark.parametrize("file", ["scores/zarr.json", "scores/emotion/c.0", "scores/cell/c.0.0", "scores/auc/c.0.0"])
def test_what_is_no_file_is_not_read(store, file, what):
    (store / file).unlink()
    if what == "pipe":
        os.mkfifo(store / file)
    elif what == "device":
        (store / file).symlink_to("/dev/zero")
    else:
        (store / file).mkdir()
    if what != "folder":
        with pytest.raises(StoreError):
            nsteer.open(store)["scores"].load()


def test_a_chunk_that_unpacks_into_more_than_it_may_is_not_unpacked():
    bomb = zstandard.ZstdCompressor().compress(bytes(MAX_UNPACKED + 1))
    with pytest.raises(ValueError, match="too large"):
        bounded(bomb[:32], len(bomb))


def test_many_small_axes_that_multiply_take_no_memory(tmp_path, monkeypatch):
    """Every label is there; the values would be 6 TiB."""
    monkeypatch.setattr(room, "MAX_FILES", 10**9)
    dims = ("emotion", "prompt", "seed", "layer")
    coords = {"emotion": ["joy", "fear"], "prompt": [f"p{k}" for k in range(9000)]}
    coords |= {"seed": list(range(9000)), "layer": list(range(9000))}
    wide_store = Store(tmp_path / "wide.zarr")
    variable = Variable(dims, "float32", "auc")
    wide_store.prepare([Group("scores", {**coords, "seed": [0], "layer": [0]}, {"auc": variable}, ("emotion",))])
    wide_store.prepare([Group("scores", coords, {"auc": variable}, ("emotion",))])
    scores = nsteer.open(tmp_path / "wide.zarr")["scores"]
    with pytest.raises(
        RoomError, match=r"scores/auc: .* GiB are asked for, more than 64 times what its files can hold"
    ):
        scores.load()
    assert np.isnan(scores.auc.sel({"emotion": "joy", "seed": 3, "layer": 5})).all()
    assert verify(wide_store).clean


SEEDED = {"text": Variable(("emotion", "seed"), "string", "text"), "n": Variable(("emotion", "seed"), "int32", "n")}


def seeded(count):
    return Group("texts", {"emotion": ["joy", "fear"], "seed": list(range(count))}, SEEDED, ("emotion",))


def test_a_cell_of_very_many_files_is_refused_before_one_is_written(tmp_path):
    """A group that was begun with one seed has a file a seed: a store may declare millions of them, all in order."""
    store = Store(tmp_path / "seeds.zarr")
    store.prepare([seeded(1)])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RoomError, match=r"a cell of 'texts' would be 8,194 files, most of them of 'text'"):
        store.prepare([seeded(4097)])
    assert sorted(tmp_path.rglob("*")) == before
    store.prepare([seeded(4096)])
    assert store.leaf("texts").dims["seed"] == 4096
    Store(tmp_path / "begun.zarr").prepare([seeded(4097)])  # begun with as many, it is one file a cell


def test_a_variable_that_the_plan_does_not_name_counts_too(tmp_path):
    store = Store(tmp_path / "seeds.zarr")
    store.prepare([seeded(1)])
    group = seeded(5000)
    with pytest.raises(RoomError, match="would be 10,000 files"):
        store.prepare([Group(group.path, group.coords, {"n": SEEDED["n"]}, group.cell)])


def test_files_by_the_thousand_that_are_not_there_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "MAX_FILES", 10**9)
    store = Store(tmp_path / "seeds.zarr")
    store.prepare([seeded(1)])
    data = xr.Dataset({"text": ("seed", ["a"]), "n": ("seed", np.int32([1]))}, {"seed": [0]})
    store.commit("texts", ("joy",), data, fingerprint=1)
    store.prepare([seeded(200_000)])
    opened = nsteer.open(tmp_path / "seeds.zarr")["texts"]
    with pytest.raises(RoomError, match=r"texts/n: 200,000 files are asked for, and it has 2; ask for a part of it"):
        opened.n.load()
    assert opened.n.sel(emotion="joy", seed=[0, 5]).values.tolist() == [1, -1]
    assert (opened.n.sel(emotion="fear") == -1).all(), "of what is not done nothing is opened"


def test_memory_that_is_not_there_is_said_before_it_is_taken(store, monkeypatch):
    monkeypatch.setattr(room, "PLENTY", 0)
    assert nsteer.open(store)["scores"].load().auc.notnull().all()
    monkeypatch.setattr(room, "free_memory", lambda: 15)
    with pytest.raises(RoomError, match=r"of memory are free; ask for a part of it"):
        nsteer.open(store)["scores"].load()
    assert issubclass(RoomError, StoreError) and issubclass(RoomError, MemoryError)


def test_a_file_larger_than_any_of_a_store_is_not_read(store):
    for file in ("scores/emotion/c.0", "scores/cell/c.0.0", "scores/auc/c.0.0", "zarr.json"):
        os.truncate(store / file, 2**40)
        with pytest.raises(StoreError, match="1,099,511,627,776 bytes"):
            nsteer.open(store)["scores"].load()
        done = CliRunner().invoke(cli.main, ["verify", str(store)])
        assert done.exit_code == 1 and isinstance(done.exception, SystemExit)


def test_groups_that_contradict_one_another_are_one_line(store, monkeypatch):
    monkeypatch.setattr(Store, "groups", lambda self: {}["scores"])
    done = CliRunner().invoke(cli.main, ["ls", str(store)])
    assert done.exit_code == 1 and "does not fit together (KeyError: 'scores'); see nsteer verify" in done.output
