"""What a plan means without saying it: layer sets, the names of a formula, the vectors that a direction rests on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from nsteer.plan import formulas, layers
from nsteer.plan.schema import (
    Also,
    Calibrated,
    Continuing,
    Edit,
    Filter,
    Judge,
    Method,
    Plan,
    Steer,
    labels_of_strengths,
)
from nsteer.plan.texts import TextSet
from nsteer.science.presets import NEUTRAL
from nsteer.science.targets import Target


def layer_sets(spec: Any, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The layer sets of a steer entry by label. Raises LookupError for a layer out of range."""
    if not isinstance(spec, dict):
        indices = layers.resolve(spec, n_layers)
        return {_set_label(spec, indices, n_layers): indices}
    if "each" in spec:
        return {str(layer): (layer,) for layer in layers.resolve(spec["each"], n_layers)}
    return {label: layers.resolve(layer_set, n_layers) for label, layer_set in spec["sets"].items()}


def _set_label(spec: Any, indices: tuple[int, ...], n_layers: int) -> str:
    """What the plan says where it means the same in every model (`0.5`, `0.25:0.75`), else block indices."""
    relative = isinstance(spec, float) or (isinstance(spec, str) and "." in spec)
    return str(spec) if relative else layers.label(indices, n_layers)


def stands_for(plan: Plan, dotted: tuple[str, ...], method: str | None = None) -> tuple[str, ...]:
    """What a name in a formula of this plan stands for (see formulas.meaning).

    method : of a formula that steers: whose vectors a name without a method means; there it means a direction only in
        a plan without methods
    """
    emotions, scales = plan.emotion_labels() if plan.methods else [], plan.scales()
    directions: Iterable[str] = plan.directions if method is None or not plan.methods else ()
    methods: Iterable[str] = plan.methods if method is None or len(dotted) > 1 or not plan.methods else (method,)
    return formulas.meaning(dotted, directions=directions, methods=methods, emotions=emotions, scales=scales)


def rated_emotions(plan: Plan, kind: str, label: str) -> list[str]:
    """The emotions whose vectors a name rests on: one, or all that are rated."""
    from nsteer.science.directions import rated  # here: it brings numpy, and few plans rate

    return [label] if kind == "vector" else rated(plan.emotion_labels(), plan.scales())


def swept(edits: Sequence[Edit]) -> Calibrated | list[float] | None:
    """The strengths over which a condition of `edits` goes; None where it has one of each edit."""
    strengths: list[Any] = [edit.strength for edit in edits if not isinstance(edit.strength, float | int)]
    return strengths[0] if strengths else None


def strengths_of(edits: Sequence[Edit]) -> list[float]:
    """The labels of a condition on the axis `strength`; of `none`, which has no edit, 0."""
    if not edits:
        return [0.0]
    strengths: Any = swept(edits)
    return [float(edits[0].strength)] if strengths is None else labels_of_strengths(strengths)  # type: ignore[arg-type]


def conditions(plan: Plan) -> dict[str, list[Edit]]:
    """The conditions of `edits`, by label: `none`, without any edit, is always there."""
    return {"none": [], **plan.edits}


def continuing(plan: Plan) -> Continuing:
    """The plan's own prompts, and how they are continued under `edits`."""
    how = {name: getattr(plan, name) for name in Continuing.model_fields}
    return Continuing.model_construct(**{name: value for name, value in how.items() if value is not None})


def directions_of(edit: Edit) -> list[str]:
    """The names of the directions that an edit rests on: its own, its reference, its gate's."""
    gate = edit.when.direction if edit.when else None
    return [name for name in (edit.direction, edit.reference, gate) if name is not None]


def derived_for(plan: Plan, name: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector of a method that a direction of the plan rests on."""
    pairs = dict[tuple[str, str], None]()
    for method, label in named_by(plan, name):
        pairs |= dict.fromkeys([(method, label)] if method in plan.methods else derived_for(plan, label))
    return list(pairs)


def named_by(plan: Plan, name: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that the formula of a direction names, those of directions too."""
    spec, pairs = plan.directions[name], dict[tuple[str, str], None]()
    for dotted in formulas.names(formulas.parse(spec.formula)) if spec.formula else ():
        pairs |= dict.fromkeys(vectors_for(plan, *stands_for(plan, dotted)))
    return list(pairs)


def vectors_for(plan: Plan, kind: str, *where: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a name in a formula rests on."""
    if kind == "direction":
        return [(plan.directions[name].source, name) for name in where]
    method, label = where
    return [(method, emotion) for emotion in rated_emotions(plan, kind, label)]


def steered_directions(plan: Plan, entry: Steer) -> list[str]:
    """The names in `directions` that steer in an entry."""
    if entry.vectors.directions is not None:
        return entry.vectors.directions
    formulas_alone = bool(entry.vectors.formulas) and entry.vectors.labels == []
    return [] if plan.methods or formulas_alone else list(plan.directions)


def steering_vectors(plan: Plan, entry: Steer) -> list[tuple[str, str]]:
    """The (method, emotion) labels under which vectors steer: of the methods emotions and formulas, then directions.

    A direction stands under its source (`contrast`, ...) and its name; so does a formula where the plan has no methods.
    """
    emotions = plan.emotion_labels() if entry.vectors.labels is None else entry.vectors.labels
    methods = entry.vectors.methods or list(plan.methods)
    pairs = [(method, label) for method in methods for label in (*emotions, *entry.vectors.formulas)]
    pairs += [(plan.directions[name].source, name) for name in steered_directions(plan, entry)]
    return pairs + [("formula", label) for label in entry.vectors.formulas if not plan.methods]


def labels_under(plan: Plan, method: str) -> list[str]:
    """The labels of the vectors that stand under a label of the `method` axis: emotions, or directions of a source."""
    if method in plan.methods:
        return plan.emotion_labels()
    return [name for name, spec in plan.directions.items() if spec.source == method]


def rests_on(plan: Plan, entry: Steer, method: str, label: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a label of the `emotion` axis rests on: its own, or a formula's."""
    return (
        _made_of(plan, entry.vectors.formulas[label], method) if label in entry.vectors.formulas else [(method, label)]
    )


def also_rests_on(plan: Plan, entry: Steer, method: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that the entry's further edits rest on, their gates among them."""
    pairs = dict[tuple[str, str], None]()
    for further in entry.also:
        text = formula_of(plan, further)
        pairs |= dict.fromkeys([(method, further.direction)] if text is None else _made_of(plan, text, method))
        if further.when is not None and further.when.direction is not None:
            pairs[method, further.when.direction] = None
    return list(pairs)


def formula_of(plan: Plan, further: Also) -> str | None:
    """The formula that the direction of a further edit is; None where it is an emotion's own vector."""
    return None if further.direction in plan.emotion_labels() else further.direction


def _made_of(plan: Plan, text: str, method: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a formula that steers rests on."""
    pairs = dict[tuple[str, str], None]()
    for dotted in formulas.names(formulas.parse(text)):
        pairs |= dict.fromkeys(vectors_for(plan, *stands_for(plan, dotted, method)))
    return list(pairs)


def neutral_count(method: Method) -> int:
    """How many neutral texts a method reads."""
    if method.neutral_samples is not None:
        return method.neutral_samples
    return 0 if method.samples == "all" else method.samples  # as many as there are is a number once texts are known


def sample_count(method: Method, texts: TextSet | None, label: str) -> int:
    """How many samples an emotion has under a method."""
    if method.samples != "all":
        return method.samples
    return 0 if texts is None else len(texts.passages.get(label, ()))


def reads_instruction(method: Method) -> bool:
    """Whether a method reads its texts behind the instructions that they were written to."""
    return method.source == "generation" and method.context == "with_prompt"


def labels_of(plan: Plan) -> list[str]:
    """The labels of the `emotion` axis of samples and activations: the emotions, then the neutral baseline."""
    return [*plan.emotion_labels(), NEUTRAL]


def counts_for(name: str, by: Filter, judge: Judge, classes: Sequence[str], asks: bool) -> str | None:
    """The class whose score counts for a contrast's answers under its filter; None where it can not be told.

    name : of the direction; asks : whether the judge's question names the class, so that any may be asked about
    """
    target = judge.targets.get(name, Target((name,)))
    wanted = by.class_ or (target.own if target else None)
    if wanted is not None and (asks or wanted in classes):
        return wanted
    return classes[0] if by.class_ is None and len(classes) == 1 else None
