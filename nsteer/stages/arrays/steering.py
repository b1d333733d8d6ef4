"""The groups of steered generations: texts, receipts, what labels mean, the strengths that were searched for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.models.templates import shown
from nsteer.plan.check import Study, layer_sets
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Calibrated, Steer
from nsteer.science import calibration
from nsteer.stages import cells
from nsteer.stages.arrays.base import (
    CONDITION,
    RECEIPT,
    ROW,
    attributes,
    count,
    dataset,
    number,
    prompt_columns,
    receipt_values,
    sites_of,
    text,
    text_variables,
    union,
)
from nsteer.stages.keys import Prompted, Unsteered
from nsteer.store import Group, Variable


def steering_axes(study: Study) -> dict[str, list]:
    """Labels of the steering cube: the union over models and steer entries, in the plan's order."""
    plan = study.plan
    return {
        "model": [facts.label for facts in study.facts],
        "op": [entry.label for entry in plan.steer],
        "layer_set": union([list(layer_sets(b.layers, f.n_layers)) for b in plan.steer for f in study.facts]),
        "method": union([cells.steered_methods(plan, entry) for entry in plan.steer]),
        "emotion": union([cells.steered_emotions(plan, entry) for entry in plan.steer]),
        "strength": union([entry.labels() for entry in plan.steer]),
        "control": union([cells.controls(entry) for entry in plan.steer]),
        "prompt": union([list(prompt_set(entry.prompts, study.texts)) for entry in plan.steer]),
        "seed": union([entry.seeds for entry in plan.steer]),
    }


def steering_groups(study: Study) -> list[Group]:
    """Texts and numbers of the steered continuations, and of the unsteered ones beside them."""
    axes = steering_axes(study)
    tokens = list(range(max(entry.generate.max_new_tokens for entry in study.plan.steer)))
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    dims = (*CONDITION, *ROW)
    unsteered = {name: axes[name] for name in ("model", "op", "prompt", "seed")}
    receipts = {name: number((*dims, "layer"), meaning) for name, meaning in RECEIPT.items()}
    sites = [entry.site for entry in study.plan.steer]
    groups = [
        Group(
            "generations",
            {**axes, "token": tokens},
            text_variables(dims),
            CONDITION,
            auxiliary=prompt_columns(study, axes["prompt"]),
            attrs=attributes("generations"),
        ),
        Group("steering", {**axes, "layer": layers}, receipts, CONDITION, {}, *sites_of("steering", ("op",), sites)),
        settings_group(study, axes),
        *calibration_groups(study, axes),
    ]
    if entries := max(len(entry.also) for entry in study.plan.steer):
        further = {name: number((*dims, "entry"), f"{meaning}, at all its layers") for name, meaning in RECEIPT.items()}
        coords = {**axes, "entry": list(range(entries))}
        groups.append(Group("steering_also", coords, further, CONDITION, attrs=attributes("steering_also")))
    if any("zero" in entry.controls for entry in study.plan.steer):
        groups.append(
            Group(
                "unsteered",
                {**unsteered, "token": tokens},
                text_variables(tuple(unsteered)),
                Unsteered._fields,
                auxiliary=prompt_columns(study, axes["prompt"]),
                attrs=attributes("unsteered"),
            )
        )
    if any("prompted" in entry.controls for entry in study.plan.steer):
        asked = prompted_axes(study)
        variables = text_variables(tuple(asked))
        coords = {**asked, "token": tokens}
        groups.append(Group("prompted", coords, variables, Prompted._fields, attrs=attributes("prompted")))
    return groups


def prompted_axes(study: Study) -> dict[str, list]:
    """Labels of the continuations that are asked for in words."""
    axes = steering_axes(study)
    named = {name: axes[name] for name in ("model", "op", "emotion")}
    return {**named, "asked": ["towards", "away"], **{name: axes[name] for name in ROW}}


MEASURED = {
    "kl": "nats: KL(steered ‖ unsteered) of the next-token distributions over the unsteered greedy continuation, mean "
    "over its tokens, then over prompts",
    "perplexity_ratio": "perplexity of the unsteered greedy continuation under the steered model over that under the "
    "unsteered one (geometric mean over tokens, then over prompts)",
}
"""What a calibrated strength is a label of."""


def calibration_groups(study: Study, axes: dict[str, list]) -> list[Group]:
    """The strengths found for every condition whose label is a target, with the curves on which they were found."""
    entries = [entry for entry in study.plan.steer if isinstance(entry.strengths, Calibrated)]
    labels: dict[str, Sequence] = {
        **{name: axes[name] for name in CONDITION},
        "op": [entry.label for entry in entries],
        "method": union([cells.steered_methods(study.plan, entry) for entry in entries]),
        "emotion": union([cells.steered_emotions(study.plan, entry) for entry in entries]),
        "strength": union([entry.labels() for entry in entries]),
    }
    return [calibration_group("calibration", CONDITION, labels)] if entries else []


def calibration_group(path: str, cell: tuple[str, ...], labels: Mapping[str, Sequence]) -> Group:
    """Strengths that were found, and how, by the labels of what they are strengths of."""
    variables = {
        "found": number(cell, "strength found, in the unit of the op's scale; NaN where there is none"),
        "value": number(cell, "value measured at the strength found"),
        "met": Variable(cell, "bool", "whether the value is within the tolerance of the target"),
        "reason": text(cell, "why there is no strength"),
        "monotone": Variable(cell, "bool", "whether the curve never falls with strength, where it was measured"),
        "measure": text(cell, "what the target is of: kl or perplexity_ratio"),
        "rounds": count(cell, "rounds of the search"),
        "batches": count(cell, "forward batches in which the vector's rows travelled"),
        "tried": number((*cell, "trial"), "strengths tried, least first; NaN beyond"),
        "measured": number((*cell, "trial"), "value at each of them"),
    }
    attrs = attributes(path, **{f"strength_{name}": meaning for name, meaning in MEASURED.items()})
    return Group(path, {**labels, "trial": list(range(calibration.TRIALS))}, variables, cell, attrs=attrs)


def calibration_data(search: calibration.Search, measure: str, batches: int) -> xr.Dataset:
    """The end of a search as the cell of its condition."""
    strength, curve = search.strength, sorted(search.tried.items())
    missing = np.full(calibration.TRIALS - len(curve), np.nan)
    values: dict[str, Any] = {
        "found": np.float32(math.nan if strength is None else strength),
        "value": np.float32(math.nan if strength is None else search.tried[strength]),
        "met": strength is not None,
        "reason": search.reason,
        "monotone": search.monotone,
        "measure": measure,
        "rounds": np.int32(search.rounds),
        "batches": np.int32(batches),
    }
    lines = {"tried": [s for s, _ in curve], "measured": [v for _, v in curve]}
    scalars = {name: ((), value) for name, value in values.items()}
    return dataset(
        {"trial": range(calibration.TRIALS)},
        {**scalars, **{name: (("trial",), np.r_[line, missing].astype(np.float32)) for name, line in lines.items()}},
    )


ARMS = ("vector", "random", "zero")
SPLITS = ("tuned", "held-out")


def tuned_group(study: Study) -> Group:
    """The best layer set and strength of every vector, and what they score beside their controls."""
    axes, cell = steering_axes(study), ("model", "op", "method", "emotion")
    both = (*cell, "split", "arm")
    variables = {
        "layer_set": text(cell, "label of the layer set that is best; empty where there is none"),
        "best": number(cell, "label on the axis strength that is best; NaN where there is none"),
        "reason": text(cell, "why there is none"),
        "tried": count(cell, "settings tried"),
        "settings": text(cell, "the search of the plan, its objective and its limits, as JSON"),
        "score": number(both, "mean of the objective over continuations"),
        "low": number(both, "lower end of its interval at 95 %"),
        "high": number(both, "upper end of its interval at 95 %"),
        "n": count(both, "continuations"),
        "ratio": number(both, "perplexity over that of the unsteered continuation, geometric mean"),
    }
    coords: dict[str, Sequence] = {**{name: axes[name] for name in cell}, "split": list(SPLITS), "arm": list(ARMS)}
    return Group("tuned", coords, variables, cell, attrs=attributes("tuned"))


def settings_group(study: Study, axes: dict[str, list]) -> Group:
    """What each label of the `op` axis means, and the prompts' texts."""
    variables = {
        "settings": text(("op",), "the steer entry, as JSON"),
        "prompt_text": text(("op", "prompt"), "the prompt, before any chat template"),
    }
    return Group("ops", {"op": axes["op"], "prompt": axes["prompt"]}, variables, ("op",), attrs=attributes("ops"))


def settings_data(study: Study, entry: Steer) -> xr.Dataset:
    """What the label of a steer entry means, as the cell of its group."""
    prompts = prompt_set(entry.prompts, study.texts)
    said = study.as_json(entry, "steer", study.plan.steer.index(entry))
    data = {
        "settings": ((), json.dumps({k: v for k, v in said.items() if k != "also" or entry.also})),
        "prompt_text": (("prompt",), list(map(shown, prompts.values()))),
    }
    return xr.Dataset(data, coords={"prompt": list(prompts)})


def further_data(receipts: np.ndarray, number: Sequence[int], prompts: list[str], seeds: list[int]) -> xr.Dataset:
    """Receipts of the edits of `also` over (prompt, seed, entry), each over all its layers.

    receipts : [prompt, seed, edit, 4]; number : the entry that each edit is of, below 0 for the entry's own op
    """
    entries = list(range(max(number) + 1))
    summed = np.stack([receipts[:, :, [n == entry for n in number]].sum(2) for entry in entries], 2)
    values = receipt_values(summed).astype(np.float32)
    dims: dict[str, Sequence] = {"prompt": prompts, "seed": seeds, "entry": entries}
    return dataset(dims, {name: (tuple(dims), values[..., i]) for i, name in enumerate(RECEIPT)})
