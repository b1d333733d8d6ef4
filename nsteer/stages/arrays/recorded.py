"""The groups of `reads` and `edits`, which know of no emotions: streams, continuations and receipts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.plan.prompts import prompt_set, shown
from nsteer.stages.arrays.base import RECEIPT, about, beside, depths, number, sites_of, text_variables
from nsteer.stages.keys import Read
from nsteer.store import Group, Variable, slug


def _conditions(study: Study) -> list[str]:
    return ["none", *study.plan.edits]


def texts_of(prompts: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of prompts that go by other labels, as an auxiliary coordinate."""
    texts = {label: shown(text) for label, text in prompts.items()}
    if all(label == text for label, text in texts.items()):
        return {}
    meaning = "the prompt, before any chat template"
    return {"prompt_text": (Variable(("prompt",), "string", meaning, ""), list(texts.values()))}


def edited_groups(study: Study) -> list[Group]:
    """Continuations under each condition of `edits:`, with a receipt for every edit at every layer."""
    generate = study.plan.generate
    assert generate is not None
    dims = ("model", "edit", "prompt")
    prompts = prompt_set(study.plan.prompts, study.texts)
    coords = {
        "model": [facts.label for facts in study.facts],
        "edit": _conditions(study),
        "prompt": list(prompts),
    }
    texts = Group(
        "edited",
        {**coords, "token": list(range(generate.max_new_tokens))},
        text_variables(dims),
        dims[:2],
        auxiliary={**beside(study, list(prompts)), **texts_of(prompts)},
        attrs=about("edited"),
    )
    return [texts, receipts_group("edited_receipts", study, coords)]


def receipts_group(path: str, study: Study, coords: Mapping[str, Sequence]) -> Group:
    """Receipts of the edits of each condition; `entry` counts the edits in a condition's list."""
    entries = list(range(max((len(edits) for edits in study.plan.edits.values()), default=0) or 1))
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    dims = (*coords, "entry", "layer")
    variables = {name: number(dims, meaning) for name, meaning in RECEIPT.items()}
    cell = tuple(dim for dim in coords if dim != "prompt")
    conditions = [study.plan.edits.get(label, []) for label in _conditions(study)]
    sites = [[edits[i].site if i < len(edits) else "" for i in entries] for edits in conditions]
    sited = sites_of(path, ("edit", "entry"), sites)
    return Group(path, {**coords, "entry": entries, "layer": layers}, variables, cell, {}, *sited)


def reads_groups(study: Study, facts: Facts, longest: int) -> list[Group]:
    """Recorded streams: pooled ones in `reads`, whole ones (a vector a position) in `streams`."""
    layers, depth = depths(facts)
    prompts = prompt_set(study.plan.prompts, study.texts)
    base: dict[str, Sequence] = {
        "model": [facts.label],
        "read": [],
        "edit": _conditions(study),
        "prompt": list(prompts),
    }
    along = {**beside(study, list(prompts)), **texts_of(prompts)}
    tail = {"layer": layers, "d_model": list(range(facts.d_model))}
    pooled = [name for name, read in study.plan.reads.items() if read.pooling is not None]
    whole = [name for name, read in study.plan.reads.items() if read.pooling is None]
    cell, found = Read._fields, []
    for product, names, middle in (("reads", pooled, {}), ("streams", whole, {"position": list(range(longest))})):
        if names:
            coords: dict[str, Sequence] = {**base, "read": names, **middle, **tail}
            variables = {"stream": number(tuple(coords), "what stood at the read's site", compress=True)}
            path = f"{product}/{slug(facts.label)}"
            site, attrs = sites_of(product, ("read",), [study.plan.reads[name].site for name in names])
            found.append(Group(path, coords, variables, cell, {}, {**depth, **site, **along}, attrs))
    receipts = {**base, "read": list(study.plan.reads)}
    return [*found, receipts_group(f"read_receipts/{slug(facts.label)}", study, receipts)]
