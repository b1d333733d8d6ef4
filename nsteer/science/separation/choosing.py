"""The layer at which emotions are told apart best, the U over depth, and the trap that is no layer."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import special

from nsteer.errors import TrapError
from nsteer.science import axis, metrics, statistics
from nsteer.science.separation.slices import PINNED

BETTER = {
    "mean_pairwise_cosine": "min",
    "cv_cosine": "min",
    "accuracy": "max",
    "reliability": "max",
    "rdm_reliability": "max",
    "pole_separation": "max",
}


@axis.of_arrays
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
    variables = {"layer": (dims, layers), "value": (dims, value), "trapped": bad}
    if "depth" in measured.coords:
        variables["depth"] = (dims, np.where(known, measured.depth.values[at], np.nan))
    coords = {name: coord for name, coord in measured.coords.items() if set(coord.dims) <= set(dims)}
    return xr.Dataset(variables, coords=coords, attrs={"metric": metric, "better": BETTER[metric]})


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


@axis.of_arrays
def u_shape(measured: xr.Dataset, level: float = statistics.LEVEL) -> xr.Dataset:
    """The U of Jeong 2026: where emotions are best told apart over depth by `cv_cosine`, and whether it turns there.

    measured : from `measure`; its `cv_influence` (…, layer, unit) gives the intervals, over independent samples
    Returns over the dims but layer: `layer`, `depth` of the lowest; `depth_low`, `depth_high` of the layers that can
    not be distinguished from it (a confidence set of the argmin, half a layer to each side); `n_set` of them; `vertex`
    (depth at which a parabola through the layers turns) with Fieller's interval; `curvature` with its t interval; `r2`;
    `n_layers` whose vectors have a length; `best_p` (…, each_layer): p of each being the lowest.
    Trapped places are marked, never placed.
    """
    best = best_layer(measured, "cv_cosine", trapped="mark")
    bad = _trapped(measured, PINNED)
    depth = measured.depth.values if "depth" in measured.coords else measured.layer.values / measured.sizes["layer"]
    curve = measured.cv_cosine.transpose(..., "layer")
    influence = measured.cv_influence.transpose(..., "layer", "unit")
    freedom = measured.cv_df.transpose(..., "layer")
    names = [
        *("depth_low", "depth_high", "n_set", "vertex", "vertex_low", "vertex_high", "r2"),
        *("curvature", "curvature_low", "curvature_high", "curvature_df", "n_layers"),
    ]
    out = {name: np.full(curve.shape[:-1], np.nan) for name in names}
    may_be = np.full(curve.shape, np.nan)
    for at in np.ndindex(curve.shape[:-1]):
        row, may_be[at] = _turn(
            curve.values[at], influence.values[at], freedom.values[at], np.asarray(depth, float), level
        )
        for name, value in row.items():
            out[name][at] = value
    dims = curve.dims[:-1]
    variables: dict[str, Any] = {name: (dims, values) for name, values in out.items()}
    best = best.assign({**variables, "trapped": bad.transpose(*dims)}).assign_attrs(level=level)
    best["best_p"] = ((*dims, "each_layer"), may_be)
    gone = best.trapped
    best["layer"] = xr.where(gone, -1, best.layer)
    for name in ("depth", "value", *names):
        if name in best:
            best[name] = best[name].where(~gone)
    return best


def _turn(
    curve: np.ndarray, influence: np.ndarray, freedom: np.ndarray, depth: np.ndarray, level: float
) -> tuple[dict[str, float], np.ndarray]:
    """One curve [layer] with the deviations of its units [layer, unit] as the figures of its U; p of each layer."""
    known = ~np.isnan(curve)
    layers, p = len(curve), np.full(len(curve), np.nan)
    curve, influence, depth = curve[known], influence[known], depth[known]
    out = {"n_layers": float(len(curve))}
    if not len(curve):
        return out, p
    df = float(np.nanmin(freedom[known]))
    influence = influence[:, ~np.isnan(influence).any(0)]
    p[known] = statistics.lowest(curve, influence, df)
    among = p[known] > 1 - level
    half = 0.5 / layers
    out |= {
        "n_set": float(among.sum()),
        "depth_low": depth[among].min() - half,
        "depth_high": depth[among].max() + half,
    }
    if len(curve) < 4:
        return out, p
    centre = float(depth.mean())
    x = depth - centre
    design = np.stack([x**2, x, np.ones(len(x))], 1)
    weights = np.linalg.pinv(design)  # coefficients = weights @ curve
    a, b, _ = (float(weight) for weight in weights @ curve)
    off = weights @ influence  # [coefficient, unit]
    cov = off @ off.T
    t = float(special.stdtrit(df, (1 + level) / 2))
    reach = t * float(np.sqrt(cov[0, 0]))
    rest = curve - design @ (weights @ curve)
    total = float(((curve - curve.mean()) ** 2).sum())
    low, high = statistics.fieller(-b / 2, a, cov[1, 1] / 4, cov[0, 0], -cov[0, 1] / 2, t)
    out |= {"curvature": a, "curvature_low": a - reach, "curvature_high": a + reach, "curvature_df": df}
    out |= {
        "vertex": centre - b / (2 * a) if a else float("nan"),
        "vertex_low": low + centre,
        "vertex_high": high + centre,
    }
    return {**out, "r2": 1 - float((rest**2).sum()) / total if total > 0 else float("nan")}, p


@axis.of_arrays
def best_by_accuracy(measured: xr.Dataset, level: float = statistics.LEVEL) -> xr.Dataset:
    """The layer of the highest held-out accuracy, and the depths of those that can not be distinguished from it.

    Over the dims but layer: `layer`, `depth`, `value`, `depth_low`, `depth_high`, `n_set`, `best_p`, as in `u_shape`.
    """
    best = best_layer(measured, "accuracy")
    depth = measured.depth.values if "depth" in measured.coords else measured.layer.values / measured.sizes["layer"]
    curve = measured.accuracy.transpose(..., "layer")
    hits = measured.accuracy_hit.transpose(..., "layer", "unit")
    low, high, count = (np.full(curve.shape[:-1], np.nan) for _ in range(3))
    half, may_be = 0.5 / curve.shape[-1], np.full(curve.shape, np.nan)
    for at in np.ndindex(curve.shape[:-1]):
        known = ~np.isnan(curve.values[at])
        off = hits.values[at][known]
        off = off[:, ~np.isnan(off).any(0)]
        if known.any() and off.shape[1] > 1:
            p = statistics.lowest(-curve.values[at][known], -off, off.shape[1] - 1)
            among = p > 1 - level
            may_be[at][known] = p
            low[at], high[at] = depth[known][among].min() - half, depth[known][among].max() + half
            count[at] = among.sum()
    dims = curve.dims[:-1]
    best = best.assign(depth_low=(dims, low), depth_high=(dims, high), n_set=(dims, count))
    return best.assign(best_p=((*dims, "each_layer"), may_be)).assign_attrs(level=level)
