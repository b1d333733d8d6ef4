"""What the groups of a store have in common: their names, the form of their variables and coordinates, datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.models.facts import Facts
from nsteer.plan.check import Study
from nsteer.plan.schema import Plan
from nsteer.stages.keys import Condition
from nsteer.store import Variable

SITE = "resid_post"
RECEIPT = {
    "touched": "positions touched by the edit, over prompt and generated tokens",
    "relative_change": "mean of ‖Δ‖/‖h‖ over touched positions",
    "cosine": "mean cosine of the residual stream before and after, over touched positions",
    "injected": "mean of ‖Δ‖ over touched positions",
}
CONDITION = Condition._fields
ROW = ("prompt", "seed")


def text(dims: tuple[str, ...], long_name: str) -> Variable:
    """A variable of text."""
    return Variable(dims, "string", long_name)


def number(dims: tuple[str, ...], long_name: str, units: str = "1", compress: bool = False) -> Variable:
    """A variable of numbers."""
    return Variable(dims, "float32", long_name, units, compress)


def count(dims: tuple[str, ...], long_name: str) -> Variable:
    """A variable of counts."""
    return Variable(dims, "int32", long_name)


def depths(facts: Facts) -> tuple[list[int], dict[str, Any]]:
    """The layers of a model, and the auxiliary coordinate of their relative depth."""
    layers = list(range(facts.n_layers))
    depth = np.array(layers, np.float64) / facts.n_layers
    return layers, {"depth": (Variable(("layer",), "float64", "relative depth, layer / n_layers"), depth)}


def prompt_columns(study: Study, prompts: Sequence[str]) -> dict[str, Any]:
    """The columns that the files and datasets of prompts bring along, as auxiliary coordinates; empty where none."""
    return {
        name: (Variable(("prompt",), "string", "column of the prompt's row", ""), [values.get(p, "") for p in prompts])
        for name, values in study.beside.items()
        if any(prompt in values for prompt in prompts)
    }


def vector_axes(plan: Plan) -> dict[str, list[str]]:
    """The labels of all vectors of a plan: methods, then sources of directions; emotions, then names of directions."""
    sources = [spec.source for spec in plan.directions.values()]
    return {
        "method": union([list(plan.methods), sources]),
        "emotion": union([plan.emotion_labels() if plan.methods else [], list(plan.directions)]),
    }


def union(lists: Sequence[Sequence]) -> list:
    """Every item of the lists once, in their order."""
    return list(dict.fromkeys(item for labels in lists for item in labels))


def sites_of(product: str, dims: tuple[str, ...], sites: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Auxiliary coordinates and attributes of a group: the site an attribute, and a label where it is another one."""
    site_labels = np.array(sites, object)
    if set(site_labels.flat) <= {SITE, ""}:
        return {}, attributes(product, site=SITE)
    meaning = "what was read or edited; empty: as the group's attribute says"
    return {"site": (Variable(dims, "string", meaning, ""), site_labels)}, attributes(product, site=SITE)


def text_variables(dims: tuple[str, ...]) -> dict[str, Variable]:
    """The variables of continuations."""
    return {
        "text": text(dims, "continuation"),
        "n_tokens": count(dims, "tokens of the continuation, end of text included"),
        "token_id": Variable(
            (*dims, "token"), "int32", "token ids of the continuation, -1 beyond its end", compress=True
        ),
        "program": text(dims, "the program that wrote it: a label of the group programs"),
    }


def attributes(product: str, **attrs: Any) -> dict[str, Any]:
    """The attributes of a group."""
    return {"product": product, "product_version": 1, **attrs}


def ragged(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Token ids of unequal length as [row, token] int32, -1 beyond the end."""
    out = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def dataset(dims: Mapping[str, Sequence], variables: Mapping[str, tuple[tuple[str, ...], Any]]) -> xr.Dataset:
    """A Dataset of variables (dims, values) whose labels are `dims`; text stays text."""
    data_vars = {}
    for name, (own, values) in variables.items():
        array = np.asarray(values)
        data_vars[name] = (own, array.astype(object) if array.dtype.kind in "UT" else array)
    return xr.Dataset(data_vars, coords={dim: list(labels) for dim, labels in dims.items()})


def texts_data(prompts: Sequence[str], seeds: Sequence[int], rows: Mapping[tuple, Mapping[str, Any]]) -> xr.Dataset:
    """Continuations of one cell: `rows[prompt, seed]` holds text, tokens and program."""
    dims: dict[str, Sequence] = {"prompt": list(prompts), "seed": list(seeds)}
    keys = [(p, s) for p in prompts for s in seeds]
    shape = [len(labels) for labels in dims.values()]
    width = max(max(len(rows[key]["tokens"]) for key in keys), 1)
    own = tuple(dims)

    def column(name: str) -> np.ndarray:
        return np.array([rows[key][name] for key in keys], object).reshape(shape)

    ids = ragged([rows[key]["tokens"] for key in keys], width).reshape(*shape, width)
    lengths = np.array([len(rows[key]["tokens"]) for key in keys], np.int32).reshape(shape)
    return dataset(
        {**dims, "token": range(width)},
        {
            "text": (own, column("text")),
            "n_tokens": (own, lengths),
            "token_id": ((*own, "token"), ids),
            "program": (own, column("program")),
        },
    )


def receipt_values(receipt: np.ndarray) -> np.ndarray:
    """Sums of a receipt [..., 4] as touched and means in the order of RECEIPT; NaN means where nothing was touched."""
    touched = receipt[..., :1]
    means = np.divide(receipt[..., 1:], touched, out=np.full_like(receipt[..., 1:], np.nan), where=touched > 0)
    return np.concatenate([touched, means], -1)
