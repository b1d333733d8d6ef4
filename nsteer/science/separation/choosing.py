"""The layer at which emotions are told apart best, the U over depth, and the trap that is no layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import TrapError
from nsteer.science import metrics, statistics
from nsteer.science.separation.blocks import PINNED

BETTER = {
    "mean_pairwise_cosine": "min",
    "accuracy": "max",
    "reliability": "max",
    "rdm_reliability": "max",
    "pole_separation": "max",
}


def best_layer(measured: xr.Dataset, metric: str = PINNED, trapped: str = "raise") -> xr.Dataset:
    """The layer at which a metric of `measure` is best: `layer`, `depth`, `value` over the dims but layer.

    trapped : what to do where mean_pairwise_cosine is pinned at -1/(n-1): "raise" TrapError, or "mark" the place with
    layer -1 and NaN. Nothing there (all NaN) also gives layer -1. Ties go to the shallower layer.
    Raises ValueError for a metric without a better side, TrapError naming the places where it is pinned.
    """
    if metric not in BETTER:
        raise ValueError(f"no layer can be chosen by {metric!r}; known: {', '.join(BETTER)}")
    curve, bad = measured[metric].transpose(..., "layer"), _trapped(measured, metric)
    if trapped == "raise" and bool(bad.any()):
        raise TrapError(trap_message(bad, measured))
    sign = 1.0 if BETTER[metric] == "min" else -1.0
    values = sign * curve.values
    known = ~np.isnan(values).all(-1) & ~bad.transpose(*curve.dims[:-1]).values
    at = np.where(np.isnan(values), np.inf, values).argmin(-1)
    layers = np.where(known, measured.layer.values[at], -1)
    value = np.where(known, np.take_along_axis(curve.values, at[..., None], -1)[..., 0], np.nan)
    dims = curve.dims[:-1]
    found = {"layer": (dims, layers), "value": (dims, value), "trapped": bad}
    if "depth" in measured.coords:
        found["depth"] = (dims, np.where(known, measured.depth.values[at], np.nan))
    coords = {name: coord for name, coord in measured.coords.items() if set(coord.dims) <= set(dims)}
    return xr.Dataset(found, coords=coords, attrs={"metric": metric, "better": BETTER[metric]})


def _trapped(measured: xr.Dataset, metric: str) -> xr.DataArray:
    """Where a metric can not choose a layer: bool over the dims but layer."""
    if metric != PINNED:
        return measured[metric].isnull().all("layer") & False
    if "pinned" not in measured:
        raise ValueError(f"{PINNED} needs `pinned` beside it, from `measure`, before a layer is chosen by it")
    return (measured.pinned & measured[PINNED].notnull()).any("layer")


def trap_message(bad: xr.DataArray, measured: xr.Dataset) -> str:
    """What is wrong with the mean pairwise cosine, and where."""
    places = [_place(bad, at) for at in np.argwhere(bad.values)]
    n = int(measured.n_emotions.max()) if "n_emotions" in measured else 0
    wall = f" = {metrics.pinned_value(n):.4f}" if n > 1 else ""
    return (
        f"the mean pairwise cosine of vectors minus their grand mean is -1/(n-1){wall} by algebra, whatever the "
        f"model: its lowest layer is noise, and no best layer ({'; '.join(places) or 'here'}). Use accuracy, "
        "reliability or pole_separation, or baseline neutral_mean"
    )


def _place(bad: xr.DataArray, at: Any) -> str:
    return ", ".join(str(bad[dim].values.tolist()[i]) for dim, i in zip(bad.dims, at, strict=True) if dim in bad.coords)


def u_shape(measured: xr.Dataset, level: float = statistics.LEVEL) -> xr.Dataset:
    """The U of Jeong 2026: where mean pairwise cosine is lowest over depth, and whether it turns there.

    measured : from `measure`; its `resampled_cosine` (…, layer, resample) gives the intervals over samples
    Returns over the dims but layer: `layer`, `depth` of the argmin with `depth_low`, `depth_high` and `support` (share
    of resamples with the same argmin); `vertex` (depth at which a parabola through all layers turns) with interval;
    `curvature` with interval; `r2`; `rise_before`, `rise_after` (first and last layer above the minimum); `u_shaped`:
    curvature's interval above zero, vertex and argmin inside, both ends above. Trapped places are marked, never placed.
    """
    found = best_layer(measured, PINNED, trapped="mark")
    depth = measured.depth.values if "depth" in measured.coords else measured.layer.values / measured.sizes["layer"]
    curve = measured[PINNED].transpose(..., "layer")
    drawn = measured.resampled_cosine.transpose(..., "layer", "resample")
    names = [
        *("depth_low", "depth_high", "support", "vertex", "vertex_low", "vertex_high", "r2"),
        *("curvature", "curvature_low", "curvature_high", "rise_before", "rise_after"),
    ]
    out = {name: np.full(curve.shape[:-1], np.nan) for name in names}
    shaped = np.zeros(curve.shape[:-1], bool)
    for at in np.ndindex(curve.shape[:-1]):
        if found.layer.values[at] < 0:
            continue
        row = _turn(curve.values[at], drawn.values[at], np.asarray(depth, float), level)
        for name in names:
            out[name][at] = row[name]
        shaped[at] = bool(
            row["curvature_low"] > 0
            and depth.min() < row["vertex"] < depth.max()
            and row["rise_before"] > 0
            and row["rise_after"] > 0
        )
    dims = curve.dims[:-1]
    made: dict[str, Any] = {name: (dims, values) for name, values in out.items()}
    return found.assign({**made, "u_shaped": (dims, shaped)}).assign_attrs(level=level)


def _turn(curve: np.ndarray, drawn: np.ndarray, depth: np.ndarray, level: float) -> dict[str, float]:
    """One curve [layer] and its resamples [layer, resample] as the figures of its U."""
    known = ~np.isnan(curve)
    curve, drawn, depth = curve[known], drawn[known], depth[known]
    edges = [(1 - level) / 2, (1 + level) / 2]
    lowest = int(curve.argmin())
    fit = statistics.parabola(depth, curve, level)
    out = {"vertex": fit.vertex, "curvature": fit.a, "r2": fit.r2}
    out |= {"rise_before": float(curve[0] - curve[lowest]), "rise_after": float(curve[-1] - curve[lowest])}
    use = ~np.isnan(drawn).any(0)
    blank = dict.fromkeys(("depth_low", "depth_high", "support", "vertex_low", "vertex_high"), float("nan"))
    out |= {**blank, "curvature_low": fit.a_low, "curvature_high": fit.a_high}
    if use.sum() > 1:
        lows = drawn[:, use].argmin(0)
        low, high = np.quantile(depth[lows], edges)
        out |= {"depth_low": float(low), "depth_high": float(high), "support": float((lows == lowest).mean())}
        if len(depth) > 2:
            a, b, _ = np.polyfit(depth, drawn[:, use], 2)
            bend = np.quantile(a, edges)
            turns = np.quantile((-b / (2 * a))[a > 0], edges) if (a > 0).any() else (np.nan, np.nan)
            out |= {"curvature_low": float(bend[0]), "curvature_high": float(bend[1])}
            out |= {"vertex_low": float(turns[0]), "vertex_high": float(turns[1])}
    return out
