"""How far the judges of a study agree: rows beside the claims, which are read by the first of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from nsteer.report.claims.evidence import Evidence, Row, unknown
from nsteer.science import agreement

SAME = "agreement of judges: whether a text is of the class steered to (Cohen's kappa)"
NEAR = "agreement of judges: score of the class steered to (Cohen's kappa, squared weights)"
WHY = "the paper has one judge"


def judges_agree(evidence: Evidence) -> list[Row]:
    """A row for every two judges and model: of their verdicts, and of their scores where both have one unit."""
    if evidence.missing_judged() or len(evidence.judges) < 2:
        return []
    return [
        row
        for a, b in combinations(evidence.judges, 2)
        for model in evidence.models
        for row in _of(evidence, model, a, b)
    ]


def _of(evidence: Evidence, model: str, a: str, b: str) -> list[Row]:
    rows = []
    scope, used = f"{model}, {a} and {b}", (("judged", {"model": model, "judge": [a, b]}),)
    judged = [evidence.judged_by(judge) for judge in (a, b)]
    if any(model not in success.model.values.tolist() for success in judged):
        return []
    alike = _told_alike(evidence, a, b)
    judged = [
        success.sel({"emotion": [e for e in success.emotion.values.tolist() if e in alike]}) for success in judged
    ]
    units = {str(evidence.judge_settings(judge).get("unit", judge)) for judge in (a, b)}
    kinds = [(SAME, "named", agreement.kappa)]
    kinds += [(NEAR, "target", agreement.weighted_kappa)] if len(units) == 1 else []
    for what, name, of in kinds:
        first, second = (success[name].sel({"model": model}) for success in judged)
        kappa, texts = agreement.agreement(first, second, of, seed=evidence.rules.seed)
        if not texts:
            rows.append(unknown("judges", what, scope, "", "no text that both judged", inputs=used))
            continue
        known = np.isfinite(kappa.estimate)
        ours = f"{kappa.estimate:.2f} ({texts} texts)" if known else f"none: no variety in {texts} texts"
        rows.append(
            unknown(
                "judges",
                what,
                scope,
                "",
                WHY,
                ours=ours,
                value=kappa.estimate,
                low=kappa.low,
                high=kappa.high,
                n=kappa.n,
                assumed="interval over prompts",
                inputs=used,
            )
        )
    return rows


def _told_alike(evidence: Evidence, a: str, b: str) -> list[str]:
    """Emotions that both judges tell by classes that rise, or that fall: else their scores are of two things."""
    first, second = (evidence.classes_of(judge) for judge in (a, b))
    both = {e: (own, two) for e, own in first.items() if own is not None and (two := second.get(e)) is not None}
    return [
        e
        for e, (target, other) in both.items()
        if [bool(s) for s in (target.rises, target.falls)] == [bool(s) for s in (other.rises, other.falls)]
    ]
