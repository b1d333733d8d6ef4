"""What a plan means without saying it: layer sets, the names of a formula, the vectors that a direction rests on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nsteer.plan import formulas, layers
from nsteer.plan.schema import Also, Edit, Method, Plan, Steer
from nsteer.science.presets import NEUTRAL


def layer_sets(spec: Any, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The layer sets of a steer block by label. Raises LookupError for a layer out of range."""
    if not isinstance(spec, dict):
        found = layers.resolve(spec, n_layers)
        return {_set_label(spec, found, n_layers): found}
    if "each" in spec:
        return {str(layer): (layer,) for layer in layers.resolve(spec["each"], n_layers)}
    return {label: layers.resolve(one, n_layers) for label, one in spec["sets"].items()}


def _set_label(spec: Any, found: tuple[int, ...], n_layers: int) -> str:
    """What the plan says where it means the same in every model (`0.5`, `0.25:0.75`), else block indices."""
    relative = isinstance(spec, float) or (isinstance(spec, str) and "." in spec)
    return str(spec) if relative else layers.label(found, n_layers)


def stands_for(plan: Plan, parts: tuple[str, ...], method: str | None = None) -> tuple[str, ...]:
    """What a name in a formula of this plan stands for (see formulas.meaning).

    method : of a formula that steers: whose vectors a name without a method means; there it means no direction
    """
    emotions, scales = plan.emotion_labels(), plan.scales()
    directions: Iterable[str] = plan.directions if method is None else ()
    methods: Iterable[str] = plan.methods if method is None or len(parts) > 1 else (method,)
    return formulas.meaning(parts, directions=directions, methods=methods, emotions=emotions, scales=scales)


def rated_emotions(plan: Plan, kind: str, label: str) -> list[str]:
    """The emotions whose vectors a name rests on: one, or all that are rated."""
    from nsteer.science.directions import rated  # here: it brings numpy, and few plans rate

    return [label] if kind == "vector" else rated(plan.emotion_labels(), plan.scales())


def directions_of(edit: Edit) -> list[str]:
    """The names of the directions that an edit rests on: its own, its reference, its gate's."""
    gate = edit.when.direction if edit.when else None
    return [name for name in (edit.direction, edit.reference, gate) if name is not None]


def derived_for(plan: Plan, name: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a direction of the plan rests on."""
    spec, found = plan.directions[name], dict[tuple[str, str], None]()
    for parts in formulas.names(formulas.parse(spec.formula)) if spec.formula else ():
        kind, *where = stands_for(plan, parts)
        more = derived_for(plan, where[0]) if kind == "direction" else None
        found |= dict.fromkeys(more or [(where[0], e) for e in rated_emotions(plan, kind, where[-1]) if more is None])
    return list(found)


def rests_on(plan: Plan, block: Steer, method: str, label: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a label of the `emotion` axis rests on: its own, or a formula's."""
    return (
        _made_of(plan, block.vectors.formulas[label], method) if label in block.vectors.formulas else [(method, label)]
    )


def also_rests_on(plan: Plan, block: Steer, method: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that the block's further edits rest on, their gates among them."""
    found = dict[tuple[str, str], None]()
    for one in block.also:
        text = formula_of(plan, one)
        found |= dict.fromkeys([(method, one.direction)] if text is None else _made_of(plan, text, method))
        if one.when is not None and one.when.direction is not None:
            found[method, one.when.direction] = None
    return list(found)


def formula_of(plan: Plan, one: Also) -> str | None:
    """The formula that the direction of a further edit is; None where it is an emotion's own vector."""
    return None if one.direction in plan.emotion_labels() else one.direction


def _made_of(plan: Plan, text: str, method: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a formula that steers rests on."""
    found = dict[tuple[str, str], None]()
    for parts in formulas.names(formulas.parse(text)):
        kind, *where = stands_for(plan, parts, method)
        found |= dict.fromkeys((where[0], e) for e in rated_emotions(plan, kind, where[1]))
    return list(found)


def neutral_count(method: Method) -> int:
    """How many neutral texts a method reads."""
    return method.samples if method.neutral_samples is None else method.neutral_samples


def labels_of(plan: Plan) -> list[str]:
    """The labels of the `emotion` axis of samples and activations: the emotions, then the neutral baseline."""
    return [*plan.emotion_labels(), NEUTRAL]
