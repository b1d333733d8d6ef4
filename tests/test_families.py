"""Families that matter most are read and steered as plain hooks do it, one text at a time (bench/families.py)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import families

from nsteer.errors import ModelError
from nsteer.models import facts as models
from nsteer.plan.schema import Model

MOST = ("gemma3_text", "mistral", "gpt2", "falcon", "granite", "phi3", "olmo2", "falcon_h1", "qwen3_next", "qwen3")
SCALED = {"granite": ("divide", 4.0), "falcon_h1": ("multiply", 0.04)}


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in MOST)])
def test_a_family_is_read_and_steered_as_by_plain_hooks(kind):
    row = families.look(kind, families.tokenizer())
    assert not {"not_built", "refused", "broken"} & set(row), row
    assert row["capture"] < 2e-5 and row["sites"] and row["scaling"] == SCALED.get(kind)
    assert row["equal"] == row["of"] and row["moved"] >= 2


def test_a_line_tells_what_is_wrong():
    rows = [
        {"family": "a", "capture": 0.5, "equal": 1, "of": 3, "moved": 3, "sites": "", "scaling": ("softcap", 30.0)},
        {"family": "b", "refused": "no | list"},
        {"family": "c", "not_built": "sizes"},
    ]
    lines = [families.line(row) for row in rows]
    assert lines == [
        "| a | 5e-01 | 1 of 3 (3 changed) |  | softcap 30 |  |",
        "| b |  |  |  |  | refused: no / list |",
        "| c |  |  |  |  | not_built: sizes |",
    ]


HIDDEN = {"hidden_size": 32}


@pytest.mark.parametrize(
    "config",
    [
        HIDDEN | {"layers_block_type": ["mamba", "attention", "mlp"]},
        HIDDEN | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        {"text_config": HIDDEN | {"n_layers": 3}, "vision_config": {"hidden_size": 8}},
        {"thinker_config": {"text_config": HIDDEN | {"num_hidden_layers": 3}}},
    ],
)
def test_depth_and_width_of_configs_of_several_makes(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    found = models.facts(Model(id=str(tmp_path), label="m"))
    assert (found.n_layers, found.d_model) == (3, 32)


def test_an_adapter_is_refused_with_what_to_do(tmp_path):
    """Beside a config.json too: transformers would take the weights of its base model, wherever they lie."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    for more in (False, True):
        if more:
            (tmp_path / "config.json").write_text(json.dumps(HIDDEN | {"num_hidden_layers": 3}))
        with pytest.raises(ModelError, match=r"an adapter \(PEFT\) of 'some/model': merge it into its model"):
            models.facts(Model(id=str(tmp_path), label="m"))
