"""Turns the steering cubes into answers (did it move texts further than its controls?) and doses by concept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.cost import costs
from nsteer.report.claims.effects import against_controls, alike, chosen_p, controls_of
from nsteer.report.claims.evidence import CONTROLS, Evidence
from nsteer.report.claims.steering import aimed
from nsteer.science import effects, metrics, statistics

YES, NO, AWAY, UNDETERMINED = "yes", "not distinguished from its controls", "the other way", "undetermined"
TOO_FEW = 5
"""Prompts from which a test of signs can reach p = 0.05 at all is 6: below, it is said that there are too few."""


@dataclass(frozen=True)
class Answer:
    """Whether one setup worked: `verdict`, the figures in words, and the control that they stand against."""

    of: str
    verdict: str
    text: str
    control: str


@dataclass(frozen=True)
class Dose:
    """What one concept (all, when "") did at one strength of a setup; a figure that is not there is NaN.

    moved : control ("none" the vector itself) -> texts that moved to the target, and texts judged; changed : share of
    texts that differ from the unsteered continuation; pushed : mean relative change of the stream at edited layers;
    ratio : median perplexity ratio; repetitive : share of texts that loop; nll : rise of the NLL of the capability
    passages, in nats a token; answers : change of the share of capability questions that are answered rightly
    """

    setup: str
    concept: str
    strength: float
    n: int
    moved: Mapping[str, tuple[int, int]]
    changed: float
    pushed: float
    ratio: float
    repetitive: float
    nll: float = float("nan")
    answers: float = float("nan")


def steered(evidence: Evidence) -> tuple[tuple[Answer, ...], tuple[Dose, ...]]:
    """Answers and doses of every setup of the steering cubes; doses of each condition written by hand."""
    answers, doses = [], []
    for where, told, judged in evidence.setups():
        setup = ", ".join(where.values())
        answers.append(_answer(evidence, setup, where, judged))
        doses += _doses(evidence, setup, where, told, judged)
    for where, told, judged in evidence.by_hand.setups():
        named = _doses(evidence.by_hand, f"edits, {where['model']}", where, told, judged)
        doses += [dose for dose in named if dose.concept]  # all conditions together are no dose of anything
    return tuple(answers), tuple(doses)


def _answer(evidence: Evidence, setup: str, where: Mapping[str, str], judged: xr.Dataset | None) -> Answer:
    if judged is None:
        why = "No judge read these texts: whether they moved is for the reader of the pairs below."
        return Answer(setup, UNDETERMINED, why, "")
    scenarios, _ = aimed(evidence, judged)
    if scenarios is None:
        return Answer(setup, UNDETERMINED, "No judged text has a target among the judge's classes.", "")
    steered_ = scenarios.change.sel({"control": "none"}).values
    usable = np.full(steered_.shape, np.nan)
    place = effects.chosen_strength(steered_, usable)
    alone = effects.at_chosen(steered_, place)
    controls = controls_of(scenarios)
    if not controls:
        text = f"The score of the target changed by {metrics.nan_mean(alone):+.2f} over {len(alone)} prompts."
        return Answer(setup, UNDETERMINED, text, "no control: a push in any direction moves about half of the texts")
    further = np.stack(
        [against_controls(scenarios.change.sel({"strength": s}), controls) for s in scenarios.strength.values]
    )
    mean = effects.mean_at_chosen(further, steered_, usable)
    p = chosen_p(effects.at_chosen(further, place), mean)
    told = not np.isnan(p) and p <= 0.05
    verdict = YES if told and mean.low > 0 else AWAY if told and mean.high < 0 else NO
    few = " too few to decide;" if mean.n <= TOO_FEW else ""
    edges = f"95 % {mean.low:+.2f} to {mean.high:+.2f}, " if np.isfinite(mean.low) else ""
    text = (
        f"The score of the target rose by {mean.estimate:+.2f} more than under the controls ({edges}n = {mean.n} "
        f"prompts,{few} p = {p:.2g}); by {metrics.nan_mean(alone):+.2f} in all."
    )
    return Answer(setup, verdict, text, " and ".join(alike(controls)))


def _doses(
    evidence: Evidence, setup: str, where: Mapping[str, str], told: xr.Dataset, judged: xr.Dataset | None
) -> list[Dose]:
    pushed, weighed = _pushed(evidence, where), _costs_of(evidence, where)
    differs = evidence.differs
    concepts = [str(e) for e in told.emotion.values.tolist()]
    doses = []
    for concept in ["", *concepts] if len(concepts) > 1 else concepts:
        own: dict[str, Any] = {"emotion": [concept] if concept else concepts}
        for strength in sorted(told.strength.values.tolist()):
            at = {**own, "strength": strength}
            cube = told.sel({**at, "control": "none"}) if "none" in told.control.values else told.sel(at)
            n = int(cube.repetition.notnull().sum())
            if not n:
                continue
            loops = float((cube.regime == "repetitive").sum() / n)
            changed = float("nan")
            if differs is not None:
                changed = float(differs.sel({**where, **at, "control": "none"}).mean())
            ratios = statistics.clean(cube.perplexity_ratio.values)
            push = pushed.sel(at).mean().item() if pushed is not None else float("nan")
            ratio = float(np.median(ratios)) if len(ratios) else float("nan")
            lost = weighed(at)
            doses.append(Dose(setup, concept, strength, n, _moved(judged, at), changed, push, ratio, loops, *lost))
    return doses


def _costs_of(evidence: Evidence, where: Mapping[str, str]) -> Callable[[Mapping[str, Any]], tuple[float, float]]:
    """What the vector itself costs at labels of `emotion` and `strength`: rise of NLL, change of the share answered
    rightly; NaN where it is not measured."""
    measures = costs(evidence)
    if measures is None or any(label not in measures[dim].values for dim, label in where.items()):
        return lambda at: (float("nan"), float("nan"))
    own_costs = measures.sel({**where, "control": "none"})

    def at_labels(at: Mapping[str, Any]) -> tuple[float, float]:
        cube = own_costs.sel(dict(at)) if at["strength"] in own_costs.strength.values else None
        return (float("nan"),) * 2 if cube is None else (float(cube.nll_rise.mean()), float(cube.right_change.mean()))

    return at_labels


def _moved(judged: xr.Dataset | None, at: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Control -> texts that moved to the target, and how many were judged; random draws together."""
    if judged is None or at["strength"] not in judged.strength.values:
        return {}
    known = [e for e in at["emotion"] if e in judged.emotion.values]
    counts: dict[str, tuple[int, int]] = {}
    for control in judged.control.values.tolist():
        hits = statistics.clean(judged.success.sel({**at, "emotion": known, "control": control}).values)
        if len(hits):
            arm = next((name for name in CONTROLS if str(control).startswith(name)), str(control))
            k, n = counts.get(arm, (0, 0))
            counts[arm] = k + int(hits.sum()), n + len(hits)
    return counts


def _pushed(evidence: Evidence, where: Mapping[str, str]) -> xr.DataArray | None:
    """Relative change of the stream by the vector itself, (emotion, strength), mean over texts and edited layers."""
    if not evidence.has("steering"):
        return None
    change = evidence.results["steering"].relative_change
    if any(label not in change[dim].values for dim, label in where.items()) or "none" not in change.control.values:
        return None
    cube = change.sel({**where, "control": "none"}).load()
    return cube.mean([dim for dim in cube.dims if dim not in ("emotion", "strength")])
