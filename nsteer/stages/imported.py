"""Puts vectors that no run of a store made into its group `vectors`, with where they come from in `imports`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.models.facts import Facts
from nsteer.stages import arrays
from nsteer.stages.keys import Vector
from nsteer.store import Store
from nsteer.system.fingerprints import fingerprint


def commit(
    store: Store, facts: Facts, vectors: Mapping[tuple[str, str], Mapping[int, np.ndarray]], origin: Mapping[str, Any]
) -> list[Vector]:
    """Commits vectors as they stand, (method, emotion) -> Layers by block index, each with where it comes from.

    Layers that a vector lacks are missing values. Raises ExchangeError for one that the store's own samples made under
    the same labels, StoreError.
    """
    methods, emotions = (list(dict.fromkeys(pair[i] for pair in vectors)) for i in (0, 1))
    group = arrays.vectors_of(facts, methods, emotions)
    kept = arrays.imports_group([facts.label], methods, emotions)
    if store.exists:
        done = store.committed(group.path)
        before = {cell: record.fingerprint for cell, record in store.committed("imports").items()}
        for pair in vectors:
            cell = Vector(facts.label, *pair)
            if cell in done and before.get(cell) != done[cell].fingerprint:
                raise ExchangeError(
                    f"{store.path} has a vector {' / '.join(pair)} of {facts.label} that was not imported: "
                    "name another --method"
                )
    store.prepare([group, kept])
    for pair, layers in vectors.items():
        cell, data = Vector(facts.label, *pair), _data(facts, layers)
        number = fingerprint({"imported": hashlib.sha256(data["vector"][1].tobytes()).hexdigest()})
        said = {**origin, "layers": sorted(layers), "imported": datetime.now(UTC).isoformat(timespec="seconds")}
        dims = {"layer": range(facts.n_layers), "d_model": range(facts.d_model)}
        store.commit("imports", cell, arrays.dataset({}, {"provenance": ((), json.dumps(said))}), fingerprint=number)
        store.commit(group.path, cell, arrays.dataset(dims, data), fingerprint=number)
    return [Vector(facts.label, *pair) for pair in vectors]


def _data(facts: Facts, layers: Mapping[int, np.ndarray]) -> dict[str, Any]:
    """The variables of a cell of `vectors`; NaN at layers that the file has not, counts unknown."""
    values = np.full((facts.n_layers, facts.d_model), np.nan, np.float32)
    for layer, vector in layers.items():
        values[layer] = vector
    return {
        "vector": (("layer", "d_model"), values),
        "norm": (("layer",), np.linalg.norm(values, axis=-1)),
        "n_samples": ((), np.int32(-1)),
        "n_distinct": ((), np.int32(-1)),
    }
