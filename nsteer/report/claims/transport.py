"""How much of what steering injects arrives: the steering delta of Jeong 2026, raw and over what was injected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import NO_UNSTEERED, Evidence, Row, conditions, control_label, greatest, unknown
from nsteer.science import outcomes, statistics
from nsteer.store import slug


def deltas(evidence: Evidence) -> list[Row]:
    """The steering delta, raw and over what was injected, beside a random direction of the same norm."""
    what, paper = "steering delta on the target, over injected (transport ratio)", "raw delta, e.g. Gemma-3 +7591"
    lacking = [path for path in ("projections", "projections_unsteered") if not evidence.has(path)]
    if lacking:
        return [unknown("4", what, "all models", paper, f"the store has no group {' and '.join(lacking)}")]
    rows = []
    projected = evidence.results["projections"].projection
    for where, cube in conditions(projected.isel({"where": [0]}).to_dataset(name="projection")):
        rows.append(_one_delta(evidence, where, greatest(cube.strength.values.tolist()), what, paper))
    return rows or [unknown("4", what, "all models", paper, "no projection is finished")]


def _one_delta(evidence: Evidence, where: dict[str, str], strength: float, what: str, paper: str) -> Row:
    projected = evidence.results["projections"].projection.sel({**where, "where": "prompt_end"}).load()
    unsteered = evidence.results["projections_unsteered"].projection
    unsteered = unsteered.sel({d: v for d, v in {**where, "where": "prompt_end"}.items() if d in unsteered.dims}).load()
    labels = {**where, "strength": strength}
    if not bool(unsteered.notnull().any()):
        return unknown("4", what, ", ".join(where.values()), paper, NO_UNSTEERED, inputs=(("projections", labels),))
    projected = projected.sel({"strength": [strength]})
    injected, how = _injected(evidence, where, projected)
    transport = outcomes.transport(projected, unsteered, injected)
    value = transport.get("transport", transport.delta)
    shown, interval = (
        {},
        statistics.mean_interval(by_prompt(value.sel({"control": "none"}))),
    )
    for control in value.control.values.tolist():
        raw, over = (statistics.clean(x.sel({"control": control}).values) for x in (transport.delta, value))
        shown[control] = f"{raw.mean():+.3g} raw, {over.mean():+.3g} over injected" if len(raw) else "nothing"
    used = (
        ("projections", labels),
        (
            "projections_unsteered",
            {d: v for d, v in where.items() if d in unsteered.dims or d in ("model", "op", "method")},
        ),
    )
    why = (
        "nearly mechanical: the raw delta measures the norm of the stream"
        if injected is not None
        else f"not over injected: {how}"
    )
    return unknown(
        "4",
        what,
        ", ".join([*where.values(), f"strength {strength:g}"]),
        paper,
        why,
        ours=shown.get("none", ""),
        value=interval.estimate,
        n=interval.n,
        low=interval.low,
        high=interval.high,
        control=control_label(shown),
        assumed=how,
        inputs=used,
    )


def by_prompt(values: xr.DataArray) -> np.ndarray:
    """The mean of what is there for each prompt: [prompt]."""
    return values.mean([dim for dim in values.dims if dim != "prompt"]).values


def _injected(evidence: Evidence, where: dict[str, str], projected: xr.DataArray) -> tuple[xr.DataArray | None, str]:
    """The length added at each layer: as recorded, else estimated from neutral norms (scale stream_norm only)."""
    if evidence.has("steering") and "injected" in evidence.results["steering"]:
        recorded = evidence.results["steering"].injected.sel(where).load()
        return recorded.sel({"strength": projected.strength.values}), "injected as recorded by the edit"
    path = f"activations/{slug(where['model'])}"
    entry = next((b for b in _steer_entries(evidence.plan) if (b.get("name") or b.get("op", "add")) == where["op"]), {})
    if entry.get("scale", "stream_norm") != "stream_norm" or entry.get("op", "add") != "add" or not evidence.has(path):
        return None, "the store does not record the length added (steering.injected)"
    if where["layer_set"] != "all":
        return (
            None,
            f"the length added is not recorded, and is only estimated for layer set all, not {where['layer_set']}",
        )
    norm = evidence.results[path].token_norm.sel({"model": where["model"], "method": where["method"]}).load()
    estimate = outcomes.estimated_injection(norm, projected.strength)
    return estimate, "injected = strength x mean stream norm of the neutral samples, summed over layers: an estimate"


def _steer_entries(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steer = plan.get("steer") or []
    return [steer] if isinstance(steer, Mapping) else list(steer)
