"""Turns a store's texts into a few pairs: a steered text beside its unsteered continuation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsteer.report import texts as columns
from nsteer.report.claims.evidence import Evidence
from nsteer.science import outcomes
from nsteer.science.axis import outward_name

RULE = (
    "drawn evenly over concepts and prompts, at the largest strength at which most texts of the setup neither loop nor "
    "explode; changed texts first, else not chosen by what they say"
)
"""How pairs are chosen."""


@dataclass(frozen=True)
class Pair:
    """A steered text beside its unsteered continuation; `said` and `said_unsteered` are the judge's likeliest classes.

    labels : axis -> label, of those that say anything
    """

    labels: dict[str, str]
    prompt: str
    text: str
    unsteered: str
    said: str
    said_unsteered: str


def pairs(evidence: Evidence, n: int = 3) -> tuple[Pair, ...]:
    """So many pairs, by the rule above."""
    corpus = columns.collect(evidence)
    if not corpus.rows or n < 1:
        return ()
    there = corpus.codes["unsteered"] != columns.NONE
    own = there & np.isin(
        corpus.codes["control"], [k for k, c in enumerate(corpus.axes["control"]) if c in ("none", "")]
    )
    rows = np.flatnonzero(own & _fit(corpus, own))
    if not len(rows):
        rows = np.flatnonzero(own)
    picked = _spread_out(corpus, rows, n)
    return tuple(_pair(corpus, i, evidence.axis) for i in picked)


def _fit(corpus: columns.Texts, own: np.ndarray) -> np.ndarray:
    """Rows at the largest usable strength of their setup."""
    strengths = np.array([abs(float(s)) if s else 0.0 for s in corpus.axes["strength"]])[corpus.codes["strength"]]
    ruined = np.isin(corpus.codes["regime"], [outcomes.REGIMES.index(regime) for regime in ("repetitive", "explosive")])
    setup = np.stack([corpus.codes[name] for name in ("model", "op", "layer_set", "method")])
    fits = np.zeros(corpus.rows, bool)
    for key in np.unique(setup[:, own], axis=1).T:
        mine = own & (setup == key[:, None]).all(0)
        known = np.unique(strengths[mine])
        usable = [s for s in known if ruined[mine & (strengths == s)].mean() < 0.5]
        fits |= mine & (strengths == (max(usable) if usable else known.min()))
    return fits


def _spread_out(corpus: columns.Texts, rows: np.ndarray, n: int) -> list[int]:
    """n rows of them, each of another concept, edit, model and prompt as far as there are so many."""
    picked: list[int] = []
    seen: dict[str, dict[int, int]] = {name: {} for name in ("emotion", "op", "prompt", "model", "method", "layer_set")}
    left = rows.tolist()
    same = {i for i in left if corpus.text[i] == corpus.unsteered[int(corpus.codes["unsteered"][i])][0]}
    while left and len(picked) < n:
        best = min(left, key=lambda i: (i in same, sum(seen[a].get(int(corpus.codes[a][i]), 0) for a in seen), i))
        left.remove(best)
        picked.append(best)
        for axis, counts in seen.items():
            code = int(corpus.codes[axis][best])
            counts[code] = counts.get(code, 0) + 1
    return picked


def _pair(corpus: columns.Texts, i: int, axis_name: str) -> Pair:
    labels = {axis: corpus.axes[axis][corpus.codes[axis][i]] for axis in columns.FILTERS}
    other = corpus.unsteered[int(corpus.codes["unsteered"][i])]
    named = int(corpus.codes["named"][i])
    prompt = labels.pop("prompt")
    several = {axis for axis, known in corpus.axes.items() if len(known) > 1} | {"emotion", "strength"}
    several -= {"control", "seed"} | ({"op"} if not labels["method"] else set())
    shown = {outward_name(axis, axis_name): label for axis, label in labels.items() if label and axis in several}
    if not labels["method"]:
        shown["edit"] = labels["op"]
    return Pair(
        shown,
        corpus.prompts.get(prompt, prompt),
        corpus.text[i],
        str(other[0]),
        corpus.classes[named] if named != columns.NONE else "",
        corpus.classes[other[1]] if other[1] >= 0 else "",
    )
