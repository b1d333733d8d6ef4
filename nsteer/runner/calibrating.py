"""Stage `calibration`: the strength at which each vector changes the model as much as the plan asks, into the store.

A prompt is continued once, greedily and unsteered. Every strength that is tried is a row: that text once more, edited
as if it had been written under the edit, and set against the same text unedited in its batch. A round tries several
strengths of many vectors together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Calibrated, Generate, Steer
from nsteer.program.form import Form, Row, RowEdit
from nsteer.program.ops import ACTING_AT_ZERO, MOST, UNSCALED
from nsteer.runner.editing import RowMaker, usable
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import WAVE, Clock
from nsteer.runner.steering import Derived, needed, prompts_of
from nsteer.runner.writing import decoding
from nsteer.science.calibration import FAN, Search
from nsteer.stages import arrays, cells, forms
from nsteer.stages.keys import Condition

STAGE = "calibration"
RELATIVE = ("stream_norm", "reference_norm")
"""Scales whose unit is the length of a stream: 10 of it is far beyond any use."""


def calibrate(model: ModelRun) -> None:
    """Fills the missing cells of `calibration` for the model at hand."""
    todo, derived = model.missing(STAGE), Derived(model)
    for block in model.plan.steer:
        if not isinstance(block.strengths, Calibrated):
            continue
        alone = single(block, block.strengths)
        for layer_set, layers in model.job.layer_sets(block).items():
            mine = {k: fp for k, fp in todo.items() if (k.op, k.layer_set) == (cells.op_label(block), layer_set)}
            mine = derived.ready(STAGE, STAGE, mine, partial(needed, model, alone))
            if mine:
                search_cells(model, alone, block.strengths, layers, mine)


def single(block: Steer, spec: Calibrated) -> Steer:
    """The block as its strengths are searched: greedy, one row a prompt."""
    greedy = Generate(max_new_tokens=min(spec.tokens, block.generate.max_new_tokens))
    prompts = block.prompts if spec.prompts is None else spec.prompts
    return block.model_copy(update={"generate": greedy, "seeds": [0], "project": False, "prompts": prompts})


def search_cells(
    model: ModelRun, block: Steer, spec: Calibrated, layers: Sequence[int], todo: Mapping[Condition, int]
) -> None:
    """The searches of one block and layer set. Those of a wave go on together, a round a time."""
    prompts = prompts_of(model, block, STAGE, STAGE, todo)
    if prompts is None:
        return
    makers = {method: RowMaker(model, block, layers, method) for method in {key.method for key in todo}}
    form, clock = forms.calibrate(block, layers, model.facts.n_layers), Clock()
    together = max(1, model.plan.batch.rows // (len(prompts) * FAN))  # searches whose rounds are one batch
    written: dict[str, tuple[int, ...]] = {}
    for wave in model.run.waves(STAGE, STAGE, todo, lambda key: math.ceil(WAVE / together)):
        written = written or continuations(model, block, prompts, {key: todo[key] for key in wave})
        good = [key for key in wave if written and usable(makers[key.method], STAGE, STAGE, key, todo[key])]
        searches = {key: search(block, spec, key.strength) for key in good}
        batches: dict[Condition, set[int]] = {key: set() for key in good}
        while open_ := {key: points for key, one in searches.items() if (points := one.propose())}:
            rows = {
                row.key: row
                for key, points in open_.items()
                for strength in points
                for row in tried(makers[key.method], key, strength, prompts, written)
            }
            results = model.execute(STAGE, form, rows.values())
            for key, points in open_.items():
                names = [[Tried(vector(key), strength, label) for label in prompts] for strength in points]
                if not model.run.came_back(STAGE, STAGE, key, todo[key], chain(*names), results):
                    del searches[key]
                    continue
                found = [[results.found[name] for name in one] for one in names]
                batches[key] |= {row["batch"] for one in found for row in one}
                values = [value(spec, [row["against"] for row in one]) for one in found]
                searches[key].add(dict(zip(points, values, strict=True)))
        share = clock.share(len(wave))
        for key, one in searches.items():
            data = arrays.calibration_data(one, spec.measure, len(batches[key]))
            say(model, key, one)
            model.run.commit(STAGE, key, data, todo[key], share)
            model.run.finished(STAGE, key)


def continuations(
    model: ModelRun, block: Steer, prompts: Mapping[str, Encoded], todo: Mapping[tuple, int]
) -> dict[str, tuple[int, ...]]:
    """The unsteered greedy continuation of every prompt; none where one fails, or was not run."""
    form = Form(decoding=decoding(model, block.generate))
    results = model.execute(STAGE, form, [Row(label, one.tokens) for label, one in prompts.items()])
    there = [model.run.came_back(STAGE, STAGE, key, number, prompts, results) for key, number in todo.items()]
    return {label: results.found[label]["tokens"] for label in prompts} if all(there) else {}


def search(block: Steer, spec: Calibrated, target: float) -> Search:
    """The search for one target, over the range that the op and its scale have."""
    relative = block.scale in RELATIVE
    most = spec.most or MOST.get(block.op) or (10.0 if relative else 1e5)
    least = most * (1e-2 if block.op in UNSCALED else 1e-4 if relative else 1e-7)
    rest = 0.0 if spec.measure == "kl" else 1.0
    return Search(target, least, most, spec.tolerance, rest, at_zero=block.op in ACTING_AT_ZERO or bool(block.also))


def vector(key: Condition) -> Condition:
    """A cell whatever its target: searches of one vector share what they try alike."""
    return key._replace(strength=0.0)


class Tried(NamedTuple):
    """A row of a search: the vector that it is of, the strength that is tried, and the prompt."""

    cell: Condition
    strength: float
    prompt: str


def tried(
    maker: RowMaker,
    key: Condition,
    strength: float,
    prompts: Mapping[str, Encoded],
    written: Mapping[str, tuple[int, ...]],
) -> list[Row]:
    """The rows of one strength: every prompt with its continuation."""
    made = maker.rows(key._replace(strength=strength), prompts)
    return [
        replace(forced(row, written[row.key.prompt]), key=Tried(vector(key), strength, row.key.prompt)) for row in made
    ]


def forced(row: Row, new: Sequence[int]) -> Row:
    """A row that generates as one that has been given what it is to write; each of its new tokens counts alike.

    The last token's own position decides nothing that counts, so it is not edited.
    """
    prompt, total = len(row.tokens), len(row.tokens) + len(new)
    later = (np.arange(total) >= prompt).astype(np.float32)
    tokens = (*row.tokens, *map(int, new))
    edits = tuple(_forced(one, tokens, prompt) for one in row.edits)
    return replace(row, tokens=tokens, weights={"score": later / len(new), "later": later}, edits=edits)


def _forced(one: RowEdit, tokens: Sequence[int], prompt: int) -> RowEdit:
    new = len(tokens) - prompt
    steps = np.full(new, one.generated) if one.steps is None else one.steps[:new]
    touched = np.concatenate([one.prompt, steps & (np.arange(new) < new - 1)])
    if one.after:
        before = np.array([-1, *tokens[:-1]])
        touched &= (np.arange(len(tokens)) < prompt) | np.isin(before, one.after)
    pace = np.concatenate([np.ones(prompt), np.ones(new) if one.factor is None else one.factor[:new]])
    norm = np.concatenate([one.norm, np.zeros(new)])
    return replace(one, prompt=touched, norm=norm, pace=pace, steps=None, factor=None)


def value(spec: Calibrated, changed: Sequence[Any]) -> float:
    """What a strength does: the mean over prompts, of the KL or of the log of the perplexity ratio."""
    kl, lost = np.mean(np.array(changed, np.float64), 0)
    with np.errstate(over="ignore"):
        return float(kl if spec.measure == "kl" else np.exp(lost))


def say(model: ModelRun, key: Condition, found: Search) -> None:
    """What a reader of the strengths must know."""
    _, *labels = key
    place = " / ".join(map(str, labels))
    if found.found is None:
        model.warn(f"calibration {place}: {found.reason}")
    elif not found.monotone:
        model.warn(
            f"calibration {place}: the curve falls somewhere; the strength is the least found to reach the target"
        )
