"""Rows `capability`: what steering costs a model in the capability passages and questions. Not in the paper."""

from __future__ import annotations

import xarray as xr

from nsteer.report.claims.effects import alike
from nsteer.report.claims.evidence import Evidence, Row, conditions, unknown
from nsteer.science import costing, statistics
from nsteer.science.statistics import Interval

RISE = "rise of the NLL of the capability passages (nats a token)"
LOST = "change of the share of capability questions answered rightly"
WHY = "an estimate: the paper measures no cost"
UNITS = {"nll_rise": ("passage", RISE), "right_change": ("item", LOST)}
"""Measure -> its units, and what its row says."""


def costs(evidence: Evidence) -> xr.Dataset | None:
    """`nll_rise`, `right_change` and `kl` of every steered condition; None where the store has none."""
    if not evidence.has("capability") or not evidence.has("capability_unsteered"):
        return None
    steered, unsteered = (evidence.results[path].load() for path in ("capability", "capability_unsteered"))
    return costing.cost(steered, unsteered).assign(kl=steered.kl)


def capability_cost(evidence: Evidence) -> list[Row]:
    """A row a setup, strength and measure: the mean over emotions, controls beside; passages and items are units."""
    rows = []
    for told, path in ((evidence, "capability"), (evidence.by_hand, "capability_edited")):
        measures = costs(told)
        for where, cube in conditions(measures) if measures is not None else []:
            own = where if path == "capability" else {"model": where["model"]}
            for strength in cube.strength.values.tolist():
                used = ((path, {**own, "strength": strength}), ("capability_unsteered", {"model": where["model"]}))
                here = cube.sel({"strength": strength})
                rows += [
                    _row(evidence, [*where.values(), f"strength {strength:g}"], here, name, used) for name in UNITS
                ]
    return rows


def _row(evidence: Evidence, scope: list[str], cube: xr.Dataset, name: str, used: tuple) -> Row:
    unit, what = UNITS[name]
    mean = over_units(cube[name].sel({"control": "none"}), unit)
    controls = alike([control for control in cube.control.values.tolist() if control != "none"])
    beside = {said: over_units(cube[name].sel({"control": same}), unit).estimate for said, same in controls.items()}
    more = f", KL {float(cube.kl.sel({'control': 'none'}).mean()):.3g}" if name == "nll_rise" else ""
    unsteered, foreign = _unsteered(evidence, scope[0])
    return unknown(
        "capability",
        what,
        ", ".join(filter(None, scope)),
        "not given",
        "; ".join([WHY, *foreign]),
        ours=f"{mean.estimate:+.3f}{more}; {unsteered}",
        value=mean.estimate,
        n=mean.n,
        low=mean.low,
        high=mean.high,
        control="; ".join(f"{said} {value:+.3f}" for said, value in beside.items()) or "no control in the store",
        assumed="passages and questions are the project's own, read without a chat template; mean over emotions",
        inputs=used,
    )


def over_units(values: xr.DataArray, unit: str) -> Interval:
    """The mean of a measure with its t interval over units, each unit's mean over everything else."""
    return statistics.mean_interval(values.mean([dim for dim in values.dims if dim != unit]).values)


def _unsteered(evidence: Evidence, model: str) -> tuple[str, list[str]]:
    """What the model does unsteered, in words; and a reason to expect no loss where it answers as by chance."""
    unsteered = evidence.results["capability_unsteered"].sel({"model": model})
    told = statistics.clean(costing.right(unsteered.log_likelihood.load()).values)
    k, n, chance = int(told.sum()), len(told), 1 / unsteered.sizes["choice"]
    said = f"unsteered {float(unsteered.nll.mean()):.2f} nats, {k} of {n} right"
    known = statistics.wilson(k, n).low > chance
    return said, [] if known else [f"unsteered it answers no better than chance ({chance:.2f}): little to lose"]
