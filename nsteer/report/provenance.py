"""Turns a store's records into what a page says of where its figures come from, and of what is missing."""

from __future__ import annotations

import json
import math
from typing import Any

from nsteer.report.claims import Evidence
from nsteer.report.claims.evidence import missing_perplexity
from nsteer.science import separation
from nsteer.store import slug


def collect(evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """Records of runs, models, methods, steer entries, judges and programs, each as JSON data."""
    return {
        "runs": [_run(record) for record in records(evidence, "runs", "run")],
        "facts": records(evidence, "models", "model"),
        "methods": [_settings(record, "protocol") for record in records(evidence, "methods", "method")],
        "ops": [_settings(record, "settings") for record in records(evidence, "ops", "op")],
        "judges": [_settings(record, "settings") for record in records(evidence, "judges", "judge")],
        "programs": records(evidence, "programs", "program"),
        "verified": _verified(evidence),
    }


def records(evidence: Evidence, path: str, dim: str) -> list[dict[str, Any]]:
    """One mapping for each label of `dim` whose record is there; variables over `dim` alone."""
    if not evidence.has(path):
        return []
    data = evidence.results[path]
    done = data.cell.sel({"cell_field": "fingerprint"}).notnull().values
    names = [str(name) for name in data.data_vars if data[name].dims == (dim,)]
    columns = {name: data[name].values.tolist() for name in names}
    labels = data[dim].values.tolist()
    return [
        {dim: str(labels[i]), **{name: column[i] for name, column in columns.items()}}
        for i in range(len(labels))
        if done[i]
    ]


def _run(record: dict[str, Any]) -> dict[str, Any]:
    environment = _parsed(record.get("environment"))
    environment.pop("resolved_plan", None)
    return {**record, "environment": environment}


def _settings(record: dict[str, Any], name: str) -> dict[str, Any]:
    return {**record, name: _parsed(record.get(name))}


def _parsed(text: Any) -> dict[str, Any]:
    mapping = json.loads(text) if text else {}
    return mapping if isinstance(mapping, dict) else {}


def _verified(evidence: Evidence) -> list[dict[str, Any]]:
    """Rows that were run again one at a time: how many, how many with equal tokens, the largest difference."""
    if not evidence.has("verification"):
        return []
    verifications = []
    data = evidence.results["verification"].load()
    for model in data.model.values.tolist():
        model_data = data.sel({"model": model})
        there = (model_data.stage != "").values
        if there.any():
            differences = [d for d in model_data.relative_difference.values[there].tolist() if not math.isnan(d)]
            equal = int(model_data.tokens_equal.values[there].sum())
            greatest = max(differences, default=None)
            verifications.append({"model": model, "rows": int(there.sum()), "equal": equal, "difference": greatest})
    return verifications


def missing(evidence: Evidence) -> list[str]:
    """What is missing, thin or to be read with care, a sentence each."""
    sentences = [
        f"run {record['run']} ended with status {record.get('status') or 'unknown'}"
        for record in records(evidence, "runs", "run")
        if record.get("status") != "complete"
    ]
    for path in evidence.results:
        record = evidence.results[path].cell.sel({"cell_field": "fingerprint"})
        lacking = int(record.isnull().sum())
        if lacking and path != "runs":
            sentences.append(f"{path}: {lacking} of {record.size} cells of its grid are not done or not asked for")
    for model in evidence.with_activations():
        for method in [m for m in evidence.pair(model) if m]:
            said = evidence.missing(model, method)
            sentences += [f"{model}, {method}: {said}"] if said else []
        sentences += _pinned(evidence, model)
    for again in _verified(evidence):
        if lost := again["rows"] - again["equal"]:
            sentences.append(f"{again['model']}: {lost} of {again['rows']} rows run again gave other tokens")
    return sentences + _steering_holes(evidence)


def _pinned(evidence: Evidence, model: str) -> list[str]:
    """Methods whose stored vectors sum to zero, so that their mean cosine says nothing."""
    path = f"vectors/{slug(model)}"
    if not evidence.has(path):
        return []
    trapped = separation.pinned(evidence.results[path].vector.sel({"model": model}).load()).all("layer")
    return [
        f"{model}, {method}: the stored vectors sum to zero; their mean cosine is -1/(n-1) whatever the model"
        for method in trapped.method.values.tolist()
        if bool(trapped.sel({"method": method}))
    ]


def _steering_holes(evidence: Evidence) -> list[str]:
    if not evidence.has("generations"):
        return []
    sentences = []
    if missing := evidence.missing_judged():
        sentences.append(f"the store has no group {missing}: success can not be determined")
    else:
        sentences += evidence.unmapped
    if missing := missing_perplexity(evidence.results):
        sentences.append(f"the store lacks perplexity in {missing}: of the regimes only loops can be determined")
    if "random" not in evidence.results["generations"].control.values.tolist():
        sentences.append("no random control: what steering does by chance is not known")
    if not evidence.has("unsteered"):
        sentences.append("no unsteered continuations: the plan's controls lack zero")
    return sentences
