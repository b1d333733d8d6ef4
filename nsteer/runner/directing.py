"""Stage `directions`: the plan's own vectors, whatever they are made of, into the group `vectors` of the store.

A contrast or a mean is read by the current model, of given texts or those of the stage `responses`; a vector of another
store, a formula and a random draw need none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError, InputError, ModelError
from nsteer.models.facts import Facts
from nsteer.models.templates import shown
from nsteer.plan import formulas
from nsteer.plan.check import Study, named_by, rated_emotions, stands_for
from nsteer.plan.check.borrowing import misfit
from nsteer.plan.prompts import questions
from nsteer.plan.schema import SIDES, Contrast, Direction
from nsteer.program.randomness import unit_vector
from nsteer.runner.contrasting import STAGE, mean_of
from nsteer.runner.deriving import named
from nsteer.runner.failing import kind_of
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock, LoadError
from nsteer.runner.sources import assured_vectors, vectors_of
from nsteer.science.directions import combine
from nsteer.stages import arrays
from nsteer.stages.counting import direction_texts
from nsteer.stages.keys import Vector
from nsteer.stages.table import BY_NAME


def direct(model: ModelRun) -> None:
    """Fills the missing cells of the plan's directions for the current model, formulas after what they name."""
    path, todo = model.path("vectors"), model.missing(STAGE)
    if not todo:
        return
    clock = Clock()
    for names in rounds(model, todo):
        for wave in model.run.waves(STAGE, path, {key: todo[key] for key in names}):
            for key in wave:
                if waits(model, path, key, todo[key]):
                    continue
                try:
                    data = direction_data(model, key.emotion)
                except LoadError:
                    raise
                except (ModelError, ExecutionError, InputError) as error:
                    model.run.fail(STAGE, path, key, todo[key], str(error), kind_of(error))
                    continue
                model.run.commit(path, key, data, todo[key], clock.share(1))
                model.run.finished(STAGE, key)


def rounds(model: ModelRun, todo: Mapping[Vector, int]) -> list[list[Vector]]:
    """The cells in an order in which each comes after those of the directions that its formula names."""
    left, levels = list(todo), list[list[Vector]]()
    while left:
        open_ = {(key.method, key.emotion) for key in left}
        ready = [key for key in left if not open_ & set(named_by(model.plan, key.emotion))]
        levels.append(ready)
        left = [key for key in left if key not in ready]
    return levels


def waits(model: ModelRun, path: str, key: Vector, number: int) -> bool:
    """Whether the answers that a direction is made of are not all there; the cell then waits for them."""
    spec = model.plan.directions[key.emotion].contrast
    if spec is None or spec.generate is None:
        return False
    for stage in ("responses", "responses_judged")[: 1 if spec.filter is None else 2]:
        wanted = {k: fp for k, fp in model.wanted(BY_NAME[stage].cells).items() if k.direction == key.emotion}
        if gone := model.run.lacking(model.path(stage), wanted):
            first = next(vector for vector in wanted if vector in gone)
            model.run.wait_for(STAGE, path, key, number, model.path(stage), first)
            return True
    return False


def direction_data(model: ModelRun, name: str) -> xr.Dataset:
    """One direction as a cell of `vectors`. Raises ModelError, ExecutionError, InputError."""
    spec, facts = model.plan.directions[name], model.facts
    texts: list[Any] = []
    if spec.random is not None:
        drawn = unit_vector(facts.d_model, spec.random, name)  # one for all layers: independent draws cancel
        vector = np.repeat(drawn[None], facts.n_layers, 0)
    elif spec.formula is not None:
        vector = combine(formulas.replaced(formulas.parse(spec.formula), lambda dotted: leaf(model, dotted)))
    elif spec.store is not None:
        vector = stored(model.study, facts, spec)
    elif spec.contrast is not None and spec.contrast.generate is not None:
        vector, texts = from_responses(model, name, spec.contrast)
    else:
        vector, texts = from_texts(model, name, spec), direction_texts(spec)
    dims: dict[str, Any] = {"layer": range(facts.n_layers), "d_model": range(facts.d_model)}
    return arrays.dataset(
        dims,
        {
            "vector": (tuple(dims), vector.astype(np.float32)),
            "norm": (("layer",), np.linalg.norm(vector, axis=-1).astype(np.float32)),
            "n_samples": ((), len(texts)),
            "n_distinct": ((), len(set(map(shown, texts)))),
        },
    )


def leaf(model: ModelRun, dotted: tuple[str, ...]) -> np.ndarray:
    """What stands for a name in a formula of a direction, at all layers: [layer, d_model]."""
    kind, *where = stands_for(model.plan, dotted)
    if kind == "direction":
        (name,) = where
        source = model.plan.directions[name].source
        return assured_vectors(model, source, vectors_of(model, source), [name]).sel({"emotion": name}).values
    method, label = where
    rest = rated_emotions(model.plan, kind, label)
    return named(model.study, kind, label, assured_vectors(model, method, vectors_of(model, method), rest))


def from_texts(model: ModelRun, name: str, spec: Direction) -> np.ndarray:
    """mean(positive) - mean(negative) of pooled streams, or the mean of one group, at every layer: [layer, d_model]."""
    means = [mean_of(model, name, side)[0] for side in (SIDES if spec.contrast else ("texts",))]
    return means[0] - means[1] if spec.contrast else means[0]


FEW = 10
"""Answers kept of a side below which a vector rests on little: said."""


def from_responses(model: ModelRun, name: str, spec: Contrast) -> tuple[np.ndarray, list[str]]:
    """mean(positive) - mean(negative) over the answers that are kept, each read behind what it answers: the vector
    [layer, d_model], and their texts.

    Raises ExecutionError where too few are kept, InputError for answers that are not as they were committed.
    """
    means, texts, counts = list[np.ndarray](), list[str](), dict[str, tuple[int, int]]()
    for side in SIDES:
        mean, read = mean_of(model, name, side)
        means.append(mean)
        texts += read
        counts[side] = len(read), len(questions(spec, side))
    told = f"{name}: " + " and ".join(f"{n} of {of} {side}" for side, (n, of) in counts.items()) + " answers are kept"
    least, by = (spec.filter.min_answers, f" by {spec.filter.judge}") if spec.filter else (1, "")
    if any(n < least for n, _ in counts.values()):
        raise ExecutionError(
            f"{told}{by}, and at least {least} of each are needed: other system prompts or questions, more samples, or "
            "another `filter`"
        )
    if any(n < FEW for n, _ in counts.values()) or any(n < of for n, of in counts.values()):
        model.warn(f"{told}{by}", now=any(n < FEW for n, _ in counts.values()))
    return means[0] - means[1], texts


def stored(study: Study, facts: Facts, spec: Direction) -> np.ndarray:
    """A vector of this model from a store: [layer, d_model], NaN at layers that it lacks.

    Raises ModelError when the store holds none, or one of another width.
    """
    assert spec.store is not None
    vector = study.borrowed(facts, spec.store)
    why = "no finished one" if vector is None else misfit(vector, facts)
    if why:
        what = f"{spec.store.method} / {spec.store.label}"
        raise ModelError(f"the vector {what} of {facts.label} in the store {spec.store.path!r}: {why}")
    return vector.reindex({"layer": range(facts.n_layers)}).values
