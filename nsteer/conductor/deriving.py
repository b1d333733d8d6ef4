"""Stage `vectors`: emotion vectors from the activations in the store. Needs no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from nsteer import arrays, cells, directions
from nsteer.check import Study
from nsteer.conductor.session import Clock, Session
from nsteer.errors import ExecutionError
from nsteer.layers import resolve
from nsteer.models import Facts
from nsteer.presets import NEUTRAL
from nsteer.store import Store, slug

STAGE = "vectors"


def derive(session: Session) -> None:
    """Fills the missing cells of `vectors` for the model at hand."""
    facts = session.facts
    assert facts is not None
    path = f"vectors/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in cells.vectors(session.study, facts).items()}
    todo = session.missing(STAGE, path, wanted)
    if todo:
        require_activations(session, facts)
    for name in session.study.plan.methods:
        mine = {key: fp for key, fp in todo.items() if key[1] == name}
        if not mine:
            continue
        clock = Clock()
        made = method_data(session, facts, name)
        share = clock.share(len(mine))
        for key, fp in mine.items():
            data = made.sel({"emotion": key[2]}, drop=True)
            if not np.isfinite(data.norm).any():
                session.fail(STAGE, key, "no sample is left to average (every text was too short for the pooling)")
                continue
            session.commit(STAGE, path, key, data, fp, share)
            session.finished(STAGE, key)
        repeated(session, made, name)


def require_activations(session: Session, facts: Facts) -> None:
    """Raises ExecutionError when activations are missing or stale: vectors of half a study are no vectors."""
    wanted = {(facts.label, *key): fp for key, fp in cells.activations(session.study, facts).items()}
    gone = session.store.missing(f"activations/{slug(facts.label)}", wanted)
    if gone:
        found = f"{len(gone)} of {len(wanted)} cells of activations are missing or stale, {gone[0]} first"
        raise ExecutionError(f"{found}: `nsteer run` captures them (it needs the model)")


def captured(store: Store, facts: Facts, method: str, emotion: str, count: int, layers: Sequence[int]) -> xr.Dataset:
    """The activations [sample, layer, d_model] of one emotion, loaded."""
    group = store.read(f"activations/{slug(facts.label)}")
    where: dict = {"model": facts.label, "method": method, "emotion": emotion, "sample": list(range(count))}
    where["layer"] = list(layers)
    return group[["pooled", "token_norm"]].sel(where).load()


def method_data(session: Session, facts: Facts, name: str) -> xr.Dataset:
    """All vectors of one method, over (emotion, layer, d_model)."""
    study: Study = session.study
    method = study.plan.methods[name]
    counts = cells.counts(study, method)
    layers = resolve(study.plan.layers, facts.n_layers)
    read = {e: captured(session.store, facts, name, e, n, layers) for e, n in counts.items() if n}
    pooled = {emotion: data.pooled.values for emotion, data in read.items()}
    empty = np.full((0, len(layers), facts.d_model), np.nan, np.float32)
    neutral = pooled.pop(NEUTRAL, empty)
    variance = method.project_out.variance if method.project_out else None
    vectors, lengths = directions.derive(
        pooled, neutral, baseline=method.baseline, variance=variance, unit_norm=method.unit_norm
    )
    emotions = list(vectors)
    texts = session.store.read(f"samples/{slug(facts.label)}").text.sel({"model": facts.label, "method": name})
    distinct = [len(set(texts.sel({"emotion": e, "sample": list(range(counts[e]))}).values.tolist())) for e in emotions]
    return arrays.dataset(
        {"emotion": emotions, "layer": layers, "d_model": range(facts.d_model)},
        {
            "vector": (("emotion", "layer", "d_model"), np.stack([vectors[e] for e in emotions])),
            "norm": (("emotion", "layer"), np.stack([lengths[e] for e in emotions])),
            "n_samples": (("emotion",), [int((~np.isnan(pooled[e]).all((1, 2))).sum()) for e in emotions]),
            "n_distinct": (("emotion",), distinct),
        },
    )


def repeated(session: Session, made: xr.Dataset, method: str) -> None:
    """Says so when an emotion's texts repeat: greedy decoding of few templates writes few texts."""
    fewer = made.emotion.values[(made.n_distinct < made.n_samples).values]
    if len(fewer):
        least = int(made.n_distinct.sel({"emotion": fewer}).min())
        assert session.facts is not None
        session.warnings.append(
            f"{session.facts.label}, {method}: {len(fewer)} emotions have repeated texts (as few as {least} distinct): "
            "their samples count for less than their number"
        )
