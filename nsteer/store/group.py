"""Turns a declared group of arrays into checked shapes: labels, chunks, fills."""

from __future__ import annotations

import math
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.science.axis import EMOTION, named, outward_name, word
from nsteer.system.names import COMPONENT, slug

CELL = "cell"  # the array of commit records
CELL_FIELD = "cell_field"  # its last dim
CELL_FIELDS = ("fingerprint", "run", "finished", "seconds", "structure", "content", "labels")
FILLS = {"float32": math.nan, "float64": math.nan, "int32": -1, "int64": -1, "bool": False, "string": ""}
CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class Variable:
    """An array of a group. `fill` None means: NaN for floats, -1 for integers, "" for text, False for bool."""

    dims: tuple[str, ...]
    dtype: str
    long_name: str
    units: str = "1"
    compress: bool = False
    fill: Any = None

    @property
    def filler(self) -> Any:
        """What stands where nothing was written."""
        return FILLS[self.dtype] if self.fill is None else self.fill


@dataclass(frozen=True)
class Group:
    """One leaf of the store: the arrays that share labels, and the cells in which they are committed.

    `coords` holds the labels of every dim. `cell` names the dims that make a cell: one commit each. With
    `chunks={"sample": 16}` the cell dim is `sample_chunk`; chunk k holds labels [16k, 16k + 16) of `sample` in
    the order in which they were published; with `ordered_as`, in that of the group of this path, all of whose labels
    are then published here too, so that chunk k of both holds the same. `auxiliary` maps a name to (Variable, values
    aligned with `coords`).
    """

    path: str
    coords: Mapping[str, Sequence]
    variables: Mapping[str, Variable]
    cell: tuple[str, ...]
    chunks: Mapping[str, int] = field(default_factory=dict)
    auxiliary: Mapping[str, tuple[Variable, Any]] = field(default_factory=dict)
    attrs: Mapping[str, Any] = field(default_factory=dict)
    ordered_as: str = ""


def under(group: Group, name: str) -> Group:
    """A group that the package declares, under the name that a store has for the axis of emotions."""
    if name == EMOTION:
        return group

    def variable(declared: Variable) -> Variable:
        dims = tuple(outward_name(dim, name) for dim in declared.dims)
        return replace(declared, dims=dims, long_name=word(declared.long_name))

    with named(name):
        return replace(
            group,
            coords={outward_name(dim, name): labels for dim, labels in group.coords.items()},
            variables={outward_name(n, name): variable(declared) for n, declared in group.variables.items()},
            cell=tuple(outward_name(dim, name) for dim in group.cell),
            auxiliary={outward_name(n, name): (variable(v), values) for n, (v, values) in group.auxiliary.items()},
        )


def chunk_dim(dim: str) -> str:
    """The cell dim that counts the chunks of `dim`."""
    return f"{dim}_chunk"


def labels_of(where: str, dim: str, given: Iterable) -> list:
    """The labels of one dim as str, int or float of Python, all of one type.

    Raises StoreError when they are mixed, repeated, not finite, or of another type.
    """
    labels = given.tolist() if isinstance(given, np.ndarray) else list(given)
    if not {str, int, float}.issuperset(map(type, labels)):
        labels = list(map(_python_label, labels))
    kinds = sorted({type(label).__name__ for label in labels})
    if len(kinds) > 1 or not {"str", "int", "float"}.issuperset(kinds):
        kind_names = " and ".join(kinds)
        raise StoreError(f"{where}: labels of {dim!r} must be all text, all int or all float; found {kind_names}")
    if kinds == ["float"] and not all(map(math.isfinite, labels)):
        raise StoreError(f"{where}: a label of {dim!r} is not a finite number")
    if len(set(labels)) < len(labels):
        label, times = Counter(labels).most_common(1)[0]
        raise StoreError(f"{where}: label {label!r} of {dim!r} is given {times} times")
    return labels


def _python_label(label: Any) -> Any:
    if isinstance(label, str):
        return str(label)
    if isinstance(label, bool | np.bool_):
        return bool(label)
    if isinstance(label, numbers.Integral):
        return int(label)
    return float(label) if isinstance(label, numbers.Real) else label


def check(group: Group) -> None:
    """Raises StoreError for a group that could not be committed safely, saying what to change."""
    _check_names(group)
    for dim, size in group.chunks.items():
        if dim not in group.coords or chunk_dim(dim) not in group.cell or size < 1:
            raise StoreError(
                f"{group.path}: chunks of {dim!r} need its labels, a size of at least 1 and {chunk_dim(dim)!r} "
                f"among the cell dims; found size {size}, cell {group.cell}"
            )
    for axis in group.cell:
        if axis not in group.coords and axis not in map(chunk_dim, group.chunks):
            raise StoreError(f"{group.path}: cell dim {axis!r} has no labels; labelled: {sorted(group.coords)}")
    for name, variable in group.variables.items():
        _check_variable(group, name, variable)
        apart = [axis for axis in cell_dims(group.cell, group.chunks) if axis not in variable.dims]
        if apart:  # two cells would share a chunk, and two writers would lose each other's work
            raise StoreError(f"{group.path}: {name!r} must have every cell dim; it lacks {apart}")
    for name, (variable, _) in group.auxiliary.items():
        _check_variable(group, name, variable)


def _check_names(group: Group) -> None:
    for component in group.path.split("/"):
        if not COMPONENT.fullmatch(component):
            raise StoreError(
                f"group path {group.path!r}: {component!r} must be lower-case letters, digits, '.', '_' or '-'; "
                "see slug()"
            )
    names = [
        *group.coords,
        *map(chunk_dim, group.chunks),
        *group.variables,
        *group.auxiliary,
        CELL,
        CELL_FIELD,
    ]
    folded = Counter(name.lower() for name in names)
    if twice := [name for name in names if folded[name.lower()] > 1]:
        raise StoreError(f"{group.path}: {twice[0]!r} is taken: names must differ in more than case")
    if bad := [name for name in names if not name.isidentifier()]:
        raise StoreError(f"{group.path}: {bad[0]!r} can not name an array: use letters, digits and '_'")


def _check_variable(group: Group, name: str, variable: Variable) -> None:
    if variable.dtype not in FILLS:
        raise StoreError(f"{group.path}: dtype {variable.dtype!r} of {name!r} is not one of {sorted(FILLS)}")
    if unknown := [dim for dim in variable.dims if dim not in group.coords]:
        raise StoreError(
            f"{group.path}: dim {unknown[0]!r} of {name!r} has no labels; labelled: {sorted(group.coords)}"
        )
    if len(set(variable.dims)) < len(variable.dims):
        raise StoreError(f"{group.path}: a dim of {name!r} is named twice: {variable.dims}")


def cell_dims(cell: Sequence[str], chunks: Mapping[str, int]) -> dict[str, int]:
    """Data dims along which cells are cut -> labels of that dim in one cell (1, or the size of a chunk)."""
    cut = {chunk_dim(dim): (dim, size) for dim, size in chunks.items()}
    return dict(cut.get(axis, (axis, 1)) for axis in cell)


def chunk_shape(variable: Variable, sizes: Mapping[str, int], cut: Mapping[str, int]) -> tuple[int, ...]:
    """One cell a chunk; where there are layers of `d_model`, split along `layer` to about 1 MiB a chunk."""
    shape = {dim: cut.get(dim, max(1, sizes[dim])) for dim in variable.dims}
    if {"layer", "d_model"} <= set(shape) and "layer" not in cut and variable.dtype != "string":
        layer_bytes = np.dtype(variable.dtype).itemsize * math.prod(shape.values()) // shape["layer"]
        shape["layer"] = max(1, min(shape["layer"], CHUNK_BYTES // layer_bytes))
    return tuple(shape.values())


def check_slugs(path: str, models: Iterable[str]) -> None:
    """Raises StoreError when two model labels would share one path component."""
    seen: dict[str, str] = {}
    for model in models:
        other = seen.setdefault(slug(model), model)
        if other != model:
            raise StoreError(
                f"{path}: models {other!r} and {model!r} would share the name {slug(model)!r} in the store; "
                "use another store for one of them"
            )
