"""Claim 4 of Jeong 2026: does steering work, at which strength, and against which control?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import NsteerError
from nsteer.report.claims.evidence import (
    CONTROLS,
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
from nsteer.report.claims.transport import deltas
from nsteer.report.claims.verdicts import claimed
from nsteer.science import effects, outcomes, statistics
from nsteer.science.metrics import nan_mean
from nsteer.store.results import Results

WORKS = "steering moves a scenario to its target class (share)"
PAPER_4 = "37 of 40 (0.93, Wilson 0.80 to 0.97)"
PAPER_LOW = 0.80
"""The lower end of the interval of the paper's own 37 of 40: a share that may be below it does not agree."""
EFFECT = "change of P(target class), vector minus controls, at the strength best on other prompts"
SELECTIVE = "change of P(target class) minus that of its strongest rival, at the strength best on other prompts"
DOSE = "change of P(target class) with strength (Kendall's tau over strengths, mean over prompts)"
NEEDED = "change of P(target class) when the direction is projected out"
SETUP = ("op", "layer_set", "method")
"""What strengths must share to be counted together over models: a label of one op says nothing of another's unit."""


def steering_works(evidence: Evidence) -> list[Row]:
    """Claim 4: scenarios moved at each strength, with controls beside; effects; deltas; turning points."""
    if missing := evidence.missing_judged():
        return [unknown("4", WORKS, "all models", PAPER_4, f"the store has no group {missing}"), *deltas(evidence)]
    judged = evidence.judged
    assert judged is not None
    holes = outcomes.unmapped(*_emotions_and_classes(evidence), given=evidence.judge_map)
    rows: list[Row] = []
    together: dict[tuple, list[xr.Dataset]] = {}
    told = conditions(judged)
    for where, part in told:
        found, note = aimed(evidence, part)
        used = (("judged", dict(where)), ("judged_unsteered", {d: where[d] for d in ("model", "op") if d in where}))
        if found is None:
            why = "no judged continuation whose target has a class"
            rows.append(unknown("4", WORKS, ", ".join(where.values()), PAPER_4, why, assumed="; ".join(holes)))
            continue
        together.setdefault(tuple(where[d] for d in SETUP), []).append(found)
        scope = list(where.values())
        for strength in found.strength.values.tolist():
            rows.append(
                _share(found.sel({"strength": strength}), [*scope, f"strength {strength:g}"], [note, *holes], used)
            )
        rows += _effects(evidence, where, part, found, scope, [note, *holes], used)
    rows += _untold(evidence, [where for where, _ in told], holes)
    rows += _joint(together, holes)
    if not rows:
        why = "no continuation is judged, or no emotion has a class"
        rows = [unknown("4", WORKS, "all models", PAPER_4, why, assumed="; ".join(holes))]
    return [*rows, *_turning(evidence), *deltas(evidence)]


def _joint(together: Mapping[tuple, list[xr.Dataset]], holes: list[str]) -> list[Row]:
    """Rows of several models: each prompt's mean over them, since models share the prompts."""
    rows = []
    for setup, parts in together.items():
        if len(parts) < 2:
            continue
        joint = xr.concat(parts, "model", join="outer").mean("model")
        labels = dict(zip(SETUP, setup, strict=True))
        for strength in joint.strength.values.tolist():
            used = (("judged", labels), ("judged_unsteered", {"op": labels["op"]}))
            scope = [f"{len(parts)} models", *setup, f"strength {strength:g}"]
            rows.append(_share(joint.sel({"strength": strength}), scope, holes, used))
    return rows


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
    judged = evidence.scores("judged")
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


def aimed(evidence: Evidence, part: xr.Dataset) -> tuple[xr.Dataset | None, str]:
    """`success`, `named` and `change` over (strength, control, prompt), strengths above 0, and what a scenario is.

    A prompt whose kind has a target is steered to it, at the target's sign; where no prompt has one, the mean over all
    emotions stands. Seeds are averaged: prompts are the units. None where nothing is known.
    """
    prompts = [str(p) for p in part.prompt.values.tolist()]
    strengths = sorted({abs(s) for s in part.strength.values.tolist()} - {0.0})
    aims = scenario_cells(prompts, evidence.targets, 1.0)
    flat = part[["success", "named", "change"]]
    if not aims:
        note = "no scenario targets known: each prompt's mean over all emotions"
        found = flat.sel({"strength": [s for s in part.strength.values.tolist() if s > 0]}).mean(["emotion", "seed"])
    else:
        note = f"scenario targets of the text set; {len(aims)} scenarios"
        found = _aimed(flat.mean("seed"), aims, strengths)
    found = found.transpose("strength", "control", "prompt").sortby("strength")
    known = found.change.notnull()
    own = {"strength": known.any(["control", "prompt"]).values, "prompt": known.any(["control", "strength"]).values}
    found = found.isel({dim: np.flatnonzero(some) for dim, some in own.items()})
    if not found.sizes["strength"] or "none" not in found.control.values:
        return None, note
    lost = len(aims) - found.sizes["prompt"]
    return found, note + (f"; {lost} scenarios without a judged target" if lost > 0 else "")


def _aimed(flat: xr.Dataset, aims: Sequence[tuple[str, str, float]], strengths: Sequence[float]) -> xr.Dataset:
    """Each scenario's own emotion and sign, over (strength, control, prompt)."""
    known = {dim: flat[dim].values.tolist() for dim in ("emotion", "strength")}
    blank = xr.full_like(flat.isel({"emotion": 0, "strength": 0}, drop=True), NAN)
    rows = []
    for strength in strengths:
        one = blank.copy(deep=True)
        for prompt, emotion, sign in aims:
            if emotion in known["emotion"] and sign * strength in known["strength"]:
                cell = flat.sel({"emotion": emotion, "strength": sign * strength, "prompt": prompt}, drop=True)
                for name in one:
                    one[name].loc[{"prompt": prompt}] = cell[name]
        rows.append(one)
    return xr.concat(rows, "strength").assign_coords(strength=list(strengths))


def controls_of(found: xr.Dataset) -> list[str]:
    """The controls with any number, the vector itself left out."""
    known = found.change.notnull().any([d for d in found.change.dims if d != "control"])
    return [c for c in found.control.values.tolist() if c != "none" and bool(known.sel({"control": c}))]


def against_controls(change: xr.DataArray, controls: Sequence[str]) -> np.ndarray:
    """Paired effect of each prompt: change by the vector minus the mean change by the controls: [prompt]."""
    return (change.sel({"control": "none"}) - change.sel({"control": list(controls)}).mean("control")).values


def _share(found: xr.Dataset, scope: Sequence[str], notes: list[str], used: tuple) -> Row:
    """The share of scenarios that moved; it agrees only where the vector also moves them further than the controls."""
    shares = {c: statistics.clean(found.success.sel({"control": c}).values) for c in found.control.values.tolist()}
    k, n = float(shares["none"].sum()), len(shares["none"])
    what = ("4", WORKS, ", ".join(scope), PAPER_4)
    if not n:
        return unknown(*what, "no judged continuation whose target has a class", assumed="; ".join(notes))
    strict = statistics.clean(found.named.sel({"control": "none"}).values)
    beside = [f"{name_of(c)} {one.sum():.3g} of {len(one)}" for c, one in shares.items() if c != "none" and len(one)]
    fields: dict[str, Any] = {
        "ours": f"{k:.3g} of {n} ({k / n:.2f})",
        "control": "; ".join([*(beside or ["no control in the store"]), f"likeliest class {strict.sum():.3g} of {n}"]),
        "assumed": "; ".join(["success: P(target class) rises over the unsteered twin (falls, for sign -1)", *notes]),
        "inputs": used,
    }
    edges, controls = statistics.wilson(k, n), controls_of(found)
    if not controls:
        low, high = edges.low, edges.high
        why = "no control to compare with: a push in any direction moves about half"
        return unknown(*what, why, value=k / n, n=n, low=low, high=high, **fields)
    p = statistics.score_p(k, n, PAPER_LOW)
    further = against_controls(found.change, controls)
    paired = statistics.paired_permutation(further, np.zeros(len(further)), "greater")
    why = "" if paired.p <= 0.05 or k / n <= PAPER_LOW else "not above its controls"
    return stated(
        *what, **claimed(edges, above=PAPER_LOW, p=max(p, paired.p) if k / n > PAPER_LOW else p), why=why, **fields
    )


def name_of(control: str) -> str:
    """A control in words."""
    return CONTROLS.get(re.sub(r"-\d+$", "", control), control)


def _effects(
    evidence: Evidence,
    where: Mapping[str, str],
    part: xr.Dataset,
    found: xr.Dataset,
    scope: list[str],
    notes: list[str],
    used: tuple,
) -> list[Row]:
    """Paired effect, selectivity and dose of one setup; necessity where the op projects out."""
    named, controls = ", ".join(scope), controls_of(found)
    fields: dict[str, Any] = {"assumed": "; ".join([*notes, "not in the paper: ours"]), "inputs": used}
    steered = found.change.sel({"control": "none"}).values
    if _projects_out(evidence, where["op"]):
        fall = -steered[-1] if steered.size else steered
        mean = statistics.mean_interval(-fall)
        flips = statistics.paired_permutation(-fall, np.zeros(len(fall)))
        ours, shown = f"{mean.estimate:+.3f}, p = {flips.p:.3g}", _control_means(found.isel({"strength": -1}), controls)
        return [
            stated(
                "effects",
                NEEDED,
                named,
                "not given",
                ours=ours,
                **claimed(mean, below=0.0, p=flips.p),
                control=shown,
                **fields,
            )
        ]
    usable = _usable(evidence, where, part, found)
    place = effects.chosen_strength(steered, usable)
    taken = [found.strength.values.tolist()[i] for i in np.unique(place[place >= 0])]
    at = f"strengths taken: {', '.join(f'{s:g}' for s in taken) or 'none'}"
    rows = []
    if controls:
        further = np.stack(
            [against_controls(found.change.sel({"strength": s}), controls) for s in found.strength.values]
        )
        rows.append(
            _effect(
                effects.at_chosen(further, place), effects.at_chosen(steered, place), found, named, at, controls, fields
            )
        )
    else:
        rows.append(unknown("effects", EFFECT, named, "not given", "no control to compare with", **fields))
    rows.append(_selective(evidence, where, found, place, named, at, fields))
    tau = effects.monotonicity(steered, found.strength.values)
    mean = statistics.mean_interval(tau)
    flips = statistics.paired_permutation(tau, np.zeros(len(tau)))
    known = statistics.clean(tau)
    why = "" if len(found.strength) > 1 else "fewer than two strengths"
    control = f"above 0 in {int((known > 0).sum())} of {len(known)} prompts"
    ours = f"{mean.estimate:+.2f}"
    rows.append(
        stated(
            "effects",
            DOSE,
            named,
            "not given",
            ours=ours,
            **claimed(mean, above=0.0, p=flips.p),
            control=control,
            why=why,
            **fields,
        )
    )
    return rows


def _effect(
    further: np.ndarray, plain: np.ndarray, found: xr.Dataset, scope: str, at: str, controls: list[str], fields: dict
) -> Row:
    known = ~np.isnan(further)
    mean = statistics.mean_interval(further)
    flips = statistics.paired_permutation(further, np.zeros(len(further)))
    p, among = flips.p, ""
    drawn = [c for c in controls if c.startswith("random")]
    if len(drawn) >= 20:  # enough directions for a p of their own
        own = nan_mean(found.change.sel({"control": drawn}).mean("strength").values, 1)
        count = int((own >= nan_mean(found.change.sel({"control": "none"}).mean("strength").values)).sum())
        p, among = max(p, (1 + count) / (1 + len(drawn))), f"; {count} of {len(drawn)} random directions do as much"
    against = int((plain[known] < 0).sum())
    edge = statistics.wilson(against, int(known.sum()))
    control = (
        (
            f"{', '.join(map(name_of, controls))}{among}; the vector alone {nan_mean(plain):+.3f}; pushed the wrong "
            f"way in {against} of {int(known.sum())} prompts ({edge.low:.2f} to {edge.high:.2f}); {at}"
        )
        if known.any()
        else at
    )
    ours = f"{mean.estimate:+.3f}, p = {flips.p:.3g} (sign flips over prompts)"
    return stated(
        "effects", EFFECT, scope, "not given", ours=ours, **claimed(mean, above=0.0, p=p), control=control, **fields
    )


def _control_means(found: xr.Dataset, controls: Sequence[str]) -> str:
    shown = [f"{name_of(c)} {float(found.change.sel({'control': c}).mean()):+.3f}" for c in controls]
    return "; ".join(shown) or "no control in the store"


def _projects_out(evidence: Evidence, op: str) -> bool:
    settings = evidence.settings(op)
    return settings.get("op", op) == "project_out"


def _usable(evidence: Evidence, where: Mapping[str, str], part: xr.Dataset, found: xr.Dataset) -> np.ndarray:
    """Share of each prompt's texts that are surgical, [strength, prompt]; NaN where regimes can not be told."""
    blank = np.full((found.sizes["strength"], found.sizes["prompt"]), NAN)
    steered = evidence.steered
    if steered is None or missing_perplexity(evidence.results):
        return blank
    regime = steered.regime.sel({**where, "control": "none"}).reindex(
        {"prompt": found.prompt.values, "emotion": part.emotion.values}, fill_value=""
    )
    for i, strength in enumerate(found.strength.values.tolist()):
        if strength in regime.strength.values:
            one = regime.sel({"strength": strength})
            told = one != ""
            share = (one == "surgical").sum(["emotion", "seed"]) / told.sum(["emotion", "seed"]).where(lambda n: n > 0)
            blank[i] = share.transpose("prompt").values
    return blank


def _selective(
    evidence: Evidence,
    where: Mapping[str, str],
    found: xr.Dataset,
    place: np.ndarray,
    scope: str,
    at: str,
    fields: dict[str, Any],
) -> Row:
    """Selectivity over prompts, each emotion's own class against its strongest rival; off-target beside."""
    matrix, names, classes = specificity(evidence, where, found, place)
    what = ("effects", SELECTIVE, scope, "not given")
    if matrix is None:
        return unknown(*what, "no emotion with a class at these strengths", **fields)
    targets = np.array([classes.index(str(evidence.classes[e])) for e in names])
    each = np.stack([effects.selectivity(matrix[i], int(t)) for i, t in enumerate(targets)])  # [emotion, prompt]
    mean = statistics.mean_interval(
        np.array([statistics.clean(c).mean() if statistics.clean(c).size else NAN for c in each.T])
    )
    flips = statistics.paired_permutation(each_mean := _columns(each), np.zeros(len(each_mean)))
    whole = np.stack([_columns(one) for one in matrix])  # [emotion, class], mean over prompts
    off = effects.off_target(whole, targets)
    control = (
        f"off target {nan_mean(off):.3f}; own class rises most for {effects.diagonal_share(whole, targets):.0%} of "
        f"{len(names)} emotions; {at}"
    )
    ours = f"{mean.estimate:+.3f}, p = {flips.p:.3g}"
    return stated(*what, ours=ours, **claimed(mean, above=0.0, p=flips.p), control=control, **fields)


def _columns(values: np.ndarray) -> np.ndarray:
    """Mean of what is there over the first axis; NaN where nothing is."""
    known = ~np.isnan(values)
    return np.divide(
        np.where(known, values, 0.0).sum(0), known.sum(0), out=np.full(values.shape[1], NAN), where=known.any(0)
    )


def specificity(
    evidence: Evidence, where: Mapping[str, str], found: xr.Dataset, place: np.ndarray
) -> tuple[np.ndarray | None, list[str], list[str]]:
    """Change of every class for every emotion steered to, each prompt at its strength: [emotion, prompt, class].

    Emotions with a class of the judge, and the classes, beside it.
    """
    own = {d: where[d] for d in ("model", "op") if d in where}
    steered = evidence.scores("judged").sel({**where, "control": "none"}).load()
    plain = evidence.scores("judged_unsteered").sel(own).load()
    classes = [str(c) for c in steered["class"].values.tolist()]
    names = [str(e) for e in steered.emotion.values.tolist() if evidence.classes.get(str(e)) in classes]
    strengths = [s for s in found.strength.values.tolist() if s in steered.strength.values]
    if not names or len(strengths) < found.sizes["strength"]:
        return None, names, classes
    asked = {"emotion": names, "strength": strengths, "prompt": found.prompt.values}
    change = (steered.sel(asked) - plain.sel({"prompt": found.prompt.values})).mean("seed")
    values = change.transpose("strength", "prompt", "emotion", "class").values
    matrix = effects.at_chosen(values, place).transpose(1, 0, 2)
    known = ~np.isnan(matrix).all((1, 2))
    return (
        (matrix[known], [e for e, k in zip(names, known, strict=True) if k], classes)
        if known.any()
        else (None, names, classes)
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


def turning_points(results: Results, rules: Rules | None = None) -> xr.Dataset:
    """Flip point, sweet spot and collapse point over (model, op, layer_set, method, emotion, control)."""
    return turning_points_of(Evidence(results, rules or Rules(), None))


def turning_points_of(evidence: Evidence) -> xr.Dataset:
    """As `turning_points`, of a store that is already open."""
    if evidence.judged is None or evidence.steered is None:
        raise NsteerError("turning points need the groups judged, judged_unsteered and generations in the store")
    regime = evidence.steered.regime.reindex_like(evidence.judged.success, fill_value="")
    return outcomes.turning_points(evidence.judged.named, evidence.judged.success, regime, evidence.rules.thresholds)
