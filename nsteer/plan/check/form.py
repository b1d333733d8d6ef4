"""Turns a document into a plan, with stand-ins where it fails by form, so that the rest is still checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from nsteer.plan import reader
from nsteer.plan.check import wording
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.schema import Plan, Section
from nsteer.science.presets import CONTRASTS, PRESETS, Preset

P = TypeVar("P", bound=Section)

STAND_IN = {
    "name": "unnamed",
    "store": "unnamed.zarr",
    "models": ["zoo/llama"],
    "id": "zoo/llama",
    "strengths": [1.0],
    "prompts": ["-"],
    "source": "generation",
    "op": "add",
    "direction": "-",
    "question": "{text}",
    "rubric": "{text}",
    "function": "-",
    "tables": ["-"],
    "classes": ["-"],
    "answers": {"yes": ["yes"], "no": ["no"]},
    "kind": "last",
    "positive": ["-"],
    "negative": ["-"],
    "questions": ["-"],
    "judge": "-",
    "texts": ["-"],
    "path": "-",
    "method": "-",
    "emotion": "-",
    "held_out": {},
}
"""A value of the right form for every required field: what is missing must not hide what else is wrong."""


def plan_of(check: Checker) -> Plan | None:
    """The plan, or what can be made of it without the sections that fail; None when too little is left."""
    return section_of(check, Plan, expand_presets(check.document.data))


def section_of(check: Checker, section: type[P], whole: Any = None) -> P | None:
    """The document as a section of a plan, or what can be made of it; whole: its data, presets spelled out."""
    whole = check.document.data if whole is None else whole
    bad, missing = set(check.document.refused), set[Path]()
    check.failed, check.left_out = set(bad), _places(bad)
    data = _without(whole, list(bad))
    for attempt in range(8):
        try:
            return section.model_validate(data)
        except ValidationError as error:
            every = error.errors()
            errors = [(check.original(_real(error, data)), error) for error in every if not _other_branch(error, every)]
            if not attempt:
                new = [(path, error) for path, error in errors if not (_has_preset(check, path) or check.covers(path))]
                check.problems += [wording.problem(check.document, path, error) for path, error in new]
            missing |= {path for path, error in errors if error["type"] == "missing"}
            bad |= {path for path, error in errors if error["type"] != "missing"}
            check.failed = bad | missing
            check.left_out = _places(bad)
            data = _fill_missing(_without(whole, list(bad)), [check.reduced(path) for path in missing])
    return None


def _has_preset(check: Checker, path: Path) -> bool:
    """Whether `path` is the `source` that a preset would bring, were the preset a known one."""
    if len(path) != 3 or path[0] != "methods" or path[2] != "source":
        return False
    method = check.node(path[:2])
    return isinstance(method, str) or (isinstance(method, dict) and "preset" in method and "source" not in method)


def expand_presets(data: Any) -> Any:
    """The data of a plan with every known `preset` spelled out beneath the fields that override it."""
    if not isinstance(data, dict):
        return data
    expanded = dict(data)
    if isinstance(methods := data.get("methods"), dict):
        named = {name: {"preset": method} if isinstance(method, str) else method for name, method in methods.items()}
        expanded["methods"] = {name: _expand(method, PRESETS) for name, method in named.items()}
    if isinstance(directions := data.get("directions"), dict):
        expanded["directions"] = {
            name: {**direction, "contrast": _expand(direction["contrast"], CONTRASTS)}
            if _has(direction, "contrast")
            else direction
            for name, direction in directions.items()
        }
    return expanded


def _has(value: Any, field: str) -> bool:
    return isinstance(value, dict) and isinstance(value.get(field), dict)


def _expand(section: Any, presets: Mapping[str, Preset]) -> Any:
    preset = section.get("preset") if isinstance(section, dict) else None
    if not isinstance(preset, str) or preset not in presets:
        return section
    fields = presets[preset].fields
    nested = {
        k: {**v, **section[k]} for k, v in fields.items() if isinstance(v, dict) and _overrides(v, section.get(k))
    }
    return {**fields, **section, **nested}


def _overrides(preset: dict, own: Any) -> bool:
    """Whether `own` refines a preset's mapping; a pooling of another kind replaces it instead."""
    return isinstance(own, dict) and own.get("kind", preset.get("kind")) == preset.get("kind")


def _real(error: Any, data: Any) -> Path:
    """pydantic's location without the steps that only pydantic knows (shorthands, union tags)."""
    path: list[str | int] = []
    for key in error["loc"]:
        if (isinstance(data, dict) and key in data) or (
            isinstance(data, list) and isinstance(key, int) and key < len(data)
        ):
            path.append(key)
            data = data[key]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else tuple(path)


def _other_branch(error: Any, every: Sequence[Any]) -> bool:
    """Whether an error of a union (text or a list, a word or a number) is of a branch that the plan did not mean."""
    tag, is_list = error["loc"][-1], isinstance(error["input"], list)
    if not isinstance(tag, str):
        return False
    beside = {str(other["loc"][-1]) for other in every if other["loc"][:-1] == error["loc"][:-1]}
    if tag.startswith("literal["):
        return bool({"int", "constrained-int"} & beside) or not isinstance(error["input"], str)
    if tag.startswith("dict[") and any(tag.startswith("literal[") for tag in beside):
        return isinstance(error["input"], str)
    if tag == "str":
        return is_list and error["type"] == "string_type"
    return tag.startswith(("list[", "function-before[")) and not is_list


def _places(paths: Iterable[Path]) -> dict[Path, set[int]]:
    """The places in lists that `paths` name, by list."""
    places: dict[Path, set[int]] = {}
    for path in paths:
        if path and isinstance(path[-1], int):
            places.setdefault(path[:-1], set()).add(path[-1])
    return places


def _without(data: Any, paths: list[Path]) -> Any:
    """`data` without the nodes at `paths`; an emptied list entry goes with its list's other entries kept."""
    if not paths:
        return data
    if () in paths or not isinstance(data, (dict, list)):
        return {} if isinstance(data, dict) else None
    gone = {path[0] for path in paths if len(path) == 1}
    deeper = {key: [p[1:] for p in paths if len(p) > 1 and p[0] == key] for key in {p[0] for p in paths if len(p) > 1}}
    items: Iterator = iter(data.items()) if isinstance(data, dict) else enumerate(data)
    kept = [(key, _without(value, deeper.get(key, []))) for key, value in items if key not in gone]
    return dict(kept) if isinstance(data, dict) else [value for _, value in kept]


def _fill_missing(data: Any, paths: list[Path]) -> Any:
    """`data` with a stand-in for each missing field, so that the rest can still be checked."""
    for path in paths:
        try:
            data = reader._put(data, path, STAND_IN.get(str(path[-1]), "-"))
        except (LookupError, TypeError):
            continue
    return data
