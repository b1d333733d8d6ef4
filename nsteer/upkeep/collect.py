"""Removes what a look at a store found to be unwanted, and nothing else: each thing is looked at again as it goes.

On a disk this is done under the lock that commits respect, so no commit comes in between the second look and the
removal. Object storage has no such lock: there nothing goes before somebody says that no run is at work (`guarded`),
and a cell that is committed in between all the same is dropped whole, to be computed again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeVar

from nsteer.errors import StoreError
from nsteer.stages.products import product_of
from nsteer.store import Store, chunks, structure
from nsteer.store.leases import Leases
from nsteer.store.runs import PATH as RUNS
from nsteer.system.names import chunk_index
from nsteer.upkeep import gc
from nsteer.upkeep.survey import Leftover
from nsteer.upkeep.verify import Told

T = TypeVar("T", gc.Waste, Leftover)
BATCH = 256
"""Cells that are removed under one hold of the locks: commits of a run wait for no longer."""


def guarded(store: Store, alone: bool) -> None:
    """Raises StoreError where nothing keeps commits of other machines out while cells go, and nobody said there are
    none."""
    if not (store.place.guarded or alone):
        raise StoreError(
            f"{store.path}: object storage has no lock that commits respect, so a cell that a run on another machine "
            "commits now could go with what is removed; run this again with --alone when no run is at work there"
        )


def collect(store: Store, removals: gc.Plan, told: Told = lambda group, done: None, alone: bool = False) -> None:
    """Removes what was planned, and says in `removals` what went and what was spared.

    A cell goes as long as its record is the one that was seen: its record first, then its files, so that a kill leaves
    leftovers and no broken cell. Beside a run that is at work, or where one was since the look, only cells of results
    go: what it has prepared and explained may have no cell yet. `told` hears of a group how many more cells and files
    are done with. On object storage it takes `alone`, the word that nobody else is at work: StoreError without.
    """
    guarded(store, alone)
    cells, groups, leftovers = removals.cells, removals.groups, removals.leftovers
    removals.cells, removals.groups, removals.leftovers, removals.deleted = [], {}, [], True
    for path, some in _batches(cells):
        with store.changing("collect"), store.place.committing(path):
            if product_of(path).wanted or _quiet(store, removals):
                gone = [waste for waste in some if _gone(store, waste)]
                removals.cells += gone
                removals.spared += len(some) - len(gone)
            else:
                removals.waiting += len(some)
        told(path, len(some))
    with store.changing("collect"):
        if groups and _quiet(store, removals):
            removals.groups = {path: size for path, size in groups.items() if _empty(store, path)}
            structure.retire(
                store.place, removals.groups, [path for path in store.groups() if path not in removals.groups]
            )
        removals.waiting += len(groups) - len(removals.groups)
    for path, few in _batches(leftovers):
        with store.changing("collect"), store.place.committing(path):
            removals.leftovers += _swept(store, few, _quiet(store, removals), removals)
        told(path, len(few))
    store.forget()


def _batches(things: Sequence[T]) -> Iterator[tuple[str, list[T]]]:
    """Cells or files of one group at a time, in their order."""
    for path, same in itertools.groupby(things, lambda waste: waste.group):
        some = list(same)
        for start in range(0, len(some), BATCH):
            yield path, some[start : start + BATCH]


def _quiet(store: Store, removals: gc.Plan) -> bool:
    """Whether no run is at work on the store, and none was since the look."""
    if Leases(store.path).living(locked=store.place.guarded):
        return False
    leaf = store.leaf(RUNS)
    return (leaf.dims["run"] if leaf else 0) == removals.runs


def _gone(store: Store, waste: gc.Waste) -> bool:
    """Removes a cell whose record is the one that was seen. False where another stands there, or none."""
    record, *files = waste.files
    if store.place.read(record) != waste.record:
        return False
    store.place.delete(record)
    for name in files:
        store.place.delete(name)
    return store.place.guarded or not store.place.delete(record)  # a commit came in between: to be done again


def _empty(store: Store, path: str) -> bool:
    """Whether a group keeps no cell. One whose records can not be read is not known to be empty."""
    try:
        leaf = store.leaf(path)
        return leaf is not None and not len(leaf.records(fresh=True))
    except StoreError:
        return False


def _swept(store: Store, leftovers: Sequence[Leftover], quiet: bool, removals: gc.Plan) -> list[Leftover]:
    """Removes leftover files that are as they were seen. Beside a run, chunks alone: it may be about to publish."""
    stamps, gone = store.place.stamps([leftover.name for leftover in leftovers]), []
    for leftover, stamp in zip(leftovers, stamps, strict=True):
        if not stamp:
            continue
        if (
            stamp != leftover.stamp
            or _taken(store, leftover)
            or not (quiet or (leftover.kind == "orphan" and store.place.guarded))
        ):
            removals.spared += 1
            continue
        store.place.delete(leftover.name)
        gone.append(leftover)
    return gone


def _taken(store: Store, leftover: Leftover) -> bool:
    """Whether a chunk is of a finished cell by now: it may have been seen while its cell was being committed."""
    index, leaf = chunk_index(leftover.name.rpartition("/")[2]), store.leaf(leftover.group) if leftover.group else None
    if leftover.kind != "orphan" or leaf is None or index is None:
        return False
    try:
        position = chunks.position(leaf, leftover.name.split("/")[-2], index)
        if position is None or (record := leaf.record(position)) is None:
            return False
        own = chunks.of_cell(leaf, position, chunks.structure_of(leaf, record))
        return any(chunk.name == leftover.name for chunk in own)
    except StoreError:
        return True  # what stands there can not be read: nothing is known of it
