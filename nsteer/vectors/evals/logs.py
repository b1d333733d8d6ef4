"""Turns the continuations of a store into eval logs of Inspect: a log a model, steer entry, method and emotion."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from nsteer import __version__
from nsteer.errors import ExchangeError
from nsteer.science import axis, outcomes
from nsteer.store import results
from nsteer.store.results import Results

OF_LOG = ("model", "op", "method", "emotion")
OF_SAMPLE = ("layer_set", "strength", "control", "prompt", "seed")
"""Dims of the cubes: those that a log is of, and those of its samples."""

UNSTEERED = "unsteered"


def write(
    store: str, folder: str, *, models: Sequence[str] = (), methods: Sequence[str] = (), emotions: Sequence[str] = ()
) -> list[Path]:
    """Writes eval logs (`.eval`) into a folder; the same store gives the same names. Returns them.

    A sample is a prompt under a layer set, strength and control; its epochs are the seeds, its scores perplexity,
    repetition, and judges' scores, its metadata the labels. Unsteered continuations are in each log of their
    entry. Raises ExchangeError without Inspect or continuations, LabelError, StoreError.
    """
    try:
        from inspect_ai.log import write_eval_log
    except ImportError as error:
        raise ExchangeError("eval logs need Inspect: pip install 'nsteer[inspect]'") from error
    opened = results.open(store)
    if "generations" not in opened:
        raise ExchangeError(f"{opened.name} has no steered continuations")
    asked = {"model": list(models), "method": list(methods), "emotion": list(emotions)}
    texts = results.select(
        axis.inward(opened["generations"]), {k: v for k, v in asked.items() if v}, where=f"generations of {opened.name}"
    )
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExchangeError(f"can not write {folder}: {error.strerror or error}") from error
    paths = []
    for labels in _logs(texts):
        log = _log(opened, texts.sel(labels), labels)
        if log is not None:
            task = re.sub("[^A-Za-z0-9.]+", "-", log.eval.task)
            name = f"{log.eval.created.replace(':', '-')}_{task}_{log.eval.eval_id}.eval"
            write_eval_log(log, str(place / name), format="eval")
            paths.append(place / name)
    if not paths:
        raise ExchangeError(f"{opened.name} has no finished continuations of these labels")
    return paths


def _logs(texts: xr.Dataset) -> Iterator[dict[str, str]]:
    """The labels of each log, in the store's order."""
    for labels in np.ndindex(*(texts.sizes[dim] for dim in OF_LOG)):
        yield {dim: str(texts[dim].values[i]) for dim, i in zip(OF_LOG, labels, strict=True)}


def _log(opened: Results, texts: xr.Dataset, labels: Mapping[str, str]) -> Any:
    """One log; None where none of its cells is finished."""
    from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalResults, EvalSample, EvalSpec
    from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, GenerateConfig, ModelOutput
    from inspect_ai.scorer import Score

    prompts = _prompts(opened, labels["op"])
    continuations = [*_steered(opened, texts.load(), labels), *_unsteered(opened, labels)]
    if not any(where["control"] != UNSTEERED for where, _, _ in continuations):
        return None
    samples = []
    for place, text, scores in continuations:
        words = [place["layer_set"], f"{place['strength']:g}", place["control"], place["prompt"]]
        asked = prompts.get(place["prompt"], place["prompt"])
        samples.append(
            EvalSample(
                id=" / ".join(words) if place["control"] != UNSTEERED else f"{UNSTEERED} / {place['prompt']}",
                epoch=place["epoch"],
                input=asked,
                target=labels["emotion"],
                messages=[ChatMessageUser(content=asked), ChatMessageAssistant(content=text)],
                output=ModelOutput.from_content(labels["model"], text),
                scores={name: Score(value=value) for name, value in scores.items()},
                metadata={**labels, **{dim: place[dim] for dim in OF_SAMPLE}},
            )
        )
    settings = _settings(opened, labels["op"])
    task = " ".join(labels[dim] for dim in ("op", "method", "emotion"))
    digest = hashlib.sha256(json.dumps([opened.name, labels]).encode()).hexdigest()
    spec = EvalSpec(
        created=_created(opened),
        eval_id=digest[:22],
        run_id=digest[22:44],
        task_id=digest[:22],
        task=task,
        task_args={"store": opened.name, **labels},
        dataset=EvalDataset(name=labels["op"], samples=len(prompts) or None),
        model=labels["model"],
        model_generate_config=GenerateConfig(max_tokens=settings.get("generate", {}).get("max_new_tokens")),
        config=EvalConfig(epochs=max(sample.epoch for sample in samples)),
        packages={"nsteer": __version__},
        metadata={"steer": settings},
    )
    metrics = EvalResults(total_samples=len(samples), completed_samples=len(samples), scores=_metrics(continuations))
    return EvalLog(status="success", eval=spec, results=metrics, samples=samples)


Sample = tuple[dict[str, Any], str, dict[str, Any]]
"""Where a continuation stands, its text, its scores."""


def _steered(opened: Results, texts: xr.Dataset, labels: Mapping[str, str]) -> Iterator[Sample]:
    """The steered continuations that are finished."""
    yield from _samples(texts, _scores(opened, texts, labels, "outcomes", "judged"))


def _unsteered(opened: Results, labels: Mapping[str, str]) -> Iterator[Sample]:
    """The unsteered continuations of the same model and entry."""
    if UNSTEERED not in opened or labels["op"] not in opened[UNSTEERED].op.values:
        return
    mine = {dim: labels[dim] for dim in ("model", "op")}
    texts = opened[UNSTEERED].sel(mine).load()
    aside = {"layer_set": "", "strength": 0.0, "control": UNSTEERED}
    scores = _scores(opened, texts, mine, "outcomes_unsteered", "judged_unsteered")
    for place, text, own_scores in _samples(texts, scores):
        yield {**aside, **place}, text, own_scores


def _samples(texts: xr.Dataset, scores: Mapping[str, xr.DataArray]) -> Iterator[Sample]:
    dims = [str(dim) for dim in texts.text.dims]
    for at in np.ndindex(texts.text.shape):
        if texts.n_tokens.transpose(*dims).values[at] < 0:
            continue  # not finished, or no prompt of this entry
        place = {dim: texts[dim].values.tolist()[i] for dim, i in zip(dims, at, strict=True)}
        place["epoch"] = at[dims.index("seed")] + 1
        known = {name: _score(values, place) for name, values in scores.items()}
        yield place, str(texts.text.values[at]), {name: value for name, value in known.items() if value is not None}


def _scores(opened: Results, texts: xr.Dataset, labels: Mapping[str, str], *groups: str) -> dict[str, xr.DataArray]:
    """Name -> a number a continuation; label of a judge -> one a class of its own."""
    scores = {"repetition": outcomes.repetition(texts.token_id)}
    for group in groups:
        if group in opened and labels["op"] in opened[group].op.values:
            whole = axis.inward(opened[group])
            data = whole.sel({dim: label for dim, label in labels.items() if dim in whole.dims})
            if "perplexity" in data:
                scores["perplexity"] = data.perplexity.load()
            for judge in data.judge.values.tolist() if "score" in data else ():
                score = data.score.sel(judge=judge, drop=True).load()
                others = [dim for dim in score.dims if dim != "class"]
                scores[str(judge)] = score.isel({"class": score.notnull().any(others).values.nonzero()[0]})
    return scores


def _score(values: xr.DataArray, place: Mapping[str, Any]) -> Any:
    """A score at its place: a number, a number a class; None where it is missing."""
    try:
        value = values.sel({dim: place[str(dim)] for dim in values.dims if dim in place})
    except KeyError:
        return None
    if value.dims:
        named = {str(label): float(value.sel({value.dims[0]: label})) for label in value[value.dims[0]].values}
        return named if all(map(math.isfinite, named.values())) else None
    return float(value) if math.isfinite(float(value)) else None


def _metrics(continuations: Sequence[Sample]) -> list[Any]:
    """Means over prompts and seeds, a metric a condition."""
    from inspect_ai.log import EvalMetric, EvalScore

    sums: dict[str, dict[str, list[float]]] = {}
    several = len({where["layer_set"] for where, _, _ in continuations if where["layer_set"]}) > 1
    for place, _, scores in continuations:
        words = [f"strength {place['strength']:g}"] if place["control"] != UNSTEERED else [UNSTEERED]
        words += [place["control"]] * (place["control"] not in (UNSTEERED, "none"))
        words += [f"layers {place['layer_set']}"] * (several and bool(place["layer_set"]))
        for name, value in scores.items():
            for kind, number in (value if isinstance(value, dict) else {"": value}).items():
                full = f"{name} {kind}".strip()
                sums.setdefault(full, {}).setdefault(", ".join(words), []).append(number)
    return [
        EvalScore(
            name=name,
            scorer=name,
            metrics={key: EvalMetric(name=key, value=float(np.mean(values))) for key, values in by.items()},
        )
        for name, by in sums.items()
    ]


def _prompts(opened: Results, op: str) -> dict[str, str]:
    """The texts of an entry's prompts by label."""
    if "ops" not in opened or op not in opened["ops"].op.values:
        return {}
    text = opened["ops"].prompt_text.sel({"op": op})
    return {str(label): str(prompt) for label, prompt in zip(text.prompt.values, text.values, strict=True) if prompt}


def _settings(opened: Results, op: str) -> dict[str, Any]:
    if "ops" not in opened or op not in opened["ops"].op.values:
        return {}
    return dict(json.loads(opened["ops"].settings.sel({"op": op}).item() or "{}"))


def _created(opened: Results) -> str:
    """When the last run began, as Inspect writes times."""
    started = [str(started) for started in opened["runs"].started.values if started] if "runs" in opened else []
    when = datetime.fromisoformat(started[-1]) if started else datetime(2000, 1, 1, tzinfo=UTC)
    return when.astimezone(UTC).isoformat(timespec="seconds")
