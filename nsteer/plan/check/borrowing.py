"""Checks of directions from a store: that it holds the vector, of this model, at the layers where edits use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from nsteer.errors import StoreError, did_you_mean
from nsteer.models.facts import Facts
from nsteer.plan import formulas, layers
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import stands_for
from nsteer.plan.reader import Path
from nsteer.plan.schema import Edit, Plan, Stored
from nsteer.science.axis import CONCEPT, EMOTION


def borrowed(label: str, spec: Stored) -> Any:
    """A model's vector in a store, DataArray (layer, d_model) float32; None where no finished cell holds it.

    Raises StoreError for a store that can not be read, InputError for a damaged cell.
    """
    from nsteer.store import Store, slug  # here: few plans borrow, and checking one stays light
    from nsteer.store.inputs import read_whole

    store, path, key = Store(spec.path), f"vectors/{slug(label)}", (label, spec.method, spec.label)
    record = store.committed(path).get(key) if store.exists else None
    return None if record is None else read_whole(store, path, {key: record.fingerprint})[key].vector


def misfit(vector: Any, facts: Facts) -> str:
    """Why a vector over (layer, d_model) can not be one of this model; "" where it can."""
    if vector.sizes["d_model"] != facts.d_model:
        return f"of width {vector.sizes['d_model']} where {facts.label} has {facts.d_model}"
    beyond = [layer for layer in vector.layer.values.tolist() if layer not in range(facts.n_layers)]
    return f"at layer {max(beyond)} where {facts.label} has {facts.n_layers} layers" if beyond else ""


@dataclass(frozen=True)
class Known:
    """A direction from a store, and the layers of a model at which it is a number."""

    name: str
    facts: Facts
    layers: frozenset[int]


def all_borrowed(check: Checker, plan: Plan, sound: set[str]) -> None:
    """Each direction from a store, then each edit that uses one. `sound` are the directions that can be worked out."""
    stored_directions = [known for name in plan.directions if name in sound for known in _direction(check, plan, name)]
    for condition, edits in plan.edits.items() if stored_directions else ():
        for i, edit in enumerate(edits):
            _edit(check, plan, ("edits", condition, i), edit, sound, stored_directions)


def _direction(check: Checker, plan: Plan, name: str) -> Iterator[Known]:
    """Where the vector is a number, in every model; a problem for the first model that has none there."""
    spec = plan.directions[name].store
    path: Path = ("directions", name, "store")
    if spec is None or not spec.label or any(check.fails(*path, field) for field in Stored.model_fields):
        return
    if not (os.path.isdir(spec.path) and check.document.may_read(FilePath(spec.path))):
        return  # said elsewhere
    for facts in check.facts:
        try:
            vector = borrowed(facts.label, spec)
            if vector is None:
                _lost(check, path, spec, facts)
                return
        except StoreError as error:
            check.add((*path, "path"), f"{spec.path!r}: {error}", "a store whose vector can be read")
            return
        if why := misfit(vector, facts):
            check.add(path, f"a vector {why}", "one of this model", "another model has the same label in that store")
            return
        there = vector.notnull().all("d_model").values
        yield Known(name, facts, frozenset(vector.layer.values[there].tolist()))


def _lost(check: Checker, path: Path, spec: Stored, facts: Facts) -> None:
    """The problem of a vector that a store does not hold, at what is wrong with how it is named."""
    from nsteer.store import Store, slug

    there = list(Store(spec.path).committed(f"vectors/{slug(facts.label)}"))
    of_model = [(method, emotion) for model, method, emotion in there if model == facts.label]
    of_method = [emotion for method, emotion in of_model if method == spec.method]
    if not of_model:
        check.add(path, f"{spec.path!r}, without vectors of it", f"a store with vectors of {facts.label}")
    elif not of_method:
        hint = did_you_mean(spec.method, list(dict.fromkeys(method for method, _ in of_model)))
        check.add((*path, "method"), repr(spec.method), f"a method of {facts.label} in that store", hint)
    else:
        hint, field = did_you_mean(spec.label, of_method), EMOTION if spec.concept is None else CONCEPT
        check.add((*path, field), repr(spec.label), f"a finished vector of {spec.method} in that store", hint)


def _edit(check: Checker, plan: Plan, path: Path, edit: Edit, sound: set[str], stored_directions: list[Known]) -> None:
    """Every layer at which an edit uses a vector from a store must be among those that the vector has."""
    for known in stored_directions:
        try:
            at = layers.resolve(edit.layers, known.facts.n_layers)
            same = edit.vector_layer == "same"
            vectors_at = at if same else layers.resolve(edit.vector_layer, known.facts.n_layers)
        except LookupError:
            continue  # said elsewhere
        own = [edit.direction, *([edit.when.direction] if edit.when and edit.when.direction else ())]
        uses = [("layers" if same else "vector_layer", vectors_at, name) for name in own]
        uses += [("layers", at, edit.reference)] if edit.reference else []
        for field, needed, name in uses:
            if name not in sound or known.name not in _made_of(plan, name):
                continue
            if lost := sorted(set(needed) - known.layers):
                have = layers.label(tuple(sorted(known.layers)), known.facts.n_layers) if known.layers else "none"
                what = f"layer {lost[0]} of {known.facts.label}, at which the store has no vector {known.name!r}"
                check.add((*path, field), what, "layers at which it has one", f"it has {have}")
                return


def _made_of(plan: Plan, name: str) -> set[str]:
    """The directions of the plan that one rests on, itself among them."""
    text = plan.directions[name].formula
    meanings = [stands_for(plan, dotted) for dotted in formulas.names(formulas.parse(text))] if text else []
    return {name}.union(*(_made_of(plan, where[0]) for kind, *where in meanings if kind == "direction"))
