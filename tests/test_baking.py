"""Baked weights do what the edit does, seen by plain transformers; what weights can not hold is refused in a line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tinies
import torch
import xarray as xr
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsteer
from nsteer import cli, zoo
from nsteer.errors import BakeError, LabelError
from nsteer.models import facts as models
from nsteer.plan.schema import Model
from nsteer.stages import imported
from nsteer.store import Store
from nsteer.vectors import baking

TEXTS = ["tom walked to the market and", "the rain fell", "a happy girl sang in the sun by the old house"]
VECTOR = {"method": "given", "emotion": "v"}
LAYERS = [4, 2]


def vector_store(model: str, store: str) -> Path:
    """A store with one drawn vector of a model, at each layer another."""
    facts = models.facts(Model(id=model))
    draw = np.random.default_rng(5)
    values = {layer: draw.normal(size=facts.d_model).astype(np.float32) for layer in range(facts.n_layers)}
    into = Store(store)
    with into.adding():
        imported.commit(into, facts, {("given", "v"): values}, {})
    return Path(store)


def tiny(name: str) -> str:
    tinies.model(name).save_pretrained(name)
    tinies.tokenizer().save_pretrained(name)
    return name


def left() -> list[str]:
    """What lies in the folder, but for the lock of the store."""
    return sorted(path.name for path in Path().iterdir() if path.suffix != ".lock")


def loaded(folder: str | Path):
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()


def logits(model, tokenizer, texts) -> list[np.ndarray]:
    """[position, token] of each text, read together, padded on the left."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**batch, position_ids=positions).logits
    return [row[mask.bool()].numpy() for row, mask in zip(out, batch["attention_mask"], strict=True)]


@pytest.fixture(autouse=True)
def stands(tmp_path):
    """In an empty folder (tests/conftest.py)."""


# ---- what is baked -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strength"), [("gpt2", 1.0), ("qwen", 0.5)])
def test_a_direction_taken_out_is_what_the_edits_of_a_plan_do(name, strength):
    store = vector_store(f"zoo/{name}", "s.zarr")
    baked = baking.bake(store, "baked", **VECTOR, layers=[2], strength=strength)
    assert baked.error < 1e-5 < 1e-2 < baked.effect
    edit = {"op": "project_out", "direction": "v", "vector_layer": 2, "strength": strength}
    everywhere = [{**edit, "site": site} for site in ("attn_out", "mlp_out")]
    study = nsteer.plan(
        {
            "name": "ablated",
            "models": [f"zoo/{name}"],
            "directions": {"v": {"store": {"path": str(store), **VECTOR}}},
            "edits": {"out": [{**edit, "site": "resid_pre", "layers": 0}, *everywhere]},
            "prompts": TEXTS,
            "generate": {"max_new_tokens": 8},
            "store": "edited.zarr",
        }
    )
    assert not nsteer.run(study).failures
    texts = nsteer.open("edited.zarr")["edited"].text
    model, tokenizer = loaded("baked"), AutoTokenizer.from_pretrained("baked")
    for prompt in TEXTS:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=8, do_sample=False)
        said = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert texts.sel(edit="out", strength=strength, prompt=prompt).item().strip() == said.strip()
    plain = loaded(zoo.path(name))
    far = [np.abs(a - b).max() for a, b in zip(logits(model, tokenizer, TEXTS), logits(plain, tokenizer, TEXTS))]
    assert min(far) > 1e-2


def test_nothing_along_the_direction_is_written_and_the_head_is_as_it_was():
    vector_store("zoo/gpt2", "s.zarr")
    baking.bake("s.zarr", "baked", **VECTOR, layers=[2])
    vector = nsteer.open("s.zarr").sel(model="zoo/gpt2", layer=2, **VECTOR).values
    unit = torch.from_numpy(vector / np.linalg.norm(vector))
    model, plain = loaded("baked"), loaded(zoo.path("gpt2"))
    out = model(**AutoTokenizer.from_pretrained("baked")(TEXTS[2], return_tensors="pt"), output_hidden_states=True)
    for stream in out.hidden_states[:-1]:  # the last is after the final norm
        assert ((stream @ unit).abs() / stream.norm(dim=-1)).max() < 1e-5
    assert plain.lm_head.weight is plain.transformer.wte.weight and not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert not torch.equal(model.transformer.wte.weight, plain.transformer.wte.weight)
    said = json.loads(Path("baked/nsteer.json").read_text())
    assert said["baked"] == {"op": "project_out", "strength": 1.0, "layers": [2]} and said["vector"]["emotion"] == "v"


def test_a_constant_in_biases_is_what_steer_adds():
    store = vector_store("zoo/gpt2", "s.zarr")
    baking.bake(store, "baked", **VECTOR, op="add", layers=LAYERS, strength=2.5, scale="unit")
    vector = nsteer.open(store).sel(model="zoo/gpt2", **VECTOR)
    assert isinstance(vector, xr.DataArray)
    plain, model, tokenizer = loaded(zoo.path("gpt2")), loaded("baked"), AutoTokenizer.from_pretrained("baked")
    baked, unsteered = logits(model, tokenizer, TEXTS), logits(plain, tokenizer, TEXTS)
    with nsteer.steer(plain, vector, LAYERS, strength=2.5, scale="unit"):
        wanted = logits(plain, tokenizer, TEXTS)
    for a, b, c in zip(baked, wanted, unsteered, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
        assert np.abs(b - c).max() > 100 * np.abs(a - b).max()


def test_a_narrow_dtype_is_within_its_rounding_or_refused():
    vector_store("zoo/llama", "s.zarr")
    baked = baking.bake("s.zarr", "narrow", **VECTOR, layers=[3], dtype="float16")
    assert json.loads(Path("narrow/config.json").read_text())["dtype"] == "float16" and baked.error > 1e-5
    with pytest.raises(BakeError, match="rounding to bfloat16 hides the edit"):
        baking.bake("s.zarr", "faint", **VECTOR, layers=[3], strength=1e-3, dtype="bfloat16")
    assert not Path("faint").exists()


def test_the_folder_is_a_model_like_any_other():
    vector_store("zoo/llama", "s.zarr")
    shown = CliRunner().invoke(
        cli.main, "bake s.zarr -o baked --method given --emotion v --layer 3 --json".split(), catch_exceptions=False
    )
    assert shown.exit_code == 0 and json.loads(shown.stdout)["error"] < 1e-4
    assert nsteer.capture("baked", TEXTS[:1], layers=[2], pooling="last").notnull().all()
    again = CliRunner().invoke(cli.main, "bake s.zarr -o baked --method given --emotion v --layer 3".split())
    assert again.exit_code == 1 and again.output == "error: baked is there: name a folder that is not\n"


# ---- what is refused ---------------------------------------------------------------------------------------------

REFUSED = [
    ("gemma", {}, "attn_out of layer 0 comes from no linear layer but from Gemma2RMSNorm"),
    ("bloom", {}, "not the sum of embeddings alone"),
    ("granite", {"op": "add"}, "multiply what the MLP adds by 0.5"),
    ("llama", {"op": "add"}, "ends in no bias"),
]


@pytest.mark.parametrize(("name", "more", "words"), REFUSED, ids=[f"{n}-{m.get('op', '')}" for n, m, _ in REFUSED])
def test_what_no_weight_holds_exactly_is_refused(name, more, words):
    vector_store(tiny(name), "s.zarr")
    with pytest.raises(BakeError, match=words) as raised:
        baking.bake("s.zarr", "baked", **VECTOR, layers=[2], **more)
    assert "\n" not in str(raised.value) and left() == [name, "s.zarr"]


WRONG = [
    ({"layers": None}, "name layers, the one whose vector it is: the vector has 0, 1, 2"),
    ({"layers": [1, 3]}, "2 layers: one direction is taken out of the whole stream"),
    ({"layers": [99]}, "layer 99"),
    ({"op": "clamp"}, "op 'clamp': weights hold no other edit exactly"),
    ({"op": "add", "scale": "stream_norm"}, "an amount that depends on the text is in no weight"),
    ({"strength": 0.0}, "strength 0.0"),
    ({"dtype": "int8"}, "dtype 'int8'"),
    ({"folder": "nowhere/baked"}, "no such folder as nowhere"),
]


@pytest.mark.parametrize(("said", "words"), WRONG, ids=[next(iter(said)) for said, _ in WRONG])
def test_mistakes_are_told_before_a_model_loads(said, words, monkeypatch):
    vector_store("zoo/gpt2", "s.zarr")
    monkeypatch.setattr(baking, "load", None)
    with pytest.raises(BakeError, match=words):
        baking.bake("s.zarr", **{"folder": "baked", **VECTOR, "layers": [2], **said})


def test_labels_and_weights_must_be_those_of_the_store():
    folder = Path(shutil.copytree(zoo.path("gpt2"), "mine"))
    vector_store("mine", "s.zarr")
    with pytest.raises(LabelError, match="did you mean 'given'"):
        baking.bake("s.zarr", "baked", method="givn", emotion="v", layers=[2])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 0.1}))
    results = nsteer.open("s.zarr")
    assert "models" not in results  # so the store tells nothing of its weights, and the folder as it is is taken
    with pytest.raises(BakeError, match="not those that the vector was made of"):
        baking._facts({"id": "mine", "revision": "", "identity": "another", "gguf": ""})


def test_weights_that_do_not_do_what_the_edit_does_are_not_kept(monkeypatch):
    vector_store("zoo/gpt2", "s.zarr")
    honest, count = baking._orthogonal, []

    def forgetful(into, bias, unit, strength):
        """Leaves the biases as they are."""
        count.append(bias)
        honest(into, None, unit, strength)

    monkeypatch.setattr(baking, "_orthogonal", forgetful)
    with pytest.raises(BakeError, match="do not do what the edit does"):
        baking.bake("s.zarr", "baked", **VECTOR, layers=[2])
    assert any(bias is not None for bias in count) and left() == ["s.zarr"]
