"""Claim 6 of Jeong 2026: do steered continuations and promoted tokens change script?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import (
    AGREES,
    DIFFERS,
    NO_TWINS,
    OPEN,
    Evidence,
    Row,
    beside,
    conditions,
    greatest,
    unknown,
    verdict_of,
)
from nsteer.science import outcomes, statistics
from nsteer.store import slug

FOREIGN = "share of letters in another script, steered minus unsteered"
PAPER_6 = "Chinese in Qwen from strength 0.03; none reported elsewhere"


def entanglement(evidence: Evidence) -> list[Row]:
    """Claim 6: letters of another script under steering, promoted tokens by script."""
    rows: list[Row] = []
    changes: dict[str, float] = {}
    if lacking := [path for path in ("generations", "unsteered") if not evidence.has(path)]:
        rows.append(unknown("6", FOREIGN, "all models", PAPER_6, f"the store has no group {' and '.join(lacking)}"))
    else:
        text, plain = evidence.results["generations"].text.load(), evidence.results["unsteered"].text.load()
        home = _home(plain)
        there = (text != "").rename("text")
        for where, part in conditions(there.where(there).to_dataset(name="text")):
            strength = greatest(part.strength.values.tolist())
            row = _one_script(evidence, where, text.sel(where), plain, strength, home)
            if not math.isnan(row.value):
                changes.setdefault(where["model"], row.value)
            rows.append(row)
    return [*rows, *_lens(evidence), _tuned(evidence, changes)]


def _home(plain: xr.DataArray) -> str:
    """The script of the unsteered texts."""
    total = sum((outcomes.script_counts(str(one)) for one in plain.values.ravel().tolist()), outcomes.script_counts(""))
    return total.most_common(1)[0][0] if total else "Latin"


def _one_script(
    evidence: Evidence, where: dict[str, str], text: xr.DataArray, plain: xr.DataArray, strength: float, home: str
) -> Row:
    own = {d: where[d] for d in ("model", "op") if d in where}
    twin = plain.sel(own)
    scope = ", ".join([*where.values(), f"strength {strength:g}"])
    labels: dict[str, Any] = {**where, "strength": strength}
    if not bool((twin != "").any()):
        return unknown("6", FOREIGN, scope, PAPER_6, NO_TWINS, inputs=(("generations", labels),))
    chosen = text.sel({"strength": strength})
    away, before = (1 - outcomes.script_share(one, [home]).isel({"script": 0}, drop=True) for one in (chosen, twin))
    change = away - before
    shown = {}
    for control in change.control.values.tolist():
        shown[control] = statistics.bootstrap(
            np.mean,
            change.sel({"control": control}).values,
            level=evidence.rules.level,
            n=1000,
            seed=evidence.rules.seed,
        )
    found = shown["none"]
    changed = outcomes.changed_table(chosen.sel({"control": ["none"]}), twin, by=("emotion",))
    top = ", ".join(f"{r.token} ({r.emotion}, {r.script}, {r.count})" for r in changed.head(5).itertuples())
    control = beside({c: f"{one.estimate:+.3f} ({one.low:+.3f} to {one.high:+.3f})" for c, one in shown.items()})
    used: tuple = (("generations", labels), ("unsteered", own))
    verdict, why = _script_verdict(evidence, where["model"], found)
    ours = f"{found.estimate:+.3f}" + (f"; most: {top}" if top else "; no run changed script")
    return Row(
        "6",
        FOREIGN,
        scope,
        PAPER_6,
        ours=ours,
        value=found.estimate,
        n=found.n,
        low=found.low,
        high=found.high,
        control=control,
        verdict=verdict,
        why=why,
        assumed=f"home script {home}; greatest strength of the grid; mean over continuations",
        inputs=used,
    )


def _script_verdict(evidence: Evidence, model: str, found: statistics.Interval) -> tuple[str, str]:
    trace = evidence.rules.trace
    if math.isnan(found.estimate):
        return OPEN, "no continuation with letters"
    if "qwen" in evidence.family(model).lower() or "qwen" in model.lower():
        return verdict_of(found.low, found.high, lambda x: x > trace)
    return verdict_of(found.low, found.high, lambda x: x <= trace)


def _lens(evidence: Evidence) -> list[Row]:
    what, paper = (
        "emotions that promote tokens of another script (logit lens)",
        "Qwen: Chinese words of the emotion's phenomenology",
    )
    rows = []
    for model in evidence.models:
        path = f"lens/{slug(model)}"
        if not evidence.has(path):
            continue
        token = evidence.results[path].token.sel({"model": model}).load()
        tokens = outcomes.promoted(token)
        if tokens.empty:
            rows.append(
                unknown("6", what, model, paper, "no promoted token has letters", inputs=((path, {"model": model}),))
            )
            continue
        home = tokens.groupby("script")["count"].sum().idxmax()
        other = tokens[tokens.script != home]
        k, n = other.emotion.nunique(), token.sizes["emotion"]
        share = statistics.wilson(k, n, evidence.rules.level)
        listed = ", ".join(f"{r.token} ({r.emotion}, {r.script})" for r in other.head(8).itertuples())
        rows.append(
            Row(
                "6",
                what,
                model,
                paper,
                ours=f"{k} of {n}" + (f": {listed}" if listed else ""),
                value=k / n,
                n=n,
                low=share.low,
                high=share.high,
                control=f"home script {home}",
                verdict=OPEN,
                why="whether a word has the emotion's phenomenology is for a reader to say",
                inputs=((path, {"model": model}),),
            )
        )
    return rows or [unknown("6", what, "all models", paper, "no group lens/<model> in the store")]


def _tuned(evidence: Evidence, changes: Mapping[str, float]) -> Row:
    what, paper = "instruction tuning does not suppress it", "RLHF does not suppress it"
    qwen = [m for m in changes if "qwen" in m.lower() or "qwen" in evidence.family(m).lower()]
    used: tuple = (("generations", {"model": qwen}),) if qwen else ()
    tuned = [m for m in qwen if re.search(r"instruct|chat|-it\b", m.lower())]
    if not tuned or len(tuned) == len(qwen):
        why = f"needs a base and an instructed Qwen; the store has {', '.join(qwen) or 'none'}"
        return unknown("6", what, "Qwen", paper, why, inputs=used)
    base = [m for m in qwen if m not in tuned]
    a, b = (float(np.nanmean([changes[m] for m in group])) for group in (tuned, base))
    verdict = AGREES if a > evidence.rules.trace else DIFFERS
    return Row(
        "6",
        what,
        "Qwen",
        paper,
        ours=f"{a:+.3f} instructed, {b:+.3f} base",
        value=a - b,
        n=len(qwen),
        verdict=verdict,
        assumed="told apart by the models' names",
        inputs=used,
    )
