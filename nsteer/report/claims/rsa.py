"""Do methods, dtypes, models and layers find one geometry? Dissimilarity matrices beside their noise ceilings.

After Jeong's own audit (2604.11050), which correlated such matrices without saying how far noise alone parts them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence, Row, compared_at, read_from, unknown
from nsteer.science import separation, statistics

QUIET = 0.3
"""A noise ceiling below this is too low for a correlation under it to mean anything: ours."""


def rsa(evidence: Evidence) -> list[Row]:
    """RDM correlations between methods, dtypes, models and layers."""
    return [*_methods(evidence), *_precisions(evidence), *_models(evidence), *_layers(evidence)]


PAPER_METHODS = "0.09 and 0.36 (2604.11050: Mistral-7B, Llama-3.1-8B; generation and comprehension)"
PAPER_DTYPES = "0.21 and 0.53 (2604.11050: fp16 and INT8)"


def matrices(evidence: Evidence, model: str) -> xr.Dataset:
    """`rdm` (method, layer, emotion, emotion_2) and `reliability` (method, layer) of a model, computed once."""
    if model not in evidence.geometry:
        data, text = evidence.pooled(model), evidence.text(model)
        names = data.method.values.tolist()
        known = evidence.measured(model)[["rdm", "rdm_reliability"]].rename(rdm_reliability="reliability")
        others = [name for name in names if name not in known.method.values]
        rdms = known
        if others:
            rdms = separation.rdms(
                data.sel({"method": others}),
                baseline={name: evidence.baseline(name) for name in others},
                text=None if text is None else text.sel({"model": model, "method": others}),
                seed=evidence.rules.seed,
            )
            rdms = xr.concat([known, rdms], "method", coords="minimal", compat="override").sel({"method": names})
        evidence.geometry[model] = rdms.drop_vars("model", errors="ignore")
    return evidence.geometry[model]


def between_models(evidence: Evidence) -> xr.Dataset | None:
    """RSA of every two models at the compared depth, over (method, model, model_2); None for fewer than two."""
    names = evidence.with_activations()
    if len(names) < 2:
        return None
    tables = [
        matrices(evidence, model).sel({"layer": evidence.layer(model, evidence.rules.depth)}, drop=True)
        for model in names
    ]
    joined = xr.concat([table.drop_vars("depth", errors="ignore") for table in tables], "model", join="outer")
    joined = joined.assign_coords(model=np.array(names, object))
    return separation.rsa(joined, "model", shuffles=999, seed=evidence.rules.seed)


def between_layers(evidence: Evidence, model: str) -> xr.Dataset:
    """RSA of every two layers of a model, over (method, layer, layer_2). No p: layers share their noise."""
    return separation.rsa(matrices(evidence, model), "layer", shuffles=0)


def _methods(evidence: Evidence) -> list[Row]:
    what, rows = "RDM correlation of two methods", []
    for model in evidence.with_activations():
        rdms, layer = matrices(evidence, model), evidence.layer(model, evidence.rules.depth)
        names = [str(m) for m in rdms.method.values.tolist()]
        here = separation.rsa(rdms.sel({"layer": layer}), "method", shuffles=999, seed=evidence.rules.seed)
        for a, b in itertools.combinations(names, 2):
            pair = here.sel({"method": a, "method_2": b})
            scope = f"{model}, {a} ~ {b}, layer {layer}"
            used = read_from(evidence, model, (a, b), layer)
            why = "other models"
            if evidence.sources(model)[a] == evidence.sources(model)[b]:
                why = "two protocols of one source: the paper's pairs differ in other knobs"
            rows.append(_pair(evidence, what, scope, PAPER_METHODS, pair, used, why))
    return rows or [unknown("audit", what, "all models", PAPER_METHODS, "no model has two methods with activations")]


def _precisions(evidence: Evidence) -> list[Row]:
    """The same weights under two labels that differ in dtype or quantisation."""
    correlations = between_models(evidence)
    rows: list[Row] = []
    if correlations is None:
        return rows
    for a, b in itertools.combinations(evidence.with_activations(), 2):
        first, second = (_precision(evidence, model) for model in (a, b))
        same = evidence.fact(a, "identity")
        if not same or same != evidence.fact(b, "identity") or first == second:
            continue
        for method in correlations.method.values.tolist():
            pair = correlations.sel({"model": a, "model_2": b, "method": method})
            used = tuple(
                entry
                for model in (a, b)
                for entry in read_from(evidence, model, [method], evidence.layer(model, evidence.rules.depth))
            )
            why = "other models" if "int8" in first + second else "these dtypes are not the paper's fp16 and INT8"
            same_texts = _same_texts(evidence, a, b, method)
            row = _pair(
                evidence,
                f"RDM correlation of {first} and {second}",
                f"{a} ~ {b}, {method}",
                PAPER_DTYPES,
                pair,
                used,
                why,
                same_texts,
            )
            rows.append(row)
    return rows


def _precision(evidence: Evidence, model: str) -> str:
    return str(evidence.fact(model, "quantization") or evidence.fact(model, "dtype") or "")


def _same_texts(evidence: Evidence, a: str, b: str, method: str) -> str:
    """How many samples read the same text under both: their noise is shared, and the ceiling may be passed."""
    first, second = evidence.text(a), evidence.text(b)
    if first is None or second is None:
        return ""
    first_texts, second_texts = (
        text.sel({"model": m, "method": method}, drop=True) for text, m in ((first, a), (second, b))
    )
    first_texts, second_texts = xr.align(first_texts, second_texts, join="inner")
    there = (first_texts != "") & (second_texts != "")
    return f"the same text in {int(((first_texts == second_texts) & there).sum())} of {int(there.sum())} samples"


def _pair(
    evidence: Evidence,
    what: str,
    scope: str,
    paper: str,
    pair: xr.Dataset,
    used: tuple,
    why: str,
    more: str = "",
) -> Row:
    value, ceiling = float(pair.correlation), float(pair.ceiling)
    if not ceiling > QUIET:
        why = f"noise ceiling {ceiling:.2f}: too noisy to tell"
    control = f"noise ceiling {ceiling:.2f} (split halves over samples), share of it {float(pair.share):.2f}"
    return Row(
        "audit",
        what,
        scope,
        paper,
        ours=f"{value:.2f}",
        value=value,
        n=int(pair.n_emotions),
        p=float(pair.p),
        control="; ".join(text for text in (control, more) if text),
        why=why,
        assumed=compared_at(evidence),
        inputs=used,
    )


def _models(evidence: Evidence) -> list[Row]:
    """One line a method for all pairs of models whose weights differ."""
    correlations = between_models(evidence)
    what, paper = "RDM correlation between models (median over pairs)", "not given"
    if correlations is None:
        n = len(evidence.with_activations())
        return [unknown("rsa", what, "all models", paper, f"{n} models with activations: needs 2")]
    names = [model for model in evidence.with_activations() if _first_of_its_weights(evidence, model)]
    rows = []
    for method in correlations.method.values.tolist():
        cube = correlations.sel({"method": method})
        pairs = [(a, b) for a, b in itertools.combinations(names, 2) if _known(cube, a, b)]
        if not pairs:
            rows.append(unknown("rsa", what, f"all models, {method}", paper, "no two models of other weights"))
            continue
        rows.append(_over_pairs(evidence, cube, method, pairs, what, paper))
    return rows


def _first_of_its_weights(evidence: Evidence, model: str) -> bool:
    mine = evidence.fact(model, "identity")
    return not mine or next(m for m in evidence.with_activations() if evidence.fact(m, "identity") == mine) == model


def _known(cube: xr.Dataset, a: str, b: str) -> bool:
    return bool(cube.correlation.sel({"model": a, "model_2": b}).notnull())


def _over_pairs(
    evidence: Evidence, cube: xr.Dataset, method: str, pairs: Sequence[tuple[str, str]], what: str, paper: str
) -> Row:
    def column(name: str) -> np.ndarray:
        return np.array([float(cube[name].sel({"model": a, "model_2": b})) for a, b in pairs])

    values, ceilings, ps = column("correlation"), column("ceiling"), column("p")
    members = sorted({model for pair in pairs for model in pair})
    low, high = _over_members(values, pairs, members, statistics.LEVEL, evidence.rules.seed)
    ceiling = float(np.nanmedian(ceilings)) if np.isfinite(ceilings).any() else float("nan")
    used = tuple(
        entry
        for model in members
        for entry in read_from(evidence, model, [method], evidence.layer(model, evidence.rules.depth))
    )
    lowest, highest = pairs[int(values.argmin())], pairs[int(values.argmax())]
    sure = int((statistics.holm(ps) < 0.05).sum())
    median = float(np.median(values))
    return Row(
        "rsa",
        what,
        f"{len(members)} models, {method}",
        paper,
        ours=f"{median:.2f} over {len(pairs)} pairs, from {values.min():.2f} ({' ~ '.join(lowest)}) to "
        f"{values.max():.2f} ({' ~ '.join(highest)})",
        value=median,
        n=len(pairs),
        low=low,
        high=high,
        control=f"noise ceiling {ceiling:.2f} (median); above shuffled emotions (Mantel, Holm) in {sure} of "
        f"{len(pairs)} pairs",
        why="the paper gives no figure",
        assumed=f"{compared_at(evidence)}; interval: models drawn again",
        inputs=used,
    )


def _over_members(
    values: np.ndarray, pairs: Sequence[tuple[str, str]], members: Sequence[str], level: float, seed: int
) -> tuple[float, float]:
    """Bootstrap edges of the median over pairs when models, not pairs, are drawn again; NaN for fewer than three."""
    if len(members) < 3:
        return float("nan"), float("nan")
    place = {model: i for i, model in enumerate(members)}
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(1000):
        times = np.bincount(rng.integers(0, len(members), len(members)), minlength=len(members))
        weight = np.array([times[place[a]] * times[place[b]] for a, b in pairs])
        if weight.sum():
            drawn.append(np.median(np.repeat(values, weight)))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _layers(evidence: Evidence) -> list[Row]:
    """How far the geometry of the compared layer reaches up and down."""
    what, paper = "RDM correlation of layers with the compared layer", "not given (2604.07729 reports it across layers)"
    rows = []
    for model in evidence.with_activations():
        correlations, layer = between_layers(evidence, model), evidence.layer(model, evidence.rules.depth)
        for method in [m for m in evidence.pair(model) if m]:
            cube = correlations.sel({"method": method, "layer": layer})
            others = cube.sel({"layer_2": [k for k in cube.layer_2.values.tolist() if k != layer]})
            values = statistics.clean(others.correlation.values)
            if not len(values):
                why = "one layer only" if not others.sizes["layer_2"] else "no vectors (missing values, or no neutral)"
                rows.append(unknown("rsa", what, f"{model}, {method}", paper, why))
                continue
            shown = "; ".join(
                f"layer {k}: {float(others.correlation.sel({'layer_2': k})):.2f}"
                for k in others.layer_2.values.tolist()
            )
            ceiling = float(others.ceiling.median())
            rows.append(
                Row(
                    "rsa",
                    what,
                    f"{model}, {method}, layer {layer}",
                    paper,
                    ours=shown,
                    value=float(np.median(values)),
                    n=len(values),
                    control=f"noise ceiling {ceiling:.2f} (median); layers share noise, so it may be passed",
                    why="the paper gives no figure",
                    assumed=compared_at(evidence),
                    inputs=read_from(evidence, model, [method]),
                )
            )
    return rows
