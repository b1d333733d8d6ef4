"""Claim 3 of Jeong 2026: how anisotropic are the residual streams?"""

from __future__ import annotations

import math

import xarray as xr

from nsteer.plan.layers import at_depth
from nsteer.report.claims.evidence import Evidence, Row, unknown
from nsteer.science import separation
from nsteer.store import slug


def anisotropy(evidence: Evidence) -> list[Row]:
    """Claim 3: anisotropy of each model, with BOS and without."""
    what, paper = "anisotropy: mean pairwise cosine of neutral sentences", "4 models; figures not known here"
    rows = []
    for model in evidence.models:
        path = f"anisotropy/{slug(model)}"
        if not evidence.has(path):
            continue
        data = evidence.results[path].pooled.sel({"model": model})
        n_layers = int(evidence.fact(model, "n_layers") or data.sizes["layer"])
        known = data.layer.values.tolist()
        wanted = [at_depth(depth, n_layers) for depth in (0.25, 0.5, 0.75)]
        best = _best_of(evidence, model)
        layers = [layer for layer in dict.fromkeys([*wanted, *best]) if layer in known]
        cosines = separation.anisotropy(data.sel({"layer": layers}))
        for bos in cosines.bos.values.tolist():
            streams = cosines.sel({"bos": bos})
            middle = streams.sel({"layer": wanted[1]}) if wanted[1] in layers else streams.isel({"layer": 0})
            ours = "; ".join(f"layer {k}: {float(streams.anisotropy.sel({'layer': k})):.3f}" for k in layers)
            used = ((path, {"model": model, "bos": bos, "layer": layers}),)
            value, n = float(middle.anisotropy), int(middle.n)
            why = (
                f"no streams for bos {bos!r} (a tokenizer without BOS, or a missing value)"
                if math.isnan(value)
                else ("the paper's own figures are not known here")
            )
            rows.append(
                Row(
                    "3",
                    f"{what}, bos {bos}",
                    model,
                    paper,
                    ours="" if math.isnan(value) else ours,
                    value=value,
                    n=n,
                    low=float(middle.low),
                    high=float(middle.high),
                    control=_isotropic(data),
                    why=why,
                    assumed="last token; depth 0.25, 0.5, 0.75 and best; own sentences",
                    inputs=used,
                )
            )
    return rows or [unknown("3", what, "all models", paper, "no group anisotropy/<model> in the store")]


def _best_of(evidence: Evidence, model: str) -> list[int]:
    if model not in evidence.with_activations() or not evidence.pair(model)[0]:
        return []
    best = separation.best_layer(evidence.measured(model), "accuracy").layer
    return [layer for layer in best.values.ravel().tolist()[:1] if layer >= 0]


def _isotropic(data: xr.DataArray) -> str:
    """What directions without any preference would show."""
    return f"random directions: 0 +- {1 / math.sqrt(data.sizes['d_model']):.3f} a pair"
