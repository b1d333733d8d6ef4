"""Turns stores from several machines into one, cell by cell through the ordinary commit, so every promise holds.

A cell that several stores hold is the same when its fingerprint and its values are; otherwise it is a conflict, and
no store's word is taken unless the caller says whose. Doing it again does what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nsteer.errors import StoreError
from nsteer.stages.products import product_of
from nsteer.store import Group, Store, Variable, chunks
from nsteer.store.group import chunk_dim
from nsteer.store.leaf import CELL_ATTR, CHUNKS_ATTR, LABELS_ATTR, ORDER_ATTR, STRUCTURES_ATTR, Leaf
from nsteer.store.runs import PATH as RUNS
from nsteer.upkeep.stored import StoredCell, committed_cells, equal, one_axis

Prefer = Literal["first", "last", None]


@dataclass(frozen=True)
class Conflict:
    """A cell, or with no labels a whole group, that the stores do not agree on."""

    group: str
    cell: Mapping[str, Any]
    stores: list[str]
    what: str

    def __str__(self) -> str:
        labels = ", ".join(f"{dim} {label}" for dim, label in self.cell.items()) or "the whole group"
        return f"{self.group} · {labels}: {self.what} ({', '.join(self.stores)})"


@dataclass
class Merged:
    """What a merge did: cells copied and found there by group, conflicts, damaged cells that another store holds
    whole, runs that came in."""

    copied: dict[str, int] = field(default_factory=dict)
    same: dict[str, int] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)
    damaged: list[Conflict] = field(default_factory=list)
    preferred: int = 0
    runs: int = 0


# ---- groups -----------------------------------------------------------------------------------------------------


def group_of(leaf: Leaf) -> Group:
    """A published group as `prepare` takes it."""
    chunks = set(map(chunk_dim, leaf.chunks))
    hidden = {CELL_ATTR, CHUNKS_ATTR, LABELS_ATTR, ORDER_ATTR, STRUCTURES_ATTR, "coordinates"}
    return Group(
        leaf.path,
        {dim: labels for dim, labels in leaf.labels.items() if dim not in chunks},
        {name: _variable(leaf, name) for name in leaf.variables},
        leaf.cell,
        leaf.chunks,
        {name: (_variable(leaf, name), leaf.beside(name)) for name in leaf.auxiliary},
        {key: value for key, value in leaf.attrs.items() if key not in hidden},
        leaf.attrs.get(ORDER_ATTR, ""),
    )


def _variable(leaf: Leaf, name: str) -> Variable:
    document = leaf.arrays[name]
    attrs, dtype, filler = document["attributes"], document["data_type"], document["fill_value"]
    packed = any(codec["name"] == "blosc" for codec in document["codecs"])
    return Variable(
        tuple(document["dimension_names"]),
        dtype,
        attrs["long_name"],
        attrs.get("units", ""),
        packed,
        float(filler) if "float" in dtype else filler,
    )


# ---- the merge --------------------------------------------------------------------------------------------------


def merge(stores: Sequence[Store], out: Store, prefer: Prefer = None) -> Merged:
    """Brings the cells of all stores into `out`, which may hold some already. They are only read.

    Cells on which they differ are left out, and named, unless `prefer` says whose word counts: the first store's
    (`out` before the others) or the last's. Raises StoreError where one is no store, or is `out` itself.
    """
    for store in stores:
        store.check_version()
        if store.place.name == out.place.name:
            raise StoreError(f"{out.path} is both merged and the result; name another output")
    one_axis([*stores, out])
    merged = Merged()
    with out.adding():
        indices = _runs(stores, out, merged)
        paths = dict.fromkeys(path for store in stores for path in store.groups() if path != RUNS)
        for path in paths:
            if _prepare(stores, out, path, merged):
                _cells(stores, out, path, prefer, indices, merged)
    return merged


def _prepare(stores: Sequence[Store], out: Store, path: str, merged: Merged) -> bool:
    """Brings the labels of a group into `out`. False when the stores can not share it."""
    for store in stores:
        try:
            if leaf := store.leaf(path):
                out.prepare([group_of(leaf)])
        except StoreError as error:
            merged.conflicts.append(Conflict(path, {}, [str(store.path)], str(error)))
            return False
    return True


def _runs(stores: Sequence[Store], out: Store, merged: Merged) -> dict[str, dict[int, int]]:
    """Appends the runs of all stores. Store -> index of a run there -> its index in `out`."""
    by_store: dict[str, dict[int, int]] = {}
    for store in stores:
        indices = by_store.setdefault(store.place.name, {})
        leaf = store.leaf(RUNS)
        if leaf is None:
            continue
        out.prepare([group_of(leaf)])
        here = out.leaf(RUNS)
        assert here is not None
        for at, label in enumerate(leaf.labels["run"]):
            indices[at] = here.position((label,))[0]
        there = dict(committed_cells(out, RUNS))
        for key, cell in committed_cells(store, RUNS):
            data = cell.data()
            known = there.get(key)
            if known is None or (data.finished.item() and not known.data().finished.item()):  # it has ended since
                record = cell.record
                out.commit(
                    RUNS, key, data, fingerprint=record.fingerprint, run=indices[cell.at[0]], seconds=record.seconds,
                    finished=record.finished,
                )  # fmt: skip
                merged.runs += known is None
    return by_store


def _cells(stores: Sequence[Store], out: Store, path: str, prefer: Prefer, indices: Mapping, merged: Merged) -> None:
    """Brings the cells of one group into `out`."""
    candidates: dict[tuple, list[StoredCell]] = {}
    for store in [out, *stores]:
        for key, cell in committed_cells(store, path):
            candidates.setdefault(key, []).append(cell)
    for key, cells in candidates.items():
        chosen = _choose(path, cells, prefer, merged)
        if chosen is None:
            continue
        if chosen.store is out:
            merged.same[path] = merged.same.get(path, 0) + (len(cells) > 1)
            continue
        record = chosen.record
        run = indices[chosen.store.place.name].get(record.run, -1)
        try:
            data = chosen.data()
            out.commit(
                path, key, data, fingerprint=record.fingerprint, run=run, seconds=record.seconds,
                finished=record.finished, partial=True,
            )  # fmt: skip
        except StoreError as error:
            merged.conflicts.append(_conflict(path, [chosen], str(error)))
            continue
        merged.copied[path] = merged.copied.get(path, 0) + 1


def _choose(path: str, cells: list[StoredCell], prefer: Prefer, merged: Merged) -> StoredCell | None:
    """The cell that counts; None, and a conflict noted, when nobody said which."""
    if len(cells) > 1 and (sound := [cell for cell in cells if cell.sound]) and len(sound) < len(cells):
        merged.damaged += [
            _conflict(path, [cell], "damaged here; another store's was taken") for cell in cells if cell not in sound
        ]
        cells = sound
    first, differing = cells[0], ""
    for other in cells[1:]:
        if other.record.fingerprint != first.record.fingerprint:
            differing = "other fingerprints: made from other settings or data"
            break
        try:
            if not equal(first, other):
                differing = "the same fingerprint, other values"
                break
        except StoreError as error:
            differing = str(error)
            break
    if not differing:
        return first
    if _account(path, cells):  # who computed, not what: each run keeps its own account
        return max(cells, key=lambda cell: cell.record.finished)
    if prefer is None:
        merged.conflicts.append(_conflict(path, cells, differing))
        return None
    merged.preferred += 1
    return cells[0] if prefer == "first" else cells[-1]


def _account(path: str, cells: list[StoredCell]) -> bool:
    """Whether cells that differ tell of the same thing, each its own story: which file it came from, and when."""
    numbers = {cell.record.fingerprint for cell in cells}
    return numbers == {0} or (product_of(path).diary and len(numbers) == 1 and all(cell.sound for cell in cells))


def _conflict(path: str, cells: list[StoredCell], what: str) -> Conflict:
    names = list(dict.fromkeys(str(cell.store.path) for cell in cells))
    return Conflict(path, chunks.cell_name(cells[0].leaf, cells[0].at), names, what)
