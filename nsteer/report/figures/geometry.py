"""Draws how emotion vectors lie: their cosines, their plane, and how alike two geometries are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsteer.report.figures.style import (
    COLOURS,
    FAINT,
    MAP,
    as_figure,
    bar,
    edges_of,
    empty,
    figure,
    heat,
    labels,
    lay,
    panels,
    say,
)
from nsteer.science import separation
from nsteer.science.axis import word

CELLS = 8
"""Matrices of at most so many rows have their numbers written into the cells."""

POLES = {"positive": ("o", COLOURS[0]), "negative": ("s", COLOURS[1]), "other": ("^", COLOURS[2])}


@as_figure
def similarity(vector: xr.DataArray) -> Figure:
    """Cosine of every two emotion vectors (emotion, d_model), emotions in the order of clustering (`leaf_order`).

    Emotions without a vector are left out, which is said. The colour scale spans what is off the diagonal.
    """
    cosine = separation.cosine_similarity(vector)
    order = separation.leaf_order((1 - cosine).rename("rdm"))
    known = [str(e) for e in vector.emotion.values.tolist()]
    if len(order) < 2:
        return empty(f"no similarity to draw: {len(order)} of {len(known)} {word('emotions')} have a vector")
    values = cosine.sel({"emotion": order, "emotion_2": order}).transpose("emotion", "emotion_2").values
    off = values[~np.eye(len(order), dtype=bool)]
    low, high = edges_of(off)
    side = max(2.6, 0.21 * len(order) + 1.6)
    fig = figure(side + 0.9, side)
    ax = fig.subplots()
    show = [[f"{x:.2f}" for x in row] for row in values] if len(order) <= CELLS else None
    mesh = heat(ax, np.where(np.eye(len(order), dtype=bool), np.nan, values), order, order, low, high, show)
    ax.set_aspect("equal")
    bar(fig, mesh, [ax], word("cosine of two emotion vectors"))
    gone = [e for e in known if e not in order]
    say(
        fig,
        [
            f"n = {len(order)} {word('emotions')}; hatched: diagonal (1)",
            f"no vector: {', '.join(gone)}" if gone else "",
        ],
    )
    return fig


@as_figure
def plane(
    vector: xr.DataArray,
    ratings: Mapping[str, Mapping[str, float]] | None = None,
    groups: Mapping[str, str] | None = None,
) -> Figure:
    """Emotion vectors (emotion, d_model) on their first two principal components: a panel for each table of ratings.

    ratings : name, such as valence or arousal -> emotion -> value, which becomes colour; its Spearman correlation with
    each component stands in the title. groups : emotion -> positive | negative | other, which becomes the marker (and
    the colour, without ratings). A component's sign is arbitrary.
    """
    components = separation.components(vector)
    score = components.score.transpose("emotion", "component").values
    known = ~np.isnan(score).any(-1)
    names = [str(e) for e in vector.emotion.values.tolist()]
    if known.sum() < 2:
        return empty(f"no plane to draw: {int(known.sum())} of {len(names)} {word('emotions')} have two components")
    share = components.share.values
    tables = dict(ratings or {})
    n = max(len(tables), 1)
    size = (4.6 * min(n, 2) + (0.8 if tables else 0.0), 3.7 * -(-n // 2) + 0.4)
    fig, axes = panels(n, 2, size, "constrained" if tables else None)
    notes = [f"n = {int(known.sum())} {word('emotions')}; the sign of a component is arbitrary"]
    gone = [e for e, there in zip(names, known, strict=True) if not there]
    notes.append(f"no vector: {', '.join(gone)}" if gone else "")
    for ax, name in zip(axes, tables or {"": {}}, strict=True):
        notes += _scatter(fig, ax, names, score, known, tables.get(name), name, groups)
        if name:
            rho = separation.rating_correlation(components.score, {name: tables[name]}).sel({"rating": name})
            shown = [f"PC{k + 1} {float(rho.rho[k]):+.2f}" for k in range(2)]
            ax.set_title(f"{name}: Spearman {', '.join(shown)} (n = {int(rho.n.max())})")
        ax.set_xlabel(f"PC1 ({share[0]:.0%} of variance)")
        ax.set_ylabel(f"PC2 ({share[1]:.0%} of variance)")
        ax.axhline(0, color=FAINT, linewidth=0.5, zorder=0)
        ax.axvline(0, color=FAINT, linewidth=0.5, zorder=0)
        ax.margins(0.14)
    if tables:
        say(fig, notes)
    else:
        lay(fig, axes, notes, (3.8, 3.0), top=0.15)
    return fig


def _scatter(
    fig: Figure,
    ax: Axes,
    names: list[str],
    score: np.ndarray,
    known: np.ndarray,
    table: Mapping[str, float] | None,
    rating: str,
    groups: Mapping[str, str] | None,
) -> list[str]:
    """One panel's points, by group; coloured by the ratings where there are any."""
    low, high = edges_of(np.array([float(v) for v in (table or {}).values()] or [np.nan]))
    mesh = None
    for group, (marker, colour) in POLES.items():
        own = [i for i, e in enumerate(names) if known[i] and (groups or {}).get(e, "other") == group]
        if not own:
            continue
        x, y = score[own, 0], score[own, 1]
        style: dict[str, Any] = {
            "marker": marker,
            "s": 34,
            "linewidths": 0.6,
            "label": group if groups and table is None else "_",
            "gid": group,
        }
        if table is None:
            ax.scatter(x, y, color=colour, edgecolors=FAINT, **style)
        else:
            tint = np.array([float(table.get(names[i], np.nan)) for i in own])
            there = ~np.isnan(tint)
            ax.scatter(x[~there], y[~there], facecolors="none", edgecolors=FAINT, **{**style, "gid": "unrated"})
            mesh = ax.scatter(
                x[there], y[there], c=tint[there], cmap=MAP, vmin=low, vmax=high, edgecolors=FAINT, **style
            )
    _name_points(ax, [(names[i], *score[i]) for i in np.flatnonzero(known)])
    if mesh is not None:
        bar(fig, mesh, [ax], rating)
    unrated = [e for e, there in zip(names, known, strict=True) if there and table is not None and e not in table]
    said = [f"no {rating} (hollow): {', '.join(unrated)}"] if unrated else []
    return said + ["circles positive, squares negative, triangles other"] * bool(groups and table is not None)


def _name_points(ax: Axes, points: list[tuple[str, float, float]]) -> None:
    """Names beside points: right, left, above or below, where they lie on no other name and no other point."""
    x, y = (np.array([p[k] for p in points]) for k in (1, 2))
    scale = np.array([270 / max(np.ptp(x), 1e-9), 200 / max(np.ptp(y), 1e-9)])  # about points (1/72 inch) a unit
    dots = np.stack([x, y], 1) * scale
    boxes: list[tuple[float, float, float, float]] = []
    for (name, *_), (cx, cy) in zip(points, dots, strict=True):
        wide = 4.8 * len(name)
        places = [
            (5, 0, "left"),
            (-5, 0, "right"),
            (0, 8, "center"),
            (0, -8, "center"),
            (5, 8, "left"),
            (5, -8, "left"),
        ]
        places += [(-5, 8, "right"), (-5, -8, "right"), (0, 15, "center"), (0, -15, "center")]
        candidates: list[Any] = []
        for dx, dy, side in places:
            left = cx + dx - {"left": 0.0, "right": wide, "center": wide / 2}[side]
            box = (left, left + wide, cy + dy - 4, cy + dy + 4)
            hits = 2 * sum(box[0] < b[1] and b[0] < box[1] and box[2] < b[3] and b[2] < box[3] for b in boxes)
            hits += int(((dots[:, 0] > box[0] - 3) & (dots[:, 0] < box[1] + 3) & (abs(dots[:, 1] - cy - dy) < 6)).sum())
            candidates.append((hits - (abs(dy) < 6), len(candidates), dx, dy, side, box))
        _, _, dx, dy, side, box = min(candidates)
        boxes.append(box)
        style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "va": "center", "ha": side}
        ax.annotate(name, (cx / scale[0], cy / scale[1]), xytext=(dx, dy), **style)


@as_figure
def rsa(correlations: xr.Dataset) -> Figure:
    """Correlation of geometries, method by method, model by model or layer by layer, beside the noise ceiling.

    correlations : from `separation.rsa`, over (…, along, along_2); a panel for each label of what stands before. Small
    matrices have "correlation of ceiling" in their cells; large ones have the ceilings as a second heat map.
    """
    dim = str(correlations.attrs["along"])
    lead = [str(d) for d in correlations.correlation.dims if d not in (dim, f"{dim}_2")]
    whole = correlations.stack(panel=lead) if lead else correlations.expand_dims(panel=[""])
    subsets = [
        (" / ".join(map(str, label)) if isinstance(label, tuple) else str(label), whole.isel({"panel": i}))
        for i, label in enumerate(whole.panel.values.tolist())
    ]
    subsets = [(name, subset) for name, subset in subsets if _there(subset).any()]
    names = labels(correlations, dim)
    if not subsets or len(names) < 2:
        return empty(f"no RSA to draw: {len(names)} {dim}(s), and two with a geometry are needed")
    small = len(names) <= CELLS
    side = max(2.9, (0.52 if small else 0.16) * len(names) + 1.3)
    n = len(subsets) * (1 if small else 2)
    columns = 3 if small else 2
    fig, axes = panels(n, columns, (side * min(n, columns) + 0.8, side * -(-n // columns) + 0.4), "compressed")
    low = min(0.0, float(np.concatenate([_there(subset) for _, subset in subsets]).min()))
    mesh = None
    for i, (name, subset) in enumerate(subsets):
        correlation, ceiling = (subset[v].transpose(dim, f"{dim}_2").values for v in ("correlation", "ceiling"))
        own = np.where(np.eye(len(names), dtype=bool), np.nan, correlation)
        if small:
            mesh = heat(axes[i], own, names, names, low, 1.0, _cells(own, ceiling))
            axes[i].set_title(name)
        else:
            mesh = heat(axes[2 * i], own, names, names, low, 1.0)
            heat(axes[2 * i + 1], np.where(np.isnan(own), np.nan, ceiling), names, names, low, 1.0)
            axes[2 * i].set_title(f"{name}\ncorrelation" if name else "correlation")
            axes[2 * i + 1].set_title(f"{name}\nnoise ceiling" if name else "noise ceiling")
    for ax in axes:
        ax.set_aspect("equal")
        if dim == "layer":  # bare numbers do not say what they count; names of methods and models do
            ax.set(xlabel=dim, ylabel=dim)
    bar(fig, mesh, axes, "Spearman correlation of RDMs")
    emotions = sorted({int(subset.n_emotions.max()) for _, subset in subsets})
    notes = [
        f"n = {' or '.join(map(str, emotions))} {word('emotions')}, "
        f"{', '.join(str(n * (n - 1) // 2) for n in emotions)} pairs"
    ]
    notes += ["in cells: correlation, below it the noise ceiling"] if small else []
    if any(np.isnan(subset.ceiling.values).any() for _, subset in subsets):
        notes.append("no ceiling (-): too few samples to halve")
    notes.append("hatched: the diagonal, and what is not there")
    say(fig, notes)
    return fig


def _there(subset: xr.Dataset) -> np.ndarray:
    """Correlations off the diagonal that are there."""
    values = subset.correlation.values
    off = values[~np.eye(len(values), dtype=bool)]
    return off[~np.isnan(off)]


def _cells(own: np.ndarray, ceiling: np.ndarray) -> list[list[str]]:
    def words(r: float, c: float) -> str:
        return "" if np.isnan(r) else f"{r:.2f}\n" + ("-" if np.isnan(c) else f"≤ {c:.2f}")

    return [[words(r, c) for r, c in zip(*rows, strict=True)] for rows in zip(own, ceiling, strict=True)]
