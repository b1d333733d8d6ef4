"""Turns the plan that a store keeps into sentences: what was asked of which model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from nsteer.report import contrasts
from nsteer.report.claims.evidence import Evidence
from nsteer.store import slug

FEW = 6
"""Names that a sentence lists before it counts the rest."""


def question_lines(evidence: Evidence) -> tuple[str, ...]:
    """What was done, a sentence a section of the plan, as far as the store holds it."""
    sentences = (*_methods(evidence), *_directions(evidence), *_steer(evidence), *_edits(evidence), *_reads(evidence))
    return (*sentences, *_judges(evidence))


def of_the_paper(evidence: Evidence) -> bool:
    """Whether the study is one of Jeong 2026: both of its protocols, or a plan of its name."""
    presets = {str(knobs.get("preset") or "") for knobs in evidence.protocols.values()}
    both = {"jeong2026-generation", "jeong2026-comprehension"} <= presets
    return both or str(evidence.plan.get("name", "")).startswith("jeong2026")


def listed(names: Sequence[Any], max_names: int = FEW) -> str:
    """Names in a row, the rest counted: `a, b, c and 4 more`."""
    shown = [str(name) for name in names]
    if len(shown) <= max_names + 1:
        return ", ".join(shown)
    return f"{', '.join(shown[:max_names])} and {len(shown) - max_names} more"


def counted(n: int, word: str) -> str:
    """`1 prompt`, `8 prompts`."""
    return f"{n:,} {word}{'' if n == 1 else 's'}"


def _methods(evidence: Evidence) -> list[str]:
    lines = []
    for model in evidence.with_activations():
        pooled = evidence.results[f"activations/{slug(model)}"]
        names = [str(e) for e in pooled.emotion.values.tolist() if str(e) != "neutral"]
        methods = [str(m) for m in pooled.method.values.tolist()]
        what = f"{counted(len(names), evidence.axis)} by {counted(len(methods), 'method')} ({listed(methods)})"
        lines.append(f"Vectors of {what}, read at {counted(_layers(pooled.pooled), 'layer')} of {model}.")
    return lines


def _layers(streams: xr.DataArray) -> int:
    """Layers that hold something: an axis is of all layers of a model."""
    there = streams.isel({"d_model": 0}).notnull()
    return int(there.any([dim for dim in there.dims if dim != "layer"]).sum())


def _directions(evidence: Evidence) -> list[str]:
    if not evidence.has("directions"):
        return []
    kept = evidence.results["directions"].settings
    known = [
        f"{name} ({_source(json.loads(text))})"
        for name, text in zip(kept.direction.values.tolist(), kept.values.tolist(), strict=True)
        if text
    ]
    counts: dict[tuple[str, str], list[str]] = {}
    for counted in contrasts.counted(evidence.results, evidence.models):
        told = f"{counted.kept} of {counted.written} {counted.side}"
        counts.setdefault((counted.model, counted.direction), []).append(told)
    answers = [f"{name} of {model}: {', '.join(told)}" for (model, name), told in counts.items()]
    said = [f"Answers kept for contrasts: {listed(answers)}."] if answers else []
    return ([f"Directions: {listed(known)}."] if known else []) + said


def _source(settings: Mapping[str, Any]) -> str:
    """Where a direction comes from, in words."""
    kind, given = next(((k, v) for k, v in settings.items() if v is not None), ("", None))
    if kind == "contrast" and isinstance(given, Mapping) and given.get("generate"):
        taken = given.get("taken") or {}
        systems = [str(taken.get(side) or contrasts.size(given.get(side))) for side in ("positive", "negative")]
        by, n = given.get("filter") or {}, contrasts.size(given["generate"].get("questions"))
        kept = f", filtered by {by['judge']}" if by else ""
        return f"contrast of answers to {counted(n, 'question')} under {' and '.join(systems)} system prompts{kept}"
    if kind == "contrast" and isinstance(given, Mapping):
        sides = [given.get(side) for side in ("positive", "negative")]
        counts = [
            str(len(texts)) if isinstance(texts, Sequence) and not isinstance(texts, str) else "" for texts in sides
        ]
        return f"contrast of {counts[0]} and {counts[1]} texts" if all(counts) else "contrast"
    return {"store": "from another store", "mean": "mean of texts"}.get(kind, kind or "unknown source")


def _steer(evidence: Evidence) -> list[str]:
    if not evidence.has("generations"):
        return []
    lines = []
    for where, told, _ in evidence.setups():
        settings = evidence.settings(where["op"])
        names, strengths = told.emotion.values.tolist(), told.strength.values.tolist()
        scale = str(settings.get("scale", "")).replace("_", " ")
        controls = [str(c) for c in told.control.values.tolist() if c != "none"]
        if evidence.has("unsteered"):
            controls = ["unsteered", *controls]
        if evidence.has("prompted") and where["op"] in evidence.results["prompted"].op.values:
            controls.append("prompted")
        unit = _unit(settings, scale)
        lines.append(
            f"{where['model']} steered to {listed(names)} ({where['method']}; op {where['op']}, layers "
            f"{where['layer_set']}) at {unit} {listed([f'{s:g}' for s in strengths])}, on "
            f"{counted(told.sizes['prompt'], 'prompt')}; controls: {', '.join(controls) or 'none'}."
        )
    return lines


def _unit(settings: Mapping[str, Any], scale: str) -> str:
    """What the labels of the strengths are of."""
    given = settings.get("strengths")
    if isinstance(given, Mapping):  # searched for
        return f"equal {next(iter(given)).replace('_', ' ').upper()}"
    return f"strengths ({scale})" if scale else "strengths"


def _edits(evidence: Evidence) -> list[str]:
    if not evidence.has("edited"):
        return []
    texts = evidence.results["edited"]
    names = [str(e) for e in texts.edit.values.tolist() if e != "none"]
    models = listed([str(m) for m in texts.model.values.tolist()])
    on = counted(texts.sizes["prompt"], "prompt")
    return [f"{models} edited by hand: {listed(names)}, on {on}; control: none (unedited)."] if names else []


def _reads(evidence: Evidence) -> list[str]:
    lines = []
    for path in evidence.results:
        if path.split("/")[0] in ("reads", "streams"):
            data = evidence.results[path]
            names = [str(read) for read in data["read"].values.tolist()]
            where = listed([str(m) for m in data.model.values.tolist()])
            layers = _layers(data.stream.isel({"prompt": 0}))
            on = counted(data.sizes["prompt"], "prompt") + (f", {counted(layers, 'layer')}" if layers else "")
            how = "pooled streams" if path.startswith("reads") else "streams, a vector a token"
            lines.append(f"Recorded of {where}: {listed(names)} ({how}) on {on}.")
    return lines


def _judges(evidence: Evidence) -> list[str]:
    if not evidence.has("judges"):
        return []
    labels = map(str, evidence.results["judges"].judge.values.tolist())
    names = [_judge(evidence, judge) for judge in labels if evidence.judge_settings(judge)]
    return [f"Judged by {listed(names)}."] if names else []


def _judge(evidence: Evidence, name: str) -> str:
    """A judge by its label, and what it is."""
    kept = evidence.judge_settings(name)
    kind = str(kept.get("classifier") or kept.get("kind") or "")
    return f"{name} ({kind})" if kind and kind != name else name
