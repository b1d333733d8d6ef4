"""Claim 4 of Jeong 2026: does steering work, at which strength, and how much of it arrives?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from nsteer.errors import NsteerError
from nsteer.report.claims.evidence import (
    AGREES,
    CONTROLS,
    DIFFERS,
    NAN,
    NO_TWINS,
    OPEN,
    Evidence,
    Row,
    Rules,
    beside,
    conditions,
    greatest,
    missing_perplexity,
    ours_of,
    unknown,
)
from nsteer.science import outcomes, statistics
from nsteer.store import slug
from nsteer.store.results import Results

WORKS = "steering moves a scenario to its target class"
PAPER_4 = "37 of 40 (0.93, Wilson 0.80 to 0.97)"


SETUP = ("op", "layer_set", "method")
"""What strengths must share to be counted together over models: a label of one op says nothing of another's unit."""


class Counted(NamedTuple):
    """k of n."""

    k: int
    n: int


def steering_works(evidence: Evidence) -> list[Row]:
    """Claim 4: k of n scenarios at each strength, with a random direction beside it; deltas; turning points."""
    if missing := evidence.missing_judged():
        return [unknown("4", WORKS, "all models", PAPER_4, f"the store has no group {missing}"), *_deltas(evidence)]
    judged = evidence.judged
    assert judged is not None
    holes = outcomes.unmapped(*_emotions_and_classes(evidence), given=evidence.judge_map)
    rows: list[Row] = []
    total: dict[tuple, dict[str, list[Counted]]] = {}
    told = conditions(judged)
    for where, part in told:
        for strength in [s for s in part.strength.values.tolist() if s > 0]:
            rows += _one_strength(evidence, where, part, strength, holes, total)
    rows += _untold(evidence, [where for where, _ in told], holes)
    for (*setup, strength), counted in total.items():
        if (several := len(counted["none"])) > 1:
            labels = dict(zip(SETUP, setup, strict=True))
            scope = f"{several} models, {', '.join(setup)}, strength {strength:g}"
            every: tuple = (("judged", {**labels, "strength": strength}), ("judged_unsteered", {"op": labels["op"]}))
            summed = {c: Counted(*map(sum, zip(*one, strict=True))) for c, one in counted.items()}
            rows.append(_share_row(evidence, scope, summed, "", holes, every))
    rows = rows or [
        unknown(
            "4",
            WORKS,
            "all models",
            PAPER_4,
            "no continuation is judged, or no emotion has a class",
            assumed="; ".join(holes),
        )
    ]
    return [*rows, *_turning(evidence), *_deltas(evidence)]


def _untold(evidence: Evidence, told: list[dict[str, str]], holes: list[str]) -> list[Row]:
    """A row for whatever was steered, of which nothing is judged."""
    steered = [] if evidence.steered is None else conditions(evidence.steered[["repetition"]])
    why = "no continuation is judged: all are empty, or no emotion has a class"
    return [
        unknown("4", WORKS, ", ".join(where.values()), PAPER_4, why, assumed="; ".join(holes))
        for where, _ in steered
        if where not in told
    ]


def _emotions_and_classes(evidence: Evidence) -> tuple[list[str], list[str]]:
    judged = evidence.results["judged"]
    return judged.emotion.values.tolist(), judged["class"].values.tolist()


def kind_of(prompt: str) -> str:
    """The scenario kind of a prompt label: `neutral-hostile-3` is of kind `neutral-hostile`."""
    return re.sub(r"-\d+$", "", prompt)


def scenario_cells(
    prompts: Sequence[str], targets: Mapping[str, Mapping[str, Any]], strength: float
) -> list[tuple[str, str, float]]:
    """(prompt, emotion, signed strength) of every prompt whose kind has a target."""
    found = []
    for prompt in prompts:
        target = targets.get(kind_of(prompt))
        if target is not None:
            found.append((prompt, str(target["emotion"]), strength * int(target.get("sign", 1))))
    return found


def _one_strength(
    evidence: Evidence,
    where: dict,
    part: xr.Dataset,
    strength: float,
    holes: list[str],
    total: dict[tuple, dict[str, list[Counted]]],
) -> list[Row]:
    scope = ", ".join([*where.values(), f"strength {strength:g}"])
    prompts = [str(p) for p in part.prompt.values.tolist()]
    cells = scenario_cells(prompts, evidence.targets, strength)
    there = [str(c) for c in part.control.values.tolist()]
    if cells:
        signed = sorted({s for _, _, s in cells})
        note = f"scenario targets of the text set; {len(cells)} scenarios"
        picked = {c: _pick(part, cells, c) for c in there}
    else:
        signed, note = [strength], "no scenario targets known: every (emotion, prompt) counts as a scenario"
        picked = {c: part.sel({"strength": strength, "control": c}) for c in there}
    if "none" not in picked:
        return []
    counted = {c: _counted(one.success) for c, one in picked.items()}
    named, n = picked["none"].named.values, counted["none"].n
    if not n:
        return [
            unknown(
                "4", WORKS, scope, PAPER_4, "no judged continuation whose target has a class", assumed="; ".join(holes)
            )
        ]
    for control, one in counted.items():
        total.setdefault((*(where[d] for d in SETUP), strength), {}).setdefault(control, []).append(one)
    strict = f"; likeliest class is the target in {int(np.nansum(named))} of {n}"
    asked = len(cells) or _with_a_class(evidence, picked["none"])
    lost = f"; {asked - n} scenarios without a judged target" if asked > n else ""
    labels = {**where, "strength": [s for s in signed if s in part.strength.values.tolist()]}
    plain = {dim: where[dim] for dim in ("model", "op") if dim in where}
    used = (("judged", labels), ("judged_unsteered", plain))
    return [_share_row(evidence, scope, counted, strict + lost, [note, *holes], used)]


def _counted(success: xr.DataArray) -> Counted:
    """k of n successes; what is not known counts for neither."""
    values = success.values
    return Counted(int(np.nansum(values)), int((~np.isnan(values)).sum()))


def _with_a_class(evidence: Evidence, part: xr.Dataset) -> int:
    """How many continuations of steered emotions have a class that they may be judged by."""
    there = part.success.notnull().any([dim for dim in part.success.dims if dim != "emotion"])
    each = part.success.size // max(part.success.sizes.get("emotion", 1), 1)
    emotions = part.emotion.values.tolist()
    return each * sum(bool(evidence.classes[e]) for e, some in zip(emotions, there.values, strict=True) if some)


def _pick(part: xr.Dataset, cells: Sequence[tuple[str, str, float]], control: str) -> xr.Dataset:
    """The continuations of the scenarios, along `scenario`; those not on the grid are left out."""
    chosen = part.sel({"control": control})
    emotions, strengths = chosen.emotion.values.tolist(), chosen.strength.values.tolist()
    held = [(p, e, s) for p, e, s in cells if e in emotions and s in strengths]
    columns = [list(column) for column in zip(*held, strict=True)] or [[], [], []]
    index = {
        dim: xr.DataArray(np.array(c, object if dim != "strength" else float), dims="scenario")
        for dim, c in zip(("prompt", "emotion", "strength"), columns, strict=True)
    }
    places = {
        dim: xr.DataArray([chosen[dim].values.tolist().index(v) for v in one.values.tolist()], dims="scenario").astype(
            int
        )
        for dim, one in index.items()
    }
    return chosen.isel(places)


def _share_row(
    evidence: Evidence, scope: str, counted: Mapping[str, Counted], more: str, notes: list[str], used: tuple
) -> Row:
    k, n = counted["none"]
    found = statistics.wilson(k, n, evidence.rules.level)
    control, why = "no random direction in the store", "no random direction to compare with"
    verdict = OPEN
    chances = {c: (one, statistics.wilson(*one, evidence.rules.level)) for c, one in counted.items() if one.n}
    beside = {CONTROLS[c]: one for c, one in chances.items() if c in CONTROLS}
    if beside:
        shown = [f"{name} {a} of {b} ({edge.low:.2f} to {edge.high:.2f})" for name, ((a, b), edge) in beside.items()]
        above = [name for name, (_, edge) in beside.items() if not found.low > edge.high]
        control, why = "; ".join(shown), "the interval leaves it open"
        if found.high < 0.925:
            verdict, why = DIFFERS, ""
        elif found.holds(0.925) or found.low > 0.925:
            verdict, why = (OPEN, f"not above a {' or a '.join(above)}") if above else (AGREES, "")
    assumed = "; ".join(["success: P(target class) rises over the unsteered twin (falls, for sign -1)", *notes])
    return Row(
        "4",
        WORKS,
        scope,
        PAPER_4,
        ours=f"{k} of {n} ({k / n:.2f})",
        value=k / n,
        n=n,
        low=found.low,
        high=found.high,
        control=control + more,
        verdict=verdict,
        why=why,
        assumed=assumed,
        inputs=used,
    )


def _turning(evidence: Evidence) -> list[Row]:
    what, paper = "sweet spot of strength (median over emotions)", "0.005 advised for small models (a reader's note)"
    if evidence.steered is None or evidence.judged is None:
        return [unknown("4", what, "all models", paper, "the store has no group generations")]
    found = turning_points_of(evidence).sel({"control": "none"})
    rows, missing = [], missing_perplexity(evidence.results)
    for where, part in conditions(evidence.judged[["success"]]):
        one = found.sel({**where, "emotion": part.emotion.values})
        points = {name: statistics.clean(one[name].values) for name in ("flip", "sweet_spot", "collapse")}
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
                n=one.sizes["emotion"],
                assumed=ours_of(evidence.rules.thresholds),
                inputs=used,
            )
        )
    return rows


def _deltas(evidence: Evidence) -> list[Row]:
    """The steering delta, raw and over what was injected, beside a random direction of the same norm."""
    what, paper = "steering delta on the target, over injected (transport ratio)", "raw delta, e.g. Gemma-3 +7591"
    lacking = [path for path in ("projections", "projections_unsteered") if not evidence.has(path)]
    if lacking:
        return [unknown("4", what, "all models", paper, f"the store has no group {' and '.join(lacking)}")]
    rows = []
    projected = evidence.results["projections"].projection
    for where, part in conditions(projected.isel({"where": [0]}).to_dataset(name="projection")):
        rows.append(_one_delta(evidence, where, greatest(part.strength.values.tolist()), what, paper))
    return rows or [unknown("4", what, "all models", paper, "no projection is finished")]


def _one_delta(evidence: Evidence, where: dict[str, str], strength: float, what: str, paper: str) -> Row:
    projected = evidence.results["projections"].projection.sel({**where, "where": "prompt_end"}).load()
    plain = evidence.results["projections_unsteered"].projection
    plain = plain.sel({d: v for d, v in {**where, "where": "prompt_end"}.items() if d in plain.dims}).load()
    labels = {**where, "strength": strength}
    if not bool(plain.notnull().any()):
        return unknown("4", what, ", ".join(where.values()), paper, NO_TWINS, inputs=(("projections", labels),))
    projected = projected.sel({"strength": [strength]})
    injected, how = _injected(evidence, where, projected)
    found = outcomes.transport(projected, plain, injected)
    value = found.get("transport", found.delta)
    shown, interval = (
        {},
        statistics.bootstrap(np.mean, value.sel({"control": "none"}).values, n=1000, seed=evidence.rules.seed),
    )
    for control in value.control.values.tolist():
        raw, over = (statistics.clean(x.sel({"control": control}).values) for x in (found.delta, value))
        shown[control] = f"{raw.mean():+.3g} raw, {over.mean():+.3g} over injected" if len(raw) else "nothing"
    used = (
        ("projections", labels),
        (
            "projections_unsteered",
            {d: v for d, v in where.items() if d in plain.dims or d in ("model", "op", "method")},
        ),
    )
    why = (
        "nearly mechanical: the raw delta measures the norm of the stream"
        if injected is not None
        else f"not over injected: {how}"
    )
    return unknown(
        "4",
        what,
        ", ".join([*where.values(), f"strength {strength:g}"]),
        paper,
        why,
        ours=shown.get("none", ""),
        value=interval.estimate,
        n=interval.n,
        low=interval.low,
        high=interval.high,
        control=beside(shown),
        assumed=how,
        inputs=used,
    )


def _injected(evidence: Evidence, where: dict[str, str], projected: xr.DataArray) -> tuple[xr.DataArray | None, str]:
    """The length added at each layer: as recorded, else estimated from neutral norms (scale stream_norm only)."""
    if evidence.has("steering") and "injected" in evidence.results["steering"]:
        recorded = evidence.results["steering"].injected.sel(where).load()
        return recorded.sel({"strength": projected.strength.values}), "injected as recorded by the edit"
    path = f"activations/{slug(where['model'])}"
    block = next((b for b in _blocks(evidence.plan) if (b.get("name") or b.get("op", "add")) == where["op"]), {})
    if block.get("scale", "stream_norm") != "stream_norm" or block.get("op", "add") != "add" or not evidence.has(path):
        return None, "the store does not record the length added (steering.injected)"
    if where["layer_set"] != "all":
        return (
            None,
            f"the length added is not recorded, and is only estimated for layer set all, not {where['layer_set']}",
        )
    norm = evidence.results[path].token_norm.sel({"model": where["model"], "method": where["method"]}).load()
    estimate = outcomes.estimated_injection(norm, projected.strength)
    return estimate, "injected = strength x mean stream norm of the neutral samples, summed over layers: an estimate"


def _blocks(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steer = plan.get("steer") or []
    return [steer] if isinstance(steer, Mapping) else list(steer)


def turning_points(results: Results, rules: Rules | None = None) -> xr.Dataset:
    """Flip point, sweet spot and collapse point over (model, op, layer_set, method, emotion, control)."""
    return turning_points_of(Evidence(results, rules or Rules(), None))


def turning_points_of(evidence: Evidence) -> xr.Dataset:
    """As `turning_points`, of a store that is already open."""
    if evidence.judged is None or evidence.steered is None:
        raise NsteerError("turning points need the groups judged, judged_unsteered and generations in the store")
    regime = evidence.steered.regime.reindex_like(evidence.judged.success, fill_value="")
    return outcomes.turning_points(evidence.judged.named, evidence.judged.success, regime, evidence.rules.thresholds)
