"""Turns two stores, or two runs of one, into what differs: knobs, versions, cells, and numbers by their labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.stages.products import product_of
from nsteer.store import Store
from nsteer.store.runs import PATH as RUNS
from nsteer.upkeep.stored import StoredCell, alike, committed_cells, equal_arrays, one_axis, pairs


@dataclass
class Compared:
    """One variable over the cells that both hold. Largest differences over elements that both have; `missing`: elements
    that only one has. `worst` and `first` name a cell, and the labels within it."""

    group: str
    variable: str
    cells: int = 0
    equal: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    missing: int = 0
    worst: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)


@dataclass
class Difference:
    """Everything that differs between a and b; a knob or label that one has not is None there."""

    a: str
    b: str
    knobs: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    versions: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    protocols: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    only_a: dict[str, list[dict]] = field(default_factory=dict)
    only_b: dict[str, list[dict]] = field(default_factory=dict)
    settings: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)
    variables: list[Compared] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """No knob, no protocol, no cell and no number differs; versions may."""
        apart = any(variable.equal < variable.cells for variable in self.variables)
        return not (
            self.knobs or self.protocols or self.only_a or self.only_b or self.settings or self.damaged or apart
        )


def stores(a: Store, b: Store) -> Difference:
    """What differs between two stores. Knobs and versions are those of their last runs."""
    a.check_version()
    b.check_version()
    one_axis([a, b])
    difference = Difference(str(a.path), str(b.path))
    told = [_environment(store, -1) for store in (a, b)]
    _environments(difference, *told)
    difference.protocols = _apart(_protocols(a), _protocols(b))
    for path in dict.fromkeys([*a.groups(), *b.groups()]):
        kind = product_of(path)
        if not (kind.diary or kind.reported):
            _group(difference, path, dict(committed_cells(a, path)), dict(committed_cells(b, path)))
    return difference


def runs(store: Store, first: int, second: int) -> Difference:
    """What differs between two runs of one store: knobs and versions, and the cells that each made last.

    A store keeps the last values of a cell, so the numbers of two runs can not be compared in one.
    """
    store.check_version()
    difference = Difference(f"{store.path} run {first}", f"{store.path} run {second}")
    _environments(difference, _environment(store, first), _environment(store, second))
    for path in store.groups():
        if not product_of(path).diary:
            for run, side in ((first, difference.only_a), (second, difference.only_b)):
                mine = [_name(cell) for _, cell in committed_cells(store, path) if cell.record.run == run]
                if mine:
                    side[path] = mine
    return difference


# ---- knobs ------------------------------------------------------------------------------------------------------


def _environment(store: Store, run: int) -> dict[str, Any]:
    """What a run was told and where it ran; empty for a store without runs. StoreError for a run that is not there."""
    leaf = store.leaf(RUNS)
    count = leaf.dims["run"] if leaf else 0
    if run < 0:
        run += count
    if not 0 <= run < count:
        if run == -1:
            return {}
        raise StoreError(f"run {run} is not in {store.path}; it holds {count}, numbered from 0")
    text = store.read(RUNS).environment.isel({"run": run}).item()
    return json.loads(text) if text else {}


def _environments(difference: Difference, a: dict[str, Any], b: dict[str, Any]) -> None:
    plans = [dict(flat({**told.get("resolved_plan", {}), "store": None})) for told in (a, b)]
    difference.knobs = _apart(*plans)
    others = [{key: value for key, value in told.items() if key not in ("resolved_plan", "seed")} for told in (a, b)]
    difference.versions = _apart(*(dict(flat(other)) for other in others))


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Nested JSON data as dotted path -> leaf."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
        for place, inner in enumerate(value):
            yield from flat(inner, f"{where}[{place}]")
    else:
        yield where, value


def _apart(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)}


def _protocols(store: Store) -> dict[str, Any]:
    """method.knob -> value, of every method that the store explains."""
    if "methods" not in store.groups():
        return {}
    knobs: dict[str, Any] = {}
    for (name,), cell in committed_cells(store, "methods"):
        knobs |= dict(flat(json.loads(cell.values()["protocol"].item()), name))
    return knobs


# ---- cells ------------------------------------------------------------------------------------------------------


def _group(difference: Difference, path: str, a: Mapping[tuple, StoredCell], b: Mapping[tuple, StoredCell]) -> None:
    for mine, other, side in ((a, b, difference.only_a), (b, a, difference.only_b)):
        if alone := [_name(cell) for key, cell in mine.items() if key not in other]:
            side[path] = alone
    compared: dict[str, Compared] = {}
    for key in (key for key in a if key in b):
        left, right = a[key], b[key]
        if left.record.fingerprint != right.record.fingerprint:
            difference.settings[path] = difference.settings.get(path, 0) + 1
        if not (left.sound and right.sound):
            difference.damaged[path] = difference.damaged.get(path, 0) + 1
            continue
        if alike(left, right):
            for name in left.structure["variables"]:
                variable = compared.setdefault(name, Compared(path, name))
                variable.cells, variable.equal = variable.cells + 1, variable.equal + 1
            continue
        for name, x, y, labels in pairs(left, right):
            _compare(compared.setdefault(name, Compared(path, name)), left, x, y, labels)
    difference.variables += compared.values()


def _compare(compared: Compared, cell: StoredCell, x: np.ndarray, y: np.ndarray, labels: Mapping[str, list]) -> None:
    """Adds a cell's values to what is known of a variable."""
    compared.cells += 1
    if x.dtype == y.dtype and equal_arrays(x, y):
        compared.equal += 1
        return
    if x.dtype.kind in "TU" or y.dtype.kind in "TU" or x.dtype.kind == "b":
        at = _at(x != y)
        if not compared.first:
            compared.first = {
                **_name(cell),
                **_labels(labels, at),
                "a": _python_value(x[at]),
                "b": _python_value(y[at]),
            }
        return
    x, y = x.astype(np.float64), y.astype(np.float64)
    both = np.isfinite(x) & np.isfinite(y)
    compared.missing += int((np.isnan(x) != np.isnan(y)).sum())
    apart = np.where(both, np.abs(x - y), 0.0)
    scale = np.maximum(np.abs(x), np.abs(y))
    relative = np.divide(apart, scale, out=np.zeros_like(apart), where=both & (scale > 0))
    compared.max_rel = max(compared.max_rel, float(relative.max()))
    if apart.max() > compared.max_abs or not compared.worst:
        at = _at(apart == apart.max())
        compared.max_abs = max(compared.max_abs, float(apart.max()))
        compared.worst = {**_name(cell), **_labels(labels, at)}


def _python_value(value: Any) -> Any:
    return value if isinstance(value, str) else value.item()


def _at(where: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(where)[0])


def _name(cell: StoredCell) -> dict[str, Any]:
    return dict(zip(cell.leaf.cell, cell.leaf.cell_labels(cell.at), strict=True))


def _labels(labels: Mapping[str, list], at: tuple[int, ...]) -> dict[str, Any]:
    return {dim: labels[dim][i] for dim, i in zip(labels, at, strict=True)}
