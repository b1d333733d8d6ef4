"""Families that matter most are read and steered as plain hooks do it, one text at a time (bench/families.py)."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import families

MOST = ("gemma3_text", "mistral", "gpt2", "falcon", "granite", "phi3", "olmo2", "falcon_h1", "qwen3_next", "qwen3")
SCALED = {"granite": ("divide", 4.0), "falcon_h1": ("multiply", 0.04)}


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in MOST)])
def test_a_family_is_read_and_steered_as_by_plain_hooks(kind):
    row = families.look(kind, families.tokenizer())
    assert not {"not_built", "refused", "broken"} & set(row), row
    assert row["capture"] < 2e-5 and row["sites"] and row["scaling"] == SCALED.get(kind)
    assert row["equal"] == row["of"] == row["moved"]


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
