"""Turns a declared group, over what is published of it, into the documents and labels that it needs.

Labels are only appended, axes only grow, and what is published keeps its chunk grid, so a writer that still
holds the old shapes is right about where its cell lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.store import documents
from nsteer.store.bound import labels_number
from nsteer.store.group import (
    CELL,
    CELL_FIELD,
    CELL_FIELDS,
    Group,
    Variable,
    cell_dims,
    check,
    check_slugs,
    chunk_dim,
    chunk_shape,
    labels_of,
)
from nsteer.store.leaf import CELL_ATTR, CHUNKS_ATTR, LABELS_ATTR, ORDER_ATTR, STRUCTURES_ATTR, Leaf

LABEL_CHUNK = 4096  # labels of one axis in one file: appending rewrites it in one rename
AXES = {
    "model": "model",
    "method": "how the steering vector was made",
    "emotion": "emotion",
    "concept": "concept",
    "layer": "index of the decoder block, from 0; the residual stream after it",
    "d_model": "component of the residual stream",
    "sample": "sample",
    "strength": "steering strength",
    CELL_FIELD: "what the commit record of a cell holds; fingerprint NaN: not computed",
}
LABEL_DTYPES = {str: "string", int: "int64", float: "float64"}


def check_same(leaf: Leaf, group: Group) -> None:
    """Raises StoreError when what is on disk could not hold the group as it is now declared."""
    pairs: dict[str, tuple[Any, Any]] = {
        "cells": (leaf.cell, tuple(group.cell)),
        "chunks": (leaf.chunks, dict(group.chunks)),
    }
    for key in ("product", "product_version"):
        pairs[key] = (leaf.attrs.get(key), documents.as_json(group.attrs).get(key))
    declared = {**group.variables, **{name: variable for name, (variable, _) in group.auxiliary.items()}}
    for name, variable in declared.items():
        if array := leaf.arrays.get(name):
            pairs[name] = (
                _said(array["dimension_names"], array["data_type"], array["fill_value"]),
                _said(variable.dims, variable.dtype, variable.filler),
            )
    for name, (stored, wanted) in pairs.items():
        if stored != wanted:
            raise StoreError(
                f"{leaf.place.name}: {name} of {leaf.path!r} is {stored} in the store, this plan wants {wanted}; "
                f"name another store, or delete the folder {leaf.path!r} in this one to compute it again"
            )


def _said(dims: Sequence[str], dtype: str, fill: Any) -> str:
    fill = float(fill) if "float" in dtype else fill  # JSON spells NaN as text
    return f"{dtype} over ({', '.join(dims)}), fill {fill!r}"


def union(leaf: Leaf | None, group: Group) -> dict[str, list]:
    """Every dim -> published labels, then the new ones in the order given."""
    labels = dict(leaf.labels) if leaf else {}
    for dim, given in group.coords.items():
        old, new = labels.get(dim, []), labels_of(group.path, dim, given)
        if old and new and type(old[0]) is float and type(new[0]) is int:
            new = [float(label) for label in new]  # strengths [1, 2] on an axis of floats
        known = set(old)
        fresh = [label for label in new if label not in known]
        labels[dim] = labels_of(group.path, dim, [*old, *fresh]) if fresh else old
        if not labels[dim]:
            raise StoreError(f"{group.path}: dim {dim!r} has no labels; give at least one")
    for dim, size in group.chunks.items():
        labels[chunk_dim(dim)] = list(range(-(-len(labels[dim]) // size)))
    if "model" in labels:
        check_slugs(group.path, labels["model"])
    return labels


def array_documents(leaf: Leaf | None, group: Group, labels: Mapping[str, list]) -> dict[str, dict]:
    """Name -> document of every array of the group, grown to the labels."""
    sizes = {dim: len(values) for dim, values in labels.items()} | {CELL_FIELD: len(CELL_FIELDS)}
    arrays = dict(leaf.arrays) if leaf else {}
    cut = cell_dims(group.cell, group.chunks)
    for dim, values in [*labels.items(), (CELL_FIELD, list(CELL_FIELDS))]:
        if dim not in arrays:
            label = Variable((dim,), LABEL_DTYPES[type(values[0])], AXES.get(dim, dim), "")
            arrays[dim] = _document(label, sizes, {}, [LABEL_CHUNK])
    for name, (variable, _) in group.auxiliary.items():
        if name not in arrays:
            chunks = [LABEL_CHUNK] if len(variable.dims) == 1 else [256] * len(variable.dims)
            arrays[name] = _document(variable, sizes, {}, chunks)
    for name, variable in group.variables.items():
        if name not in arrays:
            arrays[name] = _document(variable, sizes, cut)
    if CELL not in arrays:
        record = Variable((*group.cell, CELL_FIELD), "float64", "commit record of a cell", "")
        arrays[CELL] = _document(record, sizes, dict.fromkeys(group.cell, 1))
    return {name: {**doc, "shape": [sizes[dim] for dim in doc["dimension_names"]]} for name, doc in arrays.items()}


def _document(
    variable: Variable, sizes: Mapping[str, int], cut: Mapping[str, int], chunks: Sequence[int] | None = None
) -> dict:
    attrs = {"long_name": variable.long_name} | ({"units": variable.units} if variable.units else {})
    shape = [sizes[dim] for dim in variable.dims]
    chunks = chunks or chunk_shape(variable, sizes, cut)
    return documents.array_document(
        variable.dims, shape, chunks, variable.dtype, variable.filler, attrs, variable.compress
    )


def new_labels(leaf: Leaf | None, labels: Mapping[str, list]) -> dict[str, np.ndarray]:
    """The label arrays that differ from what is published."""
    if leaf is None:
        labels = {**labels, CELL_FIELD: list(CELL_FIELDS)}
    old = leaf.labels if leaf else {}
    return {dim: array_of(values) for dim, values in labels.items() if values != old.get(dim)}


def array_of(values: list) -> np.ndarray:
    """Labels or texts as an array that zarr stores with variable length."""
    text = isinstance(values[0], str)
    return np.array(values, dtype=np.dtypes.StringDType() if text else None)


def new_auxiliary(leaf: Leaf | None, group: Group, labels: Mapping[str, list]) -> dict[str, np.ndarray]:
    """The auxiliary arrays that differ from what is published; published values stay where none are given."""
    new_arrays = {}
    for name, (variable, given) in group.auxiliary.items():
        shape = [len(labels[dim]) for dim in variable.dims]
        values = np.full(shape, variable.filler, dtype=_numpy_dtype(variable.dtype))
        old = leaf.beside(name) if leaf and name in leaf.arrays else None
        if old is not None:
            values[tuple(map(slice, old.shape))] = old
        _place(values, group, variable, name, given, labels)
        if old is None or old.shape != values.shape or not _same(old, values):
            new_arrays[name] = values
    return new_arrays


def _place(values: np.ndarray, group: Group, variable: Variable, name: str, given: Any, labels: Mapping) -> None:
    at = []
    for dim in variable.dims:
        position = {label: index for index, label in enumerate(labels[dim])}
        at.append([position[label] for label in labels_of(group.path, dim, group.coords[dim])])
    given = np.asarray(given)
    if given.shape != tuple(map(len, at)):
        raise StoreError(f"{group.path}: {name!r} must have shape {tuple(map(len, at))}, found {given.shape}")
    values[np.ix_(*at)] = given


def _numpy_dtype(dtype: str) -> Any:
    return np.dtypes.StringDType() if dtype == "string" else np.dtype(dtype)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def attributes(
    leaf: Leaf | None, group: Group, arrays: Mapping[str, dict], labels: Mapping[str, list]
) -> dict[str, Any]:
    """Attributes are written once: the first words about a group stay. Its structures are appended to, and the numbers
    of its labels are those of what it publishes."""
    attrs = documents.as_json(group.attrs) | (dict(leaf.attrs) if leaf else {})
    attrs |= {CELL_ATTR: list(group.cell), CHUNKS_ATTR: dict(group.chunks)}
    attrs |= {ORDER_ATTR: group.ordered_as} if group.ordered_as else {}
    names = sorted({*(leaf.auxiliary if leaf else []), *group.auxiliary})
    attrs |= {"coordinates": " ".join(names)} if names else {}
    known, now = list(leaf.structures) if leaf else [], structure(arrays, group.cell, names)
    attrs[LABELS_ATTR] = {dim: labels_number(values) for dim, values in labels.items()}
    return attrs | {STRUCTURES_ATTR: known if known[-1:] == [now] else [*known, now]}


def structure(arrays: Mapping[str, dict], cell: Sequence[str], auxiliary: Sequence[str]) -> dict[str, Any]:
    """What a cell of these arrays holds: its variables, and the sizes of the dims that do not make cells."""
    dims = {name for name, doc in arrays.items() if doc["dimension_names"] == [name]}
    variables = sorted({*arrays} - {*dims, *auxiliary, CELL, CELL_FIELD})
    inner = {
        dim: size for name in variables for dim, size in zip(arrays[name]["dimension_names"], arrays[name]["shape"])
    }
    return {"variables": variables, "sizes": {dim: inner[dim] for dim in sorted(inner) if dim not in cell}}


def check_all(groups: Sequence[Group]) -> None:
    """Raises StoreError for the first group that could not be written, before anything is."""
    for group in groups:
        check(group)
        try:
            documents.as_json(group.attrs)
        except (TypeError, ValueError) as error:
            raise StoreError(f"{group.path}: attributes must be JSON data: {error}") from error
    models = dict.fromkeys(model for group in groups for model in group.coords.get("model", ()))
    check_slugs("this plan", models)
