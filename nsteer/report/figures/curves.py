"""Draws what changes over depth: separation by layer, anisotropy by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsteer.report.figures.style import (
    INK,
    along,
    as_figure,
    depth_of,
    each_model,
    empty,
    grid_lines,
    lay,
    look,
    panels,
    span,
)
from nsteer.science import metrics, separation
from nsteer.science.axis import word

DEPTH = "relative depth (layer / layers)"
TITLES = {
    "mean_pairwise_cosine": "mean pairwise cosine (lower: better apart)",
    "cv_cosine": "cross-validated mean pairwise cosine",
    "accuracy": "held-out accuracy (share)",
    "reliability": "split-half reliability",
    "rdm_reliability": "reliability of the RDM",
    "pole_separation": "valence poles, within - between (cosine)",
}
"""Metrics of `separation.measure` that can be drawn, and what their axis says."""


@as_figure
def layer_curves(measured: xr.Dataset | Sequence[xr.Dataset], metric: str = "mean_pairwise_cosine") -> Figure:
    """A metric of separation against relative depth: a panel a method, a line a model, the best layer ringed.

    measured : from `separation.measure`, over (model, method, layer) or fewer; a list of them where models differ in
    layers. metric : a key of TITLES. `cv_cosine` has its interval, mean pairwise cosine the line -1/(n-1) at
    which it says nothing; accuracy has its chance line. Places where the metric is pinned get no ring; that is said.
    Raises KeyError for another metric.
    """
    title = TITLES[metric]
    subsets = [(m, k, d) for m, rest in each_model(measured) for k, d in along(rest, "method") if metric in d]
    subsets = [(m, k, d) for m, k, d in subsets if bool(d[metric].notnull().any())]
    if not subsets:
        return empty(f"no {metric.replace('_', ' ')} to draw: no layer of any model has it")
    methods = list(dict.fromkeys(k for _, k, _ in subsets))
    models = list(dict.fromkeys(m for m, _, _ in subsets))
    fig, axes = panels(len(methods), sharey=True)
    notes = []
    for ax, method in zip(axes, methods, strict=True):
        own = [(m, d) for m, k, d in subsets if k == method]
        for model, data in own:
            notes += _curve(ax, data, metric, model or "value", look(models.index(model)), method)
        _reference(ax, [d for _, d in own], metric)
        ax.set(xlabel=DEPTH, xlim=(-0.03, 1.0))
        count = span((float(d.n_samples.max()) for _, d in own), "texts a model")
        emotions = span((float(d.n_emotions.max()) for _, d in own), word("emotions")).removeprefix("n = ")
        ax.set_title(f"{method}\n{count}, {emotions}" if method else f"{count}, {emotions}")
        grid_lines(ax)
    axes[0].set_ylabel(title)
    lacking = [f"{m}: nothing for {k}" for m in models for k in methods if (m, k) not in {p[:2] for p in subsets}]
    ringed = any(line.get_gid() for ax in axes for line in ax.get_lines())
    lay(fig, axes, [*notes, *lacking, "ring: best layer" if ringed else ""], (2.75, 2.2))
    return fig


def _curve(ax: Axes, data: xr.Dataset, metric: str, label: str, style: dict[str, Any], method: str) -> list[str]:
    """One model's line, its interval and its best layer; what is to be said of it."""
    depth, values = depth_of(data), data[metric].values
    ax.plot(depth, values, label=label, markersize=3.5, **style)
    if metric == "cv_cosine":
        low, high = (np.where(np.isfinite(edge), edge, np.nan) for edge in (data.cv_cosine_low, data.cv_cosine_high))
        ax.fill_between(depth, low, high, color=style["color"], alpha=0.13, linewidth=0)
    best = separation.best_layer(data, metric, trapped="mark")
    layer = int(best.layer)
    if layer >= 0:
        at = data.layer.values.tolist().index(layer)
        ax.plot([depth[at]], [values[at]], "o", ms=10, mfc="none", mec=style["color"], mew=1.3, gid=f"ring {label}")
    notes = []
    if metric == separation.PINNED and bool(data.pinned.any()):
        notes.append(f"{label}, {method}: pinned near -1/(n-1) by algebra: no best layer")
    if missing := int(np.isnan(values).sum()):
        notes.append(f"{label}, {method}: {missing} of {len(values)} layers are not there")
    return notes


def _reference(ax: Axes, data: Sequence[xr.Dataset], metric: str) -> None:
    """The line at which a metric says nothing."""
    if metric == "accuracy":
        chance = float(np.nanmean([float(d.chance.mean()) for d in data]))
        ax.axhline(chance, color=INK, linestyle=":", linewidth=1, label=f"chance ({chance:.2g})")
        ax.set_ylim(-0.03, 1.06)
    elif metric == separation.PINNED:
        n = max(int(d.n_emotions.max()) for d in data)
        if n > 1:
            wall = metrics.pinned_value(n)
            ax.axhline(wall, color=INK, linestyle=":", linewidth=1, label=f"-1/(n-1) = {wall:.3f}")
    else:
        ax.axhline(0.0, color=INK, linestyle=":", linewidth=1)


@as_figure
def anisotropy(anisotropies: xr.Dataset | Sequence[xr.Dataset]) -> Figure:
    """Mean pairwise cosine of neutral sentences' streams over depth: a panel with BOS, one without; jackknife bands.

    anisotropies : from `separation.anisotropy`, over (model, bos, layer) or fewer; a list where layers differ by model.
    """
    subsets = [(m, b, d) for m, rest in each_model(anisotropies) for b, d in along(rest, "bos")]
    there = [(m, b, d) for m, b, d in subsets if bool(d.anisotropy.notnull().any())]
    if not there:
        return empty("no anisotropy to draw: no streams of neutral sentences are there")
    models = list(dict.fromkeys(m for m, _, _ in subsets))
    said = {(m, b) for m, b, _ in there}
    kinds = [b for b in dict.fromkeys(b for _, b, _ in subsets) if any(b == k for _, k in said)]
    fig, axes = panels(len(kinds), sharey=True)
    for ax, kind in zip(axes, kinds, strict=True):
        for model, _, data in (curve for curve in there if curve[1] == kind):
            depth, style = depth_of(data), look(models.index(model))
            ax.plot(depth, data.anisotropy.values, label=model or "value", markersize=3.5, **style)
            ax.fill_between(depth, data.low, data.high, color=style["color"], alpha=0.13, linewidth=0)
        count = span((float(d.n.max()) for _, b, d in there if b == kind), "sentences")
        ax.set(xlabel=DEPTH, xlim=(-0.03, 1.0))
        ax.set_title(f"{kind} BOS\n{count}" if kind else count)
        grid_lines(ax)
    axes[0].set_ylabel("mean pairwise cosine")
    lay(fig, axes, [f"{m}: nothing {b} BOS" for m, b, _ in subsets if (m, b) not in said], (2.75, 2.2))
    return fig
