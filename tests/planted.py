"""Stores whose content is known by construction."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsteer.store import Group, Store, Variable, fingerprint


def put(
    store: Store, path: str, coords: dict, variables: dict, attrs: dict | None = None, auxiliary: dict | None = None
):
    """One group with one cell a model. variables: name -> (dims, dtype, values)."""
    declared = {name: Variable(dims, dtype, name) for name, (dims, dtype, _) in variables.items()}
    store.prepare(
        [Group(path, coords, declared, ("model",), {}, auxiliary or {}, attrs or {"product": path.split("/")[0]})]
    )
    for i, model in enumerate(coords["model"]):
        data = {n: (dims[1:], np.asarray(values)[i]) for n, (dims, _, values) in variables.items()}
        own = {dim: labels for dim, labels in coords.items() if dim != "model"}
        store.commit(path, (model,), xr.Dataset(data, coords=own), fingerprint=fingerprint({"a": path, "m": model}))
