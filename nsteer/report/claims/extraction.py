"""Claim 1 of Jeong 2026: does generation separate emotions better than comprehension?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence, Row, by_bags, compared_at, read_from, stated, unknown
from nsteer.report.claims.verdicts import claimed
from nsteer.science import separation, statistics
from nsteer.science.statistics import Interval
from nsteer.store import slug

BETTER = "generation separates emotions better (cross-validated mean pairwise cosine, generation - comprehension)"
NO_LENGTH = "its vectors' length can not be distinguished from 0: noise, and no cosine"


def methods_differ(evidence: Evidence) -> list[Row]:
    """Claim 1: generation against comprehension, model by model and over models."""
    rows, values, used = [], {}, []
    for model in evidence.with_activations():
        row, difference = _one_comparison(evidence, model)
        rows.append(row)
        if difference is not None and math.isfinite(difference.low):
            values[model] = difference
            used += list(row.inputs)
    if not rows:
        rows.append(unknown("1", BETTER, "all models", "lower in 7 of 7", "no activations in the store"))
    return [*rows, *_over_models(evidence, values, tuple(used))]


def _one_comparison(evidence: Evidence, model: str) -> tuple[Row, Interval | None]:
    first, second = evidence.pair(model)
    paper = "lower, in 7 of 7 comparisons"
    if not first or not second:
        lacks = "generation" if not first else "comprehension"
        return unknown("1", BETTER, model, paper, f"activations of {model} have no method of source {lacks}"), None
    measured, layer = evidence.measured(model), evidence.layer(model, evidence.rules.depth)
    here = measured.sel({"layer": layer})
    first_measures, second_measures = (here.sel({"method": m}) for m in (first, second))
    used = read_from(evidence, model, (first, second), layer)
    if bool(first_measures.pinned) or bool(second_measures.pinned):
        why = f"mean pairwise cosine is -1/(n-1) by algebra with baseline {evidence.rules.baseline}"
        return unknown("1", BETTER, model, paper, why, inputs=used), None
    if absent := next(
        (m for m, data in ((first, first_measures), (second, second_measures)) if math.isnan(data[separation.PINNED])),
        "",
    ):
        why = (
            f"{absent}: no vectors at layer {layer} (missing values, or no neutral samples for "
            f"{evidence.rules.baseline})"
        )
        return unknown("1", BETTER, model, paper, why, inputs=used), None
    a, b = cosine_of(first_measures), cosine_of(second_measures)
    difference = statistics.difference(a, b)
    silent = [m for m, interval in ((first, a), (second, b)) if math.isnan(interval.estimate)]
    thin = [f"{m}: {missing}" for m in (first, second) if (missing := evidence.missing(model, m))]
    control = "; ".join(
        [*(beside_of(m, data) for m, data in ((first, first_measures), (second, second_measures))), *thin]
    )
    row = stated(
        "1",
        BETTER,
        model,
        paper,
        ours=_said(a, b, difference, layer),
        **claimed(difference, below=0.0),
        control=control,
        why="; ".join(f"{m}: {NO_LENGTH}" for m in silent),
        assumed="; ".join(
            [
                compared_at(evidence),
                "interval: jackknife over independent texts, Fieller",
                *(said for m in (first, second) if (said := evidence.read_behind(m))),
            ]
        ),
        inputs=used,
    )
    return row, difference


def _said(a: Interval, b: Interval, difference: Interval, layer: int) -> str:
    first, second = ("none" if math.isnan(interval.estimate) else f"{interval.estimate:.3f}" for interval in (a, b))
    return (
        f"{first} and {second} at layer {layer}"
        if "none" in (first, second)
        else f"{first} - {second} = {difference.estimate:+.3f} at layer {layer}"
    )


def cosine_of(data: xr.Dataset) -> Interval:
    """The cross-validated cosine of one model, method and layer of `measured`."""
    low, high = float(data.cv_cosine_low), float(data.cv_cosine_high)
    return Interval(float(data.cv_cosine), low, high, int(data.n_units), method="jackknife", df=float(data.cv_df))


def beside_of(method: str, data: xr.Dataset) -> str:
    """What must stand beside a cosine: whether the vectors tell held-out texts apart, and the paper's own metric."""
    return (
        f"{method}: held-out accuracy {float(data.accuracy):.2f} (chance {float(data.chance):.2f}{by_bags(data)}), "
        "reliability "
        f"{float(data.reliability):.2f}, the paper's metric {float(data[separation.PINNED]):.3f} (noise moves it)"
    )


NAMES = {
    "better": ("models in which generation separates better", "7 of 7"),
    "u": ("shift of the methods' values over models (exact Mann-Whitney, the paper's test)", "U not given, p = 0.007"),
    "d": ("Cohen's d of the two methods' values", "d = -107.5"),
    "pair": ("mean difference of the methods over models, paired", "not given"),
    "vary": (
        "the advantage varies between models (SD of its true values)",
        "varies with instruction tuning and family",
    ),
}


def _over_models(evidence: Evidence, values: Mapping[str, Interval], used: tuple) -> list[Row]:
    """Claim 1 over all models: count, tests, effects, and whether the advantage varies."""
    scope, n = f"{len(values)} models", len(values)
    if n < 2:
        why = f"{n} models with both methods above noise: a test over models needs at least 2"
        return [unknown("1", what, scope, paper, why, inputs=used) for what, paper in NAMES.values()]
    both = {model: _values(evidence, model) for model in values}
    a, b = (np.array([pair[i] for pair in both.values()]) for i in (0, 1))
    common: dict[str, Any] = {"assumed": compared_at(evidence), "inputs": used}
    k = int((a < b).sum())
    share, p = statistics.wilson(k, n), statistics.binomial_p(k, n, 0.5)
    rows = [
        stated(
            "1",
            *_names("better", scope),
            ours=f"{k} of {n}",
            **claimed(share, above=0.5, p=p),
            control="Wilson",
            **common,
        )
    ]
    test, moved = statistics.mann_whitney(a, b), statistics.shift(a, b)
    ours = f"{moved.estimate:+.3f}; U = {test.statistic:g}, p = {test.p:.3g}"
    control = f"{test.groups}; {n} models can not give p below {2 / math.comb(2 * n, n):.2g}"
    rows.append(
        stated("1", *_names("u", scope), ours=ours, **claimed(moved, below=0.0, p=test.p), control=control, **common)
    )
    d, g = statistics.cohens_d(a, b), statistics.hedges_g(a, b)
    needs = statistics.implied_sd(d.groups.difference, -107.5)
    why = f"the paper's denominator is not known: for d = -107.5 this difference would need an SD of {needs:.2g}"
    ours = f"d = {d.value:.2f} ({d.low:.2f} to {d.high:.2f}), g = {g.value:.2f}"
    rows.append(
        unknown(
            "1",
            *_names("d", scope),
            why,
            ours=ours,
            value=d.value,
            n=n,
            low=d.low,
            high=d.high,
            control=str(d.groups),
            **common,
        )
    )
    paired, signed = statistics.paired_permutation(a, b), statistics.wilcoxon(a, b)
    mean = statistics.mean_interval(a - b)
    control = f"sign flips p = {paired.p:.3g}; Wilcoxon p = {signed.p:.3g}; dz = {statistics.cohens_dz(a, b).value:.2f}"
    ours = f"{mean.estimate:+.3f}, p = {paired.p:.3g}"
    rows.append(
        stated(
            "1", *_names("pair", scope), ours=ours, **claimed(mean, below=0.0, p=paired.p), control=control, **common
        )
    )
    return [*rows, _varies(evidence, values, common), *_by_tuning(evidence, values, used)]


def _values(evidence: Evidence, model: str) -> tuple[float, float]:
    here = evidence.measured(model).sel({"layer": evidence.layer(model, evidence.rules.depth)})
    first, second = (float(here.cv_cosine.sel({"method": m})) for m in evidence.pair(model))
    return first, second


def _names(key: str, scope: str) -> tuple[str, str, str]:
    return NAMES[key][0], scope, NAMES[key][1]


def _varies(evidence: Evidence, values: Mapping[str, Interval], common: Mapping[str, Any]) -> Row:
    errors = [(interval.high - interval.low) / (2 * 1.96) for interval in values.values()]
    spread, p = statistics.heterogeneity([interval.estimate for interval in values.values()], errors)
    families = sorted({evidence.family(model) for model in values})
    return stated(
        "1",
        *_names("vary", f"{len(values)} models"),
        ours="; ".join(f"{model} {interval.estimate:+.3f}" for model, interval in values.items()),
        **claimed(spread, above=0.0, p=p),
        control=f"Cochran's Q, p = {p:.3g}; families: {', '.join(families)}",
        **common,
    )


def _by_tuning(evidence: Evidence, values: Mapping[str, Interval], used: tuple) -> list[Row]:
    """The advantage of models read through a chat template against that of models without one."""
    what, paper = "the advantage differs with instruction tuning (chat template minus none)", "it does; size not known"
    chat: dict[bool, list[float]] = {True: [], False: []}
    for model, advantage in values.items():
        path = f"samples/{slug(model)}"
        if evidence.has(path):
            first = evidence.pair(model)[0]
            chat[bool(evidence.results[path].chat.sel({"model": model, "method": first}).any())].append(
                advantage.estimate
            )
    if min(map(len, chat.values())) < 2:
        why = f"needs 2 models of each kind; {len(chat[True])} used a chat template, {len(chat[False])} did not"
        return [unknown("1", what, "all models", paper, why, inputs=used)]
    test, moved = statistics.mann_whitney(chat[True], chat[False]), statistics.shift(chat[True], chat[False])
    low, high = moved.low, moved.high
    return [
        unknown(
            "1",
            what,
            "all models",
            paper,
            "which way the paper's difference goes is not known",
            ours=f"{moved.estimate:+.3f} ({low:+.3f} to {high:+.3f}), p = {test.p:.3g}",
            value=moved.estimate,
            n=len(values),
            low=low,
            high=high,
            control=str(test.groups),
            assumed="instruction tuned = read through a chat template",
            inputs=used,
        )
    ]
