"""Stage `vectors`: emotion vectors from the activations in the store. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError, InputError
from nsteer.plan.check import Study, rated_emotions
from nsteer.program.randomness import draw_label, generator
from nsteer.runner.failing import kind_of
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock
from nsteer.science import directions
from nsteer.science.axis import word
from nsteer.science.presets import NEUTRAL
from nsteer.stages import arrays, cells
from nsteer.stages.job import Job
from nsteer.stages.keys import Vector
from nsteer.stages.table import BY_NAME

STAGE = "vectors"


def derive(model: ModelRun) -> None:
    """Fills the missing cells of `vectors` for the current model."""
    path = model.path(STAGE)
    ready = with_activations(model, path, model.missing(STAGE))
    for name in model.plan.methods:
        for wave in model.run.waves(STAGE, path, {key: fp for key, fp in ready.items() if key.method == name}):
            clock = Clock()
            try:
                vectors = method_data(model, model.job, name, [key.emotion for key in wave])
            except InputError as error:  # lost, or another run's since: what rests on it can not be distinguished here
                for key in wave:
                    model.run.fail(STAGE, path, key, ready[key], str(error), kind_of(error))
                continue
            share = clock.share(len(wave))
            for key in wave:
                data = vectors.sel({"emotion": key.emotion}, drop=True)
                if not np.isfinite(data.norm).any():
                    reason = (
                        "no sample is left to average (every text is too short for the pooling, or a missing value)"
                    )
                    if int(data.n_samples):
                        reason = f"too few samples are left for {model.plan.methods[name].estimator.kind}"
                    model.run.fail(STAGE, path, key, ready[key], reason)
                    continue
                model.run.commit(path, key, data, ready[key], share)
                model.run.finished(STAGE, key)
            few(model, vectors, name)


def with_activations(model: ModelRun, path: str, todo: Mapping[Vector, int]) -> dict[Vector, int]:
    """The cells whose activations are all there; the others wait.

    Raises ExecutionError when no activations are there at all.
    """
    if not todo:
        return {}
    wanted = model.wanted(cells.activations)
    read = model.path("activations")
    gone = model.run.lacking(read, wanted)
    if gone == set(wanted):
        raise ExecutionError(
            f"{len(gone)} of {len(wanted)} cells of activations are missing or stale: "
            "`nsteer run` captures them (it needs the model)"
        )
    ready = {}
    for key, fp in todo.items():
        needed = cells.averaged(model.plan, key.method, key.emotion)
        absent = [other for other in wanted if other in gone and other.method == key.method and other.emotion in needed]
        if absent:
            model.run.wait_for(STAGE, path, key, fp, read, absent[0])
        else:
            ready[key] = fp
    return ready


def captured(model: ModelRun, method: str, emotion: str, count: int) -> xr.Dataset:
    """The activations (sample, layer, d_model) of one emotion, as the plan wants them. Raises InputError."""
    names = ["pooled", "token_norm"]
    layers = list(model.job.layers)
    chunks = [chunk[names].sel({"layer": layers}) for chunk in by_chunk(model, "activations", method, emotion)]
    whole = xr.concat(chunks, "sample", data_vars="all", coords="minimal", compat="override", join="override")
    return whole.sel({"sample": list(range(count))})


def written(model: ModelRun, method: str, emotion: str, count: int) -> np.ndarray:
    """The texts [sample] of one emotion, as the plan wants them. Raises InputError."""
    return np.concatenate([chunk.text.values for chunk in by_chunk(model, "samples", method, emotion)])[:count]


def by_chunk(model: ModelRun, stage: str, method: str, emotion: str) -> list[xr.Dataset]:
    """The cells of one emotion, a chunk of samples each, in their order."""
    every = model.wanted(BY_NAME[stage].cells)
    wanted = {key: number for key, number in every.items() if (key.method, key.emotion) == (method, emotion)}
    return list(model.run.inputs(model.path(stage), wanted).values())


@dataclass(frozen=True)
class Samples:
    """What the vectors of a method are made of: emotion -> pooled streams [sample, layer, d_model], texts [sample]."""

    pooled: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.pooled.values())


def samples_of(model: ModelRun, job: Job, name: str, emotions: Sequence[str]) -> Samples:
    """The samples that the vectors of some emotions rest on, read from the store. Raises InputError."""
    needed = {label for emotion in emotions for label in cells.averaged(job.plan, name, emotion)}
    counts = {e: n for e, n in cells.counts(job.study, job.plan.methods[name]).items() if e in needed and n}
    return Samples(
        {e: captured(model, name, e, n).pooled.values for e, n in counts.items()},
        {e: written(model, name, e, n) for e, n in counts.items()},
    )


def method_data(
    model: ModelRun, job: Job, name: str, emotions: Sequence[str], samples: Samples | None = None
) -> xr.Dataset:
    """The vectors of one method for some emotions, over (emotion, layer, d_model). Raises InputError.

    job : the model's, or that with shuffled labels: both rest on the same samples; samples : of `samples_of`, where
    they have been read
    """
    method = job.plan.methods[name]
    samples = samples_of(model, job, name, emotions) if samples is None else samples
    pooled, texts = dict(samples.pooled), dict(samples.texts)
    empty = np.full((0, len(job.layers), job.facts.d_model), np.nan, np.float32)
    neutral = pooled.get(NEUTRAL, empty)
    if method.labels == "shuffled":
        known = {e: len(texts[e]) for e in pooled if e != NEUTRAL or method.baseline == "neutral_mean"}
        places = directions.permutation(known, generator("shuffled", job.plan.seed, name, *draw_label(job.draw)))
        pooled, texts = directions.permuted(pooled, places), directions.permuted(texts, places)
    against = pooled.pop(NEUTRAL, empty)
    vectors, lengths = directions.derive(
        pooled,
        against,
        baseline=method.baseline,
        estimator=method.estimator.kind,
        parameters=method.estimator.parameters(),
        variance=method.project_out.variance if method.project_out else None,
        denoised_by=neutral,
        unit_norm=method.unit_norm,
    )
    emotions = [emotion for emotion in vectors if emotion in emotions]
    return arrays.dataset(
        {"emotion": emotions, "layer": job.layers, "d_model": range(job.facts.d_model)},
        {
            "vector": (("emotion", "layer", "d_model"), np.stack([vectors[e] for e in emotions])),
            "norm": (("emotion", "layer"), np.stack([lengths[e] for e in emotions])),
            "n_samples": (("emotion",), [int((~np.isnan(pooled[e]).all((1, 2))).sum()) for e in emotions]),
            "n_distinct": (("emotion",), [len(set(texts[e].tolist())) for e in emotions]),
        },
    )


def named(study: Study, kind: str, label: str, vectors: xr.DataArray) -> np.ndarray:
    """What stands for a name in a formula, [layer, d_model]: a vector of a method, or an axis of the plan's ratings.

    vectors : of its method, (emotion, layer, d_model); kind, label : see `formulas.meaning`
    """
    emotions = rated_emotions(study.plan, kind, label)
    by_emotion = {e: vectors.sel({"emotion": e}).values for e in emotions}
    return by_emotion[label] if kind == "vector" else directions.axes(by_emotion, study.plan.scales())[label]


def few(model: ModelRun, vectors: xr.Dataset, method: str) -> None:
    """Says so when an emotion rests on one text, or on fewer than its samples: greedy decoding repeats itself."""
    single = vectors.emotion.values[(vectors.n_samples == 1).values].tolist()
    if single:
        model.warn(f"{method}: the vector of {', '.join(single)} rests on one text")
    fewer = vectors.emotion.values[(vectors.n_distinct < vectors.n_samples).values]
    if len(fewer):
        least = int(vectors.n_distinct.sel({"emotion": fewer}).min())
        model.warn(
            f"{method}: {len(fewer)} {word('emotions')} have repeated texts (as few as {least} distinct): "
            "their samples count for less than their number; more topics or templates, or generate: {sample: true}, "
            "make them differ",
            now=False,
        )
