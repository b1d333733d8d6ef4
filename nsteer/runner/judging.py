"""Stages `judged` and `judged_unsteered`: what an external classifier says of the continuations."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError, ModelError
from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.plan.prompts import prompt_set, shown
from nsteer.plan.schema import Judge, Steer
from nsteer.runner.failing import not_loaded
from nsteer.runner.runs import Clock, Run
from nsteer.stages import arrays, cells, counting
from nsteer.stages.table import BY_NAME, Stage
from nsteer.system.fingerprints import fingerprint

STAGES = ("judged", "judged_unsteered")


def judge(run: Run) -> None:
    """Fills the missing cells of both, for all models; the classifier is loaded once, when a cell needs it."""
    spec = run.study.plan.judge
    assert spec is not None
    facts = cells.judge_facts(spec)
    remember(run, spec, facts)
    todo = {stage: outstanding(run, BY_NAME[stage]) for stage in STAGES}
    if not any(todo.values()):
        return
    from nsteer.executors.classifier import Classifier

    classifier = run.judge = run.judge or loaded(Classifier, facts, spec.device, run.warn)
    for stage, mine in todo.items():
        if mine:
            run.prepare([arrays.judged_group(stage, run.study, classifier.classes, classifier.head)])
            fill(run, classifier, BY_NAME[stage], mine)


def loaded(make: Callable[..., Any], facts: models.Facts, device: str, say: Callable[[str], None]) -> Any:
    """The classifier. Raises ModelError for whatever fails on the way: a device that is not there, memory."""
    try:
        with models.unchanged(facts):
            return make(facts.source, facts.revision, device, say=say)
    except Exception as error:
        reason, _ = not_loaded(error, facts.id, device)
        raise ModelError(reason) from error


def unmatched(study: Study) -> list[str]:
    """What to say of emotions that the judge has no class for: they are judged, and count for no rate."""
    plan = study.plan
    if plan.judge is None or not plan.steer:
        return []
    try:
        classes = cells.judge_facts(plan.judge).classes
    except ModelError:
        return []  # said when it is to be loaded
    given = plan.judge.map or {}
    steered = [(e, block) for block in plan.steer for e in cells.steered_emotions(plan, block)]
    named = {e: given.get(e, e) for e, block in steered if e in given or e not in block.vectors.formulas}
    lost = [
        f"{e} ({name})" if e != name else e for e, name in named.items() if name is not None and name not in classes
    ]
    if not lost or not classes:
        return []
    return [
        f"the judge {plan.judge.classifier} has no class for {', '.join(lost)}: a missing value in its rates "
        f"(its classes: {', '.join(classes)})"
    ]


def remember(run: Run, spec: Judge, facts: models.Facts) -> None:
    """Keeps who judges, and how emotions map to classes, beside what is judged."""
    settings = {**spec.model_dump(exclude={"device"}), "identity": facts.judging, "head": facts.head}
    run.prepare([arrays.judges_group([spec.classifier])])
    key, wanted = (spec.classifier,), fingerprint(settings)
    if run.store.missing("judges", {key: wanted}):
        data = xr.Dataset({"settings": ((), json.dumps(settings))})
        run.store.commit("judges", key, data, fingerprint=wanted, run=run.number)


def outstanding(run: Run, stage: Stage) -> dict[Any, int]:
    """Cells whose continuations are in the store and that this judge has not read yet."""
    path = source(stage)
    if path not in run.store.groups():
        return {}
    made = continued(run, stage)
    there = set(made) - set(run.store.missing(path, made))
    wanted = {key: fp for job in run.jobs for key, fp in job.wanted(stage.cells).items() if key in there}
    return run.missing(stage.name, stage.name, wanted)


def source(stage: Stage) -> str:
    """The group of the continuations that a stage judges."""
    return BY_NAME[stage.reads].products[-1]


def continued(run: Run, stage: Stage) -> dict[Any, int]:
    """The continuations of all models that are this run's to judge, by their fingerprints."""
    of = BY_NAME[stage.reads].cells
    wanted = {key: number for job in run.jobs for key, number in job.wanted(of).items()}
    return run.mine(stage.name, wanted)


def fill(run: Run, classifier: Any, stage: Stage, todo: Mapping[Any, int]) -> None:
    """Judges the missing cells of a stage, a wave of texts at a time."""
    path, made = source(stage), continued(run, stage)
    of = {job.label: job for job in run.jobs}
    clock, empty, name = Clock(), 0, stage.name
    for wave in run.waves(name, name, todo, lambda key: stage.rows(of[key.model], key)):
        texts: dict[tuple, xr.DataArray] = {}
        for key in wave:
            with run.guarded(name, name, key, todo[key]):
                texts[key] = cell_texts(run, path, key, made[key], of[key.model].wanted(counting.blocks)[key.op])
        if not texts:
            continue
        found = probabilities(run, classifier, name, texts, todo)
        share = clock.share(len(wave))
        for key, values in found.items():
            one = texts[key]
            part = values.reshape(*one.shape, len(classifier.classes))
            empty += int(np.isnan(part).all(-1).sum())
            dims = {"prompt": one.prompt.values, "seed": one.seed.values, "class": classifier.classes}
            data = arrays.dataset(dims, {"probability": (tuple(dims), part.astype(np.float32))})
            run.commit(name, key, data, todo[key], share)
            run.finished(name, key)
    if empty:
        run.warn(f"{name}: {empty} empty continuations are not judged: missing values")


def probabilities(
    run: Run, classifier: Any, path: str, texts: Mapping[tuple, xr.DataArray], todo: Mapping[tuple, int]
) -> dict[tuple, np.ndarray]:
    """What the judge says of cells, [text, class] each; together, or where that fails one cell at a time."""
    flat = {key: one.values.ravel().tolist() for key, one in texts.items()}
    try:
        whole = classifier.probabilities([text for one in flat.values() for text in one])
        ends = np.cumsum([len(one) for one in flat.values()])[:-1]
        return dict(zip(flat, np.split(whole, ends), strict=True))
    except ExecutionError:
        found = {}
        for key, one in flat.items():
            with run.guarded(path, path, key, todo[key]):
                found[key] = classifier.probabilities(one)
        return found


def cell_texts(run: Run, made_from: str, key: tuple, number: int, block: Steer) -> xr.DataArray:
    """What the judge reads of one cell, over (prompt, seed). Raises InputError."""
    prompts = prompt_set(block.prompts, run.study.texts)
    texts = run.inputs(made_from, {key: number})[key].text.sel({"prompt": list(prompts), "seed": block.seeds})
    assert run.study.plan.judge is not None
    if run.study.plan.judge.over == "all":
        read = [[shown(prompts[p]) + text for text in texts.sel({"prompt": p}).values.tolist()] for p in prompts]
        return texts.copy(data=np.array(read, object))
    return texts
