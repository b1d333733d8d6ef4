"""Claim 2 of Jeong 2026: do emotions lie in middle layers, on a U over depth, at any scale?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import (
    AGREES,
    DIFFERS,
    OPEN,
    Evidence,
    Row,
    measured_as,
    read_from,
    unknown,
    verdict_of,
)
from nsteer.science import metrics, separation, statistics
from nsteer.store import slug

MIDDLE = "depth at which mean pairwise cosine is lowest"


def middle_layers(evidence: Evidence) -> list[Row]:
    """Claim 2: the U and where its minimum lies; the trap; companions; scale."""
    rows, placed, used = [], {}, []
    for model in evidence.with_activations():
        methods = [m for m in evidence.pair(model) if m]
        if not methods:
            rows.append(unknown("2", MIDDLE, model, "about 0.5", f"activations of {model} hold no known method"))
            continue
        turned = separation.u_shape(evidence.measured(model), evidence.rules.level)
        for method in methods:
            inputs_ = read_from(evidence, model, [method])
            one = turned.sel({"method": method})
            rows += _one_u(evidence, model, method, one, inputs_)
            if method == methods[0] and not math.isnan(float(one.depth)):
                placed[model] = float(one.depth)
                used += list(inputs_)
        rows += _trap(evidence, model)
    if not rows:
        rows.append(unknown("2", MIDDLE, "all models", "about 0.5", "no activations in the store"))
    return [*rows, _with_scale(evidence, placed, tuple(used))]


def _one_u(evidence: Evidence, model: str, method: str, one: xr.Dataset, used: tuple) -> list[Row]:
    rules, scope = evidence.rules, f"{model}, {method}"
    u = "a U over depth (curvature of a parabola)"
    if int(one.layer) < 0:
        why = (
            "the metric is -1/(n-1) by algebra: no best layer"
            if bool(one.trapped)
            else "no vectors (holes, or no neutral)"
        )
        return [unknown("2", what, scope, p, why, inputs=used) for what, p in ((MIDDLE, "about 0.5"), (u, "U-shaped"))]
    measured = evidence.measured(model).sel({"method": method})
    low, high = float(one.depth_low), float(one.depth_high)
    inside = rules.middle[0] <= float(one.depth) <= rules.middle[1]
    if math.isnan(low):
        verdict, why = OPEN, "no interval: too few samples"
    elif high < rules.middle[0] or low > rules.middle[1]:
        verdict, why = DIFFERS, ""
    elif inside and low >= rules.middle[0] and high <= rules.middle[1]:
        verdict, why = AGREES, ""
    else:
        verdict, why = OPEN, "the interval leaves it open"
    best = separation.best_layer(measured, "accuracy")
    sure = separation.best_layer(measured, "reliability")
    control = (
        f"best held-out accuracy at depth {float(best.depth):.2f} ({float(best.value):.2f}, p over layers "
        f"{float(measured.accuracy_p_any):.3g}); best reliability at {float(sure.depth):.2f}; same argmin in "
        f"{float(one.support):.0%} of resamples"
    )
    n, layers = int(measured.n_samples.max()), measured.sizes["layer"]
    assumed = f"{measured_as(evidence)}; middle = {rules.middle[0]:g} to {rules.middle[1]:g}; depth = layer / layers"
    if thin := evidence.holes(model, method):
        control += f"; {thin}"
    ours = f"{float(one.depth):.2f} (layer {int(one.layer)} of {layers})"
    first = Row(
        "2",
        MIDDLE,
        scope,
        "about 0.5",
        ours=ours,
        value=float(one.depth),
        n=n,
        low=low,
        high=high,
        control=control,
        verdict=verdict,
        why=why,
        assumed=assumed,
        inputs=used,
    )
    low, high = float(one.curvature_low), float(one.curvature_high)
    verdict, why = verdict_of(low, high, lambda x: x > 0)
    if verdict == AGREES and not bool(one.u_shaped):
        verdict, why = DIFFERS, "bent, but the minimum is at an end"
    if layers < 4:
        verdict, why = OPEN, f"{layers} layers: too few for a parabola"
    ours = f"curvature {float(one.curvature):+.2f}, turns at {float(one.vertex):.2f}"
    control = (
        f"parabola turns at {float(one.vertex):.2f} ({float(one.vertex_low):.2f} to {float(one.vertex_high):.2f}), "
        f"R2 {float(one.r2):.2f}; ends above the minimum by {float(one.rise_before):.3f} and "
        f"{float(one.rise_after):.3f}"
    )
    second = Row(
        "2",
        u,
        scope,
        "U-shaped",
        ours=ours,
        value=float(one.curvature),
        n=n,
        low=low,
        high=high,
        control=control,
        verdict=verdict,
        why=why,
        assumed=assumed,
        inputs=used,
    )
    return [first, second]


def _trap(evidence: Evidence, model: str) -> list[Row]:
    """A row for every method whose stored vectors are grand-mean-centred."""
    path, rows = f"vectors/{slug(model)}", []
    if not evidence.has(path):
        return []
    vectors = evidence.results[path].vector.sel({"model": model}).load()
    for method in vectors.method.values.tolist():
        one = vectors.sel({"method": method})
        if bool(separation.pinned(one).any()):
            value = float(separation.mean_pairwise_cosine(one).mean())
            n = one.sizes["emotion"]
            why = (
                "refused as a layer choice: these vectors sum to zero, so their mean pairwise cosine is "
                f"-1/(n-1) = {metrics.pinned_value(n):.4f} by algebra (the -1/(n-1) trap)"
            )
            rows.append(
                unknown(
                    "2",
                    "layer choice by mean pairwise cosine of the vectors as stored",
                    f"{model}, {method}",
                    "argmin",
                    why,
                    ours=f"{value:.4f} at every layer",
                    value=value,
                    n=n,
                    inputs=((path, {"model": model, "method": method}),),
                )
            )
    return rows


def _with_scale(evidence: Evidence, placed: Mapping[str, float], used: tuple) -> Row:
    what, paper = (
        "the depth of the minimum is the same from small to large models (range of depths)",
        "same, 124M to 3B",
    )
    size = {model: evidence.fact(model, "parameters") for model in placed}
    known = [model for model, n in size.items() if n]
    if len(known) < 3:
        return unknown(
            "2", what, "all models", paper, f"{len(known)} models with a placed minimum: needs 3", inputs=used
        )
    counts = np.array([float(size[model]) for model in known])
    depths = np.array([placed[model] for model in known])
    rho, p, n = statistics.spearman(counts, depths)
    spread = float(np.ptp(depths))
    ours = f"range {spread:.2f}; Spearman with parameters {rho:+.2f}, p = {p:.3g}"
    control = "; ".join(f"{model} ({size[model] / 1e6:.3g}M) {placed[model]:.2f}" for model in known)
    if counts.max() < 10 * counts.min():
        verdict, why = OPEN, f"sizes span a factor of {counts.max() / counts.min():.2g}, the paper's span 24"
    else:
        verdict, why = (AGREES if spread <= 0.2 and not p < 0.05 else DIFFERS), ""
    return Row(
        "2",
        what,
        f"{n} models",
        paper,
        ours=ours,
        value=spread,
        n=n,
        p=p,
        control=control,
        verdict=verdict,
        why=why,
        assumed="the same = within 0.2 of depth",
        inputs=used,
    )
