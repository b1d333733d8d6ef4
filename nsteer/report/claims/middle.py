"""Claim 2 of Jeong 2026: do emotions lie in middle layers, on a U over depth, at any scale?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import NAN, Evidence, Row, by_bags, measured_as, read_from, unknown
from nsteer.report.claims.extraction import NO_LENGTH
from nsteer.report.claims.verdicts import claimed
from nsteer.science import metrics, separation, statistics
from nsteer.science.statistics import Interval
from nsteer.store import slug

SAME = 0.14
MIDDLE = "depth at which emotions are separated best (cross-validated mean pairwise cosine is lowest)"
ACCURATE = "depth at which held-out accuracy is highest"
U = "a U over depth (curvature of a parabola through the cross-validated cosine)"


def middle_layers(evidence: Evidence) -> list[Row]:
    """Claim 2: where separation is best, by cosine and by accuracy; the U; the trap; scale."""
    rows, placed, used = [], {}, []
    for model in evidence.with_activations():
        methods = [m for m in evidence.pair(model) if m]
        if not methods:
            rows.append(unknown("2", MIDDLE, model, "about 0.5", f"activations of {model} hold no known method"))
            continue
        measured = evidence.measured(model)
        turned, best = separation.u_shape(measured), separation.best_by_accuracy(measured)
        for method in methods:
            inputs_ = read_from(evidence, model, [method])
            u_shape, by_hits = turned.sel({"method": method}), best.sel({"method": method})
            rows += [
                *_one_u(evidence, model, method, u_shape, inputs_),
                _accurate(evidence, model, method, by_hits, inputs_),
            ]
            if method == methods[-1] and not math.isnan(float(by_hits.depth)):
                placed[model] = float(by_hits.depth)
                used += list(inputs_)
        rows += _trap(evidence, model)
    if not rows:
        rows.append(unknown("2", MIDDLE, "all models", "about 0.5", "no activations in the store"))
    return [*rows, _with_scale(evidence, placed, tuple(used))]


def _one_u(evidence: Evidence, model: str, method: str, turned: xr.Dataset, used: tuple) -> list[Row]:
    rules, scope = evidence.rules, f"{model}, {method}"
    if int(turned.layer) < 0:
        why = (
            NO_LENGTH + " at any layer"
            if not bool(turned.trapped)
            else "the metric is -1/(n-1) by algebra: no best layer"
        )
        if bool(evidence.measured(model).sel({"method": method})[separation.PINNED].isnull().all()):
            why = "no vectors (missing values, or no neutral)"
        why = "; ".join(filter(None, [why, evidence.missing(model, method)]))
        return [unknown("2", what, scope, p, why, inputs=used) for what, p in ((MIDDLE, "about 0.5"), (U, "U-shaped"))]
    measured = evidence.measured(model).sel({"method": method})
    n, layers, seen = int(measured.n_units.max()), measured.sizes["layer"], int(turned.n_layers)
    paper = separation.best_layer(measured, separation.PINNED, trapped="mark")
    control = (
        f"{int(turned.n_set)} of {seen} layers can not be distinguished from the best; by the paper's metric, which "
        f"noise moves, "
        f"depth {float(paper.depth):.2f}"
    )
    if seen < layers:
        control += f"; {layers - seen} layers without a signal are left out"
    if thin := evidence.missing(model, method):
        control += f"; {thin}"
    depth = Interval(float(turned.depth), float(turned.depth_low), float(turned.depth_high), n)
    first = Row(
        "2",
        MIDDLE,
        scope,
        "about 0.5",
        ours=f"{float(turned.depth):.2f} (layer {int(turned.layer)} of {layers})",
        **placed_in(depth, turned.best_p.values, depths_of(measured), rules.middle),
        control=control,
        assumed=_assumed(evidence),
        inputs=used,
    )
    bend = Interval(
        float(turned.curvature),
        float(turned.curvature_low),
        float(turned.curvature_high),
        n,
        df=float(turned.curvature_df),
    )
    low, high = float(turned.vertex_low), float(turned.vertex_high)
    inside = low > 0 and high < 1
    why = "" if inside or not bend.low > 0 else "bent, but its turning point can not be determined"
    ours = f"curvature {float(turned.curvature):+.2f}, turns at {float(turned.vertex):.2f} ({low:.2f} to {high:.2f})"
    if seen < 4:
        bend, why = Interval(bend.estimate, NAN, NAN, n), f"{seen} layers: too few for a parabola"
    elif why:
        bend = Interval(bend.estimate, NAN, NAN, n)
    second = Row(
        "2",
        U,
        scope,
        "U-shaped",
        ours="" if seen < 4 else ours,
        **claimed(bend, above=0.0),
        control="" if seen < 4 else f"R2 {float(turned.r2):.2f}",
        why=why,
        assumed=_assumed(evidence),
        inputs=used,
    )
    return [first, second]


def placed_in(place: Interval, p: np.ndarray, depth: np.ndarray, middle: tuple[float, float]) -> dict[str, Any]:
    """The fields of a row about a place among layers: p is that of the layers on the other side being the best."""
    within = (middle[0] < depth) & (depth < middle[1])
    among = p > 1 - place.level
    others = ~within if within[among].all() else within if not within[among].any() else among
    known = p[others][~np.isnan(p[others])]
    return claimed(place, *middle, p=float(known.max()) if len(known) else NAN)


def depths_of(measured: xr.Dataset) -> np.ndarray:
    """Relative depth of each layer."""
    return (measured.depth if "depth" in measured.coords else measured.layer / measured.sizes["layer"]).values


def _assumed(evidence: Evidence) -> str:
    rules = evidence.rules
    return f"{measured_as(evidence)}; middle = {rules.middle[0]:g} to {rules.middle[1]:g}; depth = layer / layers"


def _accurate(evidence: Evidence, model: str, method: str, best: xr.Dataset, used: tuple) -> Row:
    """Where held-out accuracy peaks; beside it the accuracy at a layer chosen inside the folds, and of words alone."""
    measured, scope = evidence.measured(model).sel({"method": method}), f"{model}, {method}"
    if int(best.layer) < 0:
        return unknown("2", ACCURATE, scope, "about 0.5", "no vectors (missing values, or no neutral)", inputs=used)
    thin = evidence.missing(model, method)
    layers, n = measured.sizes["layer"], int(measured.accuracy_chosen_n)
    share, chance = float(measured.accuracy_chosen), float(measured.chance.max())
    edges = statistics.wilson(share * n, n) if n else Interval(NAN, NAN, NAN, 0)
    p = float(measured.accuracy_p_any) if "accuracy_p_any" in measured else NAN
    control = (
        f"at a layer chosen inside the folds {share:.2f} ({edges.low:.2f} to {edges.high:.2f}), chance {chance:.2f}"
        f"{by_bags(measured)}; p over layers {p:.3g}; {int(best.n_set)} of {layers} layers can not be distinguished "
        f"from the "
        "best; reliability "
        f"there {float(measured.reliability.sel({'layer': int(best.layer)})):.2f}" + (f"; {thin}" if thin else "")
    )
    depth = Interval(float(best.depth), float(best.depth_low), float(best.depth_high), n)
    ours = f"{float(best.depth):.2f} (layer {int(best.layer)} of {layers}): {float(best.value):.2f}"
    told = placed_in(depth, best.best_p.values, depths_of(measured), evidence.rules.middle)
    why = "" if p <= 0.05 else "no layer tells held-out texts apart: no best one"
    if why:
        told |= {"low": NAN, "high": NAN}
    return Row(
        "2",
        ACCURATE,
        scope,
        "about 0.5",
        ours=ours,
        **told,
        control=control,
        why=why,
        assumed=_assumed(evidence),
        inputs=used,
    )


def _trap(evidence: Evidence, model: str) -> list[Row]:
    """A row for every method whose stored vectors are grand-mean-centred."""
    path, rows = f"vectors/{slug(model)}", []
    if not evidence.has(path):
        return []
    vectors = evidence.results[path].vector.sel({"model": model}).load()
    for method in vectors.method.values.tolist():
        own = vectors.sel({"method": method})
        if bool(separation.pinned(own).any()):
            value = float(separation.mean_pairwise_cosine(own).mean())
            n = own.sizes["emotion"]
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
        "the depth of the highest held-out accuracy is the same from small to large models (change a factor of 10)",
        "same, 124M to 3B",
    )
    size = {model: evidence.fact(model, "parameters") for model in placed}
    known = [model for model, n in size.items() if n]
    if len(known) < 4:
        return unknown("2", what, "all models", paper, f"{len(known)} models with a best layer: needs 4", inputs=used)
    counts = np.log10([float(size[model]) for model in known])
    depths = np.array([placed[model] for model in known])
    slope = statistics.slope(counts, depths)
    control = "; ".join(f"{model} ({size[model] / 1e6:.3g}M) {placed[model]:.2f}" for model in known)
    if np.ptp(counts) < 1:
        why = f"sizes span a factor of {10 ** np.ptp(counts):.2g}, the paper's span 24"
        return unknown("2", what, f"{len(known)} models", paper, why, control=control, inputs=used)
    return Row(
        "2",
        what,
        f"{len(known)} models",
        paper,
        ours=f"{slope.estimate:+.2f} ({slope.low:+.2f} to {slope.high:+.2f})",
        **claimed(slope, -SAME, SAME),
        control=control,
        assumed=f"the same = within {SAME:g} of depth a factor of 10 (0.2 over the paper's sizes)",
        inputs=used,
    )
