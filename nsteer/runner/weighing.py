"""Stages `capability` and the two beside it: what edits cost the current model, in capability passages and questions.

They are read as they stand, whatever chat template a plan's prompts go through, and edited as if the model had written
what follows their openings and questions under the edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from nsteer.errors import EditError
from nsteer.plan.capability import shipped
from nsteer.plan.prompts import Encoded, encode, ending
from nsteer.plan.schema import Continuing, Generate
from nsteer.program.form import Row
from nsteer.runner.calibrating import forced
from nsteer.runner.editing import ConditionMaker, GridMaker, Maker, usable
from nsteer.runner.model import ModelRun
from nsteer.runner.prompting import prompts_of
from nsteer.runner.recording import with_strengths
from nsteer.runner.runs import Clock
from nsteer.runner.steering import Derived, calibrated, edits_of, vectors_needed
from nsteer.stages import arrays, counting, forms
from nsteer.stages.keys import Condition, EditSearch, OfModel

STEERED, UNSTEERED, BY_HAND = "capability", "capability_unsteered", "capability_edited"
Label = tuple[str, str]
"""Of a text that is scored: the passage and "", or the item and the choice."""

C = TypeVar("C", bound=Continuing)
K = TypeVar("K", Condition, EditSearch)


class Weighed(NamedTuple):
    """A row that is a passage, or a question with an answer: of which cell."""

    cell: Condition | EditSearch | OfModel
    label: Label


def weigh(model: ModelRun) -> None:
    """Fills the missing cells of `capability` for the current model."""
    todo, derived = model.missing(STEERED), Derived(model)
    for entry in model.plan.steer:
        for layer_set, layers in model.job.layer_sets(entry).items():
            mine = {k: fp for k, fp in todo.items() if (k.op, k.layer_set) == (entry.label, layer_set)}
            alone, texts = _read(model, entry) if mine else (entry, {})
            mine = derived.ready(STEERED, STEERED, mine, partial(vectors_needed, model, alone))
            strengths = calibrated(model, entry, mine, (STEERED, STEERED))
            mine = {key: mine[key] for key in strengths}
            of = {key.method: GridMaker(model, alone, layers, key.method, strengths) for key in mine}
            _cells(model, STEERED, alone, edits_of(alone), texts, {key: of[key.method] for key in mine}, mine)


def weigh_edits(model: ModelRun) -> None:
    """Fills the missing cells of `capability_edited` for the current model."""
    ready, strengths = with_strengths(model, BY_HAND, BY_HAND, model.missing(BY_HAND))
    for label in dict.fromkeys(key.edit for key in ready):
        alone, texts = _read(model, model.job.continuing)
        maker = ConditionMaker(model, label, alone, alone.generate.max_new_tokens, strengths)
        mine = {key: fp for key, fp in ready.items() if key.edit == label}
        _cells(model, BY_HAND, alone, maker.written, texts, dict.fromkeys(mine, maker), mine)


def weigh_unsteered(model: ModelRun) -> None:
    """Fills the missing cell of `capability_unsteered` for the current model."""
    for key, number in model.missing(UNSTEERED).items():
        with model.run.guarded(UNSTEERED, UNSTEERED, key, number):
            _, texts = _read(model, model.job.continuing)
            tokenizer, clock, rows = model.executor.tokenizer, Clock(), list[Row]()
            for label, new in texts.items():
                before, _ = shipped().scored()[label]
                tokens = encode(tokenizer, before).tokens
                weights = np.r_[np.zeros(len(tokens)), np.full(len(new), 1 / len(new))].astype(np.float32)
                rows.append(Row(Weighed(key, label), tokens + new, {"score": weights}))
            results = model.execute(UNSTEERED, forms.score(), rows)
            if model.run.came_back(UNSTEERED, UNSTEERED, key, number, [row.key for row in rows], results):
                scored = {row.key.label: results.readouts[row.key]["score"] for row in rows}
                data = arrays.capability_data(_summed(scored, texts), None)
                model.run.commit(UNSTEERED, key, data, number, clock.share(1))
                model.run.finished(UNSTEERED, key)


def _read(model: ModelRun, texts: C) -> tuple[C, dict[Label, tuple[int, ...]]]:
    """What says how the capability texts are read: by label of what stands before; and what follows, as tokens."""
    scored, tokenizer = shipped().scored(), model.executor.tokenizer
    new = {label: ending(tokenizer, encode(tokenizer, before), text) for label, (before, text) in scored.items()}
    passages: dict[str, Any] = {
        "prompts": {"/".join(label): before for label, (before, _) in scored.items()},
        **{"chat": "never", "seeds": [0], "project": False},
        "generate": Generate(max_new_tokens=max(map(len, new.values()))),
    }
    return texts.model_copy(update=passages), new


def _cells(
    model: ModelRun,
    stage: str,
    passages: Continuing,
    at: Sequence[Any],
    texts: Mapping[Label, tuple[int, ...]],
    makers: Mapping[K, Maker[K]],
    todo: Mapping[K, int],
) -> None:
    """Cells whose edits stand at the same sites. All their rows share one form, so they travel together."""
    before = prompts_of(model, passages, at, stage, stage, todo) if todo else None
    if before is None:
        return
    form, clock = forms.weigh(next(iter(makers.values())).flat), Clock()
    for wave in model.run.waves(stage, stage, todo, lambda key: counting.weighed_rows(model.job, key)):
        good = [key for key in wave if usable(makers[key], stage, stage, key, todo[key])]
        rows = {key: _rows(makers[key], key, before, texts) for key in good}
        results = model.execute(stage, form, [row for mine in rows.values() for row in mine])
        share = clock.share(len(wave))
        for key, mine in rows.items():
            if not model.run.came_back(stage, stage, key, todo[key], [row.key for row in mine], results):
                continue
            readouts = {row.key.label: results.readouts[row.key] for row in mine}
            try:
                wrote = {
                    (" ".join(label).strip(),): {**result, "tokens": texts[label]} for label, result in readouts.items()
                }
                makers[key].check(key, wrote)
            except EditError as error:
                model.run.fail(stage, stage, key, todo[key], str(error))
                continue
            scored = _summed({label: result["score"] for label, result in readouts.items()}, texts)
            kl = {label: float(readouts[label, ""]["against"][0]) for label in shipped().passages}
            model.run.commit(stage, key, arrays.capability_data(scored, kl), todo[key], share)
            model.run.finished(stage, key)


def _rows(maker: Maker[K], key: K, before: Mapping[str, Encoded], texts: Mapping[Label, tuple[int, ...]]) -> list[Row]:
    """The rows of one cell: every passage, and every question with each of its answers."""
    rows = maker.rows(key, before)
    return [
        replace(forced(row, new), key=Weighed(key, label))
        for row, (label, new) in zip(rows, texts.items(), strict=True)
    ]


def _summed(scored: Mapping[Label, Any], texts: Mapping[Label, tuple[int, ...]]) -> dict[Label, float]:
    """Means of log P over tokens as they are kept: of an answer their sum."""
    return {label: float(score) * (len(texts[label]) if label[1] else 1) for label, score in scored.items()}
