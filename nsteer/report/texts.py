"""Turns a store's continuations into columns: the labels and figures of each, its text, and the unsteered one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from nsteer.report.claims import Evidence
from nsteer.report.claims.evidence import signs_of
from nsteer.science import outcomes

FILTERS = {
    "model": "Model",
    "op": "Edit",
    "layer_set": "Layers",
    "method": "Method",
    "emotion": "Emotion",
    "strength": "Strength",
    "control": "Control",
    "prompt": "Prompt",
    "seed": "Seed",
}
"""Axis of the table -> its name on the page."""

NUMBERS = ("repetition", "perplexity_ratio", "target", "before", "change", "confidence")
NONE = 2**32 - 1
"""A code of nothing."""


@dataclass
class Texts:
    """Continuations as columns of one length.

    axes : labels of each axis; codes : position of each row's label among them; numbers : figures, NaN a missing value
    text : continuations; the code `unsteered` : index into `unsteered` (text, likeliest class, its probability), or
    NONE
    classes, regimes : labels of the codes `named` and `regime`; prompts : axis label -> the prompt itself
    """

    axes: dict[str, list[str]]
    codes: dict[str, np.ndarray]
    numbers: dict[str, np.ndarray]
    text: list[str]
    unsteered: list[list[Any]]
    classes: list[str] = field(default_factory=list)
    targets: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(self.text)


def collect(evidence: Evidence) -> Texts:
    """All continuations of a store, those of `generations` first, then those under `edits:`."""
    if evidence.columns is None:
        every = [columns for columns in (_steered(evidence), _edited(evidence)) if columns.rows]
        first = every[0] if every else Texts({}, {}, {}, [], [])
        evidence.columns = _joined(*every) if len(every) == 2 else first
    return evidence.columns


def _steered(evidence: Evidence) -> Texts:
    if not evidence.has("generations"):
        return Texts({}, {}, {}, [], [])
    generations = evidence.results["generations"]
    text = generations.text.load()
    there = (generations.n_tokens.load() >= 0).values if "n_tokens" in generations else (text != "").values
    at = np.argwhere(there)
    where = tuple(at.T)
    codes = {str(dim): column.astype(np.uint32) for dim, column in zip(text.dims, at.T, strict=True)}
    axes = {str(dim): [label_of(v) for v in text[dim].values.tolist()] for dim in text.dims}
    numbers, named, classes, targets = _figures(evidence, text, where)
    told = evidence.steered
    assert told is not None
    regimes = told.regime.transpose(*text.dims).values[where]
    codes["regime"] = _coded(regimes.tolist(), outcomes.REGIMES)
    codes["named"] = named
    indices, unsteered = _unsteered(evidence, text, where)
    codes["unsteered"] = indices
    return Texts(axes, codes, numbers, text.values[where].tolist(), unsteered, classes, targets, _prompts(evidence))


def label_of(value: Any) -> str:
    """A label as text: a strength as the plan writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _coded(values: Sequence[str], known: Sequence[str]) -> np.ndarray:
    position = {name: i for i, name in enumerate(known)}
    return np.array([position.get(value, NONE) for value in values], np.uint32)


def _figures(
    evidence: Evidence, text: xr.DataArray, where: tuple
) -> tuple[dict[str, np.ndarray], np.ndarray, list[str], dict[str, str]]:
    """What was measured and judged of each row: figures, code of the likeliest class, the classes, the targets."""
    told, judged = evidence.steered, evidence.judged
    assert told is not None

    def column(data: xr.DataArray) -> np.ndarray:
        return data.reindex_like(text).transpose(*text.dims).values[where].astype(np.float32)

    numbers = {name: np.full(len(where[0]), np.nan, np.float32) for name in NUMBERS}
    numbers |= {name: column(told[name]) for name in ("repetition", "perplexity_ratio")}
    named = np.full(len(where[0]), NONE, np.uint32)
    if not evidence.judges:
        return numbers, named, [], {}
    p = evidence.scores("judged").load()
    classes = [str(label) for label in p["class"].values.tolist()]
    known = p.notnull().any("class")
    told_as = outcomes.named_class(p)
    best = column(told_as.where(told_as >= 0).astype(float))
    named = np.where(np.isnan(best), NONE, np.nan_to_num(best).astype(np.int64)).astype(np.uint32)
    numbers["confidence"] = column(p.max("class").where(known))
    targets = {emotion: str(target) for emotion, target in evidence.classes.items() if target}
    if judged is not None:
        numbers["target"] = column(judged.target)
        numbers["change"] = column(judged.change)
        numbers["before"] = numbers["target"] - column((judged.change * signs_of(judged.change)).astype(float))
    return numbers, named, classes, targets


def _unsteered(evidence: Evidence, text: xr.DataArray, where: tuple) -> tuple[np.ndarray, list[list[Any]]]:
    """Index of each row's unsteered continuation, and those: [text, likeliest class, its probability]."""
    if not evidence.has("unsteered"):
        return np.full(len(where[0]), NONE, np.uint32), []
    unsteered = evidence.results["unsteered"].text.load()
    place = unsteered.copy(data=np.arange(unsteered.size).reshape(unsteered.shape).astype(float))
    shared = {dim: text[dim] for dim in unsteered.dims}
    at = [where[text.dims.index(dim)] for dim in unsteered.dims]
    flat = place.reindex(shared).transpose(*unsteered.dims).values[tuple(at)]
    words, best = unsteered.values.ravel().tolist(), [-1] * unsteered.size
    sure: list[float | None] = [None] * unsteered.size
    if evidence.judges and evidence.has("judged_unsteered"):
        p = evidence.scores("judged_unsteered").load().reindex_like(unsteered)
        best = outcomes.named_class(p).transpose(*unsteered.dims).values.ravel().tolist()
        top = p.max("class").transpose(*unsteered.dims).values.ravel()
        sure = [None if np.isnan(p) else round(float(p), 3) for p in top]
    group = evidence.results["unsteered"]
    there = (group.n_tokens.load() >= 0).values.ravel() if "n_tokens" in group else (unsteered != "").values.ravel()
    known = ~np.isnan(flat) & there[np.nan_to_num(flat).astype(int)]
    index = np.where(known, np.nan_to_num(flat), NONE).astype(np.uint32)
    return index, [list(text) for text in zip(words, best, sure, strict=True)]


def _prompts(evidence: Evidence) -> dict[str, str]:
    """Prompt label -> prompt."""
    if not evidence.has("ops"):
        return {}
    shown = evidence.results["ops"].prompt_text.load()
    prompts: dict[str, str] = {}
    for row in shown.transpose("op", "prompt").values.tolist():
        prompts |= {str(k): t for k, t in zip(shown.prompt.values.tolist(), row, strict=True) if t}
    return prompts


def _edited(evidence: Evidence) -> Texts:
    """Continuations under conditions written by hand, each beside the unedited one: a condition is its own edit."""
    corpus = _steered(evidence.by_hand)
    if not corpus.rows:
        return corpus
    nothing = {"layer_set": [""], "method": [""], "emotion": [""], "control": [""]}
    axes = {**corpus.axes, "op": corpus.axes["emotion"], **nothing}
    none = np.zeros_like(corpus.codes["op"])
    codes = {**corpus.codes, "op": corpus.codes["emotion"], **dict.fromkeys(nothing, none)}
    return replace(corpus, axes=axes, codes=codes)


def _joined(first: Texts, second: Texts) -> Texts:
    """Both, on axes that hold the labels of both, and over the classes of both."""
    axes, codes = {}, {}
    classes = list(dict.fromkeys([*first.classes, *second.classes]))
    places = np.array([classes.index(label) for label in second.classes], np.uint32)
    named = second.codes["named"].copy()
    named[named != NONE] = places[named[named != NONE]]
    for name in FILTERS:
        labels = list(dict.fromkeys([*first.axes[name], *second.axes[name]]))
        axes[name] = labels
        moved = np.array([labels.index(label) for label in second.axes[name]], np.uint32)
        codes[name] = np.concatenate([first.codes[name], moved[second.codes[name]]])
    codes["regime"] = np.concatenate([first.codes["regime"], second.codes["regime"]])
    codes["named"] = np.concatenate([first.codes["named"], named])
    unsteered = [[text, best if best < 0 else int(places[best]), sure] for text, best, sure in second.unsteered]
    own = second.codes["unsteered"]
    shifted = np.where(own == NONE, NONE, own.astype(np.int64) + len(first.unsteered))
    codes["unsteered"] = np.concatenate([first.codes["unsteered"], shifted.astype(np.uint32)])
    numbers = {name: np.concatenate([first.numbers[name], second.numbers[name]]) for name in NUMBERS}
    return Texts(
        axes,
        codes,
        numbers,
        [*first.text, *second.text],
        [*first.unsteered, *unsteered],
        classes,
        {**second.targets, **first.targets},
        {**second.prompts, **first.prompts},
    )
