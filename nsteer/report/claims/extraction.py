"""Claim 1 of Jeong 2026: does generation separate emotions better than comprehension?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nsteer.report.claims.evidence import (
    AGREES,
    DIFFERS,
    OPEN,
    Evidence,
    Row,
    compared_at,
    read_from,
    unknown,
    verdict_of,
)
from nsteer.science import separation, statistics
from nsteer.store import slug

BETTER = "generation-based extraction separates emotions better (mean pairwise cosine, generation - comprehension)"


def methods_differ(evidence: Evidence) -> list[Row]:
    """Claim 1: generation against comprehension, model by model and over models."""
    rows, values, used = [], {}, []
    for model in evidence.with_activations():
        row, both = _one_comparison(evidence, model)
        rows.append(row)
        if both is not None:
            values[model] = both
            used += list(row.inputs)
    if not rows:
        rows.append(unknown("1", BETTER, "all models", "lower in 7 of 7", "no activations in the store"))
    return rows + _over_models(evidence, values, rows, tuple(used))


def _one_comparison(evidence: Evidence, model: str) -> tuple[Row, tuple[float, float] | None]:
    first, second = evidence.pair(model)
    paper = "lower, in 7 of 7 comparisons"
    if not first or not second:
        lacks = "generation" if not first else "comprehension"
        return unknown("1", BETTER, model, paper, f"activations of {model} have no method of source {lacks}"), None
    measured, layer = evidence.measured(model), evidence.layer(model, evidence.rules.depth)
    here = measured.sel({"layer": layer})
    one, two = (here.sel({"method": m}) for m in (first, second))
    used = read_from(evidence, model, (first, second), layer)
    a, b = float(one[separation.PINNED]), float(two[separation.PINNED])
    if bool(one.pinned) or bool(two.pinned):
        why = f"mean pairwise cosine is -1/(n-1) by algebra with baseline {evidence.rules.baseline}"
        return unknown("1", BETTER, model, paper, why, inputs=used), None
    if math.isnan(a) or math.isnan(b):
        hole = first if math.isnan(a) else second
        why = f"{hole}: no vectors at layer {layer} (holes, or no neutral samples for {evidence.rules.baseline})"
        return unknown("1", BETTER, model, paper, why, inputs=used), None
    drawn = one.resampled_cosine.values - two.resampled_cosine.values
    low, high = separation.shifted(drawn, a - b, evidence.rules.level)
    verdict, why = verdict_of(low, high, lambda x: x < 0)
    control = (
        f"held-out accuracy {float(one.accuracy):.2f} and {float(two.accuracy):.2f} (chance {float(one.chance):.2f}); "
        f"reliability {float(one.reliability):.2f} and {float(two.reliability):.2f}"
    )
    thin = [f"{m}: {holes}" for m in (first, second) if (holes := evidence.holes(model, m))]
    control = "; ".join([control, *thin])
    ours = f"{a:.3f} - {b:.3f} = {a - b:+.3f} at layer {layer}"
    n = int(one.n_samples) + int(two.n_samples)
    row = Row(
        "1",
        BETTER,
        model,
        paper,
        ours=ours,
        value=a - b,
        n=n,
        low=low,
        high=high,
        control=control,
        verdict=verdict,
        why=why,
        assumed=compared_at(evidence),
        inputs=used,
    )
    return row, (a, b)


def _over_models(
    evidence: Evidence, values: Mapping[str, tuple[float, float]], rows: Sequence[Row], used: tuple
) -> list[Row]:
    """Claim 1 over all models: count, tests, effects, and whether the advantage varies."""
    scope, n = f"{len(values)} models", len(values)
    names = {
        "better": ("models in which generation separates better", "7 of 7"),
        "u": ("Mann-Whitney U of the two methods' values", "p = 0.007"),
        "d": ("Cohen's d of the two methods' values", "d = -107.5"),
        "g": ("Hedges' g of the two methods' values", "not given"),
        "pair": ("paired test over models", "not given"),
        "vary": ("the advantage varies between models", "varies with instruction tuning and family"),
    }
    if n < 2:
        why = f"{n} models with both methods: a test over models needs at least 2"
        return [unknown("1", what, scope, paper, why, inputs=used) for what, paper in names.values()]
    a, b = (np.array([pair[i] for pair in values.values()]) for i in (0, 1))
    assumed = compared_at(evidence)
    k = int((a < b).sum())
    share = statistics.wilson(k, n, evidence.rules.level)
    verdict, why = OPEN, f"{k} of {n} leaves it open"
    if k == n or share.low > 0.5:
        verdict, why = (AGREES, "") if n > 2 else (OPEN, f"{n} models are too few")
    elif share.high < 0.5:
        verdict, why = DIFFERS, ""
    out = [
        Row(
            "1",
            *_names(names, "better", scope),
            ours=f"{k} of {n}",
            value=k / n,
            n=n,
            low=share.low,
            high=share.high,
            control="Wilson interval",
            verdict=verdict,
            why=why,
            assumed=assumed,
            inputs=used,
        )
    ]
    test = statistics.mann_whitney(a, b)
    least = 2 / math.comb(2 * n, n)
    if least > 0.05:
        verdict, why = OPEN, f"{n} models can not give p below {least:.2g}"
    else:
        verdict, why = (AGREES if test.p < 0.05 and a.mean() < b.mean() else DIFFERS), ""
    out.append(
        Row(
            "1",
            *_names(names, "u", scope),
            ours=f"U = {test.statistic:g}, p = {test.p:.3g}",
            value=test.statistic,
            n=2 * n,
            p=test.p,
            control=str(test.groups),
            verdict=verdict,
            why=why,
            assumed=assumed + "; exact, two-sided",
            inputs=used,
        )
    )
    d, g = statistics.cohens_d(a, b, evidence.rules.level), statistics.hedges_g(a, b, evidence.rules.level)
    needs = statistics.implied_sd(d.groups.difference, -107.5)
    why = f"the paper's denominator is not known: for d = -107.5 this difference would need an SD of {needs:.2g}"
    out.append(
        Row(
            "1",
            *_names(names, "d", scope),
            ours=f"d = {d.value:.2f}",
            value=d.value,
            n=2 * n,
            low=d.low,
            high=d.high,
            control=str(d.groups),
            verdict=OPEN,
            why=why,
            assumed=assumed + "; pooled SD",
            inputs=used,
        )
    )
    verdict, why = verdict_of(g.low, g.high, lambda x: x < 0)
    out.append(
        Row(
            "1",
            *_names(names, "g", scope),
            ours=f"g = {g.value:.2f}",
            value=g.value,
            n=2 * n,
            low=g.low,
            high=g.high,
            control=str(g.groups),
            verdict=verdict,
            why=why,
            assumed=assumed,
            inputs=used,
        )
    )
    paired, signed = statistics.paired_permutation(a, b), statistics.wilcoxon(a, b)
    least = 2.0 ** (1 - n)
    verdict, why = (
        (OPEN, f"{n} pairs can not give p below {least:.2g}")
        if least > 0.05
        else (AGREES if paired.p < 0.05 and a.mean() < b.mean() else DIFFERS, "")
    )
    dz = statistics.cohens_dz(a, b).value
    out.append(
        Row(
            "1",
            *_names(names, "pair", scope),
            ours=f"mean difference {paired.statistic:+.3f}, p = {paired.p:.3g}",
            value=paired.statistic,
            n=n,
            p=paired.p,
            control=f"Wilcoxon p = {signed.p:.3g}; dz = {dz:.2f}",
            verdict=verdict,
            why=why,
            assumed=assumed,
            inputs=used,
        )
    )
    return [*out, _varies(evidence, values, rows, names["vary"], used), *_by_tuning(evidence, values, used)]


def _names(names: Mapping[str, tuple[str, str]], key: str, scope: str) -> tuple[str, str, str]:
    return names[key][0], scope, names[key][1]


def _varies(evidence: Evidence, values: Mapping, rows: Sequence[Row], name: tuple[str, str], used: tuple) -> Row:
    known = [row for row in rows if row.scope in values]
    apart = [(x.scope, y.scope) for x in known for y in known if x.high < y.low]
    families = sorted({evidence.family(model) for model in values})
    spread = max(row.value for row in known) - min(row.value for row in known)
    verdict, why = (AGREES, "") if apart else (OPEN, "no two models' intervals are apart")
    ours = "; ".join(f"{row.scope} {row.value:+.3f}" for row in known)
    control = f"{len(apart)} pairs of models whose intervals are apart; families: {', '.join(families)}"
    return Row(
        "1",
        name[0],
        f"{len(known)} models",
        name[1],
        ours=ours,
        value=spread,
        n=len(known),
        control=control,
        verdict=verdict,
        why=why,
        assumed=compared_at(evidence),
        inputs=used,
    )


def _by_tuning(evidence: Evidence, values: Mapping[str, tuple[float, float]], used: tuple) -> list[Row]:
    """The advantage of models read through a chat template against that of models without one."""
    what, paper = "the advantage differs with instruction tuning (chat template minus none)", "it does; size not known"
    chat: dict[bool, list[float]] = {True: [], False: []}
    for model, (a, b) in values.items():
        path = f"samples/{slug(model)}"
        if evidence.has(path):
            first = evidence.pair(model)[0]
            chat[bool(evidence.results[path].chat.sel({"model": model, "method": first}).any())].append(a - b)
    if min(map(len, chat.values())) < 2:
        why = f"needs 2 models of each kind; {len(chat[True])} used a chat template, {len(chat[False])} did not"
        return [unknown("1", what, "all models", paper, why, inputs=used)]
    test = statistics.mann_whitney(chat[True], chat[False])
    difference = float(np.mean(chat[True]) - np.mean(chat[False]))
    return [
        Row(
            "1",
            what,
            "all models",
            paper,
            ours=f"{difference:+.3f}, p = {test.p:.3g}",
            value=difference,
            n=len(values),
            p=test.p,
            control=str(test.groups),
            verdict=AGREES if test.p < 0.05 else OPEN,
            why="" if test.p < 0.05 else "not significant",
            assumed="instruction tuned = read through a chat template",
            inputs=used,
        )
    ]
