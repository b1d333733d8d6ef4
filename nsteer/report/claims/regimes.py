"""Claim 5 of Jeong 2026: which regimes are there, and what sets them?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import (
    CONTROLS,
    NAN,
    Evidence,
    Row,
    conditions,
    greatest,
    missing_perplexity,
    ours_of,
    unknown,
)
from nsteer.report.claims.verdicts import claimed
from nsteer.science import metrics, outcomes, statistics
from nsteer.science.outcomes import Thresholds
from nsteer.science.statistics import Interval

REGIME = "regimes of continuations at the largest strength (share surgical)"
PAPER_5 = "three regimes by perplexity ratio; which model is in which is not known here"
CODE = "one label a model by the rule of the author's later code (jeong2026-code), which asks for no perplexity"
CODE_LABELS = {
    "gemma-3-1b-pt": "explosive",
    **dict.fromkeys(
        ("gemma-3-1b-it", "qwen2.5-1.5b", "qwen2.5-1.5b-instruct", "llama-3.2-3b", "llama-3.2-3b-instruct"), "surgical"
    ),
    **dict.fromkeys(("llama-3.1-8b", "llama-3.1-8b-instruct"), "surgical"),
}
"""What that code says of models, by the end of their ids."""


def regimes(evidence: Evidence) -> list[Row]:
    """Claim 5: which regimes there are, and whether architecture or scale sets them."""
    if evidence.steered is None:
        return [unknown("5", REGIME, "all models", PAPER_5, "the store has no group generations")]
    missing, thresholds = missing_perplexity(evidence.results), evidence.rules.thresholds
    steered = evidence.steered
    counts = outcomes.regime_counts(steered.regime)
    rows: list[Row] = []
    seen: dict[str, list[Interval]] = {name: [] for name in outcomes.REGIMES}
    shares: dict[str, np.ndarray] = {}
    for where, cube in conditions(
        steered[["repetition", "regime", "perplexity_ratio", "repetition_unsteered", "empty"]]
    ):
        counted = counts.sel(where)
        strength = greatest(cube.strength.values.tolist())
        strongest = cube.sel({"strength": strength, "control": "none"})
        top = counted["count"].sel({"strength": strength, "control": "none"}).sum("emotion")
        numbers = {name: int(top.sel({"regime": name})) for name in outcomes.REGIMES}
        n, scope = sum(numbers.values()), ", ".join([*where.values(), f"strength {strength:g}"])
        what, labels = ("5", REGIME, scope, PAPER_5), {**where, "strength": strength}
        used: tuple = (("generations", labels),)
        unsteered_labels = {d: where[d] for d in ("model", "op") if d in where}
        used += (("unsteered", unsteered_labels),) if evidence.has("unsteered") else ()
        if missing:
            loops = strongest.repetition.values
            share = float(np.nanmean(loops >= thresholds.repetition)) if (~np.isnan(loops)).any() else NAN
            why = f"the store lacks perplexity in {missing}: only loops can be determined"
            known = int((~np.isnan(loops)).sum())
            rows.append(unknown(*what, why, ours=f"repetitive {share:.0%}", n=known, inputs=used))
            continue
        used += (("outcomes", labels), ("outcomes_unsteered", unsteered_labels))
        share_ = _share_of(strongest.regime, "surgical")
        median = statistics.clean(strongest.perplexity_ratio.values)
        ours = ", ".join(f"{name} {k}" for name, k in numbers.items()) + f" of {n}"
        if empty := int(strongest.empty.sum()):
            ours += f"; {empty} empty, in no regime"
        if broken := sum(
            all(failure[dim] == label for dim, label in labels.items()) for failure in evidence.not_finite
        ):
            ours += f"; {broken} emotions without texts: not finite"
        if len(median):
            ours += f"; median perplexity ratio {np.median(median):.3g}"
        rows.append(
            unknown(
                *what,
                "the paper's table of models and regimes is not known here",
                ours=ours,
                value=share_.estimate,
                n=share_.n,
                low=share_.low,
                high=share_.high,
                control=_regime_control(counted, cube, strength, thresholds),
                assumed=ours_of(thresholds),
                inputs=used,
            )
        )
        _see(seen, cube.regime.sel({"control": "none"}))
        shares.setdefault(where["model"], top.values / max(n, 1))
    rows += [row for model in evidence.models if (row := _by_code(evidence, steered, model)) is not None]
    if missing:
        return rows
    everything: tuple = (("generations", {}), ("outcomes", {}), ("outcomes_unsteered", {}))
    rows.append(_three(evidence, seen, everything))
    return [*rows, _architecture(evidence, shares, everything)]


def _share_of(regime: xr.DataArray, name: str, level: float = statistics.LEVEL) -> Interval:
    """The share of a regime, of those that are told: a mean over prompts, Wilson."""
    told, own = (mask.sum([d for d in mask.dims if d != "prompt"]).values for mask in (regime != "", regime == name))
    return _share(own, told, level)


def _share(own: np.ndarray, told: np.ndarray, level: float = statistics.LEVEL) -> Interval:
    """A share of counts [prompt], of those that are told: a mean over prompts, Wilson."""
    shares = own[told > 0] / told[told > 0]
    return statistics.wilson(float(shares.sum()), len(shares), level)


def _see(seen: dict[str, list[Interval]], regime: xr.DataArray) -> None:
    """Adds the shares of each regime at every emotion and strength."""
    told, *own = (
        mask.sum([d for d in mask.dims if d not in ("emotion", "strength", "prompt")]).transpose(..., "prompt")
        for mask in (regime != "", *(regime == name for name in seen))
    )
    for at in np.ndindex(told.shape[:-1]):
        for intervals, count in zip(seen.values(), own, strict=True):
            if (share := _share(count.values[at], told.values[at])).n:
                intervals.append(share)


def _three(evidence: Evidence, seen: Mapping[str, list[Interval]], used: tuple) -> Row:
    """Whether each regime is that of most texts somewhere: the rarest one decides, at its best place."""
    what = "share of the rarest of the three regimes, at the model, emotion and strength that have most of it"
    best = {
        name: max(intervals, key=lambda interval: (interval.estimate, interval.n), default=None)
        for name, intervals in seen.items()
    }
    known = {name: interval for name, interval in best.items() if interval is not None}
    if len(known) < len(seen):
        return unknown("5", what, "all models", "3 regimes", "no regime can be determined", inputs=used)
    rarest = min(known, key=lambda name: known[name].estimate)
    share, places = known[rarest], max(len(intervals) for intervals in seen.values())
    wide = statistics.wilson(share.estimate * share.n, share.n, 1 - (1 - statistics.LEVEL) / places)
    p = min(1.0, places * statistics.binomial_p(share.estimate * share.n, share.n, 0.5))
    fields = claimed(Interval(share.estimate, wide.low, 1.0, share.n), above=0.5, p=p if share.estimate > 0.5 else 1.0)
    return Row(
        "5",
        what,
        "all models",
        "3 regimes",
        ours="; ".join(f"{name} {interval.estimate:.2f}" for name, interval in known.items()),
        **fields,
        control=f"the best of {places} places each (Bonferroni); absence is no evidence: this row can not differ",
        assumed=ours_of(evidence.rules.thresholds),
        inputs=used,
    )


def _by_code(evidence: Evidence, steered: xr.Dataset, model: str) -> Row | None:
    """The author's label of a model, and the same with texts without a word apart; None where nothing was steered."""
    if model not in steered.model.values.tolist():
        return None
    cube = steered.repetition.sel({"model": model, "control": "none"})
    there = cube.notnull() & (cube.strength != 0)
    text = evidence.results["generations"].text.sel({"model": model, "control": "none"}).load()
    texts = [str(value) for value in text.transpose(*there.dims).values[there.values].tolist()]
    lost = _lost(evidence, there)
    if not texts and not lost:
        return None
    bare = sum(not text.strip() for text in texts)
    name = str(evidence.fact(model, "id") or model).rpartition("/")[-1].lower()
    known = f"{CODE_LABELS[name]} (2 scenarios, 5 strengths, 20 tokens)" if name in CODE_LABELS else "not labelled"
    looping = sum(map(outcomes.words_repeat, texts)) / max(len(texts), 1)
    apart = outcomes.code_regime_apart(texts, lost)
    return unknown(
        "5",
        CODE,
        model,
        known,
        "other prompts, strengths and lengths than that code's; a label has no interval",
        ours=f"{outcomes.code_regime(texts) or 'no text'}; with texts that are empty or not finite apart {apart}",
        n=len(texts),
        control=f"repeating {looping:.0%}; without a word {bare}; not written, since something was not finite, {lost}",
        assumed="all strengths but 0, all emotions and prompts together",
        inputs=(("generations", {"model": model, "control": "none"}),),
    )


def _lost(evidence: Evidence, there: xr.DataArray) -> int:
    """Texts of a model that its steered cells would have had, were nothing of their edits not finite.

    there : the texts that were written, over op, prompt, seed and the rest; a cell has as many as the entry's others
    """
    model, many = str(there.model.item()), there.any([d for d in there.dims if d not in ("op", "prompt", "seed")])
    each = {str(op): int(many.sel({"op": op}).sum()) for op in there.op.values.tolist()}
    broken = [
        failure for failure in evidence.not_finite if failure["model"] == model and float(failure["strength"]) != 0
    ]
    return sum(max(each.get(failure["op"], 0), 1) for failure in broken)


def _regime_control(counted: xr.Dataset, cube: xr.Dataset, strength: float, thresholds: Thresholds) -> str:
    text = []
    for control in [c for c in CONTROLS if c in counted.control.values.tolist()]:
        other = counted["count"].sel({"strength": strength, "control": control}).sum("emotion")
        if int(other.sum()):
            told = ", ".join(f"{r} {int(other.sel({'regime': r}))}" for r in outcomes.REGIMES)
            text.append(f"{CONTROLS[control]}: {told}")
    unsteered = cube.repetition_unsteered.values.ravel()
    if known := int((~np.isnan(unsteered)).sum()):
        text.append(f"unsteered repetitive {int((unsteered >= thresholds.repetition).sum())} of {known}")
    return "; ".join(text)


def _architecture(evidence: Evidence, shares: Mapping[str, np.ndarray], used: tuple) -> Row:
    """Are regime shares nearer within a family than between families, and do they go with size?"""
    what, paper = (
        "regimes are set by architecture rather than scale (distance between minus within families)",
        "they are",
    )
    names = list(shares)
    families = np.array([evidence.family(model) for model in names], object)
    several = [f for f in set(families.tolist()) if (families == f).sum() > 1]
    if len(several) < 1 or len(set(families.tolist())) < 2:
        why = f"needs two models of one family beside another family; the store has {', '.join(sorted(set(families)))}"
        return unknown("5", what, f"{len(names)} models", paper, why, inputs=used)
    matrix = np.stack([shares[name] for name in names])
    apart = np.abs(matrix[:, None] - matrix[None]).sum(-1) / 2

    def gap(labels: np.ndarray, kept: np.ndarray | None = None) -> float:
        at = np.arange(len(labels)) if kept is None else kept
        row, column = (at[pair] for pair in metrics.pairs(len(at)))
        same = labels[row] == labels[column]
        if same.all() or not same.any():
            return NAN
        return float(apart[row, column][~same].mean() - apart[row, column][same].mean())

    null = statistics.permutation_null(gap, families, n=999, seed=evidence.rules.seed)
    left = [gap(families, np.delete(np.arange(len(names)), k)) for k in range(len(names))]
    interval = statistics.jackknife(null.observed, left)
    sizes = [float(evidence.fact(name, "parameters") or NAN) for name in names]
    rho, p, _ = statistics.spearman(sizes, matrix[:, 0])
    return Row(
        "5",
        what,
        f"{len(names)} models",
        paper,
        ours=f"{null.observed:+.2f}, p = {null.p:.3g}",
        **claimed(interval, above=0.0, p=null.p),
        control=f"surgical share with parameters: Spearman {rho:+.2f}, p = {p:.3g}, which is no evidence against scale",
        assumed="shares at the largest strength; p: families shuffled; interval: models left out in turn",
        inputs=used,
    )
