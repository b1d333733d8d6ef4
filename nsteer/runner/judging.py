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
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Model, Steer
from nsteer.runner.failing import not_loaded
from nsteer.runner.session import Clock, Session
from nsteer.stages import arrays, cells
from nsteer.system.fingerprints import fingerprint

PRODUCTS = {"judged": "generations", "judged_unsteered": "unsteered"}


def judge(session: Session) -> None:
    """Fills the missing cells of both, for all models; the classifier is loaded once, when a cell needs it."""
    spec = session.study.plan.judge
    assert spec is not None
    facts = judge_facts(spec)
    remember(session, spec, facts)
    todo = {}
    for path, made_from in PRODUCTS.items():
        todo[path] = outstanding(session, path, made_from, facts.judging, spec.over)
    if not any(todo.values()):
        return
    from nsteer.executors.classifier import Classifier

    classifier = session.judge = session.judge or loaded(Classifier, facts, spec.device, session.warn)
    for path, made_from in PRODUCTS.items():
        if todo[path]:
            session.prepare([arrays.judged_group(path, session.study, classifier.classes, classifier.head)])
            fill(session, classifier, path, made_from, todo[path])


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
        classes = judge_facts(plan.judge).classes
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
        f"the judge {plan.judge.classifier} has no class for {', '.join(lost)}: a hole in its rates "
        f"(its classes: {', '.join(classes)})"
    ]


def remember(session: Session, spec: Any, facts: models.Facts) -> None:
    """Keeps who judges, and how emotions map to classes, beside what is judged."""
    settings = {**spec.model_dump(exclude={"device"}), "identity": facts.judging, "head": facts.head}
    session.prepare([arrays.judges_group([spec.classifier])])
    key, wanted = (spec.classifier,), fingerprint(settings)
    if session.store.missing("judges", {key: wanted}):
        data = xr.Dataset({"settings": ((), json.dumps(settings))})
        session.store.commit("judges", key, data, fingerprint=wanted, run=session.run)


def judge_facts(spec: Any) -> models.Facts:
    return models.facts(Model(id=spec.classifier, revision=spec.revision))


def outstanding(session: Session, path: str, made_from: str, identity: str, over: str) -> dict[tuple, int]:
    """Cells whose continuations are in the store and that this judge has not read yet."""
    if made_from not in session.store.groups():
        return {}
    wanted = continued(session, path, made_from)
    there = set(wanted) - set(session.store.missing(made_from, wanted))
    judged = {key: fp for key, fp in cells.judged(wanted, identity, over).items() if key in there}
    return session.missing(path, path, judged)


def continued(session: Session, path: str, made_from: str) -> dict[tuple, int]:
    """The continuations of all models that are this session's to judge, by their fingerprints."""
    of = cells.steering if made_from == "generations" else cells.unsteered
    wanted: dict[tuple, int] = {}
    for facts in session.study.facts:
        wanted |= session.wanted(of, facts)
    return session.mine(path, wanted)


def size_of(session: Session, block: Steer) -> int:
    """How many texts a cell of a block has."""
    return len(prompt_set(block.prompts, session.study.texts)) * len(block.seeds)


def fill(session: Session, classifier: Any, path: str, made_from: str, todo: Mapping[tuple, int]) -> None:
    """Judges the missing cells of one product, a wave of texts at a time."""
    made = continued(session, path, made_from)
    blocks = {cells.op_label(block): block for block in session.study.plan.steer}
    clock, empty = Clock(), 0
    for wave in session.waves(path, path, todo, lambda key: size_of(session, blocks[key[1]])):
        texts: dict[tuple, xr.DataArray] = {}
        for key in wave:
            with session.guarded(path, path, key, todo[key]):
                texts[key] = cell_texts(session, made_from, key, made[key], blocks[key[1]])
        if not texts:
            continue
        found = probabilities(session, classifier, path, texts, todo)
        share = clock.share(len(wave))
        for key, values in found.items():
            one = texts[key]
            part = values.reshape(*one.shape, len(classifier.classes))
            empty += int(np.isnan(part).all(-1).sum())
            dims = {"prompt": one.prompt.values, "seed": one.seed.values, "class": classifier.classes}
            data = arrays.dataset(dims, {"probability": (tuple(dims), part.astype(np.float32))})
            session.commit(path, path, key, data, todo[key], share)
            session.finished(path, key)
    if empty:
        session.warn(f"{path}: {empty} empty continuations are not judged: holes")


def probabilities(
    session: Session, classifier: Any, path: str, texts: Mapping[tuple, xr.DataArray], todo: Mapping[tuple, int]
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
            with session.guarded(path, path, key, todo[key]):
                found[key] = classifier.probabilities(one)
        return found


def cell_texts(session: Session, made_from: str, key: tuple, number: int, block: Steer) -> xr.DataArray:
    """What the judge reads of one cell, over (prompt, seed). Raises InputError."""
    prompts = prompt_set(block.prompts, session.study.texts)
    texts = session.inputs(made_from, {key: number})[key].text.sel({"prompt": list(prompts), "seed": block.seeds})
    assert session.study.plan.judge is not None
    if session.study.plan.judge.over == "all":
        shown = [[prompts[p] + text for text in texts.sel({"prompt": p}).values.tolist()] for p in prompts]
        return texts.copy(data=np.array(shown, object))
    return texts
