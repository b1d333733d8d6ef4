"""The store: what was committed under a label comes back under that label, and nothing else does."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.core.buffer import default_buffer_prototype

from nsteer.errors import StoreError, StoreVersionError
from nsteer.store import LAYOUT, Group, Store, Variable, documents, fingerprint, slug
from nsteer.store.finished import finished
from nsteer.store.regular import SMALL, Files
from nsteer.upkeep.merge import merge

PATH = "vectors/zoo--llama"
REPOSITORY = Path(__file__).parents[1]


def truth(*labels) -> float:
    """A number that is known by its labels alone; exact in float32."""
    return zlib.crc32(repr(labels).encode()) % 100_000 / 8


def vectors(methods=("pca", "dm"), emotions=("joy", "fear"), layers=(5, 2), width=3, depth=True, **changes) -> Group:
    over = ("model", "method", "emotion", "layer")
    declared = {
        "path": PATH,
        "coords": {
            "model": ["zoo/llama"],
            "method": methods,
            "emotion": emotions,
            "layer": layers,
            "d_model": range(width),
        },
        "variables": {
            "vector": Variable((*over, "d_model"), "float32", "steering vector"),
            "norm": Variable(over, "float64", "length of the vector"),
        },
        "cell": ("method", "emotion"),
        "auxiliary": {"depth": (Variable(("layer",), "float64", "depth"), np.array(layers) / 8)} if depth else {},
        "attrs": {"product": "vectors", "product_version": 1},
    }
    return Group(**declared | changes)


def vector_data(method, emotion, layers=(2, 5), width=3) -> xr.Dataset:
    """One cell, its labels in an order of its own."""
    components = list(range(width))[::-1]
    values = [[[truth(method, emotion, layer, d) for d in components] for layer in layers]]
    norms = [[truth(method, emotion, layer) for layer in layers]]
    return xr.Dataset(
        {"vector": (("model", "layer", "d_model"), values), "norm": (("model", "layer"), norms)},
        coords={"model": ["zoo/llama"], "layer": list(layers), "d_model": components},
    )


def assert_true(data: xr.Dataset, method, emotion, layers, width=3) -> None:
    cell = data.sel({"method": method, "emotion": emotion, "model": "zoo/llama"})
    for layer in layers:
        assert cell.norm.sel(layer=layer).item() == truth(method, emotion, layer)
        for d in range(width):
            assert cell.vector.sel(layer=layer, d_model=d).item() == truth(method, emotion, layer, d)


@pytest.fixture
def store(tmp_path) -> Store:
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    return store


def commit(store, method, emotion, layers=(2, 5), width=3, number=7, **extra) -> None:
    data = vector_data(method, emotion, layers, width)
    store.commit(PATH, (method, emotion), data, fingerprint=number, **extra)


# ---- round trips


def test_a_cell_comes_back_under_its_labels_whatever_their_order(store):
    commit(store, "dm", "joy", run=3, seconds=1.5)
    read = store.read(PATH)
    assert_true(read, "dm", "joy", [5, 2])
    assert read.layer.values.tolist() == [5, 2]
    assert np.isnan(read.vector.sel({"method": "pca"})).all()
    assert read.depth.sel(layer=5).item() == 5 / 8 and "depth" in read.coords
    record = read.cell.sel({"method": "dm", "emotion": "joy"})
    assert record.sel(cell_field=["fingerprint", "run", "seconds"]).values.tolist() == [7, 3, 1.5]
    assert read.vector.dtype == np.float32 and read.vector.attrs["long_name"] == "steering vector"


VALUES = {
    "float32": [0.5, -3.25e38, np.nan],
    "float64": [1e300, 0.1, np.nan],
    "int32": [-(2**31), 0, 2**31 - 1],
    "int64": [-(2**63), 0, 2**63 - 1],
    "bool": [True, False, True],
    "string": ["快乐 😀", "", "line\nbreak, \x00 and " + "long " * 200],
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", VALUES)
def test_every_type_comes_back_as_it_was(tmp_path, dtype, compress):
    store = Store(tmp_path / "s.zarr")
    variable = Variable(("emotion", "prompt"), dtype, "value", compress=compress)
    store.prepare([Group("g", {"emotion": ["joy", "悲しい"], "prompt": list("abc")}, {"x": variable}, ("emotion",))])
    values = np.array(VALUES[dtype], dtype=object if dtype == "string" else dtype)
    data = xr.Dataset({"x": ("prompt", values[::-1])}, {"prompt": list("cba")})
    store.commit("g", ("悲しい",), data, fingerprint=1)
    read = store.read("g").x.load()
    back = read.sel(emotion="悲しい", prompt=list("abc"))
    np.testing.assert_array_equal(back.values, values)
    fills = {"float32": np.nan, "float64": np.nan, "int32": -1, "int64": -1, "bool": False, "string": ""}
    np.testing.assert_array_equal(read.sel(emotion="joy").values, np.array([fills[dtype]] * 3, dtype=read.dtype))
    assert read.dtype == (np.dtypes.StringDType() if dtype == "string" else np.dtype(dtype))


def test_labels_absent_from_the_data_hold_the_fill_even_over_older_values(store):
    commit(store, "pca", "joy")
    commit(store, "pca", "joy", layers=[5])
    read = store.read(PATH)
    assert_true(read, "pca", "joy", [5])
    assert np.isnan(read.vector.sel({"method": "pca", "emotion": "joy", "layer": 2})).all()


def test_an_axis_of_one_label_and_a_scalar_coordinate_may_be_left_out_of_the_data(store):
    data = vector_data("pca", "joy").sel(model="zoo/llama").assign_coords(emotion="joy")
    store.commit(PATH, ("pca", "joy"), data, fingerprint=1)
    store.commit(PATH, ("dm", "joy"), vector_data("dm", "joy").isel(model=0, drop=True), fingerprint=1)
    assert_true(store.read(PATH), "pca", "joy", [5, 2])
    assert_true(store.read(PATH), "dm", "joy", [5, 2])


def test_float_and_int_labels_select_exactly(tmp_path):
    store = Store(tmp_path / "s.zarr")
    group = Group("g", {"strength": [0.1, 0.005]}, {"x": Variable(("strength",), "float64", "x")}, ("strength",))
    store.prepare([group])
    store.prepare([Group("g", {"strength": [2, (0.005).__class__(1)][:1]}, group.variables, ("strength",))])
    store.commit("g", (2,), xr.Dataset({"x": ((), 4.0)}), fingerprint=1)
    store.commit("g", (0.1,), xr.Dataset({"x": ((), 3.0)}), fingerprint=1)
    assert list(store.committed("g")) == [(0.1,), (2.0,)]
    assert store.read("g").x.sel(strength=[2, 0.1]).values.tolist() == [4.0, 3.0]


# ---- growth


def test_every_axis_grows_and_old_cells_stay(store):
    commit(store, "dm", "joy")
    commit(store, "pca", "fear")
    store.prepare([vectors(methods=["lda", "dm"], emotions=["awe", "joy"], layers=[0, 5, 7], width=5)])
    read = store.read(PATH)
    assert read.method.values.tolist() == ["pca", "dm", "lda"]
    assert read.emotion.values.tolist() == ["joy", "fear", "awe"]
    assert read.layer.values.tolist() == [5, 2, 0, 7]
    assert read.depth.values.tolist() == [5 / 8, 2 / 8, 0, 7 / 8]
    assert list(store.committed(PATH)) == [("pca", "fear"), ("dm", "joy")]
    for method, emotion in [("dm", "joy"), ("pca", "fear")]:
        assert_true(read, method, emotion, [5, 2])
        assert np.isnan(read.vector.sel({"method": method, "emotion": emotion, "layer": [0, 7]})).all()
    commit(store, "lda", "awe", layers=[7, 2, 0, 5], width=5)  # over several chunks now
    assert_true(store.read(PATH), "lda", "awe", [0, 2, 5, 7], width=5)
    assert_true(store.read(PATH), "dm", "joy", [5, 2])


def samples(labels, **changes) -> Group:
    dims = ("method", "sample", "token")
    return Group(
        "activations/zoo--llama",
        {"method": ["generation"], "sample": labels, "token": [0, 1]},
        {"pooled": Variable(dims, "float32", "pooled", compress=True)},
        cell=("method", "sample_chunk"),
        **{"chunks": {"sample": 3}} | changes,
    )


def sample_data(labels) -> xr.Dataset:
    values = [[truth(label, token) for token in (1, 0)] for label in labels]
    return xr.Dataset({"pooled": (("sample", "token"), values)}, {"sample": labels, "token": [1, 0]})


def test_chunks_are_cells_in_published_order_and_growth_in_the_last_leaves_it_committed(tmp_path):
    store, path = Store(tmp_path / "s.zarr"), "activations/zoo--llama"
    store.prepare([samples(list("dbaec"))])
    assert store.read(path).sample_chunk.values.tolist() == [0, 1]
    store.commit(path, ("generation", 0), sample_data(list("bad")), fingerprint=1)
    store.commit(path, ("generation", 1), sample_data(list("ce")), fingerprint=2)
    store.prepare([samples(list("fgdh"))])
    assert store.read(path).sample_chunk.values.tolist() == [0, 1, 2]
    assert list(store.committed(path)) == [("generation", 0), ("generation", 1)]
    wanted = {("generation", 1): 3, ("generation", 2): 4, ("generation", 0): 1}
    assert store.missing(path, wanted) == [("generation", 1), ("generation", 2)]
    store.commit(path, ("generation", 2), sample_data(list("gh")), fingerprint=4)
    read = store.read(path).pooled.isel({"method": 0})
    for label in "abcdegh":
        assert [read.sel(sample=label, token=t).item() for t in (0, 1)] == [truth(label, t) for t in (0, 1)]
    assert np.isnan(read.sel(sample="f")).all()
    with pytest.raises(StoreError, match="sample 'd' belongs to another cell"):
        store.commit(path, ("generation", 1), sample_data(list("ed")), fingerprint=3)


def test_chunks_of_two_groups_hold_the_same_labels_where_one_follows_the_other(tmp_path):
    store, path = Store(tmp_path / "s.zarr"), "activations/zoo--llama"
    store.prepare([samples(list("dbaec"))])
    told = replace(samples(list("acx")), path="told", ordered_as=path)
    store.prepare([samples(list("acx")), told])
    store.prepare([replace(told, coords={**told.coords, "sample": list("yx")})])
    assert [store.labels(name, "sample") for name in (path, "told")] == [list("dbaecx"), list("dbaecxy")]
    out = Store(tmp_path / "out.zarr")
    merge([store], out)
    assert out.leaf("told").attrs["nsteer_ordered_as"] == path and store.labels("nothing", "sample") == []


def test_a_chunk_is_one_cell_or_a_part_of_it_of_about_a_mebibyte(tmp_path):
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors(layers=range(80), width=8192), samples(list("abcdefg"))])
    document = json.loads((store.path / PATH / "vector" / "zarr.json").read_text())
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [1, 1, 1, 32, 8192]
    document = json.loads((store.path / "activations/zoo--llama/pooled/zarr.json").read_text())
    assert document["chunk_grid"]["configuration"]["chunk_shape"] == [1, 3, 2]
    assert [codec["name"] for codec in document["codecs"]] == ["bytes", "blosc", "crc32c"]


def test_a_group_gains_a_variable_and_a_plan_need_not_write_those_of_another(store):
    commit(store, "dm", "joy")
    more = {"auc": Variable(("method", "emotion"), "float64", "auc")}
    other = Store(store.path)
    other.prepare([vectors(variables=more, depth=False)])
    other.commit(PATH, ("pca", "fear"), xr.Dataset({"auc": ((), 0.75)}), fingerprint=2)
    read = Store(store.path).read(PATH)
    assert_true(read, "dm", "joy", [5, 2])
    assert read.auc.sel({"method": "pca", "emotion": "fear"}).item() == 0.75
    with pytest.raises(StoreError, match=r"lack the variables \['auc', 'norm', 'vector'\]"):
        Store(store.path).commit(PATH, ("pca", "joy"), xr.Dataset(), fingerprint=2)


# ---- fingerprints and staleness

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


def leaves(value, where=()):
    if not isinstance(value, dict | list) or not value:
        yield where
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, (*where, key))


def changed(value, where):
    if not where:
        return [value, "changed"]
    copy = value.copy()
    copy[where[0]] = changed(value[where[0]], where[1:])
    return copy


@given(PLAIN)
def test_a_fingerprint_ignores_the_order_of_keys_and_sees_every_leaf(value):
    number = fingerprint(value)
    assert 0 <= number < 2**52 and int(float(number)) == number
    assert fingerprint(reordered(value)) == number
    for where in leaves(value):
        assert fingerprint(changed(value, where)) != number


def test_a_fingerprint_is_the_same_in_every_version():
    assert (
        fingerprint({"b": [1, 2.5, None], "a": "快乐"})
        == fingerprint({"a": "快乐", "b": (1, 2.5, None)})
        == 0xF6FEBB59014F1  # by sha256sum of the JSON text
    )


@pytest.mark.parametrize("value", [float("nan"), {1: 2}, {"a": np.int64(3)}, {1, 2}, Path("x"), [float("inf")]])
def test_a_fingerprint_refuses_what_is_not_plain_data(value):
    with pytest.raises(TypeError):
        fingerprint(value)


def test_missing_keeps_the_order_of_wanted_and_knows_stale_cells(store):
    commit(store, "dm", "joy", number=1)
    commit(store, "pca", "joy", number=2)
    wanted = {("pca", "fear"): 1, ("pca", "joy"): 9, ("dm", "joy"): 1, ("new", "joy"): 1}
    assert store.missing(PATH, wanted) == [("pca", "fear"), ("pca", "joy"), ("new", "joy")]
    assert store.missing("nowhere", wanted) == list(wanted)
    assert Store(store.path.parent / "none.zarr").missing(PATH, wanted) == list(wanted)
    commit(store, "pca", "joy", number=9)
    assert store.missing(PATH, wanted) == [("pca", "fear"), ("new", "joy")]


def test_a_stale_cell_is_uncommitted_before_its_data_change(store, monkeypatch):
    commit(store, "dm", "joy", number=1)
    seen = []
    write = zarr.AsyncArray.setitem

    async def watched(array, key, value):
        committed = await asyncio.to_thread(Store(store.path).committed, PATH)
        seen.append((array.name.rsplit("/")[-1], ("dm", "joy") in committed))
        await write(array, key, value)

    monkeypatch.setattr(zarr.AsyncArray, "setitem", watched)
    commit(store, "dm", "joy", number=2)
    assert sorted(seen) == [("norm", False), ("vector", False)]
    assert store.committed(PATH)["dm", "joy"].fingerprint == 2


def test_a_commit_that_fails_leaves_the_cell_uncommitted_and_one_refused_leaves_it_alone(store, monkeypatch):
    commit(store, "dm", "joy", number=1)
    with pytest.raises(StoreError):
        store.commit(PATH, ("dm", "joy"), xr.Dataset(), fingerprint=2)
    assert store.committed(PATH)["dm", "joy"].fingerprint == 1

    write, ended = zarr.AsyncArray.setitem, []

    async def full(array, key, value):
        if array.name.endswith("norm"):
            raise OSError(28, "No space left on device")
        await asyncio.sleep(0.01)
        await write(array, key, value)
        ended.append(array.name.rsplit("/")[-1])

    monkeypatch.setattr(zarr.AsyncArray, "setitem", full)
    with pytest.raises(StoreError, match=r"No space left on device\. Committed cells are kept; run again"):
        commit(store, "dm", "joy", number=2)
    assert store.committed(PATH) == {} and ended == ["vector"], "what is written beside it ends before it is told"


# ---- refusals


def refused(store, data, words, cell=("dm", "joy")):
    with pytest.raises(StoreError, match=words):
        store.commit(PATH, cell, data, fingerprint=1)
    assert store.committed(PATH) == {}


def test_data_that_do_not_fit_are_refused_in_words(store):
    good = vector_data("dm", "joy")
    refused(store, good.assign(nrm=good.norm), "'nrm' is no variable of this group; did you mean 'norm'?")
    refused(store, good.drop_vars("norm"), r"lack the variables \['norm'\]")
    refused(store, good.assign_coords(layer=[2, 6]), "layer 6 is not a published label; known: 5, 2 ")
    refused(store, good.assign_coords(layer=[2, 2]), "label of 'layer' twice")
    refused(store, good.drop_vars("layer"), "dim 'layer' of the data has no labels")
    refused(store, good.isel(layer=0, drop=True), "'vector' lacks dim 'layer', which has 2 labels")
    refused(store, good.rename(layer="seed"), "'vector' has dim 'seed'")
    refused(store, good.assign_coords(emotion="fear"), "the data are of emotion 'fear', the cell is")
    refused(store, good.assign(norm=good.norm.astype(str)), "'norm' is float64 in the store; ")
    refused(store, good.assign(vector=good.vector * 1e300), "'vector' is float32 in the store; .* does not fit")
    refused(store, good, "emotion 'jy' is not a published label; did you mean 'joy'?", ("dm", "jy"))
    refused(store, good, "a cell is .'method', 'emotion'.", ("dm",))
    with pytest.raises(StoreError, match="fingerprint"):
        store.commit(PATH, ("dm", "joy"), good, fingerprint=2**60)
    with pytest.raises(StoreError, match="holds no group 'vector/zoo--llama'; did you mean 'vectors/zoo--llama'"):
        store.read("vector/zoo--llama")


X = Variable(("emotion",), "float64", "x")


def group(emotions=("joy",), **changes) -> Group:
    return Group(
        **{"path": "g", "coords": {"emotion": emotions}, "variables": {"x": X}, "cell": ("emotion",)} | changes
    )


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (group([1, "a"]), "labels of 'emotion' must be all text, all int or all float; found int and str"),
        (group([1, 2.5]), "found float and int"),
        (group([True]), "found bool"),
        (group(["a", "b", "a"]), "label 'a' of 'emotion' is given 2 times"),
        (group([float("nan")]), "not a finite number"),
        (group([]), "dim 'emotion' has no labels"),
        (group(path="G"), "must be lower-case"),
        (group(path="../g"), "must be lower-case"),
        (
            group(variables={"x": Variable(("emotion",), "float16", "x")}),
            "dtype 'float16' of 'x' is not one of",
        ),
        (
            group(variables={"x": Variable(("emotion", "layer"), "bool", "x")}),
            "dim 'layer' of 'x' has no labels",
        ),
        (group(variables={"x": X, "X": X}), "names must differ in more than case"),
        (group(variables={"cell": X}), "'cell' is taken"),
        (group(cell=("method",)), "cell dim 'method' has no labels"),
        (
            group(coords={"emotion": ["a"], "seed": [1]}, cell=("emotion", "seed")),
            "'x' must have every cell dim; it lacks",
        ),
        (group(chunks={"emotion": 4}), "chunks of 'emotion' need"),
        (group(attrs={"at": Path("x")}), "attributes must be JSON data"),
        (group(auxiliary={"depth": (X, [1, 2])}), r"'depth' must have shape \(1,\), found \(2,\)"),
    ],
)
def test_groups_that_could_not_be_committed_safely_are_refused_in_words(tmp_path, bad, words):
    with pytest.raises(StoreError, match=words):
        Store(tmp_path / "s.zarr").prepare([bad])
    assert Store(tmp_path / "s.zarr").groups() == []


def test_a_group_that_changed_its_kind_is_refused_and_nothing_is_written(store):
    before = (store.path / "zarr.json").read_bytes()
    vector = vectors().variables["vector"]
    for changes, words in [
        (
            {"variables": {"vector": Variable(vector.dims, "float64", "v")}},
            "vector of .* is float32 over .* wants float64",
        ),
        ({"variables": {"vector": Variable(vector.dims, "float32", "v", fill=0)}}, "fill nan .* fill 0.0"),
        ({"variables": {"vector": Variable(vector.dims[::-1], "float32", "v")}}, r"over \(d_model, layer"),
        ({"cell": ("emotion", "method")}, "cells of .* name another store, or delete the folder"),
        ({"attrs": {"product": "vectors", "product_version": 2}}, "product_version .* is 1 in the store"),
        ({"coords": {**vectors().coords, "layer": ["a"]}}, "labels of 'layer' must be all text"),
        ({"path": f"{PATH}/more"}, "holds results and so no groups"),
        ({"path": "vectors"}, "the store holds groups below this path"),
    ]:
        with pytest.raises(StoreError, match=words):
            store.prepare([group(path="first"), vectors(depth=False, **changes)])
    assert (store.path / "zarr.json").read_bytes() == before and store.groups() == [PATH]


def test_two_models_with_one_slug_are_refused(store):
    assert slug("Org/Name-2B") == "org--name-2b"
    coords = {**vectors().coords, "model": ["Zoo/Llama"]}
    with pytest.raises(StoreError, match="models 'zoo/llama' and 'Zoo/Llama' would share the name 'zoo--llama'"):
        store.prepare([vectors(coords=coords)])
    for bad in ["", "../x", "a\\b", "a b", ".hidden", "x" * 300, None]:
        with pytest.raises(StoreError, match="can not name a group"):
            slug(bad)


def test_foreign_data_are_never_touched(tmp_path):
    (tmp_path / "file.zarr").write_text("mine")
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.zarr" / "thesis.txt").write_text("mine")
    xr.Dataset({"x": ("a", [1])}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    before = sorted(tmp_path.rglob("*"))
    for name in ("file", "folder", "other"):
        with pytest.raises(StoreError, match=r"not an nsteer store; nothing was written\. Name another path"):
            Store(tmp_path / f"{name}.zarr").prepare([group()])
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(StoreError, match=r"can not prepare: (Not a directory|File exists)"):
        Store(tmp_path / "file.zarr" / "s.zarr").prepare([group()])
    with pytest.raises(StoreError, match="no store at"):
        Store(tmp_path / "none.zarr").check_version()
    assert not Store(tmp_path / "none.zarr").exists


@pytest.mark.parametrize(
    ("layout", "advice"),
    [
        (LAYOUT + 1, "upgrade nsteer (pip install -U nsteer), or name another store"),
        (1, "run the plan again into a new store"),
    ],
)
def test_another_layout_is_refused_by_name(store, layout, advice):
    document = json.loads((store.path / "zarr.json").read_text())
    assert document["attributes"]["nsteer_store"] == LAYOUT and document["attributes"]["Conventions"] == "nsteer-1"
    document["attributes"]["nsteer_store"] = layout
    (store.path / "zarr.json").write_text(json.dumps(document))
    for act in (store.check_version, lambda: store.prepare([vectors()]), store.groups):
        words = f"s.zarr: store layout {layout}, this nsteer reads layout {LAYOUT}; {advice}"
        with pytest.raises(StoreVersionError, match=re.escape(words) + "$"):
            act()


def test_a_damaged_chunk_raises_on_read(store):
    commit(store, "dm", "joy")
    chunk = store.path / PATH / "vector" / "c.0.1.0.0.0"
    raw = bytearray(chunk.read_bytes())
    raw[5] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(ValueError, match=r"(?i)checksum|crc32c"):
        store.read(PATH).vector.load()
    record = store.path / PATH / "cell" / "c.1.0.0"
    record.write_bytes(b"\1" + record.read_bytes()[1:])
    with pytest.raises(StoreError, match=r"commit record is damaged; remove the file .* and run again"):
        store.committed(PATH)


# ---- structure


def test_prepare_again_writes_nothing_and_is_quick(store):
    groups = [vectors(), *(vectors(path=f"vectors/m{n}") for n in range(5))]
    store.prepare(groups)
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    best = min(_seconds(lambda: Store(store.path).prepare(groups)) for _ in range(4))
    after = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    assert before == after
    assert best < 0.1 * len(groups)  # about 5 ms a group on an idle core


def _seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def test_prepare_of_one_group_leaves_the_others_alone_even_half_grown_ones(store):
    commit(store, "dm", "joy")
    for name, size in (("layer", 9), ("vector", None)):  # what a kill in the midst of growing leaves
        path = store.path / PATH / name / "zarr.json"
        document = json.loads(path.read_text())
        document["shape"][-1 if size else 2] = size or 9
        path.write_text(json.dumps(document))
    before = {path: path.read_bytes() for path in (store.path / PATH).rglob("*") if path.is_file()}
    store.prepare([group()])
    assert before == {path: path.read_bytes() for path in (store.path / PATH).rglob("*") if path.is_file()}
    tree = xr.open_datatree(store.path, engine="zarr")  # the root must not publish what the leaf does not
    assert dict(tree[PATH].sizes)["layer"] == 2
    assert_true(xr.open_zarr(store.path, group=PATH), "dm", "joy", [5, 2])
    store.prepare([vectors()])
    xr.open_datatree(store.path, engine="zarr", consolidated=False)  # healed


def test_what_is_published_is_what_zarr_itself_would_consolidate(store, tmp_path):
    store.prepare([vectors(layers=[1]), group(), samples(list("abcd"))])
    copy = tmp_path / "copy.zarr"
    shutil.copytree(store.path, copy)
    for path in ("", "vectors", PATH, "g", "activations", "activations/zoo--llama"):
        ours = json.loads((copy / path / "zarr.json").read_text())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            zarr.consolidate_metadata(str(copy), path=path or None)
        assert json.loads((copy / path / "zarr.json").read_text()) == ours
        shutil.rmtree(copy)
        shutil.copytree(store.path, copy)


def test_a_reader_sees_a_group_only_when_it_is_whole(store, monkeypatch):
    """At every write of a prepare, plain xarray opens the tree and every leaf that is there."""
    commit(store, "dm", "joy")
    replace, seen = os.replace, []

    def watched(source, target):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tree = xr.open_datatree(store.path, engine="zarr")
            leaf = xr.open_zarr(store.path / PATH)
        assert_true(tree[PATH].to_dataset(), "dm", "joy", [5, 2])
        assert leaf.sizes["layer"] == len(set(leaf.layer.values.tolist())) and leaf.vector.shape[3] in (2, 3)
        seen.append(len(tree.groups))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    store.prepare([vectors(layers=[9]), group()])
    assert len(seen) > 6 and set(seen) == {3}


def test_removed_groups_come_back_empty(store):
    commit(store, "dm", "joy")
    shutil.rmtree(store.path / PATH)
    assert store.committed(PATH) == {}
    store.prepare([vectors()])
    assert store.committed(PATH) == {} and np.isnan(store.read(PATH).vector).all()


def test_a_leaf_stays_what_it_was_when_the_group_grows_before_its_arrays_are_opened(store):
    """Labels, shapes and records of one view are of one moment (found by a reader beside writers)."""
    commit(store, "dm", "joy")
    old = Store(store.path)
    leaf = old.leaf(PATH)
    store.prepare([vectors(methods=["lda"], emotions=["awe"], layers=[9, 7, 8])])
    view = finished(leaf)
    assert view.sizes["emotion"] == 2 and view.layer.values.tolist() == [5, 2]
    assert_true(view, "dm", "joy", [5, 2])


# ---- runs


def test_a_run_records_plan_environment_and_end(store):
    first = store.add_run(
        plan="name: x\n", environment={"numpy": "2.4"}, started="2026-11-23T00:00:00Z", argv=["nsteer", "a b"]
    )
    second = store.add_run(plan="name: y\n", environment={}, started="2026-11-23T00:00:00Z")
    store.finish_run(first, "2026-11-23T01:00:00Z", "done")
    runs = store.read("runs").load()
    assert (first, second) == (0, 1) and len(set(runs.run.values)) == 2
    assert runs.plan.values.tolist() == ["name: x\n", "name: y\n"]
    assert runs.status.values.tolist() == ["done", "running"]
    assert runs.finished.values.tolist() == ["2026-11-23T01:00:00Z", ""]
    assert runs.argv.values.tolist() == ["nsteer 'a b'", ""]
    assert json.loads(runs.environment.item(0)) == {"numpy": "2.4"}
    assert len(runs.plan_sha256.item(0)) == 64 and len(store.committed("runs")) == 2
    with pytest.raises(StoreError, match="run 2 is not in"):
        store.finish_run(2, "", "")


# ---- other processes

PLAIN_XARRAY = """
import sys, xarray as xr
path = sys.argv[1]
tree = xr.open_datatree(path, engine="zarr").load()
xr.open_datatree(f"{path}/vectors", engine="zarr").load()
a = xr.open_zarr(f"{path}/vectors/zoo--llama").load()
b = xr.open_zarr(path, group="vectors/zoo--llama").load()
assert a.identical(b) and b.equals(tree["vectors/zoo--llama"].to_dataset())
print(xr.open_zarr(path, group="text").load().text.values.tolist(), xr.open_zarr(f"{path}/runs").plan.item())
assert "nsteer" not in sys.modules
"""


def test_plain_xarray_opens_everything_without_a_warning(store, tmp_path):
    commit(store, "dm", "joy")
    text = Group("text", {"prompt": ["p", "快"]}, {"text": Variable(("prompt",), "string", "t")}, ("prompt",))
    store.prepare([text])
    store.commit("text", ("快",), xr.Dataset({"text": ((), "乐")}), fingerprint=1)
    store.add_run(plan="the plan", environment={}, started="now")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PLAIN_XARRAY, str(store.path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "['', '乐']" in done.stdout and "the plan" in done.stdout


WRITER = """
import sys
sys.path[:0] = [{tests!r}, {repository!r}]
from test_store import Store, vectors, commit
store = Store(sys.argv[1])
for n in range(4):
    emotion = f"{{sys.argv[2]}}{{n}}"
    store.prepare([vectors(emotions=[emotion])])
    commit(store, "dm", emotion)
assert "torch" not in sys.modules
"""


def test_two_processes_grow_the_store_and_commit_at_once(store):
    script = WRITER.format(tests=str(Path(__file__).parent), repository=str(REPOSITORY))
    writers = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script, str(store.path), name], stderr=subprocess.PIPE)
        for name in "ab"
    ]
    assert [writer.communicate(timeout=120)[1] for writer in writers] == [b"", b""]
    done = store.committed(PATH)
    assert sorted(done) == sorted(("dm", f"{name}{n}") for name in "ab" for n in range(4))
    read = xr.open_zarr(store.path, group=PATH)
    assert len(set(read.emotion.values.tolist())) == read.sizes["emotion"] == 10
    for method, emotion in done:
        assert_true(read, method, emotion, [5, 2])


def test_a_durable_store_holds_the_same(tmp_path):
    store = Store(tmp_path / "s.zarr", durable=True)
    store.prepare([vectors()])
    commit(store, "dm", "joy", number=1)
    commit(store, "dm", "joy", number=2)
    assert_true(store.read(PATH), "dm", "joy", [5, 2])


def test_a_document_is_read_once_and_kept_while_it_fits(tmp_path):
    kept = documents.Known(100)
    for name in "abc":
        kept.keep(name.encode(), {"name": name}, 40)
    assert kept.get(b"a") is None and kept.get(b"b") == {"name": "b"}, "the one not used for longest went"
    kept.keep(b"d", {}, 40)
    assert kept.get(b"c") is None and kept.get(b"b") is not None and len(kept) == 2
    kept.keep(b"e", {}, 101)
    assert kept.get(b"e") is None and len(kept) == 2, "one that is larger than all room"
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    first, again = (documents.read_document(store.place, PATH) for _ in range(2))
    assert first is again and first == json.loads((tmp_path / "s.zarr" / PATH / "zarr.json").read_text())
    with pytest.raises(StoreError, match="damaged"):
        documents.parse(store.place, PATH, b'{"node_type": "group"')


def test_a_store_that_another_process_makes_meanwhile_is_not_foreign(tmp_path, monkeypatch):
    store = Store(tmp_path / "s.zarr")
    store.prepare([vectors()])
    read, asked = type(store.place).read, []

    def late(place, name):
        asked.append(name)
        return None if len(asked) == 1 else read(place, name)

    monkeypatch.setattr(type(store.place), "read", late)
    assert Store(tmp_path / "s.zarr").exists and asked == ["zarr.json"] * 2


# float32: a little under what is read at once, and far above
@pytest.mark.parametrize("size", [SMALL // 4 - 64, SMALL])
def test_files_of_any_size_are_written_and_read_by_the_bit(tmp_path, monkeypatch, size):
    values = np.random.default_rng(0).standard_normal(size).astype("f4")
    files = Files(tmp_path)
    array = zarr.create_array(files, name="a", shape=(2 * size,), chunks=(size,), dtype="f4", compressors=None)
    array[:size] = values
    array = zarr.open_array(Files(tmp_path), path="a", mode="r+")
    np.testing.assert_array_equal(array[:size], values)
    np.testing.assert_array_equal(array[size:], 0)  # no file
    before = sorted(file.name for file in tmp_path.rglob("*"))

    def full(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(os, "replace", full)
        array[:size] = -values
    np.testing.assert_array_equal(array[:size], values)
    assert sorted(file.name for file in tmp_path.rglob("*")) == before, "nothing half written is left"
    with pytest.raises(ValueError, match="read-only"):
        asyncio.run(files.with_read_only(True).set("a/c/0", default_buffer_prototype().buffer.from_bytes(b"1")))
