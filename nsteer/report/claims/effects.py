"""Rows `effects`: what steering does to a judge's scores, paired with its controls and tested over prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import CONTROLS, NAN, Evidence, Row, missing_perplexity, stated, unknown
from nsteer.report.claims.verdicts import ALPHA, claimed, edge_p
from nsteer.science import draws, effects, outcomes, statistics
from nsteer.science.metrics import nan_mean
from nsteer.science.statistics import Interval

EFFECT = "change of P(target class), vector minus controls, at the strength best on other prompts"
SELECTIVE = "change of P(target class) minus that of its strongest rival, at the strength best on other prompts"
DOSE = "change of P(target class) with strength (Kendall's tau over strengths, mean over prompts)"
PROMPTING = "change of P(target class), vector minus asking for it in words, at the strength best on other prompts"
NEEDED = "change of P(target class) when the direction is projected out"


def controls_of(scenarios: xr.Dataset) -> list[str]:
    """The controls with any number, the vector itself left out."""
    known = scenarios.change.notnull().any([d for d in scenarios.change.dims if d != "control"])
    return [c for c in scenarios.control.values.tolist() if c != "none" and bool(known.sel({"control": c}))]


def against_controls(change: xr.DataArray, controls: Sequence[str]) -> np.ndarray:
    """Paired effect of each prompt: change by the vector minus the mean change by the controls: [prompt]."""
    return (change.sel({"control": "none"}) - change.sel({"control": list(controls)}).mean("control")).values


SEVERAL = {
    "random": ("random direction does", "random directions do"),
    "shuffled": ("vector of shuffled labels does", "vectors of shuffled labels do"),
}
"""Controls that are draws of something -> what is said of one, and of several."""


def among_draws(change: xr.DataArray, drawn: Sequence[str], towards: bool = True) -> int:
    """Draws of a control that do as much as the vector, or as little; mean over all strengths."""

    def done(controls: list[str]) -> np.ndarray:
        return nan_mean(change.sel({"control": controls}).transpose("control", ...).mean("strength").values, 1)

    sign = 1 if towards else -1
    return int((sign * done(list(drawn)) >= sign * done(["none"])).sum())


def beside_draws(scenarios: xr.Dataset, controls: Sequence[str], towards: bool) -> tuple[float, float, list[str]]:
    """p of the vector among the draws of each control, the largest; the least that so few draws allow; both in words.

    NaN where no control is a draw of anything.
    """
    p, least, told = NAN, NAN, []
    for kind, said in SEVERAL.items():
        if drawn := [c for c in controls if kind_of_control(c) == kind]:
            n, count = len(drawn), among_draws(scenarios.change, drawn, towards)
            own, floor = draws.p_among(count, n), draws.p_among(0, n)
            p, least = np.fmax(p, own), np.fmax(least, floor)
            told.append(
                f"{count} of {n} {said[n > 1]} as {'much' if towards else 'little'}, p = {own:.2g} (so many draws "
                f"allow {floor:.2g} at least)"
            )
    return float(p), float(least), told


def kind_of_control(control: str) -> str:
    """What a control is a draw of: `random-2` is one of `random`."""
    return re.sub(r"-\d+$", "", control)


def name_of(control: str) -> str:
    """A control in words."""
    kind = kind_of_control(control)
    return CONTROLS.get(kind, kind)


def alike(controls: Sequence[str]) -> dict[str, list[str]]:
    """What controls are called in words -> their labels: several draws count together."""
    kinds: dict[str, list[str]] = {}
    for control in controls:
        kinds.setdefault(kind_of_control(control), []).append(control)
    return {name_of(kind) if len(same) == 1 else f"{len(same)} x {name_of(kind)}": same for kind, same in kinds.items()}


def effect_rows(
    evidence: Evidence,
    where: Mapping[str, str],
    cube: xr.Dataset,
    scenarios: xr.Dataset,
    scope: list[str],
    notes: list[str],
    used: tuple,
) -> list[Row]:
    """Paired effect, selectivity and dose of one setup; necessity where the op projects out."""
    named, controls = ", ".join(scope), controls_of(scenarios)
    fields: dict[str, Any] = {"assumed": "; ".join([*notes, "not in the paper: ours"]), "inputs": used}
    steered = scenarios.change.sel({"control": "none"}).values
    if _projects_out(evidence, where["op"]):
        fall = -steered[-1] if steered.size else steered
        mean = statistics.mean_interval(-fall)
        flips = statistics.paired_permutation(-fall, np.zeros(len(fall)))
        ours = f"{mean.estimate:+.3f}, p = {flips.p:.3g}"
        shown = _control_means(scenarios.isel({"strength": -1}), controls)
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
    usable = _usable(evidence, where, cube, scenarios)
    place = effects.chosen_strength(steered, usable)
    taken = [scenarios.strength.values.tolist()[i] for i in np.unique(place[place >= 0])]
    at = f"strengths taken: {', '.join(f'{s:g}' for s in taken) or 'none'}"
    rows = []
    if controls:
        further = np.stack(
            [against_controls(scenarios.change.sel({"strength": s}), controls) for s in scenarios.strength.values]
        )
        mean = effects.mean_at_chosen(further, steered, usable)
        alone = effects.at_chosen(steered, place)
        rows.append(_effect(effects.at_chosen(further, place), mean, alone, scenarios, named, at, controls, fields))
    else:
        rows.append(unknown("effects", EFFECT, named, "not given", "no control to compare with", **fields))
    if (asked := _asked(evidence, where, scenarios)) is not None:
        beyond = steered - asked.change.transpose("prompt").values
        mean = effects.mean_at_chosen(beyond, steered, usable)
        rows.append(_against_words(evidence, where, asked, effects.at_chosen(beyond, place), mean, named, at, fields))
    rows.append(_selective(evidence, where, scenarios, (steered, usable, place), named, at, fields))
    tau = effects.monotonicity(steered, scenarios.strength.values)
    mean = statistics.mean_interval(tau)
    flips = statistics.paired_permutation(tau, np.zeros(len(tau)))
    known = statistics.clean(tau)
    why = "" if len(scenarios.strength) > 1 else "fewer than two strengths"
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


def chosen_p(each: np.ndarray, mean: Interval) -> float:
    """p of a mean of 0 at strengths that were chosen: of flipped signs, or of its interval, whichever is larger.

    Signs alone are flipped as if each prompt's strength were given.
    """
    return float(np.fmax(statistics.paired_permutation(each, np.zeros(len(each))).p, edge_p(mean, 0.0)))


def _effect(
    further: np.ndarray,
    mean: Interval,
    alone: np.ndarray,
    scenarios: xr.Dataset,
    scope: str,
    at: str,
    controls: list[str],
    fields: dict,
) -> Row:
    known, own_p = ~np.isnan(further), chosen_p(further, mean)
    of_draws, least, told = beside_draws(scenarios, controls, not mean.estimate < 0)
    why, among = "", "".join(f"; {words}" for words in told)
    p = own_p if math.isnan(least) else float(np.maximum(own_p, of_draws))
    if least > draws.AGREEMENT:
        why = (
            f"of so few draws of a control p is {least:.2g} at least, and to agree it takes {draws.AGREEMENT:g}: "
            f"{draws.enough()} draws of each, or more"
        )
        p = p if least <= ALPHA else math.nan  # what can find nothing is no test (Tarone 1990)
    against = int((alone[known] < 0).sum())
    edge = statistics.wilson(against, int(known.sum()))
    control = (
        (
            f"{', '.join(alike(controls))}{among}; the vector alone {nan_mean(alone):+.3f}; pushed the wrong "
            f"way in {against} of {int(known.sum())} prompts ({edge.low:.2f} to {edge.high:.2f}); {at}"
        )
        if known.any()
        else at
    )
    ours = f"{mean.estimate:+.3f}, p = {own_p:.3g} (over prompts)"
    return stated(
        "effects",
        EFFECT,
        scope,
        "not given",
        ours=ours,
        **claimed(mean, above=0.0, p=p),
        control=control,
        why=why,
        **fields,
    )


def _asked(evidence: Evidence, where: Mapping[str, str], scenarios: xr.Dataset) -> xr.Dataset | None:
    """`change`, `success`, `named` of what was asked for in words over the prompts of `scenarios`; None if nothing is.

    Each prompt asks for its scenario's emotion, towards it or away from it; where no prompt has a target, the mean over
    all emotions stands, as it does for the vectors.
    """
    if evidence.prompted is None or where["op"] not in evidence.prompted.op.values.tolist():
        return None
    own = {d: where[d] for d in ("model", "op")}
    prompted = evidence.prompted.sel(own).mean("seed").reindex({"prompt": scenarios.prompt.values})
    aims = {p: (e, sign) for p, e, sign in scenario_cells(scenarios.prompt.values.tolist(), evidence.targets, 1.0)}
    if not aims:
        prompting = prompted.sel({"asked": "towards"}).mean("emotion")
    else:
        each = [
            prompted.sel({"prompt": p, "emotion": e, "asked": "towards" if sign > 0 else "away"}, drop=True)
            for p, (e, sign) in aims.items()
            if e in prompted.emotion.values.tolist()
        ]
        known = [p for p, (e, _) in aims.items() if e in prompted.emotion.values.tolist()]
        if not each:
            return None
        prompting = xr.concat(each, "prompt").assign_coords(prompt=known).reindex({"prompt": scenarios.prompt.values})
    return prompting if bool(prompting.change.notnull().any()) else None


def _against_words(
    evidence: Evidence,
    where: Mapping[str, str],
    asked: xr.Dataset,
    beyond: np.ndarray,
    mean: Interval,
    scope: str,
    at: str,
    fields: dict[str, Any],
) -> Row:
    """The vector's effect minus that of asking in words, paired over prompts; judge and metrics are the same."""
    words = asked.change.transpose("prompt").values
    p = chosen_p(beyond, mean)
    alone, moved = statistics.mean_interval(words), statistics.clean(asked.success.values)
    own = {d: where[d] for d in ("model", "op")}
    used = (*fields["inputs"], ("judged_prompted", own))
    control = (
        f"asked for in words alone {alone.estimate:+.3f} ({alone.low:+.3f} to {alone.high:+.3f}), moved "
        f"{moved.sum():.3g} of {len(moved)}{_fluency(evidence, own)}; {at}"
    )
    ours = f"{mean.estimate:+.3f}, p = {p:.3g} (over prompts)"
    tested = claimed(mean, above=0.0, p=p)
    return stated(
        "effects", PROMPTING, scope, "not given", ours=ours, **tested, control=control, **{**fields, "inputs": used}
    )


def _fluency(evidence: Evidence, own: Mapping[str, str]) -> str:
    """Median perplexity ratio and the share of loops of what was asked for in words."""
    results, thresholds = evidence.results, evidence.rules.thresholds
    loops = outcomes.repetition(results["prompted"].token_id.sel(own).load(), thresholds.ngram).values
    said = f", repetitive {np.mean(loops[~np.isnan(loops)] >= thresholds.repetition):.0%}" if loops.size else ""
    if "outcomes_prompted" not in results or "outcomes_unsteered" not in results:
        return said
    above, below = (results[f"outcomes_{name}"].perplexity.sel(own).load() for name in ("prompted", "unsteered"))
    ratio = outcomes.perplexity_ratio(above, below).values
    return f", perplexity ratio {np.nanmedian(ratio):.2f}{said}" if (~np.isnan(ratio)).any() else said


def _control_means(scenarios: xr.Dataset, controls: Sequence[str]) -> str:
    shown = [
        f"{name} {float(scenarios.change.sel({'control': same}).mean()):+.3f}" for name, same in alike(controls).items()
    ]
    return "; ".join(shown) or "no control in the store"


def _projects_out(evidence: Evidence, op: str) -> bool:
    settings = evidence.settings(op)
    return settings.get("op", op) == "project_out"


def _usable(evidence: Evidence, where: Mapping[str, str], cube: xr.Dataset, scenarios: xr.Dataset) -> np.ndarray:
    """Share of each prompt's texts that are surgical, [strength, prompt]; NaN where regimes can not be determined."""
    blank = np.full((scenarios.sizes["strength"], scenarios.sizes["prompt"]), NAN)
    steered = evidence.steered
    if steered is None or missing_perplexity(evidence.results):
        return blank
    regime = steered.regime.sel({**where, "control": "none"}).reindex(
        {"prompt": scenarios.prompt.values, "emotion": cube.emotion.values}, fill_value=""
    )
    for i, strength in enumerate(scenarios.strength.values.tolist()):
        if strength in regime.strength.values:
            here = regime.sel({"strength": strength})
            told = here != ""
            share = (here == "surgical").sum(["emotion", "seed"]) / told.sum(["emotion", "seed"]).where(lambda n: n > 0)
            blank[i] = share.transpose("prompt").values
    return blank


def _selective(
    evidence: Evidence,
    where: Mapping[str, str],
    scenarios: xr.Dataset,
    choice: tuple[np.ndarray, np.ndarray, np.ndarray],
    scope: str,
    at: str,
    fields: dict[str, Any],
) -> Row:
    """Selectivity over prompts, each emotion's own class against its strongest rival; off-target beside.

    choice : score, whether a text may be used, and the strengths that were chosen by them
    """
    score, usable, place = choice
    what = ("effects", SELECTIVE, scope, "not given")
    change, names, classes = specificity(evidence, where, scenarios)
    if change is not None:
        taken = effects.at_chosen(change, place)  # [prompt, emotion, class]
        known = ~np.isnan(taken).all((0, 2))
        change, names = change[:, :, known], [e for e, there in zip(names, known, strict=True) if there]
    if change is None or not names:
        return unknown(*what, "no emotion with a class at these strengths", **fields)
    taken = effects.at_chosen(change, place)
    targets = np.array([classes.index(str(evidence.own_class(e))) for e in names])
    mean = effects.mean_selectivity(change, targets.tolist(), score, usable)
    each = nan_mean(np.stack([effects.selectivity(taken[:, i], int(t)) for i, t in enumerate(targets)]), 0)
    p, whole = chosen_p(each, mean), nan_mean(taken, 0)
    off = effects.off_target(whole, targets)
    control = (
        f"off target {nan_mean(off):.3f}; own class rises most for {effects.diagonal_share(whole, targets):.0%} of "
        f"{len(names)} emotions; {at}"
    )
    ours = f"{mean.estimate:+.3f}, p = {p:.3g}"
    return stated(*what, ours=ours, **claimed(mean, above=0.0, p=p), control=control, **fields)


def specificity(
    evidence: Evidence, where: Mapping[str, str], scenarios: xr.Dataset
) -> tuple[np.ndarray | None, list[str], list[str]]:
    """Change of every class for every emotion steered to: [strength, prompt, emotion, class].

    Emotions that one class of the judge stands for, and the classes, beside it.
    """
    own = {d: where[d] for d in ("model", "op") if d in where}
    steered = evidence.scores("judged").sel({**where, "control": "none"}).load()
    unsteered = evidence.scores("judged_unsteered").sel(own).load()
    classes = [str(c) for c in steered["class"].values.tolist()]
    names = [str(e) for e in steered.emotion.values.tolist() if evidence.own_class(str(e)) in classes]
    strengths = [s for s in scenarios.strength.values.tolist() if s in steered.strength.values]
    if not names or len(strengths) < scenarios.sizes["strength"]:
        return None, names, classes
    asked = {"emotion": names, "strength": strengths, "prompt": scenarios.prompt.values}
    change = (steered.sel(asked) - unsteered.sel({"prompt": scenarios.prompt.values})).mean("seed")
    return change.transpose("strength", "prompt", "emotion", "class").values, names, classes


def kind_of(prompt: str) -> str:
    """The scenario kind of a prompt label: `neutral-hostile-3` is of kind `neutral-hostile`."""
    return re.sub(r"-\d+$", "", prompt)


def scenario_cells(
    prompts: Sequence[str], targets: Mapping[str, Mapping[str, Any]], strength: float
) -> list[tuple[str, str, float]]:
    """(prompt, emotion, signed strength) of every prompt whose kind has a target."""
    cells = []
    for prompt in prompts:
        target = targets.get(kind_of(prompt))
        if target is not None:
            cells.append((prompt, str(target["emotion"]), strength * int(target.get("sign", 1))))
    return cells
