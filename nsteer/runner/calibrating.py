"""Stages `calibration` and `calibration_edits`: the strength at which an edit changes the model as much as is asked.

A prompt is continued once, greedily and unsteered. Every strength that is tried is a row: that text once more, edited
as if it had been written under the edit, and set against the same text unedited in its batch. A round tries several
strengths of many vectors together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from nsteer.plan.check import swept
from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Calibrated, Continuing, Editing, Generate
from nsteer.program.form import Form, Row, RowEdit
from nsteer.program.ops import ACTING_AT_ZERO, MAX_STRENGTH, UNSCALED
from nsteer.runner.editing import ConditionMaker, GridMaker, Maker, usable
from nsteer.runner.model import ModelRun
from nsteer.runner.prompting import prompts_of
from nsteer.runner.recording import directed
from nsteer.runner.runs import WAVE, Clock
from nsteer.runner.steering import Derived, edits_of, vectors_needed
from nsteer.runner.writing import decoding
from nsteer.science.calibration import FAN, Search
from nsteer.stages import arrays, forms
from nsteer.stages.keys import Condition, EditSearch

RELATIVE = ("stream_norm", "reference_norm")
"""Scales whose unit is the length of a stream: 10 of it is far beyond any use."""

K = TypeVar("K", Condition, EditSearch)
T = TypeVar("T", bound=Continuing)


@dataclass(frozen=True)
class Wanted(Generic[K]):
    """Searches whose edits stand at the same sites, over the same texts.

    stage : of these cells, and their group
    texts : the prompts, and their greedy continuations that are measured on; at : what has positions in them
    makers : key without its strength -> what makes its rows
    edit : the edit whose strength is sought; alone : whether no other edit is made beside it
    """

    stage: str
    spec: Calibrated
    texts: Continuing
    at: Sequence[Editing]
    makers: Mapping[K, Maker[K]]
    edit: Editing
    alone: bool


def calibrate(model: ModelRun) -> None:
    """Fills the missing cells of `calibration` for the current model."""
    stage, derived = "calibration", Derived(model)
    todo = model.missing(stage)
    for entry in model.plan.steer:
        if not isinstance(spec := entry.strengths, Calibrated):
            continue
        alone = measured_on(entry, spec)
        for layer_set, layers in model.job.layer_sets(entry).items():
            mine = {k: fp for k, fp in todo.items() if (k.op, k.layer_set) == (entry.label, layer_set)}
            mine = derived.ready(stage, stage, mine, partial(vectors_needed, model, alone))
            of = {method: GridMaker(model, alone, layers, method) for method in {key.method for key in mine}}
            makers = {vector(key): of[key.method] for key in mine}
            if mine:
                search_cells(model, Wanted(stage, spec, alone, edits_of(entry), makers, entry, not entry.also), mine)


def calibrate_edits(model: ModelRun) -> None:
    """Fills the missing cells of `calibration_edits` for the current model."""
    stage = "calibration_edits"
    todo = directed(model, stage, stage, model.missing(stage))
    for label in dict.fromkeys(key.edit for key in todo):
        edits = model.plan.edits[label]
        spec, moved = swept(edits), [edit for edit in edits if isinstance(edit.strength, Calibrated)]
        assert isinstance(spec, Calibrated)
        texts = measured_on(model.job.continuing, spec)
        mine = {key: fp for key, fp in todo.items() if key.edit == label}
        maker: Maker = ConditionMaker(model, label, texts, texts.generate.max_new_tokens)
        makers = {vector(key): maker for key in mine}
        search_cells(model, Wanted(stage, spec, texts, edits, makers, moved[0], len(edits) == len(moved)), mine)


def measured_on(texts: T, spec: Calibrated) -> T:
    """The texts on which strengths are searched: greedy, one row a prompt."""
    greedy = Generate(max_new_tokens=min(spec.tokens, texts.generate.max_new_tokens))
    prompts = texts.prompts if spec.prompts is None else spec.prompts
    return texts.model_copy(update={"generate": greedy, "seeds": [0], "project": False, "prompts": prompts})


def search_cells(model: ModelRun, of: Wanted[K], todo: Mapping[K, int]) -> None:
    """The searches of a wave go on together, a round a time."""
    stage, spec = of.stage, of.spec
    prompts = prompts_of(model, of.texts, of.at, stage, stage, todo)
    if prompts is None:
        return
    flat, clock = next(iter(of.makers.values())).flat, Clock()
    form = forms.calibrate(flat)
    together = max(1, model.plan.batch.rows // (len(prompts) * FAN))  # searches whose rounds are one batch
    written: dict[str, tuple[int, ...]] = {}
    for wave in model.run.waves(stage, stage, todo, lambda key: math.ceil(WAVE / together)):
        written = written or continuations(model, of, prompts, {key: todo[key] for key in wave})
        good = [key for key in wave if written and usable(of.makers[vector(key)], stage, stage, key, todo[key])]
        searches = {key: search(of, key.strength) for key in good}
        batches: dict[K, set[int]] = {key: set() for key in good}
        while open_ := {key: points for key, going in searches.items() if (points := going.propose())}:
            rows = {
                row.key: row
                for key, points in open_.items()
                for strength in points
                for row in tried(of.makers[vector(key)], key, strength, prompts, written)
            }
            results = model.execute(stage, form, rows.values())
            for key, points in open_.items():
                names = [[Tried(vector(key), strength, label) for label in prompts] for strength in points]
                if not model.run.came_back(stage, stage, key, todo[key], chain(*names), results):
                    del searches[key]
                    continue
                readouts = [[results.readouts[name] for name in rows] for rows in names]
                batches[key] |= {row["batch"] for rows in readouts for row in rows}
                values = [value(spec, [row["against"] for row in rows]) for rows in readouts]
                searches[key].add(dict(zip(points, values, strict=True)))
        share = clock.share(len(wave))
        for key, ended in searches.items():
            data = arrays.calibration_data(ended, spec.measure, len(batches[key]))
            say(model, key, ended)
            model.run.commit(stage, key, data, todo[key], share)
            model.run.finished(stage, key)


def continuations(
    model: ModelRun, of: Wanted[K], prompts: Mapping[str, Encoded], todo: Mapping[K, int]
) -> dict[str, tuple[int, ...]]:
    """The unsteered greedy continuation of every prompt; none where one fails, or was not run."""
    form = Form(decoding=decoding(model, of.texts.generate))
    results = model.execute(of.stage, form, [Row(label, prompt.tokens) for label, prompt in prompts.items()])
    there = [model.run.came_back(of.stage, of.stage, key, number, prompts, results) for key, number in todo.items()]
    return {label: results.readouts[label]["tokens"] for label in prompts} if all(there) else {}


def search(of: Wanted, target: float) -> Search:
    """The search for one target, over the range that the op and its scale have."""
    spec, edit = of.spec, of.edit
    relative = edit.scale in RELATIVE
    max_strength = spec.max_strength or MAX_STRENGTH.get(edit.op) or (10.0 if relative else 1e5)
    least = max_strength * (1e-2 if edit.op in UNSCALED else 1e-4 if relative else 1e-7)
    rest = 0.0 if spec.measure == "kl" else 1.0
    return Search(target, least, max_strength, spec.tolerance, rest, at_zero=edit.op in ACTING_AT_ZERO or not of.alone)


def vector(key: K) -> K:
    """A cell whatever its target: searches of one vector share what they try alike."""
    return key._replace(strength=0.0)


class Tried(NamedTuple):
    """A row of a search: the vector that it is of, the strength that is tried, and the prompt."""

    cell: Condition | EditSearch
    strength: float
    prompt: str


def tried(
    maker: Maker[K],
    key: K,
    strength: float,
    prompts: Mapping[str, Encoded],
    written: Mapping[str, tuple[int, ...]],
) -> list[Row]:
    """The rows of one strength: every prompt with its continuation."""
    rows = maker.rows(key._replace(strength=strength), prompts)
    return [
        replace(forced(row, written[row.key.prompt]), key=Tried(vector(key), strength, row.key.prompt)) for row in rows
    ]


def forced(row: Row, new: Sequence[int]) -> Row:
    """A row that generates as one that has been given what it is to write; each of its new tokens counts alike.

    The last token's own position decides nothing that counts, so it is not edited.
    """
    prompt, total = len(row.tokens), len(row.tokens) + len(new)
    later = (np.arange(total) >= prompt).astype(np.float32)
    tokens = (*row.tokens, *map(int, new))
    edits = tuple(_forced(edit, tokens, prompt) for edit in row.edits)
    return replace(row, tokens=tokens, weights={"score": later / len(new), "later": later}, edits=edits)


def _forced(edit: RowEdit, tokens: Sequence[int], prompt: int) -> RowEdit:
    new = len(tokens) - prompt
    steps = np.full(new, edit.generated) if edit.steps is None else edit.steps[:new]
    touched = np.concatenate([edit.prompt, steps & (np.arange(new) < new - 1)])
    if edit.after:
        before = np.array([-1, *tokens[:-1]])
        touched &= (np.arange(len(tokens)) < prompt) | np.isin(before, edit.after)
    pace = np.concatenate([np.ones(prompt), np.ones(new) if edit.factor is None else edit.factor[:new]])
    norm = np.concatenate([edit.norm, np.zeros(new)])
    return replace(edit, prompt=touched, norm=norm, pace=pace, steps=None, factor=None)


def value(spec: Calibrated, changed: Sequence[Any]) -> float:
    """What a strength does: the mean over prompts, of the KL or of the log of the perplexity ratio."""
    kl, lost = np.mean(np.array(changed, np.float64), 0)
    with np.errstate(over="ignore"):
        return float(kl if spec.measure == "kl" else np.exp(lost))


def say(model: ModelRun, key: K, strength_search: Search) -> None:
    """What a reader of the strengths must know."""
    _, *labels = key
    place = " / ".join(map(str, labels))
    if strength_search.strength is None:
        model.warn(f"calibration {place}: {strength_search.reason}")
    elif not strength_search.monotone:
        model.warn(
            f"calibration {place}: the curve falls somewhere; the strength is the least found to reach the target"
        )
