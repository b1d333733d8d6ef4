"""Turns an open store into all the figures that it has data for, each with its caption and a description in words."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from nsteer.report.claims import Evidence, Rules
from nsteer.report.claims.evidence import own_labels
from nsteer.report.claims.rsa import matrices
from nsteer.report.figures import curves, geometry, responses
from nsteer.report.figures.style import labels
from nsteer.science import axis, outcomes, separation
from nsteer.science.axis import word
from nsteer.store import slug
from nsteer.store.results import Results

SETUP = ("op", "layer_set", "method")


def named(*labels: str) -> str:
    """Labels as part of a figure's name. Not all may name a group: layer sets are such as `1,3` and `0.25:0.75`."""
    return "-".join(re.sub(r"[^A-Za-z0-9._-]", "_", label.replace("/", "--")) for label in labels)


@dataclass(frozen=True)
class Picture:
    """A figure with its words: `name` is unique in a store, `alt` says what a reader who does not see it misses."""

    name: str
    section: str
    title: str
    caption: str
    alt: str
    figure: Figure


def pictures(
    results: Results | None = None,
    rules: Rules | None = None,
    ratings: Mapping[str, Mapping[str, float]] | None = None,
    evidence: Evidence | None = None,
) -> Iterator[Picture]:
    """Every figure that a store has data for, one by one.

    ratings : name, such as valence -> emotion -> value, for the plane of emotions
    evidence : of the claims table, where there is one, so that nothing is computed twice; else `results` is opened
    """
    if evidence is None:
        assert results is not None, "give results or evidence"
        evidence = Evidence(results, rules or Rules(), None)
    return axis.each(evidence.axis, _pictures(evidence, ratings))


def _pictures(evidence: Evidence, ratings: Mapping[str, Mapping[str, float]] | None) -> Iterator[Picture]:
    geometries = {model: matrices(evidence, model) for model in evidence.with_activations()}
    yield from _separation(evidence)
    yield from _vectors(evidence, ratings)
    yield from _rsa(evidence, geometries)
    yield from _streams(evidence)
    yield from _steering(evidence)
    yield from _scripts(evidence)
    yield from _receipts(evidence)


# ---- separation ----------------------------------------------------------------------------------------------

METRICS = ("cv_cosine", "mean_pairwise_cosine", "reliability", "pole_separation", "accuracy")


def _separation(evidence: Evidence) -> Iterator[Picture]:
    measured = [evidence.measured(model) for model in evidence.with_activations()]
    if not measured:
        return
    for metric in METRICS:
        if metric == "accuracy":  # of all methods, not only of the two that are compared
            measured = [evidence.told_apart(model) for model in evidence.with_activations()]
        if not any(bool(cube[metric].notnull().any()) for cube in measured):
            continue
        title = word(separation.MEANING[metric].split(";")[0])
        caption = {
            "cv_cosine": "Lower is better separated. Bands: jackknife over independent texts. Layers without a "
            "signal are left out.",
            "mean_pairwise_cosine": "The paper's metric, which noise moves: read the cross-validated one. At the "
            "dotted line the figure is what algebra makes it, whatever the model.",
            "accuracy": "Each sample is held out and given to the nearest vector. The dotted line is chance.",
            "reliability": "Halves of the samples, stepped up (Spearman-Brown): 1 is no noise, 0 nothing but noise.",
            "pole_separation": word(
                "Above 0, emotions of one valence lie nearer to each other than to those of the other."
            ),
        }[metric]
        yield Picture(
            f"curves-{metric}",
            "Separation by layer",
            f"{title[0].upper()}{title[1:]}",
            f"{caption} Baseline {_baseline(evidence, metric)}; copies of a text left out.",
            "Lines over relative depth. " + "; ".join(_best(cube, metric) for cube in measured),
            curves.layer_curves(measured, metric),
        )


def _baseline(evidence: Evidence, metric: str) -> str:
    return "as each method's plan says" if metric == "accuracy" else evidence.rules.baseline


def _best(measured: xr.Dataset, metric: str) -> str:
    """The best layers of a model in words."""
    best = separation.best_layer(measured, metric, trapped="mark")
    said = []
    for method in labels(best, "method"):
        cube = best.sel({"method": method})
        layer = int(cube.layer)
        said.append(
            f"{method} {float(cube.value):.3g} at depth {float(cube.depth):.2f}" if layer >= 0 else f"{method} none"
        )
    return f"{measured.model.values.item()}: best {', '.join(said)}"


# ---- vectors -------------------------------------------------------------------------------------------------


def _layer(evidence: Evidence, model: str, known: list[int]) -> int:
    """The layer of the middle depth, or the nearest that is there."""
    wanted = int(evidence.rules.depth * (evidence.fact(model, "n_layers") or max(known) + 1))
    return min(known, key=lambda layer: abs(layer - wanted))


def _vectors(evidence: Evidence, ratings: Mapping[str, Mapping[str, float]] | None) -> Iterator[Picture]:
    for model in evidence.models:
        path = f"vectors/{slug(model)}"
        if not evidence.has(path):
            continue
        vector = evidence.results[path].vector.sel({"model": model})
        layer = _layer(evidence, model, vector.layer.values.tolist())
        for method in labels(vector, "method"):
            here = vector.sel({"method": method, "layer": layer}).load()
            if not bool(here.notnull().any()):
                continue
            where = f"{model}, {method}, layer {layer}"
            name = named(model, method)
            yield Picture(
                f"similarity-{name}",
                word("Emotion vectors"),
                f"{word('Similarity of emotion vectors')}: {where}",
                word("Cosine of every two vectors as stored, emotions ordered by average-linkage clustering."),
                _pairs_said(here),
                geometry.similarity(here),
            )
            yield Picture(
                f"plane-{name}",
                word("Emotion vectors"),
                f"{word('Plane of emotion vectors')}: {where}",
                "First two principal components of the vectors as stored.",
                f"Scatter of {here.sizes['emotion']} {word('emotions')} on two principal components.",
                geometry.plane(here, ratings, evidence.groups or None),
            )


def _pairs_said(vector: xr.DataArray) -> str:
    """The nearest and the farthest pair in words."""
    cosine = separation.cosine_similarity(vector)
    names = labels(vector, "emotion")
    pairs = [
        (float(cosine.values[i, j]), f"{names[i]} and {names[j]}")
        for i, j in itertools.combinations(range(len(names)), 2)
        if not np.isnan(cosine.values[i, j])
    ]
    if not pairs:
        return word("No two emotions have a vector.")
    (low, far), (high, near) = min(pairs), max(pairs)
    return f"Heat map of {len(names)} {word('emotions')}. Nearest: {near} ({high:.2f}); farthest: {far} ({low:.2f})."


# ---- geometry ------------------------------------------------------------------------------------------------


def _rsa(evidence: Evidence, geometries: Mapping[str, xr.Dataset]) -> Iterator[Picture]:
    if not geometries:
        return
    section, read = (
        "Geometry compared (RSA)",
        "A correlation near its noise ceiling means: the same geometry, as far as the samples can tell.",
    )
    middle = {
        model: rdms.sel({"layer": _layer(evidence, model, rdms.layer.values.tolist())}).drop_vars(
            ["layer", "depth"], errors="ignore"
        )
        for model, rdms in geometries.items()
    }
    joined = xr.concat([table.expand_dims(model=[m]) for m, table in middle.items()], "model", join="outer")
    for along, over in (("method", "models"), ("model", "methods")):
        if joined.sizes[along] > 1:
            correlations = separation.rsa(joined, along, shuffles=0)
            yield Picture(
                f"rsa-{along}",
                section,
                f"{along.capitalize()} by {along}, at depth {evidence.rules.depth:g}",
                f"Spearman correlation of 1 - cosine matrices; panels: {over}. {read}",
                _rsa_said(correlations, along),
                geometry.rsa(correlations),
            )
    for model, rdms in geometries.items():
        if rdms.sizes["layer"] > 1:
            by_layer = separation.rsa(rdms, "layer", shuffles=0)
            yield Picture(
                f"rsa-layer-{slug(model)}",
                section,
                f"Layer by layer: {model}",
                "Layers read the same texts and share their noise, so a correlation may pass its ceiling here.",
                f"Heat maps of {rdms.sizes['layer']} layers by as many. {_rsa_said(by_layer, 'layer')}",
                geometry.rsa(by_layer),
            )


def _rsa_said(correlations: xr.Dataset, along: str) -> str:
    square = ~np.eye(correlations.sizes[along], dtype=bool)
    off = correlations.correlation.transpose(..., along, f"{along}_2").values[..., square]
    off = off[~np.isnan(off)]
    return f"Correlations from {off.min():.2f} to {off.max():.2f}." if off.size else "No correlation is there."


# ---- streams, steering ---------------------------------------------------------------------------------------


def _streams(evidence: Evidence) -> Iterator[Picture]:
    paths = [f"anisotropy/{slug(m)}" for m in evidence.models if evidence.has(f"anisotropy/{slug(m)}")]
    tables = [separation.anisotropy(evidence.results[path].pooled) for path in paths]
    if tables:
        greatest = max(float(table.anisotropy.max()) for table in tables)
        yield Picture(
            "anisotropy",
            "Anisotropy",
            "Anisotropy of neutral sentences' streams by layer",
            "0: directions fill the space; 1: all streams point one way. Bands: jackknife over sentences.",
            f"Lines over relative depth, one a model; the greatest value is {greatest:.2f}.",
            curves.anisotropy(tables),
        )


def _steering(evidence: Evidence) -> Iterator[Picture]:
    for where, told, success in evidence.setups():
        cube = told.dropna("prompt", how="all", subset=["repetition"])
        unit, name = _unit(evidence, where["op"]), named(*where.values())
        title = ", ".join(where.values())
        section = "Steering"
        yield Picture(
            f"dose-{name}",
            section,
            f"Dose and response: {title}",
            "Read every curve against the random direction of equal norm: it moves about half of the texts, by chance.",
            _dose_said(success, cube),
            responses.dose_response(success, cube, unit=unit),
        )
        if success is None:
            continue
        change = success.change.sel({"control": "none"})
        yield Picture(
            f"scenarios-{name}",
            section,
            f"{word('Scenarios by emotion')}: {title}",
            "Change of P(target class) against the unsteered continuation, at every strength.",
            f"Heat maps of {change.sizes['prompt']} scenarios by {change.sizes['emotion']} {word('emotions')}.",
            responses.scenarios(change, unit=unit),
        )
        p = evidence.scores("judged").sel({**where, "control": "none"}).load()
        p = p.sel({"strength": [s for s in success.strength.values.tolist() if s > 0], "emotion": success.emotion})
        unsteered = evidence.scores("judged_unsteered").sel({d: where[d] for d in ("model", "op")}).load()
        if p.sizes["strength"]:
            yield Picture(
                f"confusion-{name}",
                section,
                f"What the judge says: {title}",
                word("Likeliest class by the emotion steered to, all strengths above 0 together."),
                word("Heat map: emotion steered to, by likeliest class of the judge."),
                responses.confusion(p, unsteered),
            )


def _setups(record: xr.DataArray, dims: tuple[str, ...]) -> list[tuple[dict[str, str], dict[str, list]]]:
    """The labels under which any cell is done, and along the other axes of cells those that are done there."""
    done = record.sel({"cell_field": "fingerprint"}).notnull()
    some = done.any([d for d in done.dims if d not in dims]).transpose(*dims)
    setups = [
        {d: str(some[d].values.tolist()[i]) for d, i in zip(dims, at, strict=True)} for at in np.argwhere(some.values)
    ]
    return [(where, own_labels(done.sel(where))) for where in setups]


def _unit(evidence: Evidence, op: str) -> str:
    """The scale of an op's strengths."""
    if not evidence.has("ops") or op not in labels(evidence.results["ops"], "op"):
        return ""
    text = str(evidence.results["ops"].settings.sel({"op": op}).values.item())
    return str(json.loads(text).get("scale", "")).replace("_", " ") if text else ""


def _dose_said(success: xr.Dataset | None, told: xr.Dataset) -> str:
    if success is None:
        return "Lines over strength; nothing is judged."
    said = []
    for strength in sorted(success.strength.values.tolist()):
        rate = outcomes.rate(success.success.sel({"strength": strength}), ("emotion", "prompt", "seed"))
        counts = [
            f"{c} {int(rate.k.sel({'control': c}))} of {int(rate.n.sel({'control': c}))}"
            for c in labels(rate, "control")
            if not re.search(r"-\d+$", c)
        ]
        said.append(f"strength {strength:g}: {', '.join(counts)}")
    return "Moved to the target class, by control. " + "; ".join(said) + "."


def _scripts(evidence: Evidence) -> Iterator[Picture]:
    if not evidence.has("generations"):
        return
    text = evidence.results["generations"].text.load()
    share = outcomes.script_share(text)
    shares = None
    if evidence.has("unsteered"):
        shares = outcomes.script_share(evidence.results["unsteered"].text.load(), labels(share, "script"))
    for where, own in _setups(evidence.results["generations"].cell, SETUP):
        unsteered = None if shares is None else shares.sel({"op": where["op"]})
        if unsteered is not None and not bool(unsteered.notnull().any()):
            unsteered = None  # its steer entry has no control `zero`
        yield Picture(
            "scripts-" + named(*where.values()),
            "Scripts",
            f"Script of the letters: {', '.join(where.values())}",
            "A script that rises with strength and is absent at 0 was brought in by steering.",
            f"Lines over strength; scripts that occur: {', '.join(labels(share, 'script'))}.",
            responses.script_shares(share.sel(where).sel(own), unsteered, unit=_unit(evidence, where["op"])),
        )


def _receipts(evidence: Evidence) -> Iterator[Picture]:
    if not evidence.has("steering") or "injected" not in evidence.results["steering"]:
        return
    steering = evidence.results["steering"]
    for where, own in _setups(steering.cell, SETUP):
        subset = steering[["relative_change", "injected"]].sel(where).sel(own).load()
        low, high = (float(edge) for edge in (subset.relative_change.min(), subset.relative_change.max()))
        yield Picture(
            "receipts-" + named(*where.values()),
            "Receipts",
            f"What the edits did: {', '.join(where.values())}",
            "Relative change of the stream against the length that was added, layer by layer.",
            f"Scatter; relative changes from {low:.2g} to {high:.2g}.",
            responses.receipts(subset),
        )
