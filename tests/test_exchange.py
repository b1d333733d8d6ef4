"""Files of vectors: what a store holds arrives in them, what others wrote arrives in a store, at the right block."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_runner import run as run_plan

import nsteer
from nsteer import cli, zoo
from nsteer.errors import DamagedError, ExchangeError, LabelError
from nsteer.models import facts as models
from nsteer.plan.schema import Model
from nsteer.science.presets import NEUTRAL
from nsteer.stages import arrays
from nsteer.store import Store, slug
from nsteer.vectors import chat, exchange

METHODS, EMOTIONS = ["generation", "reading"], ["happy", "sad"]
HOLE = 3
"""The layer at which `reading` / `sad` has no vector."""


def planted(model: str, method: str, emotion: str) -> np.ndarray:
    """[layer, d_model], every layer of its own length."""
    facts = models.facts(Model(id=model))
    seed = int.from_bytes(f"{model}{method}{emotion}".encode()[-8:], "big") % 2**32
    values = np.random.default_rng(seed).normal(size=(facts.n_layers, facts.d_model)).astype(np.float32)
    values *= np.arange(1, facts.n_layers + 1, dtype=np.float32)[:, None]
    if (method, emotion) == ("reading", "sad"):
        values[HOLE] = np.nan
    return values


def make(path: Path, *names: str) -> Path:
    """A store with planted vectors of embedded models."""
    store = Store(path)
    for name in names:
        facts = models.facts(Model(id=name))
        group = arrays.vectors_of(facts, METHODS, EMOTIONS)
        store.prepare([group])
        for method in METHODS:
            for emotion in EMOTIONS:
                if (method, emotion) == ("generation", "sad"):
                    continue  # never derived
                values = planted(name, method, emotion)
                dims = {"layer": range(facts.n_layers), "d_model": range(facts.d_model)}
                data = {
                    "vector": (("layer", "d_model"), values),
                    "norm": (("layer",), np.linalg.norm(values, axis=-1) * 2),
                    "n_samples": ((), 3),
                    "n_distinct": ((), 2),
                }
                store.commit(group.path, (name, method, emotion), arrays.dataset(dims, data), fingerprint=7)
    return path


@pytest.fixture
def store(tmp_path):
    return make(tmp_path / "mine.zarr", "zoo/gpt2")


def out(store: Path, name: str, **choices) -> tuple[Path, list[str]]:
    """One vector exported."""
    choices = {"methods": ["generation"], "emotions": ["happy"], **choices}
    (file,), notes = exchange.export(store, str(store.parent / name), **choices)
    return file, notes


def held(store: Path, model: str, method: str, emotion: str) -> np.ndarray:
    results = nsteer.open(store)
    return results.sel(model=model, method=method, emotion=emotion).values


# ---- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["all.safetensors", "all.npz"])
def test_safetensors_and_npz_there_and_back_to_the_last_bit(store, tmp_path, name):
    file, notes = out(store, name, methods=[], emotions=[])
    assert notes == ["generation / sad: not in the store, left out"]
    cells = exchange.bring_in(file, tmp_path / "other.zarr", model="zoo/gpt2").cells
    assert {cell[1:] for cell in cells} == {("generation", "happy"), ("reading", "happy"), ("reading", "sad")}
    for _, method, emotion in cells:
        np.testing.assert_array_equal(
            held(tmp_path / "other.zarr", "zoo/gpt2", method, emotion), planted("zoo/gpt2", method, emotion)
        )


def test_safetensors_say_what_they_hold(store):
    from safetensors import safe_open

    file, _ = out(store, "one.safetensors", methods=["reading"], emotions=["sad"])
    with safe_open(file, framework="np") as opened:
        about = json.loads(opened.metadata()["nsteer"])["vectors"]["reading/sad"]
        tensor = opened.get_tensor("reading/sad")
    assert about["layers"] == [0, 1, 2, 4, 5] and tensor.shape == (5, 96)  # without the missing value
    assert about["layers_are"] == "block-index" and about["site"] == "resid_post" and about["scale"] == "raw"
    facts = models.facts(Model(id="zoo/gpt2"))
    assert about["model"]["identity"] == facts.identity and about["model"]["model_type"] == "gpt2"
    assert about["norms"]["5"] == pytest.approx(np.linalg.norm(planted("zoo/gpt2", "reading", "sad")[5]), rel=1e-6)
    assert about["norms_before_unit_norm"]["5"] == pytest.approx(2 * about["norms"]["5"], rel=1e-6)


@pytest.mark.parametrize("name", ["v.gguf", "v.json", "v.pt", "v.npz"])
def test_the_other_formats_there_and_back(store, tmp_path, name):
    file, _ = out(store, name, layers=[5, 2], strength=-1.5)
    ((_, method, emotion),) = exchange.bring_in(file, tmp_path / "other.zarr", model="zoo/gpt2").cells
    assert (method, emotion) == ("generation", "happy")
    vectors, true = held(tmp_path / "other.zarr", "zoo/gpt2", method, emotion), planted("zoo/gpt2", method, emotion)
    np.testing.assert_allclose(vectors[[5, 2]], -1.5 * true[[5, 2]], rtol=1e-6)
    assert np.isnan(vectors[[0, 1, 3, 4]]).all()


@pytest.mark.parametrize(("scale", "length"), [("unit", 4.0), ("raw", None), ("reference_norm", 4.0 * 2.5)])
def test_strength_is_in_the_unit_of_scale(store, scale, length):
    kept = {"samples": 2, "neutral_samples": None}
    put_neutral(store, kept, [[2.0, 3.0], [100.0, 100.0]])  # two samples that count, two left over from before
    file, _ = out(store, "v.json", layers=2, scale=scale, strength=4.0)
    true = planted("zoo/gpt2", "generation", "happy")[2]
    (vector,) = exchange.read(file).vectors["generation", "happy"].values()
    assert np.linalg.norm(vector) == pytest.approx(length or 4 * np.linalg.norm(true), rel=1e-5)
    assert vector @ true / np.linalg.norm(vector) / np.linalg.norm(true) == pytest.approx(1, abs=1e-6)


def put_neutral(path: Path, protocol: dict, norms: list[list[float]]) -> None:
    """Neutral samples whose streams have these norms, at every layer; a protocol that says how many count."""
    from dataclasses import replace

    import xarray as xr

    facts, opened = models.facts(Model(id="zoo/gpt2")), Store(path)
    group = arrays.Group(
        f"activations/{slug(facts.label)}",
        {"model": [facts.label], "method": METHODS, "emotion": [NEUTRAL], "sample": range(4), "layer": range(6)},
        {"token_norm": arrays.number((*arrays.SAMPLE, "layer"), "norm")},
        ("model", "method", "emotion", "sample_chunk"),
        {"sample": 4},
        attrs=arrays.attributes("activations"),
    )
    opened.prepare([group, replace(arrays.Group("methods", {"method": METHODS}, {"protocol": arrays.text(("method",), "")}, ("method",)), attrs=arrays.attributes("methods"))])  # fmt: skip # noqa: E501
    data = arrays.dataset(
        {"sample": range(4), "layer": range(6)},
        {"token_norm": (("sample", "layer"), np.repeat(np.ravel(norms).astype(np.float32)[:, None], 6, 1))},
    )
    opened.commit(group.path, (facts.label, "generation", NEUTRAL, 0), data, fingerprint=1)
    protocols = xr.Dataset({"protocol": ((), json.dumps(protocol))})
    opened.commit("methods", ("generation",), protocols, fingerprint=1)


# ---- what others read --------------------------------------------------------------------------------------------


def test_gguf_is_what_llama_cpp_takes(store):
    """As its loader checks: the architecture; names direction.N with N from 1; F32, one dimension, one width."""
    import gguf

    file, notes = out(store, "v.gguf")
    assert notes == ["block 0 is left out: llama.cpp's control vectors have no slot for it"]
    reader = gguf.GGUFReader(file)

    def text(name: str) -> str:
        return bytes(reader.get_field(name).parts[-1]).decode()

    assert text("general.architecture") == "controlvector" and text("controlvector.model_hint") == "gpt2"
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 5
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [f"direction.{layer}" for layer in range(1, 6)]
    for layer in (5, 2):
        tensor = tensors[f"direction.{layer}"]
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32 and tensor.shape.tolist() == [96]
        np.testing.assert_array_equal(tensor.data, planted("zoo/gpt2", "generation", "happy")[layer])


def test_gguf_refuses_block_0_when_it_is_named(store):
    with pytest.raises(ExchangeError, match="no slot for block 0"):
        out(store, "v.gguf", layers=[0, 2])


REPENG = """
import sys, numpy as np
from repeng import ControlVector
theirs = ControlVector.import_gguf(sys.argv[1])
assert theirs.model_type == "gpt2", theirs.model_type
np.savez(sys.argv[2], **{str(k): v for k, v in theirs.directions.items()})
(theirs * 2 + ControlVector("gpt2", {0: np.ones(96, np.float32)})).export_gguf(sys.argv[3])
"""


def test_repeng_reads_ours_and_we_read_theirs(store, tmp_path):
    """With the peer itself, where NSTEER_PEERS names the folder that bench/peers/setup.py filled."""
    python = Path(os.environ.get("NSTEER_PEERS", "")) / "repeng/bin/python"
    if not python.is_file():
        pytest.skip("NSTEER_PEERS names no folder with an environment of repeng")
    file, _ = out(store, "v.gguf", layers="1:")
    theirs = [str(tmp_path / name) for name in ("theirs.npz", "theirs.gguf")]
    subprocess.run([python, "-c", REPENG, file, *theirs], check=True)
    true = planted("zoo/gpt2", "generation", "happy")
    for path, factor in zip(theirs, (1, 2), strict=True):
        named = {"layers_are": "block-index", "method": Path(path).stem, "emotion": Path(path).suffix[1:]}
        ((*_, emotion),) = exchange.bring_in(path, tmp_path / "o.zarr", model="zoo/gpt2", **named).cells
        vectors = held(tmp_path / "o.zarr", "zoo/gpt2", "theirs", emotion)
        np.testing.assert_array_equal(vectors[1:], factor * true[1:])
    np.testing.assert_array_equal(vectors[0], np.ones(96))  # block 0, which repeng knows and llama.cpp does not


def test_easysteer_gets_a_payload_that_fits_its_digest(store):
    file, _ = out(store, "v.json", layers=[5, 0])
    payload = json.loads(file.read_text())
    assert (payload["version"], payload["kind"], payload["extra"]) == (1, "direction", {})
    assert set(payload["tensors"]) == {"layer.0", "layer.5"}
    said = hashlib.sha256(b"direction:1")
    for name in ("layer.0", "layer.5"):
        raw = base64.b64decode(payload["tensors"][name]["data"])
        true = planted("zoo/gpt2", "generation", "happy")[int(name[-1])]
        assert raw == true.tobytes() and payload["tensors"][name]["shape"] == [96]
        said.update(name.encode() + b"(96,)" + raw)
    assert payload["sha256"] == said.hexdigest()
    payload["tensors"]["layer.5"] = payload["tensors"]["layer.0"]
    file.write_text(json.dumps(payload))
    with pytest.raises(ExchangeError, match="sha256"):
        exchange.read(file)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("op", ["add", "clamp"])
def test_an_lm_eval_config_does_what_nsteer_does(zoo_model, tmp_path, name, op):
    """Hooks that do what lm-eval documents, at the hookpoints of the file, against nsteer's own edit."""
    from nsteer.executors.common import tensors
    from nsteer.program.form import EditSite, Form, ReadSite, Row, RowEdit, assemble

    executor, store = zoo_model(name), make(tmp_path / "m.zarr", f"zoo/{name}")
    last = executor.anatomy.n_layers - 1
    file, _ = out(store, "v.pt", layers=[last, 1], op=op, scale="unit", strength=9.0)
    config = torch.load(file, weights_only=True)
    base = dict(executor.module.base_model.named_modules())
    assert set(config) <= set(base) and [spec["bias"] for spec in config.values()] == [None, None]

    def hook(spec: dict):
        vector, value = spec["steering_vector"], spec["steering_coefficient"]

        def edit(module, inputs, output):
            acts = output[0] if isinstance(output, tuple) else output
            if spec["action"] == "add":
                acts = acts + vector * value
            else:
                unit = vector / vector.norm()
                acts = acts + unit * (value - (acts * unit).sum(-1, keepdim=True))
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        return edit

    true = planted(f"zoo/{name}", "generation", "happy")
    tokens = (5, 9, 7, 3)
    even = np.full(4, 0.25, np.float32)
    edits = tuple(
        RowEdit(true[layer] / np.linalg.norm(true[layer]), 9.0, np.ones(4, bool), True, even) for layer in (1, last)
    )
    form = Form(reads=(ReadSite(last, what="tokens"),), edits=(EditSite(1, op), EditSite(last, op)))
    program = assemble(form, [Row(0, tokens, {}, edits)])
    mine = executor.run(program).streams[0][0]
    seen = {}
    handles = [base[place].register_forward_hook(hook(spec)) for place, spec in config.items()]
    handles.append(
        base[f"{next(iter(config)).rpartition('.')[0]}.{last}"].register_forward_hook(
            lambda m, i, o: seen.update(stream=o[0] if isinstance(o, tuple) else o)
        )
    )
    with torch.no_grad():
        executor.module(**tensors(program, executor.anatomy)["inputs"])
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(seen["stream"][0].float().numpy(), mine, rtol=1e-4, atol=1e-3)


def test_a_name_with_places_gives_a_file_a_vector(store, tmp_path):
    files, _ = exchange.export(store, str(tmp_path / "{method}-{emotion}.gguf"), methods=["reading"], layers=[5, 2])
    assert sorted(file.name for file in files) == ["reading-happy.gguf", "reading-sad.gguf"]
    with pytest.raises(ExchangeError, match=r"2 vectors for a \.gguf file.*\{emotion\}"):
        exchange.export(store, str(tmp_path / "all.gguf"), methods=["reading"], layers=[5, 2])


def test_a_label_that_is_a_path_names_no_file(tmp_path):
    facts, store = models.facts(Model(id="zoo/gpt2")), Store(tmp_path / "s.zarr")
    group = arrays.vectors_of(facts, ["m"], ["../../out"])
    store.prepare([group])
    ones = np.ones((6, 96), np.float32)
    data = {"vector": (("layer", "d_model"), ones), "norm": (("layer",), ones[:, 0])}
    data |= {"n_samples": ((), 1), "n_distinct": ((), 1)}
    contents = arrays.dataset({"layer": range(6), "d_model": range(96)}, data)
    store.commit(group.path, ("zoo/gpt2", "m", "../../out"), contents, fingerprint=1)
    (tmp_path / "a/b").mkdir(parents=True)
    with pytest.raises(ExchangeError, match="can not be a part of a file's name"):
        exchange.export(tmp_path / "s.zarr", str(tmp_path / "a/b/{emotion}.json"))
    assert {file.name for file in tmp_path.rglob("*.json")} == {"zarr.json"}


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"name": "v.xyz"}, "ends in one of .safetensors"),
        ({"name": "none/v.pt"}, "no such folder"),
        ({"name": "v.gguf", "op": "clamp"}, "op 'clamp' in .gguf"),
        ({"name": "v.pt", "op": "rotate"}, "op 'rotate'"),
        ({"name": "v.json", "scale": "stream_norm"}, "scale 'stream_norm'"),
        ({"name": "v.json", "strength": 0.0}, "strength 0.0"),
        ({"name": "v.json", "layers": 99}, "layer 99 of a model with 6 layers"),
        ({"name": "v.json", "methods": ["reading"], "emotions": ["sad"], "layers": [HOLE, 5]}, "no vector at layer 3"),
        ({"name": "v.json", "scale": "reference_norm"}, "no neutral samples of 'generation'"),
    ],
)
def test_what_a_file_can_not_hold_is_refused(store, choices, words):
    with pytest.raises(ExchangeError) as error:
        out(store, **choices)
    assert words in str(error.value)
    assert not list(store.parent.glob("v.*"))


def test_unknown_labels_name_the_known_ones(store):
    with pytest.raises(LabelError, match="did you mean 'happy'"):
        out(store, "v.json", emotions=["hapy"])
    with pytest.raises(LabelError, match="zoo/gpt2"):
        out(store, "v.json", model="zoo/llama")


def test_of_several_models_one_must_be_named(tmp_path):
    store = make(tmp_path / "two.zarr", "zoo/gpt2", "zoo/llama")
    with pytest.raises(ExchangeError, match="name one with --model"):
        out(store, "v.json")
    file, _ = out(store, "v.json", model="zoo/llama", layers=[4, 2])
    assert list(exchange.read(file).vectors["generation", "happy"]) == [2, 4]


# ---- what others wrote -------------------------------------------------------------------------------------------

LABELS = {"model": "zoo/gpt2", "method": "theirs", "emotion": "evil"}


def numbers(layers: int = 6, width: int = 96) -> torch.Tensor:
    """[layer, d_model], the layer's own number everywhere."""
    return torch.arange(layers).float()[:, None].expand(layers, width).clone() + 100


@pytest.mark.parametrize(
    ("convention", "rows", "first", "notes"),
    [("block-index", 6, 100, 0), ("one-based", {3: 0, 6: 0}, None, 0), ("hidden-states", 7, 101, 2)],
)
def test_layers_go_where_the_convention_says(tmp_path, convention, rows, first, notes):
    matrix = numbers(7) if convention != "block-index" else numbers(6)
    torch.save({str(k): matrix[k] for k in rows} if isinstance(rows, dict) else matrix[:rows], tmp_path / "v.pt")
    said = exchange.bring_in(tmp_path / "v.pt", tmp_path / "s.zarr", layers_are=convention, **LABELS).notes
    vectors = held(tmp_path / "s.zarr", "zoo/gpt2", "theirs", "evil")
    if first is None:
        assert (vectors[2] == 103).all() and (vectors[5] == 106).all() and np.isnan(vectors[[0, 1, 3, 4]]).all()
    else:
        np.testing.assert_array_equal(vectors, numbers().numpy() - 100 + first)
    assert len(said) == notes + (convention != "one-based")  # and that the rows are all layers


def test_a_persona_vector_lands_on_the_block_whose_output_it_was(zoo_model, tmp_path):
    """hidden_states of transformers, as persona vectors are made, against the streams that nsteer itself reads."""
    from nsteer.program.form import Row, assemble
    from nsteer.stages import forms

    executor = zoo_model("gpt2")
    with torch.no_grad():
        states = executor.module(torch.tensor([[5, 9, 7]]), output_hidden_states=True).hidden_states
    torch.save(torch.stack([state[0].mean(0) for state in states]), tmp_path / "evil_response_avg_diff.pt")
    exchange.bring_in(tmp_path / "evil_response_avg_diff.pt", "s.zarr", layers_are="hidden-states", **LABELS)
    even = {"text": np.full(3, 1 / 3, np.float32)}
    true = executor.run(assemble(forms.capture(range(6)), [Row(0, (5, 9, 7), even | {"norm": even["text"]})])).pooled[0]
    vectors = held(Path("s.zarr"), "zoo/gpt2", "theirs", "evil")
    np.testing.assert_allclose(vectors[:5], true[:5], rtol=1e-4, atol=1e-4)
    assert not np.allclose(vectors[5], true[5], rtol=0.1)  # after the final norm: that is what the note says
    said = json.loads(nsteer.open("s.zarr")["imports"].provenance.item())
    assert "final norm" in " ".join(said["notes"]) and said["layers_are"] == "hidden-states"
    assert said["sha256"] == hashlib.sha256(Path("evil_response_avg_diff.pt").read_bytes()).hexdigest()


class Trap:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize("form", ["pt", "pth", "npz", "pkl", "pt-dict", "pt-zip", "safetensors", "json", "gguf"])
def test_no_file_runs_code(tmp_path, form):
    file = tmp_path / f"v.{form.split('-')[0]}"
    if form == "npz":
        np.savez(file, **{"0": np.array([Trap()], object)})
    elif form == "pt-zip":
        torch.save(Trap(), file)
    elif form == "pt-dict":
        torch.save({"0": torch.zeros(96), "1": Trap()}, file)
    else:
        file.write_bytes(pickle.dumps({0: Trap()}))
    with pytest.raises(ExchangeError):
        exchange.bring_in(file, tmp_path / "s.zarr", layers_are="block-index", **LABELS)
    assert not Path("sprung").exists() and not (tmp_path / "s.zarr").exists()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("sprung").exists()  # the trap is one


def test_files_that_do_not_fit_are_refused(tmp_path):
    def refused(content, words: str, layers_are="block-index", **labels) -> None:
        torch.save(content, tmp_path / "v.pt")
        with pytest.raises(ExchangeError) as error:
            exchange.bring_in(tmp_path / "v.pt", tmp_path / "s.zarr", layers_are=layers_are, **{**LABELS, **labels})
        assert words in str(error.value), error.value

    refused(numbers(6, 95), "holds an array [6, 95]: none is of width 96")
    by_layer = {str(k): vector for k, vector in enumerate(numbers(7))}
    refused(by_layer, "layer 6 of the file, under --layers-are block-index: the model has 6 blocks, 0 to 5")
    refused({"0": numbers()[0]}, "layer 0 of the file, under --layers-are one-based", "one-based")
    refused(numbers(6), "'\\x1b[2J' is no label on the emotion axis", emotion="\x1b[2J")
    refused({"0": numbers()[0], "x": numbers()[1]}, "nothing says which layer 'x' [96] is of")
    refused({"layer.1": numbers()[0], "mlp.1": numbers()[1]}, "nothing says which layer 'mlp.1' [96] is of")
    refused({"0": [1.0]}, "it holds list")
    refused(torch.full((6, 96), torch.nan), "layer 0 is no vector of finite numbers")
    refused([torch.zeros(96)], "nothing says which layer an array [1, 96] is of")
    refused({}, "holds no array")


def test_a_vector_of_ones_own_samples_is_never_replaced(store):
    torch.save(numbers(), "v.pt")
    with pytest.raises(ExchangeError, match="was not imported: name another --method"):
        exchange.bring_in("v.pt", store, model="zoo/gpt2", layers_are="block-index", method="reading", emotion="happy")
    for vectors in (numbers(), numbers() * 2):  # an import is replaced by another
        torch.save(vectors, "v.pt")
        exchange.bring_in("v.pt", store, layers_are="block-index", **LABELS)
        np.testing.assert_array_equal(held(store, "zoo/gpt2", "theirs", "evil"), vectors.numpy())


def test_another_model_is_noted(store, tmp_path):
    file, _ = out(store, "v.gguf")
    imported = exchange.bring_in(file, tmp_path / "o.zarr", model=str(zoo.path("gpt2")), label="mine")
    assert imported.notes == []
    from nsteer.vectors.exchange import arriving

    facts = models.facts(Model(id="zoo/llama"))
    (note,) = arriving._other_model(exchange.read(file), None, facts)
    assert note == "the file was made for the architecture gpt2, zoo/llama is llama"


# ---- imported vectors are used -----------------------------------------------------------------------------------


def plan_of(tmp_path: Path, source: Path) -> Path:
    plan = {
        "name": "borrowing",
        "models": ["zoo/gpt2"],
        "texts": "zoo",
        "prompts": ["the old house was"],
        "reads": {"all": {"layers": [5, 2]}},
        "directions": {"evil": {"store": {"path": str(source), "method": "theirs", "emotion": "evil"}}},
        "edits": {"steered": [{"op": "add", "direction": "evil", "layers": [5, 2], "strength": 0.5}]},
        "store": str(tmp_path / "borrowing.zarr"),
        "threads": 1,
    }
    (tmp_path / "borrowing.yaml").write_text(json.dumps(plan))
    return tmp_path / "borrowing.yaml"


def test_a_plan_uses_an_imported_vector_and_sees_another_one(tmp_path):
    """The edit at the last layer is read after it: exactly the vector of the file more, whatever came before."""
    source, plan = tmp_path / "theirs.zarr", plan_of(tmp_path, tmp_path / "theirs.zarr")
    streams = {}
    for factor in (1.0, 3.0):
        torch.save(numbers() * factor, tmp_path / "v.pt")
        exchange.bring_in(tmp_path / "v.pt", source, layers_are="block-index", **LABELS)
        summary = run_plan(plan)
        assert not summary.failures and summary.done["streams"] == (2 if factor == 1 else 1)
        stream = Store(tmp_path / "borrowing.zarr").read("streams/zoo--gpt2").stream.load()
        streams[factor] = stream.sel({"layer": 2, "edit": "steered", "strength": 0.5}) - stream.sel(
            {"layer": 2, "edit": "none", "strength": 0}
        )
        np.testing.assert_allclose(streams[factor].dropna("position").values, factor * 0.5 * 102, rtol=1e-4)
    assert not run_plan(plan).done


def test_upkeep_knows_imported_vectors(store, tmp_path):
    from nsteer.plan import check
    from nsteer.upkeep import gc, verify
    from nsteer.upkeep.collect import collect

    torch.save(numbers(), "v.pt")
    exchange.bring_in("v.pt", store, layers_are="block-index", **LABELS)
    assert verify.verify(Store(store)).clean
    gone = gc.plan(Store(store), [check.load(plan_of(tmp_path, store))], older=0)
    assert {waste.cell[1] for waste in gone.cells} == {"generation", "reading"}  # no plan asks for those
    collect(Store(store), gone)
    np.testing.assert_array_equal(held(store, "zoo/gpt2", "theirs", "evil"), numbers().numpy())


# ---- commands ----------------------------------------------------------------------------------------------------


def command(*words: str):
    return CliRunner().invoke(cli.main, list(words), catch_exceptions=False)


def test_the_commands(store):
    done = command(
        "export", str(store), "-o", "v.gguf", "--method", "generation", "--emotion", "happy", "--layer", "2-5"
    )
    assert (done.exit_code, done.stdout) == (0, "wrote v.gguf\n")
    done = command("import", "v.gguf", "--into", "o.zarr", "--model", "zoo/gpt2", "--method", "back", "--json")
    cell = {"model": "zoo/gpt2", "method": "back", "emotion": "happy", "blocks": [2, 3, 4, 5]}
    assert json.loads(done.stdout) == {"cells": [cell], "notes": []}
    vectors, true = held(Path("o.zarr"), "zoo/gpt2", "back", "happy"), planted("zoo/gpt2", "generation", "happy")
    np.testing.assert_array_equal(vectors[2:], true[2:])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "mine.zarr", "-o", "v.json", "--layer", "x"], "error: layers: 'x' is no layer"),
        (["export", "none.zarr", "-o", "v.json"], "error: no store at none.zarr"),
        (["import", "none.pt", "--into", "o.zarr", "--model", "zoo/gpt2"], "error: none.pt: no such file"),
    ],
)
def test_what_goes_wrong_is_one_line(store, words, said):
    done = command(*words)
    assert done.exit_code in (1, 2) and said in done.stderr and "Traceback" not in done.stderr


def test_a_vector_of_another_one_s_values_is_not_exported(store):
    """A whole file, with its own checksum right, that holds another cell's values: such as an old copy brings back."""
    group = store / "vectors" / slug("zoo/gpt2") / "vector"
    leaf = Store(store).leaf(f"vectors/{slug('zoo/gpt2')}")
    mine, other = (
        group / f"c.{'.'.join(map(str, leaf.position(('zoo/gpt2', 'reading', e))))}.0.0" for e in ("happy", "sad")
    )
    mine.write_bytes(other.read_bytes())
    with pytest.raises(DamagedError, match="reading / happy is damaged: it does not hold what was committed"):
        out(store, "v.npz", methods=["reading"])
    with pytest.raises(DamagedError, match="does not hold what was committed"):
        chat.start("zoo/gpt2", vector=f"{store}:reading/happy", chat="never", strength=0.4, new_tokens=8)
    out(store, "v.npz")


def test_a_reference_norm_of_other_values_is_not_used(store, tmp_path):
    kept = {"samples": 2, "neutral_samples": None}
    other = make(tmp_path / "other.zarr", "zoo/gpt2")
    for path, norms in ((store, [[2.0, 3.0]]), (other, [[7.0, 8.0]])):
        put_neutral(path, kept, norms * 2)
    name = f"activations/{slug('zoo/gpt2')}/token_norm/c.0.0.0.0.0"
    (store / name).write_bytes((other / name).read_bytes())
    with pytest.raises(DamagedError, match=f"{NEUTRAL} / 0 is damaged: it does not hold what was committed"):
        out(store, "v.json", layers=2, scale="reference_norm")
