"""What the analyst gets: the natural spelling selects, misspellings are named, unfinished cells do not show."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

import nsteer.store.results
from nsteer.errors import LabelError, StoreError
from nsteer.store import LAYOUT, Group, Store, Variable, fingerprint

MODELS = {"zoo/llama": ([5, 2], 3), "Org/Big": ([0, 7, 2], 4)}
METHODS, EMOTIONS, STRENGTHS = ["generation", "pca"], ["joy", "fear", "awe"], [0.05, 0.01]


def truth(*labels) -> float:
    return zlib.crc32(repr(labels).encode()) % 10_000 / 8


def vectors(model: str) -> Group:
    layers, width = MODELS[model]
    dims = ("model", "method", "emotion", "layer")
    coords = {"model": [model], "method": METHODS, "emotion": EMOTIONS, "layer": layers, "d_model": range(width)}
    numbers = {"vector": Variable((*dims, "d_model"), "float32", "vector"), "norm": Variable(dims, "float32", "norm")}
    depth = {"depth": (Variable(("layer",), "float64", "depth"), np.array(layers) / 8)}
    path = f"vectors/{model.replace('/', '--').lower()}"
    return Group(path, coords, numbers, ("method", "emotion"), auxiliary=depth, attrs={"product": "vectors"})


def vector_data(model, method, emotion) -> xr.Dataset:
    layers, width = MODELS[model]
    values = [[truth(model, method, emotion, layer, d) for d in range(width)] for layer in layers[::-1]]
    norms = [truth(model, method, emotion, layer) for layer in layers[::-1]]
    coords = {"layer": layers[::-1], "d_model": range(width)}
    return xr.Dataset({"vector": (("layer", "d_model"), values), "norm": ("layer", norms)}, coords)


def cube() -> list[Group]:
    dims = ("model", "method", "emotion", "strength", "prompt")
    coords = {"model": [*MODELS], "method": METHODS, "emotion": EMOTIONS, "strength": STRENGTHS, "prompt": ["p0", "p1"]}
    numbers = {"kl": Variable(dims, "float64", "kl"), "steps": Variable(dims, "int32", "steps")}
    cell = ("model", "method", "emotion")
    return [
        Group("steering", coords, numbers, cell),
        Group("generations", coords, {"text": Variable(dims, "string", "text")}, cell),
    ]


def cube_data(*cell) -> tuple[xr.Dataset, xr.Dataset]:
    coords = {"strength": STRENGTHS[::-1], "prompt": ["p1", "p0"]}
    grid = [[truth(*cell, s, p) for p in coords["prompt"]] for s in coords["strength"]]
    over, kl = ("strength", "prompt"), np.array(grid)
    text = np.array([[f"快乐 {value}" for value in row] for row in grid], dtype=object)
    numbers = xr.Dataset({"kl": (over, kl), "steps": (over, kl.astype("int32"))}, coords)
    return numbers, xr.Dataset({"text": (over, text)}, coords)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A store in which every cell of `awe` is still missing; tests have copies."""
    store = Store(tmp_path_factory.mktemp("filled") / "s.zarr")
    store.prepare([*map(vectors, MODELS), *cube()])
    run = store.add_run(plan="name: x\n", environment={}, started="2026-11-23T00:00:00Z")
    for model in MODELS:
        for method in METHODS:
            for emotion in ("fear", "joy"):
                cell, number = (method, emotion), fingerprint([model, method, emotion])
                data = vector_data(model, *cell)
                store.commit(vectors(model).path, cell, data, fingerprint=number, run=run, seconds=0.5)
                for group, data in zip(cube(), cube_data(model, *cell), strict=True):
                    store.commit(group.path, (model, *cell), data, fingerprint=number, run=run)
    return store.path


@pytest.fixture
def path(filled, tmp_path) -> Path:
    return shutil.copytree(filled, tmp_path / "s.zarr")


@pytest.fixture
def results(path):
    return nsteer.store.results.open(path)


# ---- selecting


def test_the_natural_spelling_selects_by_every_dim(results):
    vector = results.sel(model="zoo/llama", method="pca", emotion="joy", layer=2)
    assert isinstance(vector, xr.DataArray) and vector.dims == ("d_model",)
    assert vector.values.tolist() == [truth("zoo/llama", "pca", "joy", 2, d) for d in range(3)]
    assert vector.depth.item() == 2 / 8
    norms = results.sel(
        model="Org/Big", method=["pca", "generation"], emotion="fear", layer=slice(1, 7), variable="norm"
    )
    assert norms.layer.values.tolist() == [7, 2] and norms.method.values.tolist() == ["pca", "generation"]
    assert norms.sel({"method": "pca", "layer": 7}).item() == truth("Org/Big", "pca", "fear", 7)


def test_a_cube_answers_across_models(results):
    steering = results.sel("steering", method="generation", emotion="joy", strength=0.01, prompt="p1")
    assert isinstance(steering, xr.Dataset) and steering.kl.dims == ("model",)
    assert steering.kl.values.tolist() == [truth(model, "generation", "joy", 0.01, "p1") for model in MODELS]
    text = results.sel(
        product="generations", variable="text", model="Org/Big", method="pca", emotion="joy", strength=0.05
    )
    assert text.sel(prompt="p0").item() == f"快乐 {truth('Org/Big', 'pca', 'joy', 0.05, 'p0')}"


def test_mapping_access_and_names(results):
    assert list(results) == sorted(["generations", "runs", "steering", "vectors/org--big", "vectors/zoo--llama"])
    assert len(results) == 5 and "steering" in results
    assert results["vectors", "Org/Big"].identical(results["vectors/org--big"])
    assert sorted(results.models) == sorted(MODELS)
    assert results["runs"].plan.values.tolist() == ["name: x\n"]
    assert nsteer.open is nsteer.store.results.open


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"emotion": "jooy"}, "emotion 'jooy' is not there; did you mean 'joy'? known: joy, fear, awe"),
        ({"emotion": ["joy", "fer"]}, "emotion 'fer' is not there; did you mean 'fear'? known: joy, fear, awe"),
        ({"layer": 9}, "layer 9 is not there; known: 5, 2"),
        ({"layer": True}, "layer True is not there; known: 5, 2"),
        ({"emotin": "joy"}, "has no dim 'emotin'; did you mean 'emotion'? known: model, method, emotion, layer"),
        ({"model": "zoo/lama"}, "model 'zoo/lama' is not in vectors; did you mean 'zoo/llama'? known: "),
        (
            {"model": ["zoo/llama"]},
            "one group for each model, since their d_model differ; name one: model='Org/Big' or",
        ),
        ({"product": "vector"}, "holds no 'vector'; did you mean 'vectors'? known: "),
        (
            {"variable": "nrm"},
            "vectors/zoo--llama has no variable 'nrm'; did you mean 'norm'? known: vector, norm, cell",
        ),
        ({"emotion": slice("a", "b")}, "emotion: a range needs number labels"),
        ({"nearest": 3}, "has no dim 'nearest'"),
    ],
)
def test_what_is_not_there_is_named_with_what_is(results, labels, words):
    with pytest.raises(LabelError, match=re.escape(words)) as caught:
        results.sel(**{"model": "zoo/llama"} | labels)
    assert isinstance(caught.value, KeyError) and isinstance(caught.value, StoreError)


def test_a_product_of_many_models_asks_for_one(results):
    with pytest.raises(LabelError, match=re.escape("one group for each model: ['vectors', 'Org/Big']; known: Org/Big")):
        results["vectors"]
    with pytest.raises(LabelError, match="holds no 'steerin'; did you mean 'steering'"):
        results["steerin"]
    with pytest.raises(StoreError, match="no store at"):
        nsteer.store.results.open(results.path / "nowhere.zarr")


def test_the_accessor_takes_method_for_a_dim_where_xarray_does_not(results):
    data = results["vectors", "zoo/llama"]
    assert data.vector.sel(method="pca").sizes["method"] == 2  # the trap: xarray returns everything
    assert data.nsteer.sel(method="pca", layer=5).identical(data.sel({"method": "pca", "layer": 5}))
    assert data.vector.nsteer.sel(method="pca").identical(data.vector.sel({"method": "pca"}))
    with pytest.raises(LabelError, match="method 'pcb' is not there; did you mean 'pca'"):
        data.nsteer.sel(method="pcb")


def test_the_accessor_of_a_tree_keeps_the_groups_that_hold_the_labels(results):
    tree = results.tree
    assert tree.attrs["nsteer_store"] == LAYOUT
    subtree = tree.nsteer.sel(method="pca", emotion="joy")
    for model in MODELS:
        layers, width = MODELS[model]
        vector = subtree[vectors(model).path].vector.sel(model=model, layer=layers[0])
        assert vector.values.tolist() == [truth(model, "pca", "joy", layers[0], d) for d in range(width)]
    assert subtree["runs"].sizes["run"] == 1
    branch = tree["vectors"].nsteer.sel(model="Org/Big", layer=7)
    assert [node.path for node in branch.leaves] == ["/org--big"]
    with pytest.raises(LabelError, match="layer 99 is not there"):
        tree.nsteer.sel(layer=99)
    with pytest.raises(LabelError, match="no group has dim 'emotin'; did you mean 'emotion'"):
        tree.nsteer.sel(emotin="joy")


# ---- unfinished cells


def half_write(path: Path, group: str, cell: tuple) -> None:
    """A cell as a kill leaves it: its data are there, its record is not."""
    leaf = Store(path).leaf(group)
    record = path / leaf.record_file(leaf.position(cell))
    assert record.exists()
    record.unlink()


def test_half_written_cells_do_not_show(path):
    plain = xr.open_zarr(path, group="steering", chunks=None)
    half_write(path, "steering", ("zoo/llama", "pca", "fear"))
    half_write(path, "generations", ("zoo/llama", "pca", "fear"))
    half_write(path, "vectors/zoo--llama", ("generation", "joy"))
    results, lost = nsteer.store.results.open(path), {"model": "zoo/llama", "method": "pca", "emotion": "fear"}
    assert plain.kl.sel(lost).notnull().all()  # the bytes are there
    steering, texts = results["steering"], results["generations"]
    assert steering.kl.sel(lost).isnull().all() and (steering.steps.sel(lost) == -1).all()
    assert (texts.text.sel(lost) == "").all() and steering.cell.sel(lost).isnull().all()
    whole = steering.kl.load()
    for model in MODELS:
        for method in METHODS:
            for emotion in ("joy", "fear"):
                cell = {"model": model, "method": method, "emotion": emotion}
                if cell != lost:
                    expected = truth(*cell.values(), 0.05, "p1")
                    assert whole.sel(cell).sel(strength=0.05, prompt="p1").item() == expected
    vector = results.tree["vectors/zoo--llama"].vector
    assert vector.sel({"method": "generation", "emotion": "joy"}).isnull().all()
    assert vector.sel({"method": "pca", "emotion": ["fear", "joy"]}).notnull().all()


KEYS = [
    {"emotion": slice(None, None, -1)},
    {"method": [1, 0], "emotion": [2, 0, 0]},
    {"method": 1, "layer": [1]},
    {"emotion": 1, "d_model": slice(2, 0, -1), "model": 0},
    {"model": 0, "method": 0, "emotion": 1, "layer": 1, "d_model": 2},
    {"emotion": xr.DataArray([0, 1, 2], dims="point"), "layer": xr.DataArray([1, 0, 1], dims="point")},
    {"emotion": []},
]


@pytest.mark.parametrize("key", KEYS)
def test_lazy_indexing_masks_as_indexing_the_loaded_does(path, key):
    half_write(path, "vectors/zoo--llama", ("pca", "fear"))
    data = nsteer.store.results.open(path)["vectors", "zoo/llama"].vector
    assert not data._in_memory
    loaded = data.copy().load()
    assert np.isnan(loaded.sel({"method": "pca", "emotion": "fear"})).all() and loaded.notnull().sum() == 18
    xr.testing.assert_identical(data.isel(key).load(), loaded.isel(key))


def test_chunks_show_only_when_finished(tmp_path):
    store = Store(tmp_path / "s.zarr")
    coords = {"method": METHODS, "sample": list("edcba"), "token": [1, 0]}
    over = ("token", "sample", "method")  # the cell axes in another order than the cell's
    group = Group("samples", coords, {"id": Variable(over, "int32", "id")}, ("method", "sample_chunk"), {"sample": 2})
    store.prepare([group])
    for chunk, labels in [(0, list("de")), (2, ["a"])]:
        ids = [[ord(label) + 256 * token for label in labels] for token in (0, 1)]
        data = xr.Dataset({"id": (("token", "sample"), ids)}, {"sample": labels, "token": [0, 1]})
        store.commit("samples", ("pca", chunk), data, fingerprint=1)
    read = nsteer.store.results.open(store.path)["samples"].id
    for label in "abcde":
        done = label in "ade"
        got = read.sel({"method": "pca", "sample": label, "token": 1}).item()
        assert got == (ord(label) + 256 if done else -1)
    assert (read.sel({"method": "generation"}) == -1).all()
    assert nsteer.store.results.cells(store.path).sample_chunk.tolist() == [0, 2]


def test_a_cell_computed_anew_while_it_is_read_is_an_error_not_a_mixture(path):
    results = nsteer.store.results.open(path)
    data = results["vectors", "zoo/llama"].vector
    other = vector_data("zoo/llama", "generation", "joy")
    Store(path).commit("vectors/zoo--llama", ("pca", "joy"), other, fingerprint=5)
    assert data.sel({"method": "pca", "emotion": "fear"}).notnull().all()
    with pytest.raises(
        StoreError, match=r"cell \('pca', 'joy'\) was computed again after this was opened; open it again"
    ):
        data.sel({"method": "pca"}).load()
    again = results["vectors", "zoo/llama"].vector.sel({"method": "pca", "emotion": "joy", "model": "zoo/llama"})
    assert again.sel(layer=5, d_model=1).item() == truth("zoo/llama", "generation", "joy", 5, 1)


# ---- tables


def test_the_table_of_cells(results):
    table = nsteer.store.results.cells(results)
    assert set(table.columns) == {
        "group", "model", "method", "emotion", "fingerprint", "run", "finished", "seconds",
    }  # fmt: skip
    assert len(table) == 8 + 8 + 8 and "awe" not in set(table.emotion)
    row = table.query("group == 'vectors/org--big' and method == 'pca' and emotion == 'fear'").iloc[0]
    assert int(row.fingerprint, 16) == fingerprint(["Org/Big", "pca", "fear"]) and len(row.fingerprint) == 13
    assert row.run == 0 and row.seconds == 0.5 and row.finished.year >= 2026
    assert len(nsteer.store.results.cells(str(results.path))) == 24


def test_the_table_of_an_empty_store(tmp_path):
    Store(tmp_path / "s.zarr").prepare([])
    results = nsteer.store.results.open(tmp_path / "s.zarr")
    assert nsteer.store.results.cells(results).empty and list(results) == [] and results.models == []
    assert repr(results).startswith(f"nsteer store {tmp_path}")


def facts(table) -> list[dict]:
    return table.to_dict("records")


def test_a_table_has_one_row_for_each_fact(path):
    half_write(path, "steering", ("zoo/llama", "pca", "fear"))
    results = nsteer.store.results.open(path)
    expected = [
        {"model": m, "method": how, "emotion": e, "strength": s, "prompt": p, "kl": truth(m, how, e, s, p)}
        | {"steps": int(truth(m, how, e, s, p))}
        for m in MODELS for how in METHODS for e in ("joy", "fear") for s in STRENGTHS for p in ("p0", "p1")
        if (m, how, e) != ("zoo/llama", "pca", "fear")
    ]  # fmt: skip
    assert facts(results.to_dataframe("steering")) == expected
    part = results.to_dataframe("steering", method=["pca"], emotion="joy", strength=slice(0.02, 1), prompt="p1")
    assert facts(part) == [
        row for row in expected
        if (row["method"], row["emotion"], row["strength"], row["prompt"]) == ("pca", "joy", 0.05, "p1")
    ]  # fmt: skip
    texts = results.to_dataframe("generations", model="Org/Big", method="pca", emotion="joy", strength=0.05)
    assert texts.text.tolist() == [f"快乐 {truth('Org/Big', 'pca', 'joy', 0.05, p)}" for p in ("p0", "p1")]
    assert results.to_dataframe("steering", emotion="awe").empty
    with pytest.raises(LabelError, match="emotion 'jooy' is not there; did you mean 'joy'"):
        results.to_dataframe("steering", emotion="jooy")
    with pytest.raises(LabelError, match="has no variable 'kll'; did you mean 'kl'"):
        results.to_dataframe("steering", "kll")


def test_a_table_of_vectors_has_their_norms_and_on_demand_their_numbers(results):
    table = results.to_dataframe(model="zoo/llama", method="pca")
    assert list(table.columns) == ["model", "method", "emotion", "layer", "norm", "depth"]
    assert table.norm.tolist() == [truth("zoo/llama", "pca", e, layer) for e in ("joy", "fear") for layer in (5, 2)]
    numbers = results.to_dataframe("vectors", "vector", model="zoo/llama", method="pca", layer=2, emotion="fear")
    assert numbers.vector.tolist() == [truth("zoo/llama", "pca", "fear", 2, d) for d in range(3)]


def test_a_table_of_samples_has_those_that_each_method_has(tmp_path):
    """Chunks of three: `pca` has four samples, `generation` five, and their last chunk is not written yet."""
    store, dims = Store(tmp_path / "s.zarr"), ("method", "sample")
    coords = {"method": METHODS, "sample": list(range(7, 0, -1))}
    words = {"text": Variable(dims, "string", "text"), "tokens": Variable(dims, "int32", "tokens")}
    store.prepare([Group("samples", coords, words, ("method", "sample_chunk"), {"sample": 3})])
    for method, longest in (("pca", 4), ("generation", 5)):
        for chunk, labels in enumerate([[7, 6, 5], [4, 3, 2]]):
            there = [7 - label < longest for label in labels]
            data = xr.Dataset(
                {
                    "text": ("sample", np.array([f"{method} {x}" * ok for x, ok in zip(labels, there, strict=True)])),
                    "tokens": ("sample", [x if ok else -1 for x, ok in zip(labels, there, strict=True)]),
                },
                {"sample": labels},
            )
            store.commit("samples", (method, chunk), data, fingerprint=1)
    table = nsteer.store.results.open(store.path).to_dataframe("samples")
    expected = [("generation", x) for x in (7, 6, 5, 4, 3)] + [("pca", x) for x in (7, 6, 5, 4)]
    assert list(zip(table.method, table["sample"], strict=True)) == expected
    assert table.text.tolist() == [f"{method} {x}" for method, x in expected]


def test_the_repr_says_what_is_there(results):
    lines = repr(results).splitlines()
    assert lines[0] == f"nsteer store {results.path}"
    assert [line.split()[:2] for line in lines[1:]] == [
        ["group", "cells"],
        ["generations", "8/12"],
        ["runs", "1/1"],
        ["steering", "8/12"],
        ["vectors/org--big", "4/6"],
        ["vectors/zoo--llama", "4/6"],
    ]
    assert lines[-1].endswith("model 1 · method 2 · emotion 3 · layer 2 · d_model 3")


def test_reading_results_loads_no_torch(path):
    code = "import sys, nsteer; print(nsteer.open(sys.argv[1])); assert 'torch' not in sys.modules"
    repository = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(path)], check=True, cwd=repository, timeout=120)


def test_no_code_of_ours_selects_by_the_keyword_method():
    """xarray takes `.sel(method=...)` for the way to fill gaps and returns everything."""
    here = Path(__file__).parents[1]
    trap = re.compile(r"(?<!nsteer)(?<!results)\.sel\([^)]*\bmethod\s*=")
    docs = '"""'
    for file in [*here.glob("nsteer/**/*.py"), *here.glob("bench/**/*.py")]:
        code = "".join(file.read_text(encoding="utf-8").split(docs)[::2])  # without docstrings
        hits = [hit.group() for hit in trap.finditer(code)]
        assert not hits, f"{file}: {hits}"
