"""The groups of `reads:` and `edits:`: streams that were recorded, texts that were written under edits, receipts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from nsteer.models.facts import Facts
from nsteer.models.templates import shown
from nsteer.plan.check import Study, conditions, strengths_of, swept
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Calibrated, Edit
from nsteer.stages.arrays.base import (
    RECEIPT,
    attributes,
    depths,
    number,
    prompt_columns,
    sites_of,
    text,
    text_variables,
    union,
)
from nsteer.stages.arrays.steering import calibration_group
from nsteer.stages.job import IN_A_CHUNK
from nsteer.stages.keys import Edited, EditSearch, Read
from nsteer.stages.products import path
from nsteer.store import Group, Variable

EDITED = Edited._fields
RECEIPTS = {"reads": "read_receipts", "streams": "stream_receipts", "edited": "edited_receipts"}
"""Kind of group that is kept in chunks of prompts -> that of the receipts of its edits."""


def edited_axes(study: Study) -> dict[str, list]:
    """Labels of the cube of conditions written by hand: the union of their strengths, in the plan's order."""
    own = conditions(study.plan)
    return {
        "model": [facts.label for facts in study.facts],
        "edit": list(own),
        "strength": union([strengths_of(edits) for edits in own.values()]),
        "prompt": list(prompt_set(study.plan.prompts, study.texts)),
        "seed": list(study.plan.seeds),
    }


def texts_of(prompts: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of prompts that go by other labels, as an auxiliary coordinate."""
    texts = {label: shown(text) for label, text in prompts.items()}
    if all(label == text for label, text in texts.items()):
        return {}
    meaning = "the prompt, before any chat template"
    return {"prompt_text": (Variable(("prompt",), "string", meaning, ""), list(texts.values()))}


def along(study: Study) -> dict[str, Any]:
    """What stands beside the labels of the plan's own prompts: their texts, and columns of the rows they came from."""
    prompts = prompt_set(study.plan.prompts, study.texts)
    return {**prompt_columns(study, list(prompts)), **texts_of(prompts)}


def edited_groups(study: Study) -> list[Group]:
    """Continuations under each condition of `edits:`, with a receipt for every edit at every layer; what conditions
    mean, and the strengths that were searched for."""
    axes, generate = edited_axes(study), study.plan.generate
    groups = [conditions_group(study, axes)] + [edit_calibration_group(study, axes)] * bool(searched(study))
    if generate is None:
        return groups
    coords = {**axes, "token": list(range(generate.max_new_tokens))}
    chunks = {"prompt": IN_A_CHUNK["edited"]}
    texts = Group("edited", coords, text_variables(tuple(axes)), EDITED, chunks, along(study), attributes("edited"))
    return [*groups, texts, receipts_group("edited_receipts", study, axes, texts)]


def searched(study: Study) -> dict[str, Calibrated]:
    """The conditions whose strengths are to be found, and how."""
    strengths = {label: swept(edits) for label, edits in study.plan.edits.items()}
    return {label: spec for label, spec in strengths.items() if isinstance(spec, Calibrated)}


def edit_calibration_group(study: Study, axes: Mapping[str, list]) -> Group:
    """The strengths found for every condition whose label is a target, with the curves on which they were found."""
    own = searched(study)
    labels = {"model": axes["model"], "edit": list(own), "strength": union([about.targets for about in own.values()])}
    return calibration_group("calibration_edits", EditSearch._fields, labels)


def conditions_group(study: Study, axes: Mapping[str, list]) -> Group:
    """What each label of the `edit` axis means, and the prompts' texts."""
    variables = {
        "settings": text(("edit",), "the edits of the condition, as JSON"),
        "prompt_text": text(("edit", "prompt"), "the prompt, before any chat template"),
    }
    return Group(
        "edits", {dim: axes[dim] for dim in ("edit", "prompt")}, variables, ("edit",), attrs=attributes("edits")
    )


def condition_data(study: Study, edits: Sequence[Edit]) -> xr.Dataset:
    """What the label of a condition means, as the cell of its group."""
    prompts = prompt_set(study.plan.prompts, study.texts)
    settings = json.dumps([edit.model_dump(mode="json") for edit in edits])
    data = {"settings": ((), settings), "prompt_text": (("prompt",), list(map(shown, prompts.values())))}
    return xr.Dataset(data, coords={"prompt": list(prompts)})


def receipts_group(name: str, study: Study, coords: Mapping[str, Sequence], of: Group) -> Group:
    """Receipts of the edits of each condition, in cells like those `of` a group; `entry` counts the edits in a
    condition's list."""
    own = conditions(study.plan)
    entries = list(range(max(map(len, own.values())) or 1))
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    dims = (*coords, "entry", "layer")
    variables = {name: number(dims, meaning) for name, meaning in RECEIPT.items()}
    sites = [[edits[i].site if i < len(edits) else "" for i in entries] for edits in own.values()]
    sited = sites_of(name, ("edit", "entry"), sites)
    return Group(name, {**coords, "entry": entries, "layer": layers}, variables, of.cell, of.chunks, *sited)


def reads_groups(study: Study, facts: Facts, product: str, longest: int) -> list[Group]:
    """Recorded streams with the receipts of their edits: pooled ones, `reads`, or a vector a position, `streams`.

    longest : positions of the longest prompt, which pooled ones do not need
    """
    layers, depth = depths(facts)
    axes, whole = edited_axes(study), product == "streams"
    names = [name for name, read in study.plan.reads.items() if (read.pooling is None) == whole]
    base: dict[str, Sequence] = {
        "model": [facts.label],
        "read": names,
        **{dim: axes[dim] for dim in ("edit", "strength", "prompt")},
    }
    middle = {"position": list(range(longest))} if whole else {}
    coords: dict[str, Sequence] = {**base, **middle, "layer": layers, "d_model": list(range(facts.d_model))}
    variables = {"stream": number(tuple(coords), "what stood at the read's site", compress=True)}
    site, attrs = sites_of(product, ("read",), [study.plan.reads[name].site for name in names])
    chunks, beside_them = {"prompt": IN_A_CHUNK[product]}, {**depth, **site, **along(study)}
    reads_group = Group(path(product, facts.label), coords, variables, Read._fields, chunks, beside_them, attrs)
    return [reads_group, receipts_group(path(RECEIPTS[product], facts.label), study, base, reads_group)]
