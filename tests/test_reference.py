"""The reference page and the JSON Schema are those of the schema, and the schema is the one that plans are held to."""

from __future__ import annotations

import jsonschema
import pytest
from planside import PLAN, ROOT, STEER
from ruamel.yaml import YAML
from test_check import parts

from nsteer import reference

SCHEMA = reference.json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("name", sorted(reference.documents()))
def test_the_documents_are_what_the_schema_says(name):
    file = ROOT / "docs" / name
    assert file.read_text(encoding="utf-8") == reference.documents()[name], "run: python -m nsteer.reference"


def test_the_page_has_every_part_and_every_field():
    page = reference.page()
    names = {part.__name__ for part in parts()}
    assert names == set(reference.ORDER)
    for part in parts():
        section = page.split(f"\n## {part.__name__}\n")[1].split("\n## ")[0]
        for field in part.model_fields:
            assert f"| `{field}` |" in section, (part.__name__, field)


def plain(text: str):
    return YAML(typ="safe", pure=True).load(text)


def test_the_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", sorted((ROOT / "plans").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_plans_fit_the_schema(file):
    text = file.read_text(encoding="utf-8")
    assert [error.message for error in VALIDATOR.iter_errors(plain(text))] == []
    assert text.startswith("# yaml-language-server: $schema=../docs/nsteer.schema.json\n")


GOOD = [
    PLAN + STEER,
    "extends: other.yaml",
    "models: [{id: a/b, dtype: bfloat16}, zoo/llama]",
    "methods: {m: jeong2026-generation, n: {preset: anthropic2026, pooling: last}}",
    "methods: {n: {preset: anthropic2026, pooling: {over: all}}}",
    "layers: [1, -1, 0.5, '2:4']",
    "steer: [{strengths: [1], prompts: [a], layers: {each: all}}]",
    "judge: {classifier: zoo/judge}",
    "prompts: scenarios-8",
    "directions: {d: {random: 0}}\nedits: {e: [{op: add, direction: d}]}",
    "reads: {r: {pooling: mean}, q: {pooling: {kind: mean_from, k: 2}}, s: {}}",
]

BAD = [
    "bogus: 1",
    "methods: {m: {sauce: generation}}",
    "models: [{id: a/b, lable: x}]",
    "steer: {strength: [1]}",
    "steer: [{op: rotate, strengths: [1], prompts: [a]}]",
    "steer: {strengths: [high], prompts: [a]}",
    "seed: many",
    "emotions: 5",
    "name: a b",
    "methods: {a b: {source: generation}}",
    "edits: {e: [{direction: d}]}",
    "reads: {r: {site: resid_pre}}",
    "batch: {rows: 0}",
]


@pytest.mark.parametrize("text", GOOD)
def test_an_editor_leaves_good_plans_alone(text):
    assert [error.message for error in VALIDATOR.iter_errors(plain(text))] == []


@pytest.mark.parametrize("text", BAD)
def test_an_editor_sees_what_is_wrong(text):
    assert list(VALIDATOR.iter_errors(plain(text)))
