"""Claim 5 of Jeong 2026: which regimes are there, and what sets them?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import (
    AGREES,
    CONTROLS,
    DIFFERS,
    NAN,
    OPEN,
    Evidence,
    Row,
    conditions,
    greatest,
    missing_perplexity,
    ours_of,
    unknown,
)
from nsteer.science import metrics, outcomes, statistics
from nsteer.science.outcomes import Thresholds

REGIME = "regimes of continuations at the largest strength (share surgical)"
PAPER_5 = "three regimes by perplexity ratio; which model is in which is not known here"


def regimes(evidence: Evidence) -> list[Row]:
    """Claim 5: which regimes there are, and whether architecture or scale sets them."""
    if evidence.steered is None:
        return [unknown("5", REGIME, "all models", PAPER_5, "the store has no group generations")]
    missing, thresholds = missing_perplexity(evidence.results), evidence.rules.thresholds
    steered = evidence.steered
    counts = outcomes.regime_counts(steered.regime)
    rows: list[Row] = []
    seen: set[str] = set()
    shares: dict[str, np.ndarray] = {}
    for where, part in conditions(
        steered[["repetition", "regime", "perplexity_ratio", "repetition_unsteered", "empty"]]
    ):
        one = counts.sel(where)
        strength = greatest(part.strength.values.tolist())
        top = one["count"].sel({"strength": strength, "control": "none"}).sum("emotion")
        numbers = {name: int(top.sel({"regime": name})) for name in outcomes.REGIMES}
        n, scope = sum(numbers.values()), ", ".join([*where.values(), f"strength {strength:g}"])
        labels = {**where, "strength": strength}
        used: tuple = (("generations", labels),)
        plain_labels = {d: where[d] for d in ("model", "op") if d in where}
        used += (("unsteered", plain_labels),) if evidence.has("unsteered") else ()
        if missing:
            loops = part.repetition.sel({"strength": strength, "control": "none"}).values
            share = float(np.nanmean(loops >= thresholds.repetition)) if (~np.isnan(loops)).any() else NAN
            rows.append(
                unknown(
                    "5",
                    REGIME,
                    scope,
                    PAPER_5,
                    f"the store lacks perplexity in {missing}: only loops can be told",
                    ours=f"repetitive {share:.0%}",
                    n=int((~np.isnan(loops)).sum()),
                    inputs=used,
                )
            )
            continue
        used += (("outcomes", labels), ("outcomes_unsteered", plain_labels))
        share_ = statistics.wilson(numbers["surgical"], n, evidence.rules.level)
        median = statistics.clean(part.perplexity_ratio.sel({"strength": strength, "control": "none"}).values)
        ours = ", ".join(f"{name} {k}" for name, k in numbers.items()) + f" of {n}"
        if empty := int(part.empty.sel({"strength": strength, "control": "none"}).sum()):
            ours += f"; {empty} empty, in no regime"
        if len(median):
            ours += f"; median perplexity ratio {np.median(median):.3g}"
        rows.append(
            unknown(
                "5",
                REGIME,
                scope,
                PAPER_5,
                "the paper's table of models and regimes is not known here",
                ours=ours,
                value=share_.estimate,
                n=n,
                low=share_.low,
                high=share_.high,
                control=_regime_control(one, part, strength, thresholds),
                assumed=ours_of(thresholds),
                inputs=used,
            )
        )
        own = one["count"].sel({"control": "none"}).transpose(..., "regime")
        winners = own.values[own.sum("regime").values > 0].argmax(-1)
        seen |= {outcomes.REGIMES[i] for i in np.unique(winners)}
        shares.setdefault(where["model"], top.values / max(n, 1))
    if missing:
        return rows
    everything: tuple = (("generations", {}), ("outcomes", {}), ("outcomes_unsteered", {}))
    found = "; ".join(name for name in outcomes.REGIMES if name in seen)
    rows.append(
        Row(
            "5",
            "regimes that are the commonest for some model, emotion and strength",
            "all models",
            "3",
            ours=found,
            value=float(len(seen)),
            n=len(shares),
            verdict=AGREES if len(seen) == 3 else DIFFERS if len(shares) > 2 else OPEN,
            why="" if len(seen) == 3 or len(shares) > 2 else f"{len(shares)} models are too few",
            control="",
            assumed=ours_of(thresholds),
            inputs=everything,
        )
    )
    return [*rows, _architecture(evidence, shares, everything)]


def _regime_control(one: xr.Dataset, part: xr.Dataset, strength: float, thresholds: Thresholds) -> str:
    text = []
    for control in [c for c in CONTROLS if c in one.control.values.tolist()]:
        other = one["count"].sel({"strength": strength, "control": control}).sum("emotion")
        if int(other.sum()):
            told = ", ".join(f"{r} {int(other.sel({'regime': r}))}" for r in outcomes.REGIMES)
            text.append(f"{CONTROLS[control]}: {told}")
    plain = part.repetition_unsteered.values.ravel()
    if (~np.isnan(plain)).any():
        text.append(
            f"unsteered repetitive {int((plain >= thresholds.repetition).sum())} of {int((~np.isnan(plain)).sum())}"
        )
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
    row, column = metrics.pairs(len(names))

    def gap(labels: np.ndarray) -> float:
        same = labels[row] == labels[column]
        return float(apart[row, column][~same].mean() - apart[row, column][same].mean())

    null = statistics.permutation_null(gap, families, n=999, seed=evidence.rules.seed)
    sizes = [float(evidence.fact(name, "parameters") or NAN) for name in names]
    rho, p, _ = statistics.spearman(sizes, matrix[:, 0])
    verdict, why = (AGREES, "") if null.p < 0.05 and not p < 0.05 else (OPEN, "not told apart with this many models")
    return Row(
        "5",
        what,
        f"{len(names)} models",
        paper,
        ours=f"{null.observed:+.2f}, p = {null.p:.3g}",
        value=null.observed,
        n=len(names),
        low=null.low,
        high=null.high,
        p=null.p,
        control=f"surgical share with parameters: Spearman {rho:+.2f}, p = {p:.3g}",
        verdict=verdict,
        why=why,
        assumed="shares at the largest strength; interval: central 95 % of shuffled families",
        inputs=used,
    )
