"""Adapters: merged weights compute what peft computes unmerged; their files are part of a model's identity."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tinies
import torch
from click.testing import CliRunner
from safetensors.numpy import save_file

import nsteer
from nsteer import cli
from nsteer.errors import ModelError
from nsteer.models import facts as models
from nsteer.plan.schema import Model

PLAN = """
name: p
models:
  - {id: base, peft: adapter, label: m}
prompts: {a: the cat sat on the mat, b: tom}
reads: {whole: {layers: [3, 1]}}
store: p.zarr
"""


def invoke(*words):
    return CliRunner().invoke(cli.main, list(words), catch_exceptions=False)


@pytest.fixture
def base(folder, tmp_path):
    return shutil.copytree(folder("llama"), tmp_path / "base")


@pytest.fixture
def written(tmp_path):
    """A directory with the names of an adapter, and nothing that could be merged."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    weights = {f"base_model.model.model.layers.{k}.self_attn.q_proj.lora_A.weight": np.ones((4, 32)) for k in (3, 1)}
    save_file(weights, tmp_path / "adapter/adapter_model.safetensors")
    return tmp_path / "adapter"


def test_identity_covers_the_adapter_and_its_files(base, written):
    plain, merged = models.facts(Model(id=str(base))), models.facts(Model(id=str(base), peft=str(written)))
    assert merged.base == plain.identity == plain.base and merged.identity != plain.identity
    assert (merged.n_layers, merged.name_or_path, merged.adapter) == (plain.n_layers, plain.name_or_path, str(written))
    with models.unchanged(merged):
        pass
    (written / "adapter_model.safetensors").write_bytes(b"others!")
    assert models.facts(Model(id=str(base), peft=str(written))).identity != merged.identity
    with pytest.raises(ModelError, match=r"the adapter of .* changed since it was checked"), models.unchanged(merged):
        pass


@pytest.mark.parametrize(
    "words, spoil",
    [
        ("which is no directory with an adapter_config.json", lambda folder: shutil.rmtree(folder)),
        ("without adapter_model.safetensors", lambda folder: (folder / "adapter_model.safetensors").unlink()),
        ("without the package peft", None),
    ],
)
def test_what_can_not_be_merged_is_a_problem_of_the_plan(base, written, tmp_path, monkeypatch, words, spoil):
    import importlib.util

    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "peft" else own(name, *more))
    if spoil:
        spoil(written)
    (tmp_path / "p.yaml").write_text(PLAN)
    result = invoke("check", "p.yaml")
    assert result.exit_code != 0 and words in " ".join(result.output.split()), result.output
    assert "p.yaml:4" in result.output


def lora(folder, **shapes):
    """Other tensors in an adapter: a name -> its shape."""
    named = {f"base_model.model.model.{name}.weight": np.ones(shape) for name, shape in shapes.items()}
    save_file(named, folder / "adapter_model.safetensors")


OTHERS = {
    "of a model of at least 7 blocks": lambda folder: lora(
        folder, **{"layers.6.mlp.down_proj.lora_A": (4, 48), "layers.0.mlp.down_proj.lora_A": (4, 48)}
    ),
    "of a model of width 64": lambda folder: lora(folder, **{"layers.0.self_attn.k_proj.lora_A": (4, 64)}),
    "a git-lfs pointer in place of the file": lambda folder: (folder / "adapter_model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    ),
    "which is no safetensors file": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"weights"),
    "adapter_config.json, which can not be read": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "of the kind PREFIX_TUNING": lambda folder: (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "PREFIX_TUNING"})
    ),
}


@pytest.mark.parametrize("words", OTHERS)
def test_an_adapter_of_another_model_is_a_problem_of_the_plan(base, written, tmp_path, monkeypatch, words):
    """What peft would leave out without a word, or fail with once the model is loaded."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: True)
    OTHERS[words](written)
    (tmp_path / "p.yaml").write_text(PLAN)
    result = invoke("check", "p.yaml")
    said = " ".join(result.output.split())
    assert result.exit_code == 2 and "models[0].peft: expected an adapter of 'base', found" in said and words in said


def test_an_adapter_that_names_another_model_is_a_note(base, written, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: True)
    (tmp_path / "p.yaml").write_text(PLAN)
    for of, told in (("org/base", False), ("org/other-7B", True)):
        settings = {"peft_type": "LORA", "base_model_name_or_path": of}
        (written / "adapter_config.json").write_text(json.dumps(settings))
        result = invoke("check", "p.yaml")
        assert result.exit_code == 0 and ("of 'org/other-7B' by its config" in result.output) is told, result.output


def test_a_server_and_int8_take_no_adapter(base, written, tmp_path):
    (tmp_path / "p.yaml").write_text(PLAN)
    for setting in ("executor=ndif", "models[0].quantization=int8"):
        assert "models[0].peft" in invoke("check", "p.yaml", "--set", setting).output


def test_merged_streams_are_those_of_the_unmerged_adapter(base, tmp_path):
    """Planted: an adapter of random weights, which moves every stream; the oracle is peft's own forward, unmerged."""
    peft = pytest.importorskip("peft")
    model = tinies.model("llama")
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    (tmp_path / "p.yaml").write_text(PLAN)
    result = invoke("run", "p.yaml")
    assert result.exit_code == 0, result.output
    store = nsteer.open("p.zarr")
    assert store["models"].adapter.sel(model="m").item() == str(tmp_path / "adapter")
    tokenizer = tinies.tokenizer(bos=True)
    for prompt, text in (("a", "the cat sat on the mat"), ("b", "tom")):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            true = wrapped(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
            plain = tinies.model("llama")(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        seen = store["streams", "m"].stream.sel(
            model="m", read="whole", layer=1, prompt=prompt, edit="none", strength=0
        )
        seen = torch.tensor(seen.transpose("position", "d_model").values[: ids.shape[1]])
        assert torch.allclose(seen, true, atol=1e-4) and (seen - plain).abs().max() > 0.01
