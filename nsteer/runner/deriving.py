"""Stage `vectors`: emotion vectors from the activations in the store. Needs no model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError, InputError
from nsteer.models.facts import Facts
from nsteer.plan.check import Study, rated_emotions
from nsteer.plan.layers import resolve
from nsteer.program.randomness import generator
from nsteer.runner.failing import kind_of
from nsteer.runner.session import Clock, Session
from nsteer.science import directions
from nsteer.science.presets import NEUTRAL
from nsteer.stages import arrays, cells
from nsteer.store import slug

STAGE = "vectors"


def derive(session: Session) -> None:
    """Fills the missing cells of `vectors` for the model at hand."""
    facts = session.facts
    assert facts is not None
    path = f"vectors/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.vectors).items()}
    todo = session.missing(STAGE, path, wanted)
    ready = with_activations(session, facts, path, todo)
    for name in session.study.plan.methods:
        for wave in session.waves(STAGE, path, {key: fp for key, fp in ready.items() if key[1] == name}):
            clock = Clock()
            try:
                made = method_data(session, session.study, name, [key[2] for key in wave])
            except InputError as error:  # lost, or another run's since: what rests on it can not be told apart here
                for key in wave:
                    session.fail(STAGE, path, key, ready[key], str(error), kind_of(error))
                continue
            share = clock.share(len(wave))
            for key in wave:
                data = made.sel({"emotion": key[2]}, drop=True)
                if not np.isfinite(data.norm).any():
                    reason = "no sample is left to average (every text is too short for the pooling, or a hole)"
                    if int(data.n_samples):
                        reason = f"too few samples are left for {session.study.plan.methods[name].estimator.kind}"
                    session.fail(STAGE, path, key, ready[key], reason)
                    continue
                session.commit(STAGE, path, key, data, ready[key], share)
                session.finished(STAGE, key)
            few(session, made, name)


def with_activations(session: Session, facts: Facts, path: str, todo: Mapping[tuple, int]) -> dict[tuple, int]:
    """The cells whose activations are all there; the others wait.

    Raises ExecutionError when no activations are there at all.
    """
    if not todo:
        return {}
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.activations).items()}
    read = f"activations/{slug(facts.label)}"
    gone = session.lacking(read, wanted)
    if gone == set(wanted):
        raise ExecutionError(
            f"{len(gone)} of {len(wanted)} cells of activations are missing or stale: "
            "`nsteer run` captures them (it needs the model)"
        )
    ready = {}
    for key, fp in todo.items():
        needed = cells.averaged(session.study, key[1], key[2])
        absent = [one for one in wanted if one in gone and one[1] == key[1] and one[2] in needed]
        if absent:
            session.wait_for(STAGE, path, key, fp, read, absent[0])
        else:
            ready[key] = fp
    return ready


def captured(session: Session, method: str, emotion: str, count: int, layers: Sequence[int]) -> xr.Dataset:
    """The activations [sample, layer, d_model] of one emotion, as the plan wants them. Raises InputError."""
    names = ["pooled", "token_norm"]
    blocks = [one[names].sel({"layer": list(layers)}) for one in by_blocks(session, cells.activations, method, emotion)]
    whole = xr.concat(blocks, "sample", data_vars="all", coords="minimal", compat="override", join="override")
    return whole.sel({"sample": list(range(count))})


def written(session: Session, method: str, emotion: str, count: int) -> np.ndarray:
    """The texts [sample] of one emotion, as the plan wants them. Raises InputError."""
    return np.concatenate([one.text.values for one in by_blocks(session, cells.samples, method, emotion)])[:count]


def by_blocks(
    session: Session, of: Callable[[Study, Facts], cells.Cells], method: str, emotion: str
) -> list[xr.Dataset]:
    """The cells of one emotion, a block of samples each, in their order."""
    facts, group = session.facts, of.__name__
    assert facts is not None
    wanted = {(facts.label, *key): number for key, number in session.wanted(of).items() if key[:2] == (method, emotion)}
    return list(session.inputs(f"{group}/{slug(facts.label)}", wanted).values())


def method_data(session: Session, study: Study, name: str, emotions: Sequence[str]) -> xr.Dataset:
    """The vectors of one method for some emotions, over (emotion, layer, d_model). Raises InputError.

    study : the session's, or that with shuffled labels: both rest on the same samples
    """
    method, facts = study.plan.methods[name], session.facts
    assert facts is not None
    needed = {label for emotion in emotions for label in cells.averaged(study, name, emotion)}
    counts = {label: n for label, n in cells.counts(study, method).items() if label in needed}
    layers = resolve(study.plan.layers, facts.n_layers)
    read = {e: captured(session, name, e, n, layers) for e, n in counts.items() if n}
    pooled = {emotion: data.pooled.values for emotion, data in read.items()}
    empty = np.full((0, len(layers), facts.d_model), np.nan, np.float32)
    texts = {e: written(session, name, e, n) for e, n in counts.items() if n}
    neutral = pooled.get(NEUTRAL, empty)
    if method.labels == "shuffled":
        dealing = {e: len(texts[e]) for e in pooled if e != NEUTRAL or method.baseline == "neutral_mean"}
        hands = directions.deal(dealing, generator("shuffled", study.plan.seed, name))
        pooled, texts = directions.dealt(pooled, hands), directions.dealt(texts, hands)
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
        {"emotion": emotions, "layer": layers, "d_model": range(facts.d_model)},
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
    made = {e: vectors.sel({"emotion": e}).values for e in emotions}
    return made[label] if kind == "vector" else directions.axes(made, study.plan.scales())[label]


def few(session: Session, made: xr.Dataset, method: str) -> None:
    """Says so when an emotion rests on one text, or on fewer than its samples: greedy decoding repeats itself."""
    single = made.emotion.values[(made.n_samples == 1).values].tolist()
    if single:
        session.warn(f"{method}: the vector of {', '.join(single)} rests on one text")
    fewer = made.emotion.values[(made.n_distinct < made.n_samples).values]
    if len(fewer):
        least = int(made.n_distinct.sel({"emotion": fewer}).min())
        session.warn(
            f"{method}: {len(fewer)} emotions have repeated texts (as few as {least} distinct): "
            "their samples count for less than their number; more topics or templates, or generate: {sample: true}, "
            "make them differ",
            now=False,
        )
