"""Families that matter most are read and steered as plain hooks do it, one text at a time (bench/families.py)."""

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import families
import families_page

from nsteer.errors import ModelError
from nsteer.models import facts as models
from nsteer.plan.schema import Model

SLOW = ("gemma3_text", "falcon", "granite", "falcon_h1", "qwen3_next")
"""Of those that test_oracle and test_sites hold too, Llama and Granite; else blocks of other makes."""
SCALED = {"granite": ("divide", 4.0), "falcon_h1": ("multiply", 0.04)}


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_a_family_is_read_and_steered_as_by_plain_hooks(kind):
    row = families.look(kind)
    assert families_page.outcome(row) == "exact", row
    assert set(row["sites"]) == {"attn_out", "mlp_out"} and row["scaling"] == SCALED.get(kind)
    assert set(row["capture"]) == {"resid_pre", "resid_post", "attn_out", "mlp_out"}
    assert (row["of"], row["ties"]) == (15, 0) and row["moved"] >= 8


GOOD = {
    "family": "a",
    "capture": {"resid_post": 1e-6, "attn_out": 2e-6},
    **{"equal": 9, "ties": 0, "of": 9, "stepless": "", "stays": "", "batches": "any", "scaling": ("softcap", 30.0)},
    "sites": {"attn_out": ["attn", "mamba"]},
}
STEPLESS = {key: GOOD[key] for key in ("family", "capture", "batches", "stays")} | {"stepless": "no cache"}


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (GOOD, "| a | exact | 2e-06 | 9 of 9 | `attn` / `mamba` |  | softcap 30 | any | leave |"),
        (GOOD | {"equal": 8, "ties": 1}, "| a | exact | 2e-06 | 8 of 9, 1 at a tie | `attn` / `mamba` |"),
        (GOOD | {"equal": 8}, "| a | wrong | 2e-06 | 8 of 9 |"),
        (GOOD | {"capture": {"resid_post": 1e-6, "attn_out": 0.5}}, "| a | wrong | 5e-01 | 9 of 9 |"),
        (GOOD | {"capture": {"resid_post": 0.5}, "refused": "no"}, "| a | wrong | 5e-01 |"),
        (STEPLESS, "| a | read only | 2e-06 |  |"),
        ({"family": "b", "refused": "no | list"}, "| b | refused |  |"),
        ({"family": "c", "not_built": "sizes"}, "| c | not built |  |"),
        (GOOD | {"broken": "a traceback"}, "| a | broken |"),
    ],
)
def test_a_line_tells_what_is_wrong(row, line):
    assert families_page.line(row).startswith(line)


def test_the_page_gathers_what_was_said():
    rows = [{"family": f, "refused": "no list\nof blocks", "versions": {"torch": "2"}} for f in "bc"]
    page = families_page.page([*rows, GOOD | {"versions": {"torch": "2"}}])
    assert "with torch 2.\n" in page and "- **exact** 1: " in page and "- **refused** 2: " in page
    assert "## Refused, with which words\n\n- b, c: no list of blocks\n" in page


def test_rows_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def apart(kind, seconds, gigabytes):
        return asked.append(kind) or {"family": kind, "refused": "no", "versions": families.versions()}

    monkeypatch.setattr(families, "apart", apart)
    file = tmp_path / "rows.jsonl"
    for _ in range(2):
        rows = list(families.rows_of("ab", families.kept(file), file, 1, 1))
        assert [row["family"] for row in rows] == ["a", "b"] and asked == ["a", "b"]
    file.write_text(file.read_text().replace(families.versions()["torch"], "0.1"))
    assert families.kept(file) == {}


def test_a_family_that_hangs_dies_or_wants_all_memory_is_a_row(monkeypatch):
    def look(kind):
        if kind == "hangs":
            time.sleep(60)
        if kind == "wants":
            return {"family": kind, "not_built": str(len(bytearray(2**36)))}
        raise SystemExit

    monkeypatch.setattr(families, "look", look)
    assert families.apart("hangs", 0.3, 40)["not_built"] == "takes over 0 s"
    assert families.apart("dies", 30, 40)["broken"] == "its process died"
    assert families.apart("wants", 30, 40)["broken"] == "its process died"


def test_the_page_in_docs_has_no_wrong_family():
    page = (Path(__file__).parents[1] / "docs/families.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ")][1:]
    assert set(cells) <= {"exact", "read only", "refused", "not built"}
    assert cells.count("exact") >= 150 and "wrong** 0:" in page


HIDDEN = {"hidden_size": 32}


@pytest.mark.parametrize(
    "config",
    [
        HIDDEN | {"layers_block_type": ["mamba", "attention", "mlp"]},
        HIDDEN | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
        {"text_config": HIDDEN | {"n_layers": 3}, "vision_config": {"hidden_size": 8}},
        HIDDEN | {"decoder_layers": 3, "num_hidden_layers": 2, "encoder_layers": 2},
        {"thinker_config": {"text_config": HIDDEN | {"num_hidden_layers": 3}}},
    ],
)
def test_depth_and_width_of_configs_of_several_makes(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    facts = models.facts(Model(id=str(tmp_path), label="m"))
    assert (facts.n_layers, facts.d_model) == (3, 32)


def test_an_adapter_is_refused_with_what_to_do(tmp_path):
    """Beside a config.json too: transformers would take the weights of its base model, wherever they lie."""
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/model"}))
    for more in (False, True):
        if more:
            (tmp_path / "config.json").write_text(json.dumps(HIDDEN | {"num_hidden_layers": 3}))
        with pytest.raises(ModelError, match=r"an adapter \(PEFT\) of 'some/model': give that model's id"):
            models.facts(Model(id=str(tmp_path), label="m"))
