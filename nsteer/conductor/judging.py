"""Stages `judged` and `judged_unsteered`: what an external classifier says of the continuations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer import arrays, cells, models
from nsteer.conductor.session import WAVE, Clock, Session
from nsteer.fingerprints import fingerprint
from nsteer.plan import Model
from nsteer.prompts import prompt_set

PRODUCTS = {"judged": "generations", "judged_unsteered": "unsteered"}


def judge(session: Session) -> None:
    """Fills the missing cells of both, for all models; the classifier is loaded once, when a cell needs it."""
    spec = session.study.plan.judge
    assert spec is not None
    facts = judge_facts(spec)
    remember(session, spec, facts)
    todo = {}
    for path, made_from in PRODUCTS.items():
        todo[path] = outstanding(session, path, made_from, facts.identity, spec.over)
    if not any(todo.values()):
        return
    from nsteer.classifier import Classifier

    classifier = Classifier(facts.source, facts.revision, spec.device)
    for path, made_from in PRODUCTS.items():
        if todo[path]:
            session.store.prepare([arrays.judged_group(path, session.study, classifier.classes)])
            fill(session, classifier, path, made_from, todo[path])


def remember(session: Session, spec: Any, facts: models.Facts) -> None:
    """Keeps who judges, and how emotions map to classes, beside what is judged."""
    settings = {**spec.model_dump(exclude={"device"}), "identity": facts.identity}
    session.store.prepare([arrays.judges_group([spec.classifier])])
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
    of = cells.steering if made_from == "generations" else cells.unsteered
    wanted: dict[tuple, int] = {}
    for facts in session.study.facts:
        wanted |= of(session.study, facts)
    there = set(wanted) - set(session.store.missing(made_from, wanted))
    judged = {key: fp for key, fp in cells.judged(wanted, identity, over).items() if key in there}
    if path not in session.store.groups():
        session.progress.stage(path, len(judged), 0)
        return judged
    return session.missing(path, path, judged)


def fill(session: Session, classifier: Any, path: str, made_from: str, todo: Mapping[tuple, int]) -> None:
    """Judges the missing cells of one product, a wave of texts at a time."""
    group = session.store.read(made_from)
    axes = arrays.CONDITION if path == "judged" else ("model", "op")
    blocks = {cells.op_label(block): block for block in session.study.plan.steer}
    clock = Clock()
    for keys in waves(list(todo), len(group.prompt) * len(group.seed)):
        texts = {key: cell_texts(session, group, axes, key, blocks[key[1]]) for key in keys}
        flat = [text for one in texts.values() for text in one.values.ravel().tolist()]
        found = classifier.probabilities(flat)
        share, start = clock.share(len(keys)), 0
        for key, one in texts.items():
            part = found[start : start + one.size].reshape(*one.shape, len(classifier.classes))
            start += one.size
            dims = {"prompt": one.prompt.values, "seed": one.seed.values, "class": classifier.classes}
            data = arrays.dataset(dims, {"probability": (tuple(dims), part.astype(np.float32))})
            session.commit(path, path, key, data, todo[key], share)
            session.finished(path, key)


def waves(keys: Sequence[tuple], rows: int) -> list[Sequence[tuple]]:
    step = max(1, WAVE // max(rows, 1))
    return [keys[i : i + step] for i in range(0, len(keys), step)]


def cell_texts(session: Session, group: xr.Dataset, axes: Sequence[str], key: tuple, block: Any) -> xr.DataArray:
    """What the judge reads of one cell, over (prompt, seed)."""
    prompts = prompt_set(block.prompts, session.study.texts)
    where = {**dict(zip(axes, key, strict=True)), "prompt": list(prompts), "seed": block.seeds}
    texts = group.text.sel(where).load()
    assert session.study.plan.judge is not None
    if session.study.plan.judge.over == "all":
        shown = [[prompts[p] + text for text in texts.sel({"prompt": p}).values.tolist()] for p in prompts]
        return texts.copy(data=np.array(shown, object))
    return texts
