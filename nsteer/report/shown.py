"""Turns an open store into what `nsteer show` tells of it: separation by layer, dose and response, texts."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import LabelError, did_you_mean
from nsteer.report import contrasts, provenance
from nsteer.report import texts as columns
from nsteer.report.claims import Evidence, Rules
from nsteer.science import outcomes, separation
from nsteer.science.axis import word
from nsteer.store.results import Results

METRICS = ("accuracy", "mean_pairwise_cosine", "reliability")
FILTERS = ("model", "emotion", "strength")
REST = ("op", "layer_set", "method", "control", "prompt", "seed")


def view(
    opened: Results, rules: Rules, texts: int = 3, filters: Mapping[str, Any] | None = None, code: bool = False
) -> dict[str, Any]:
    """A store as JSON data, by the keys of `nsteer show STORE --json`: store, models, separation, contrasts, dose,
    texts, programs.

    texts : how many steered texts, spread evenly over those that fit. filters : model, emotion, strength -> label
    code : the programs with their texts. Raises LabelError for a label that the store does not have.
    """
    wanted = {dim: label for dim, label in (filters or {}).items() if label is not None}
    quick = replace(rules, shuffles=0)  # intervals take time and are not shown
    evidence = Evidence(opened, quick, None)
    corpus = columns.collect(evidence)
    check(evidence, corpus, wanted)
    programs = provenance.records(evidence, "programs", "program")
    return {
        "store": opened.name,
        "models": evidence.models,
        "separation": separated(evidence, wanted),
        "contrasts": kept(evidence, wanted),
        "dose": [*dose(evidence, wanted), *dose(evidence.by_hand, wanted)],
        "texts": text_entries(corpus, texts, wanted),
        "programs": [program if code else {k: v for k, v in program.items() if k != "source"} for program in programs],
    }


def check(evidence: Evidence, corpus: columns.Texts, wanted: Mapping[str, Any]) -> None:
    """Raises LabelError for a filter that fits nothing in the store."""
    known: dict[str, list[str]] = {"model": evidence.models}
    for dim in FILTERS[1:]:
        known[dim] = [label for label in corpus.axes.get(dim, []) if label]
    for dim, label in wanted.items():
        text = columns.label_of(label)
        if text not in known[dim]:
            raise LabelError(f"{word(dim)} {text!r} is not there; {did_you_mean(text, known[dim]) or 'there is none'}")


# ---- separation ----------------------------------------------------------------------------------------------


def separated(evidence: Evidence, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each model and method: layers, depths, the metrics by layer, and the best layer by each."""
    entries = []
    for model in evidence.with_activations():
        if wanted.get("model", model) != model:
            continue
        measured = evidence.measured(model)
        for method in measured.method.values.tolist():
            cube = measured.sel({"method": method})
            entry: dict[str, Any] = {"model": model, "method": method, "layers": cube.layer.values.tolist()}
            entry["n_samples"], entry["chance"] = int(cube.n_samples.max()), _number(cube.chance.mean())
            for metric in METRICS:
                entry[metric] = [_number(value) for value in cube[metric].values]
            entry["best"] = {metric: _best(cube, metric) for metric in METRICS}
            entries.append(entry)
    return entries


def _best(cube: xr.Dataset, metric: str) -> dict[str, Any] | None:
    best = separation.best_layer(cube, metric, trapped="mark")
    if int(best.layer) < 0:
        return None
    return {"layer": int(best.layer), "depth": _number(best.depth), "value": _number(best.value)}


def _number(value: Any) -> float | None:
    number = float(value)
    return None if math.isnan(number) else round(number, 6)


# ---- contrasts -----------------------------------------------------------------------------------------------


def kept(evidence: Evidence, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each model, contrast that it wrote, and side: answers written, answers kept, by which judge."""
    models = [model for model in evidence.models if wanted.get("model", model) == model]
    counts = contrasts.counted(evidence.results, models)
    return [count.data() for count in counts if wanted.get("emotion", count.direction) == count.direction]


# ---- dose ----------------------------------------------------------------------------------------------------


def dose(evidence: Evidence, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One entry for each setup, emotion, control and strength: n, rates, median perplexity ratio, counts of regimes."""
    entries = []
    for where, cube, success in evidence.setups():
        for emotion in cube.emotion.values.tolist():
            for control in cube.control.values.tolist():
                for strength in sorted(cube.strength.values.tolist()):
                    labels = {"emotion": emotion, "control": control, "strength": strength}
                    if all({**where, **labels}[dim] == label for dim, label in wanted.items()):
                        own = None if success is None else _at(success, labels)
                        entry = {**where, **labels, **_dose(cube.sel(labels), own)}
                        entries += [entry] if entry["n"] else []
    return entries


def _at(data: xr.Dataset, labels: Mapping[str, Any]) -> xr.Dataset | None:
    """What has these labels; None where one of them is not there."""
    there = all(label in data[dim].values.tolist() for dim, label in labels.items())
    return data.sel(dict(labels)) if there else None


def _dose(cube: xr.Dataset, success: xr.Dataset | None) -> dict[str, Any]:
    n = int(cube.repetition.notnull().sum())
    regimes = {name: int((cube.regime == name).sum()) for name in outcomes.REGIMES}
    ratios = cube.perplexity_ratio.values[~np.isnan(cube.perplexity_ratio.values)]
    entry: dict[str, Any] = {"n": n, "judged": 0, "moved": None, "named": None}
    if success is not None:
        known = success.success.values[~np.isnan(success.success.values)]
        if known.size:
            entry |= {"judged": known.size, "moved": int(known.sum()), "named": int(np.nansum(success.named.values))}
    ratio = float(np.median(ratios)) if ratios.size else None
    return {**entry, "perplexity_ratio": ratio, **regimes, "undetermined": n - sum(regimes.values())}


# ---- texts ---------------------------------------------------------------------------------------------------


def text_entries(corpus: columns.Texts, n: int, wanted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """n texts, evenly spread over those that fit the filters: steered ones that are not the unsteered text before
    others, steered ones before those of other controls."""
    if not corpus.rows or n < 1:
        return []
    fits = np.ones(corpus.rows, bool)
    for dim, label in wanted.items():
        fits &= corpus.codes[dim] == corpus.axes[dim].index(columns.label_of(label))
    steered = [k for k, label in enumerate(corpus.axes["control"]) if label in ("none", "")]
    own = fits & np.isin(corpus.codes["control"], steered)
    moved = own & changed(corpus)
    places = np.flatnonzero(next((some for some in (moved, own) if some.any()), fits))
    picked = places[np.linspace(0, len(places) - 1, min(n, len(places))).round().astype(int)] if len(places) else []
    return [_text(corpus, int(i)) for i in picked]


def changed(corpus: columns.Texts) -> np.ndarray:
    """Which texts [row] are not what the model writes unsteered."""
    places = corpus.codes["unsteered"].tolist()
    return np.array(
        [place == columns.NONE or corpus.unsteered[place][0] != text for place, text in zip(places, corpus.text)]
    )


def _text(corpus: columns.Texts, i: int) -> dict[str, Any]:
    entry: dict[str, Any] = {dim: corpus.axes[dim][corpus.codes[dim][i]] for dim in (*FILTERS, *REST)}
    entry["strength"] = float(entry["strength"]) if entry["strength"] else None
    index, named, regime = (int(corpus.codes[name][i]) for name in ("unsteered", "named", "regime"))
    unsteered = corpus.unsteered[index] if index != columns.NONE else None
    entry["prompt_text"] = corpus.prompts.get(entry["prompt"], "")
    entry |= {"text": corpus.text[i], "unsteered": unsteered[0] if unsteered else None}
    entry["named"] = corpus.classes[named] if named != columns.NONE else None
    entry["unsteered_named"] = corpus.classes[unsteered[1]] if unsteered and unsteered[1] >= 0 else None
    entry["regime"] = outcomes.REGIMES[regime] if regime != columns.NONE else None
    return {**entry, **{name: _number(corpus.numbers[name][i]) for name in columns.NUMBERS}}


def word_diff(unsteered: str, text: str) -> list[tuple[str, str]]:
    """[(kind, words)] making `text` of `unsteered`: kind " " in both, "-" in `unsteered` only, "+" in `text` only."""
    a, b = (re.findall(r"\s*\S+", said) for said in (unsteered, text))
    bare = [[word.strip() for word in words] for words in (a, b)]
    pieces: list[tuple[str, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, bare[0], bare[1], autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append((" ", "".join(b[k:m])))
            continue
        pieces += [("-", "".join(a[i:j]))] * (j > i) + [("+", "".join(b[k:m]))] * (m > k)
    return pieces
