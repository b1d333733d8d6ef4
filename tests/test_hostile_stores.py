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
from nsteer.errors import StoreError
from nsteer.store import Store
from nsteer.store.group import Group, Variable
from nsteer.store.regular import MOST_UNPACKED, _bounded


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
    bomb = zstandard.ZstdCompressor().compress(bytes(MOST_UNPACKED + 1))
    with pytest.raises(ValueError, match="too large"):
        _bounded(bomb[:32], len(bomb))
