"""Claim 4 of Jeong 2026: does steering work, at which strength, and against which control?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import NsteerError
from nsteer.report.claims.effects import against_controls, alike, controls_of, effect_rows, scenario_cells
from nsteer.report.claims.evidence import (
    NAN,
    Evidence,
    Row,
    Rules,
    conditions,
    missing_perplexity,
    ours_of,
    stated,
    unknown,
)
from nsteer.report.claims.matched import at_equal_kl
from nsteer.report.claims.transport import deltas
from nsteer.report.claims.verdicts import claimed
from nsteer.science import outcomes, statistics
from nsteer.science.targets import told_by
from nsteer.store.results import Results

WORKS = "steering moves a scenario to its target class (share)"
PAPER_4 = "37 of 40 (0.93, Wilson 0.80 to 0.97)"
PAPER_LOW = 0.80
"""The lower end of the interval of the paper's own 37 of 40: a share that may be below it does not agree."""
SETUP = ("op", "layer_set", "method")
"""What strengths must share to be counted together over models: a label of one op says nothing of another's unit."""


def steering_works(evidence: Evidence) -> list[Row]:
    """Claim 4: scenarios moved at each strength, with controls beside; effects; deltas; turning points."""
    if missing := evidence.missing_judged():
        return [unknown("4", WORKS, "all models", PAPER_4, f"the store has no group {missing}"), *deltas(evidence)]
    judged = evidence.judged
    assert judged is not None
    assumptions = [*evidence.unmapped, *told_by(evidence.classes)]
    rows: list[Row] = []
    together: dict[tuple, list[xr.Dataset]] = {}
    setups: dict[tuple[str, str, str], dict[str, xr.Dataset]] = {}
    told = conditions(judged)
    for where, cube in told:
        scenarios, note = aimed(evidence, cube)
        used = (("judged", dict(where)), ("judged_unsteered", {d: where[d] for d in ("model", "op") if d in where}))
        if scenarios is None:
            why = "no judged continuation whose target has a class"
            rows.append(unknown("4", WORKS, ", ".join(where.values()), PAPER_4, why, assumed="; ".join(assumptions)))
            continue
        together.setdefault(tuple(where[d] for d in SETUP), []).append(scenarios)
        setups.setdefault((where["model"], where["op"], where["layer_set"]), {})[where["method"]] = scenarios
        scope = list(where.values())
        for strength in scenarios.strength.values.tolist():
            at = [*scope, f"strength {strength:g}"]
            rows.append(_share(scenarios.sel({"strength": strength}), at, [note, *assumptions], used))
        rows += effect_rows(evidence, where, cube, scenarios, scope, [note, *assumptions], used)
    rows += _untold(evidence, [where for where, _ in told], assumptions)
    rows += _joint(together, assumptions)
    rows += at_equal_kl(evidence, setups)
    if not rows:
        why = "no continuation is judged, or no emotion has a class"
        rows = [unknown("4", WORKS, "all models", PAPER_4, why, assumed="; ".join(assumptions))]
    return [*rows, *_turning(evidence), *deltas(evidence)]


def _joint(together: Mapping[tuple, list[xr.Dataset]], assumptions: list[str]) -> list[Row]:
    """Rows of several models: each prompt's mean over them, since models share the prompts."""
    rows = []
    for setup, cubes in together.items():
        if len(cubes) < 2:
            continue
        joint = xr.concat(cubes, "model", join="outer").mean("model")
        labels = dict(zip(SETUP, setup, strict=True))
        for strength in joint.strength.values.tolist():
            used = (("judged", labels), ("judged_unsteered", {"op": labels["op"]}))
            scope = [f"{len(cubes)} models", *setup, f"strength {strength:g}"]
            rows.append(_share(joint.sel({"strength": strength}), scope, assumptions, used))
    return rows


def _untold(evidence: Evidence, told: list[dict[str, str]], assumptions: list[str]) -> list[Row]:
    """A row for whatever was steered, of which nothing is judged."""
    steered = [] if evidence.steered is None else conditions(evidence.steered[["repetition"]])
    why = "no continuation is judged: all are empty, or no emotion has a class"
    return [
        unknown("4", WORKS, ", ".join(where.values()), PAPER_4, why, assumed="; ".join(assumptions))
        for where, _ in steered
        if where not in told
    ]


def aimed(evidence: Evidence, cube: xr.Dataset) -> tuple[xr.Dataset | None, str]:
    """`success`, `named` and `change` over (strength, control, prompt), strengths above 0, and what a scenario is.

    A prompt whose kind has a target is steered to it, at the target's sign; where no prompt has one, the mean over all
    emotions stands. Seeds are averaged: prompts are the units. None where nothing is known.
    """
    prompts = [str(p) for p in cube.prompt.values.tolist()]
    strengths = sorted({abs(s) for s in cube.strength.values.tolist()} - {0.0})
    aims = scenario_cells(prompts, evidence.targets, 1.0)
    flat = cube[["success", "named", "change"]]
    if not aims:
        note = "no scenario targets known: each prompt's mean over all emotions"
        scenarios = flat.sel({"strength": [s for s in cube.strength.values.tolist() if s > 0]}).mean(
            ["emotion", "seed"]
        )
    else:
        note = f"scenario targets of the text set; {len(aims)} scenarios"
        scenarios = _aimed(flat.mean("seed"), aims, strengths)
    scenarios = scenarios.transpose("strength", "control", "prompt").sortby("strength")
    known = scenarios.change.notnull()
    own = {"strength": known.any(["control", "prompt"]).values, "prompt": known.any(["control", "strength"]).values}
    scenarios = scenarios.isel({dim: np.flatnonzero(some) for dim, some in own.items()})
    if not scenarios.sizes["strength"] or "none" not in scenarios.control.values:
        return None, note
    lost = len(aims) - scenarios.sizes["prompt"]
    return scenarios, note + (f"; {lost} scenarios without a judged target" if lost > 0 else "")


def _aimed(flat: xr.Dataset, aims: Sequence[tuple[str, str, float]], strengths: Sequence[float]) -> xr.Dataset:
    """Each scenario's own emotion and sign, over (strength, control, prompt)."""
    known = {dim: flat[dim].values.tolist() for dim in ("emotion", "strength")}
    blank = xr.full_like(flat.isel({"emotion": 0, "strength": 0}, drop=True), NAN)
    rows = []
    for strength in strengths:
        scenarios = blank.copy(deep=True)
        for prompt, emotion, sign in aims:
            if emotion in known["emotion"] and sign * strength in known["strength"]:
                cell = flat.sel({"emotion": emotion, "strength": sign * strength, "prompt": prompt}, drop=True)
                for name in scenarios:
                    scenarios[name].loc[{"prompt": prompt}] = cell[name]
        rows.append(scenarios)
    return xr.concat(rows, "strength").assign_coords(strength=list(strengths))


def _share(scenarios: xr.Dataset, scope: Sequence[str], notes: list[str], used: tuple) -> Row:
    """The share of scenarios that moved; it agrees only where the vector also moves them further than the controls."""
    shares = {
        name: statistics.clean(scenarios.success.sel({"control": same}).mean("control").values)
        for name, same in alike(scenarios.control.values.tolist()).items()
    }
    k, n = float(shares["none"].sum()), len(shares["none"])
    what = ("4", WORKS, ", ".join(scope), PAPER_4)
    if not n:
        return unknown(*what, "no judged continuation whose target has a class", assumed="; ".join(notes))
    strict = statistics.clean(scenarios.named.sel({"control": "none"}).values)
    beside = [
        f"{name} {share.sum():.3g} of {len(share)}" for name, share in shares.items() if name != "none" and len(share)
    ]
    fields: dict[str, Any] = {
        "ours": f"{k:.3g} of {n} ({k / n:.2f})",
        "control": "; ".join([*(beside or ["no control in the store"]), f"likeliest class {strict.sum():.3g} of {n}"]),
        "assumed": "; ".join(
            ["success: P(target class) rises over the unsteered continuation (falls, for sign -1)", *notes]
        ),
        "inputs": used,
    }
    edges, controls = statistics.wilson(k, n), controls_of(scenarios)
    if not controls:
        low, high = edges.low, edges.high
        why = "no control to compare with: a push in any direction moves about half"
        return unknown(*what, why, value=k / n, n=n, low=low, high=high, **fields)
    p = statistics.binomial_p(k, n, PAPER_LOW)
    further = against_controls(scenarios.change, controls)
    paired = statistics.paired_permutation(further, np.zeros(len(further)), "greater")
    why = "" if paired.p <= 0.05 or k / n <= PAPER_LOW else "not above its controls"
    return stated(
        *what, **claimed(edges, above=PAPER_LOW, p=max(p, paired.p) if k / n > PAPER_LOW else p), why=why, **fields
    )


def _turning(evidence: Evidence) -> list[Row]:
    what, paper = "sweet spot of strength (median over emotions)", "0.005 advised for small models (a reader's note)"
    if evidence.steered is None or evidence.judged is None:
        return [unknown("4", what, "all models", paper, "the store has no group generations")]
    turns = turning_points_of(evidence).sel({"control": "none"})
    rows, missing = [], missing_perplexity(evidence.results)
    for where, cube in conditions(evidence.judged[["success"]]):
        aimed = turns.sel({**where, "emotion": cube.emotion.values})
        points = {name: statistics.clean(aimed[name].values) for name in ("flip", "sweet_spot", "collapse")}
        shown = {name: f"{np.median(v):g} ({len(v)})" if len(v) else "none" for name, v in points.items()}
        value = float(np.median(points["sweet_spot"])) if len(points["sweet_spot"]) else NAN
        why = (
            f"no regimes: the store lacks {missing}"
            if missing
            else ("strengths are in the plan's own scale and models; the paper's figure is second-hand")
        )
        scope = ", ".join(where.values())
        used: tuple = (("judged", dict(where)), ("generations", dict(where)))
        if not missing:
            used = (*used, ("outcomes", dict(where)))
        ours = (
            f"flip {shown['flip']}, sweet spot {shown['sweet_spot']}, collapse {shown['collapse']} (emotions with one)"
        )
        rows.append(
            unknown(
                "4",
                what,
                scope,
                paper,
                why,
                ours=ours,
                value=value,
                n=aimed.sizes["emotion"],
                assumed=ours_of(evidence.rules.thresholds),
                inputs=used,
            )
        )
    return rows


def turning_points(results: Results, rules: Rules | None = None) -> xr.Dataset:
    """Flip point, sweet spot and collapse point over (model, op, layer_set, method, emotion, control)."""
    return turning_points_of(Evidence(results, rules or Rules(), None))


def turning_points_of(evidence: Evidence) -> xr.Dataset:
    """As `turning_points`, of a store that is already open."""
    if evidence.judged is None or evidence.steered is None:
        raise NsteerError("turning points need the groups judged, judged_unsteered and generations in the store")
    judged = evidence.judged
    regime = evidence.steered.regime.reindex_like(judged.success, fill_value="")
    targets = [evidence.classes.get(str(e)) for e in judged.emotion.values.tolist()]
    rises = xr.DataArray(
        [target is not None and bool(target.rises) for target in targets], {"emotion": judged.emotion}, ["emotion"]
    )
    return outcomes.turning_points(judged.named.where(rises), judged.success, regime, evidence.rules.thresholds)
