"""Claim 6 of Jeong 2026: do steered continuations and promoted tokens change script?"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import xarray as xr

from nsteer.report.claims.evidence import NO_UNSTEERED, Evidence, Row, conditions, control_label, greatest, unknown
from nsteer.report.claims.transport import by_prompt
from nsteer.report.claims.verdicts import claimed
from nsteer.science import outcomes, statistics
from nsteer.science.statistics import Interval
from nsteer.store import slug

FOREIGN = "share of letters in another script, steered minus unsteered"
PAPER_6 = "Chinese in Qwen from strength 0.03; none reported elsewhere"


def entanglement(evidence: Evidence) -> list[Row]:
    """Claim 6: letters of another script under steering, promoted tokens by script."""
    rows: list[Row] = []
    changes: dict[str, Interval] = {}
    if lacking := [path for path in ("generations", "unsteered") if not evidence.has(path)]:
        rows.append(unknown("6", FOREIGN, "all models", PAPER_6, f"the store has no group {' and '.join(lacking)}"))
    else:
        text, unsteered = evidence.results["generations"].text.load(), evidence.results["unsteered"].text.load()
        home = _home(unsteered)
        there = (text != "").rename("text")
        for where, cube in conditions(there.where(there).to_dataset(name="text")):
            strength = greatest(cube.strength.values.tolist())
            row = _one_script(evidence, where, text.sel(where), unsteered, strength, home)
            if not math.isnan(row.value):
                changes.setdefault(where["model"], Interval(row.value, row.low, row.high, row.n, df=max(row.n - 1, 1)))
            rows.append(row)
    return [*rows, *_lens(evidence), _tuned(evidence, changes)]


def _home(unsteered: xr.DataArray) -> str:
    """The script of the unsteered texts."""
    total = sum(
        (outcomes.script_counts(str(text)) for text in unsteered.values.ravel().tolist()), outcomes.script_counts("")
    )
    return total.most_common(1)[0][0] if total else "Latin"


def _one_script(
    evidence: Evidence, where: dict[str, str], text: xr.DataArray, unsteered: xr.DataArray, strength: float, home: str
) -> Row:
    own = {d: where[d] for d in ("model", "op") if d in where}
    there = unsteered.sel(own)
    scope = ", ".join([*where.values(), f"strength {strength:g}"])
    labels: dict[str, Any] = {**where, "strength": strength}
    if not bool((there != "").any()):
        return unknown("6", FOREIGN, scope, PAPER_6, NO_UNSTEERED, inputs=(("generations", labels),))
    chosen = text.sel({"strength": strength})
    away, before = (
        1 - outcomes.script_share(texts, [home]).isel({"script": 0}, drop=True) for texts in (chosen, there)
    )
    change = away - before
    shown = {}
    for control in change.control.values.tolist():
        shown[control] = statistics.mean_interval(by_prompt(change.sel({"control": control})))
    mean = shown["none"]
    changed = outcomes.changed_table(chosen.sel({"control": ["none"]}), there, by=("emotion",))
    top = ", ".join(f"{r.token} ({r.emotion}, {r.script}, {r.count})" for r in changed.head(5).itertuples())
    control = control_label(
        {c: f"{interval.estimate:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})" for c, interval in shown.items()}
    )
    used: tuple = (("generations", labels), ("unsteered", own))
    trace, why = evidence.rules.trace, "" if not math.isnan(mean.estimate) else "no continuation with letters"
    chinese = "qwen" in evidence.family(where["model"]).lower() or "qwen" in where["model"].lower()
    ours = f"{mean.estimate:+.3f}" + (f"; most: {top}" if top else "; no run changed script")
    return Row(
        "6",
        FOREIGN,
        scope,
        PAPER_6,
        ours=ours,
        **(claimed(mean, above=trace) if chinese else claimed(mean, below=trace)),
        control=control,
        why=why,
        assumed=f"home script {home}; greatest strength of the entry; interval over prompts; trace = {trace:g}",
        inputs=used,
    )


def _lens(evidence: Evidence) -> list[Row]:
    what, paper = (
        "emotions that promote tokens of another script (logit lens)",
        "Qwen: Chinese words of the emotion's phenomenology",
    )
    rows = []
    for model in evidence.models:
        path, tokens = f"lens/{slug(model)}", evidence.promoted(model)
        if tokens is None:
            continue
        if tokens.empty:
            rows.append(
                unknown("6", what, model, paper, "no promoted token has letters", inputs=((path, {"model": model}),))
            )
            continue
        home = tokens.groupby("script")["count"].sum().idxmax()
        other = tokens[tokens.script != home]
        k, n = other.emotion.nunique(), evidence.results[path].sizes["emotion"]
        share = statistics.wilson(k, n)
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
                why="whether a word has the emotion's phenomenology is for a reader to say",
                inputs=((path, {"model": model}),),
            )
        )
    return rows or [unknown("6", what, "all models", paper, "no group lens/<model> in the store")]


def _tuned(evidence: Evidence, changes: Mapping[str, Interval]) -> Row:
    what, paper = "instruction tuning does not suppress it", "RLHF does not suppress it"
    qwen = [m for m in changes if "qwen" in m.lower() or "qwen" in evidence.family(m).lower()]
    used: tuple = (("generations", {"model": qwen}),) if qwen else ()
    tuned = [m for m in qwen if re.search(r"instruct|chat|-it\b", m.lower())]
    if not tuned or len(tuned) == len(qwen):
        why = f"needs a base and an instructed Qwen; the store has {', '.join(qwen) or 'none'}"
        return unknown("6", what, "Qwen", paper, why, inputs=used)
    base = [m for m in qwen if m not in tuned]
    least = min((changes[m] for m in tuned), key=lambda interval: interval.low)
    return Row(
        "6",
        what,
        "Qwen",
        paper,
        ours="; ".join(f"{m} {changes[m].estimate:+.3f}" for m in (*tuned, *base)),
        **claimed(least, above=evidence.rules.trace),
        control="value and interval: the instructed model with the least of it",
        assumed="told apart by the models' names",
        inputs=used,
    )
