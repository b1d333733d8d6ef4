"""Turns conditions written by hand into doses: what each did to texts and streams at each of its strengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsteer.report import edited
from nsteer.report.claims.evidence import Evidence
from nsteer.report.overview.steered import Dose, costs_of, moved
from nsteer.science import statistics

WHERE = {"op": "edits", "layer_set": "", "method": ""}
"""Under which labels the conditions stand beside steer blocks."""


def doses_of_edits(evidence: Evidence) -> tuple[Dose, ...]:
    """A line for each model, condition and strength that was written under."""
    made = edited.cube(evidence)
    if made is None:
        return ()
    pushed, found = _pushed(evidence), []
    judged = evidence.by_hand.judged if evidence.has("judged_edited") else None
    limit = evidence.rules.thresholds.repetition
    differs = xr.where(made.there & made.unedited_there, made.text != made.unedited, np.nan)
    for at in np.argwhere(made.there.any(["prompt", "seed"]).transpose("model", "edit", "strength").values):
        place = dict(zip(("model", "edit", "strength"), map(int, at), strict=True))
        where = {dim: made.text[dim].values.tolist()[i] for dim, i in place.items()}
        part = {dim: slice(i, i + 1) for dim, i in place.items()}
        there = made.there.isel(part)
        n = int(there.sum())
        score = statistics.clean(made.repetition.isel(part).values)
        ratios = statistics.clean(made.ratio.isel(part).values)
        push = float("nan") if pushed is None else pushed.sel({d: where[d] for d in ("model", "edit")})
        if isinstance(push, xr.DataArray):
            push = float(push.isel({"strength": place["strength"]}).mean())
        changed = statistics.clean(differs.isel(part).values)
        here: dict[str, Any] = {"emotion": [str(where["edit"])], "strength": float(where["strength"])}
        own = {**WHERE, "model": str(where["model"])}
        found.append(
            Dose(
                f"edits, {where['model']}",
                str(where["edit"]),
                float(where["strength"]),
                n,
                {} if judged is None or own["model"] not in judged.model.values else moved(judged.sel(own), here),
                float(changed.mean()) if len(changed) else float("nan"),
                push,
                float(np.median(ratios)) if len(ratios) else float("nan"),
                float((score >= limit).mean()) if len(score) else float("nan"),
                *costs_of(evidence.by_hand, own)(here),
            )
        )
    return tuple(found)


def _pushed(evidence: Evidence) -> xr.DataArray | None:
    """Relative change of the stream, (model, edit, strength), mean over texts and edited layers."""
    if not evidence.has("edited_receipts"):
        return None
    made = evidence.results["edited_receipts"].relative_change.load()
    return made.mean([dim for dim in made.dims if dim not in ("model", "edit", "strength")])
