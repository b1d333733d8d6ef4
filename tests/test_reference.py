"""The reference pages are those of the code, and the schema is the one that plans are held to."""

from __future__ import annotations

import importlib
import re

import click
import jsonschema
import pytest
from planside import PLAN, ROOT, STEER
from ruamel.yaml import YAML
from test_check import sections

from nsteer.cli import main, reference
from nsteer.cli.reference import api

SCHEMA = reference.json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("name", sorted(reference.DOCUMENTS))
def test_the_documents_are_what_the_code_says(name):
    file = ROOT / "docs" / name
    assert file.read_text(encoding="utf-8") == reference.DOCUMENTS[name](), "run: python -m nsteer.cli.reference"


def test_the_page_has_every_part_and_every_field():
    page = reference.DOCUMENTS["plan.md"]()
    names = {part.__name__ for part in sections()}
    assert names == set(reference.ORDER)
    for part in sections():
        section = page.split(f"\n## {part.__name__}\n")[1].split("\n## ")[0]
        for field in (info.alias or name for name, info in part.model_fields.items()):
            assert f"| `{field}` |" in section, (part.__name__, field)


def section(page: str, title: str) -> str:
    """What stands under a heading of level 2 or 3, up to the next."""
    return re.split(r"\n#{2,3} ", page.split(f" {title}\n", 1)[1])[0]


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_has_its_words_options_and_example(name):
    said = section(reference.DOCUMENTS["cli.md"](), name)
    options = [
        flag
        for parameter in main.commands[name].params
        if isinstance(parameter, click.Option)
        for flag in parameter.opts
    ]
    assert [flag for flag in options if f"`{flag}" not in said and f", {flag}" not in said] == []
    assert f"```text\nnsteer {name}" in said and "Example:\n\n```text\nnsteer" in said


@pytest.mark.parametrize("module", api.MODULES)
def test_every_public_name_has_its_signature_and_words(module):
    page = reference.DOCUMENTS["api.md"]()
    names = api.public(importlib.import_module(module))
    assert names
    for name in names:
        said = section(page, f"`{module}.{name}`")
        assert f"{name}(" in said and said.split("```")[2].strip(), name
    assert not re.search(r"0x[0-9a-f]{6}", page)  # an address would differ at every run


def documented(first: int, *, second: str = "a", **rest: float) -> list:
    """Does a thing: 1 < 2.

        example(1)

    first : what it is,
        and more
    second : `<this>`
    Returns nothing.
    """


def test_a_docstring_becomes_a_signature_lists_and_examples():
    assert api.signature("f", documented) == 'f(first: int, *, second: str = "a", **rest: float) -> list'
    assert api.prose(documented).splitlines() == [
        *("Does a thing: 1 \\< 2.", "", "```text", "example(1)", "```", ""),
        *("- `first`: what it is,", "  and more", "- `second`: `<this>`", "", "Returns nothing."),
    ]


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
    "steer: [{op: spin, strengths: [1], prompts: [a]}]",
    "steer: {strengths: [high], prompts: [a]}",
    "seed: many",
    "emotions: 5",
    "name: a b",
    "methods: {a b: {source: generation}}",
    "edits: {e: [{direction: d}]}",
    "reads: {r: {site: resid_mid}}",
    "batch: {rows: 0}",
]


@pytest.mark.parametrize("text", GOOD)
def test_an_editor_leaves_good_plans_alone(text):
    assert [error.message for error in VALIDATOR.iter_errors(plain(text))] == []


@pytest.mark.parametrize("text", BAD)
def test_an_editor_sees_what_is_wrong(text):
    assert list(VALIDATOR.iter_errors(plain(text)))


def test_every_method_has_its_formula_and_source():
    from nsteer.science.directions import BASELINES, ESTIMATORS

    page = reference.DOCUMENTS["methods.md"]()
    for name in (*ESTIMATORS, *BASELINES):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        formula, citation = row.split(" | ")[1:]
        assert "`" in formula and len(citation) > 5, row
        assert f"**`{name}`**. " in page


def test_a_method_that_states_no_citation_is_no_page():
    from nsteer.cli.reference import methods

    with pytest.raises(AssertionError, match="documented states no citation"):
        methods._field(documented, "citation")
