"""Turns the schema of plans into its reference page and its JSON Schema."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from nsteer.plan import schema as plan
from nsteer.science.presets import CONTRASTS, EMOTION_SETS, PRESETS

HEAD = """# Plan reference

Generated from the schema (`python -m nsteer.cli.reference`); a test holds it true. A plan is YAML 1.2. Unknown keys and
wrong types are errors. `extends: other.yaml` builds on another plan: mappings merge, everything else is replaced.
On the command line `--set path=value` overrides a field (`--set 'steer.strengths=[0.1,0.2]'`).

Layers are 0-based block indices. A depth fraction `f` names block `floor(f * n_layers)`, at most the last.
"""

ORDER = (
    *(
        "Plan",
        "Model",
        "Resources",
        "Method",
        "Pooling",
        "Span",
        "Estimator",
        "ProjectOut",
        "Generate",
        "Steer",
        "Calibrated",
        "Also",
        "Prompted",
        "Vectors",
        "Where",
        "Which",
        "Window",
        "When",
        "Schedule",
        "Tune",
        "HeldOut",
        "Judge",
        "Signed",
        "Rule",
        "Choices",
        "Llm",
        "Python",
        "Scores",
        "Reader",
        "Measure",
        "Thresholds",
    ),
    *(
        "Read",
        "Direction",
        "Contrast",
        "Responses",
        "Filter",
        "Mean",
        "Dataset",
        "Stored",
        "Edit",
        "Batch",
        "Remote",
        "Vllm",
    ),
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan, draft 2020-12, with the shorthands that YAML may use."""
    schema = plan.Plan.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "nsteer plan"
    _shorthands(schema)
    schema.pop("required", None)  # a plan that extends another, or names a preset, leaves out what that one gives
    for name, section in schema["$defs"].items():
        if name not in IN_LISTS:
            section.pop("required", None)
    return schema


IN_LISTS = ("Model", "Edit", "Also")
"""Parts that stand in lists, which `extends` replaces whole: what they need, they must say themselves."""

SHORTHANDS = {
    "Model": "id",
    "Method": "preset",
    "Pooling": "kind",
    "Estimator": "kind",
    "Judge": "classifier",
    "Signed": "rises",
    "Reader": "id",
    "Direction": "formula",
}


def _shorthands(node: Any) -> None:
    """Wherever a section has a shorthand, text is allowed beside the mapping; labels of another form are not."""
    if isinstance(node, dict):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        for key, value in list(node.items()):
            name = value.get("$ref", "").rsplit("/", 1)[-1] if isinstance(value, dict) else ""
            if name in SHORTHANDS:
                others = {k: v for k, v in value.items() if k != "$ref"}
                node[key] = {"anyOf": [{"$ref": value["$ref"]}, {"type": "string"}], **others}
            else:
                _shorthands(value)
        if node.get("type") == "array" and node.get("items", {}).get("$ref", "").endswith("/Steer"):
            item = node["items"]
            node.pop("type")
            node.pop("items")
            node["anyOf"] = [item, {"type": "array", "items": item}]
    elif isinstance(node, list):
        for i, value in enumerate(node):
            name = value.get("$ref", "").rsplit("/", 1)[-1] if isinstance(value, dict) else ""
            if name in SHORTHANDS:
                node[i] = {"anyOf": [value, {"type": "string"}]}
            else:
                _shorthands(value)


def page() -> str:
    """The reference page, in Markdown."""
    return "\n".join([HEAD, *_sections(), *_presets()]).rstrip() + "\n"


def _sections() -> Iterator[str]:
    for name in ORDER:
        section: type[BaseModel] = getattr(plan, name)
        yield f"## {name}\n\n{' '.join((section.__doc__ or '').split())}\n"
        yield "| field | type | default | meaning |\n|---|---|---|---|"
        schema = section.model_json_schema()
        for field, info in section.model_fields.items():
            default = "required" if info.is_required() else _default(info)
            field = info.alias or field
            yield f"| `{field}` | {_type(schema, field)} | {default} | {_cell(info.description or '')} |"
        yield ""


def _default(info: Any) -> str:
    value = info.default
    if value is PydanticUndefined or value is None:
        return ""
    if isinstance(value, BaseModel):
        set_here = value.model_dump(exclude_unset=True)
        return f"`{set_here}`" if set_here else "its defaults"
    return f"`{value}`" if value not in ([], {}, "") else ""


def _type(schema: dict[str, Any], field: str) -> str:
    return _cell(_spell(schema["properties"][field], schema.get("$defs", {})))


def _spell(schema: dict[str, Any], known: dict[str, Any]) -> str:
    if "$ref" in schema:
        return schema["$ref"].rsplit("/", 1)[-1]
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if any_of := schema.get("anyOf") or schema.get("oneOf"):
        spelled = [_spell(branch, known) for branch in any_of if branch.get("type") != "null"]
        return " or ".join(dict.fromkeys(spelled))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_spell(schema['items'], known)}" if schema.get("items") else "list"
    if kind == "object":
        inner = schema.get("additionalProperties") or next(iter(schema.get("patternProperties", {}).values()), None)
        return f"label: {_spell(inner, known)}" if isinstance(inner, dict) else "mapping"
    return {"string": "text", "integer": "integer", "number": "number", "boolean": "true, false"}.get(kind, kind)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    for name, preset in (PRESETS | CONTRASTS).items():
        yield f"### `{name}`\n\nCitation: {preset.citation}.\n"
        yield "\n".join(f"- `{field}`: `{value}`" for field, value in preset.fields.items())
        assumed = ", ".join(f"`{knob}`" for knob in preset.assumed) or "nothing"
        yield f"\nAssumed, not stated there: {assumed}.\n"
    yield "## Emotion sets\n"
    for name, emotions in EMOTION_SETS.items():
        yield f"- `{name}`: {', '.join(emotions)}"
