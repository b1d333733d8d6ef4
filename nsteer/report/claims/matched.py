"""Rows `effects` of two methods that move a model equally far: at targets of KL that both were calibrated to."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence, Row, unknown
from nsteer.science import effects, statistics

MATCHED = "change of P(target class) at equal KL, first method minus second (mean over KL up to the greatest target)"


def at_equal_kl(evidence: Evidence, setups: Mapping[tuple[str, str, str], Mapping[str, xr.Dataset]]) -> list[Row]:
    """A row for every two methods of a model, op and layer set whose strengths are calibrated to KL.

    setups : (model, op, layer_set) -> method -> `change` over (strength, control, prompt), as from `steering.aimed`
    Prompts are the units. Which method should do more is claimed nowhere: the row has an interval, p and no verdict.
    """
    rows = []
    for (model, op, layer_set), methods in setups.items():
        targets = evidence.settings(op).get("strengths")
        if not isinstance(targets, dict) or not targets.get("kl"):
            continue
        for first, second in itertools.combinations(methods, 2):
            labels = {"model": model, "op": op, "layer_set": layer_set, "method": [first, second]}
            what = ("effects", MATCHED, f"{model}, {op}, {layer_set}, {first} and {second}", "not given")
            used = (("judged", labels), ("judged_unsteered", {"model": model, "op": op}), ("calibration", labels))
            both = [methods[name].change.sel({"control": "none"}) for name in (first, second)]
            reach = sorted(set(both[0].strength.values.tolist()) & set(both[1].strength.values.tolist()))
            prompts = [p for p in both[0].prompt.values.tolist() if p in both[1].prompt.values.tolist()]
            if not reach or not prompts:
                rows.append(unknown(*what, "no target and prompt in common", inputs=used))
                continue
            at = {"strength": reach, "prompt": prompts}
            first_area, second_area = (
                effects.area(success.sel(at).transpose("strength", "prompt").values, np.array(reach))
                for success in both
            )
            mean = statistics.mean_interval(first_area - second_area)
            flips = statistics.paired_permutation(first_area - second_area, np.zeros(len(first_area)))
            alone = [statistics.mean_interval(area) for area in (first_area, second_area)]
            rows.append(
                unknown(
                    *what,
                    "which of the two should do more is claimed nowhere",
                    ours=f"{mean.estimate:+.3f} ({mean.low:+.3f} to {mean.high:+.3f}), p = {flips.p:.3g} (sign flips)",
                    value=mean.estimate,
                    n=mean.n,
                    low=mean.low,
                    high=mean.high,
                    p=flips.p,
                    control="; ".join(
                        f"{name} {interval.estimate:+.3f}"
                        for name, interval in zip((first, second), alone, strict=True)
                    )
                    + f"; KL {', '.join(f'{kl:g}' for kl in reach)}",
                    assumed="trapezoids over KL from no change at 0; not in the paper: ours",
                    inputs=used,
                )
            )
    return rows
