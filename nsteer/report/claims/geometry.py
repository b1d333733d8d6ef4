"""Geometry of the emotion vectors: principal components beside ratings, and the order of their similarity matrix."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence, Row, unknown
from nsteer.report.claims.verdicts import claimed
from nsteer.science import metrics, separation, statistics
from nsteer.store import slug

AXES = {"valence": (0, "0.81 (2604.07729), 0.76 and 0.83 (2606.26987)"), "arousal": (1, "0.66 (2604.07729)")}
"""Rating -> the component that is held to follow it, and the correlations that others report (Pearson's, other sets of
emotions). The component is fixed beforehand: the best of several would need a null of its own."""


def geometry(evidence: Evidence) -> list[Row]:
    """Components beside the plan's ratings, and the hierarchical order, of each model's methods."""
    rows = []
    for model in evidence.models:
        path = f"vectors/{slug(model)}"
        if not evidence.has(path):
            continue
        vectors = evidence.results[path].vector.sel({"model": model}).load()
        layer = nearest(vectors, evidence, model)
        for method in vectors.method.values.tolist():
            here = vectors.sel({"method": method, "layer": layer})
            labels = {"model": model, "method": method, "layer": layer}
            used = ((path, labels),)
            scope = f"{model}, {method}, layer {layer}"
            rows += [*_components(evidence, here, scope, used), _order(evidence, here, scope, used)]
    what = "correlation of the first component with valence"
    return rows or [
        unknown("geometry", what, "all models", AXES["valence"][1], "no group vectors/<model> in the store")
    ]


def nearest(vectors: xr.DataArray, evidence: Evidence, model: str) -> int:
    """The layer with vectors that is nearest to the compared depth."""
    known = vectors.layer.values.tolist()
    wanted = evidence.rules.depth * int(evidence.fact(model, "n_layers") or max(known) + 1)
    return int(min(known, key=lambda layer: abs(layer - int(wanted))))


def _components(evidence: Evidence, vectors: xr.DataArray, scope: str, used: tuple) -> list[Row]:
    ratings, citation = evidence.ratings
    if not ratings:
        return [
            unknown("geometry", _what(scale, k), scope, paper, "the plan names no ratings", inputs=used)
            for scale, (k, paper) in AXES.items()
        ]
    components = separation.components(vectors, n=2)
    rows = []
    for scale, table in ratings.items():
        component, paper = AXES.get(scale, (0, "not given"))
        score = components.score.sel({"component": component})
        share = float(components.share.sel({"component": component}))
        rows.append(_one_axis(evidence, score, share, scale, table, (scope, paper, citation), used))
    return rows


def _what(scale: str, component: int) -> str:
    return f"correlation of component {component + 1} of the emotion vectors with {scale} (size; its sign is arbitrary)"


def _one_axis(
    evidence: Evidence,
    score: xr.DataArray,
    share: float,
    scale: str,
    table: Mapping[str, float],
    words: tuple[str, str, str],
    used: tuple,
) -> Row:
    scope, paper, citation = words
    emotions = [e for e in map(str, score.emotion.values.tolist()) if e in table]
    x, y = score.sel({"emotion": emotions}).values, np.array([float(table[e]) for e in emotions])
    x, y = x[~np.isnan(x)], y[~np.isnan(x)]
    component = int(score.component)
    rho, p, n = statistics.spearman(x, y, seed=evidence.rules.seed)
    if np.isnan(rho):
        why = f"{n} rated emotions with a vector: needs 3 that differ"
        return unknown("geometry", _what(scale, component), scope, paper, why, inputs=used)
    interval = statistics.correlation_interval(abs(rho), n)
    return Row(
        "geometry",
        _what(scale, component),
        scope,
        paper,
        ours=f"{abs(rho):.2f}; Pearson {abs(metrics.correlation(x, y)):.2f}",
        **claimed(interval, above=0.0, p=p),
        control=f"ratings shuffled: p; the component holds {share:.0%} of the variance among emotions",
        assumed=f"ratings: {citation}; Spearman, n emotions; agrees = above shuffled ratings",
        inputs=used,
    )


def _order(evidence: Evidence, vectors: xr.DataArray, scope: str, used: tuple) -> Row:
    """The leaves of the similarity matrix, and whether its first split is that of the valence poles."""
    what, paper = "emotions on the side of their valence pole at the first split (hierarchical order)", "not given"
    order, sides = separation.hierarchy(1 - separation.cosine_similarity(vectors))
    groups = evidence.groups
    signed = [(side, groups.get(e)) for e, side in sides.items() if groups.get(e) in ("positive", "negative")]
    if len({side for side, _ in signed}) < 2 or len({group for _, group in signed}) < 2:
        why = "no emotions of both poles on both sides" if order else "no vectors (missing values)"
        return unknown("geometry", what, scope, paper, why, ours=" ".join(order), inputs=used)
    counts = np.array([[sum(pair == (s, g) for pair in signed) for g in ("positive", "negative")] for s in (0, 1)])
    right = max(counts[0, 0] + counts[1, 1], counts[0, 1] + counts[1, 0])
    share = statistics.wilson(int(right), len(signed))
    p = statistics.fisher(counts)
    return Row(
        "geometry",
        what,
        scope,
        paper,
        ours=f"{right} of {len(signed)}: {' '.join(order)}",
        value=right / len(signed),
        n=len(signed),
        low=share.low,
        high=share.high,
        p=p,
        control="groups permuted: Fisher's exact test",
        why="the paper gives no figure",
        assumed="average linkage of 1 - cosine; poles of the text set",
        inputs=used,
    )
