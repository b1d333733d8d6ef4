"""Removes what a look at a store found to be unwanted, and nothing else: each thing is looked at again as it goes.

On a disk this is done under the lock that commits respect, so no commit comes in between the second look and the
removal. Object storage has no such lock: there a cell is looked at once more behind its removal, and one that came in
between is dropped whole, to be computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nsteer.arrays.products import product_of
from nsteer.errors import StoreError
from nsteer.store import Store, structure
from nsteer.store.leases import Leases
from nsteer.store.runs import PATH as RUNS
from nsteer.upkeep import gc
from nsteer.upkeep.survey import Leftover

BATCH = 256
"""Cells that are removed under one hold of the lock: commits of a run wait for no longer."""


def collect(store: Store, found: gc.Plan, told: Callable[[int], None] = lambda files: None) -> None:
    """Removes what was planned, and says in `found` what went and what was spared.

    A cell goes as long as its record is the one that was seen: its record first, then its files, so that a kill leaves
    leftovers and no broken cell. Beside a run that is at work, or where one was since the look, only cells of results
    go: what it has prepared and explained may have no cell yet. `told` hears of every cell and file that is done with.
    """
    cells, groups, leftovers = found.cells, found.groups, found.leftovers
    found.cells, found.groups, found.leftovers, found.deleted = [], {}, [], True
    for start in range(0, len(cells), BATCH):
        with store.changing("collect"):
            quiet = _quiet(store, found)
            for one in cells[start : start + BATCH]:
                if not quiet and not product_of(one.group).wanted:
                    found.waiting += 1
                elif _gone(store, one):
                    found.cells.append(one)
                else:
                    found.spared += 1
                told(1)
    with store.changing("collect"):
        if _quiet(store, found):
            found.groups = {path: size for path, size in groups.items() if _empty(store, path)}
        found.waiting += len(groups) - len(found.groups)
        if found.groups:
            structure.retire(store.place, found.groups, [path for path in store.groups() if path not in found.groups])
    for start in range(0, len(leftovers), BATCH):
        with store.changing("collect"):
            quiet = _quiet(store, found)
            found.leftovers += _swept(store, leftovers[start : start + BATCH], quiet, found)
        told(len(leftovers[start : start + BATCH]))
    store.forget()


def _quiet(store: Store, found: gc.Plan) -> bool:
    """Whether no run is at work on the store, and none was since the look."""
    if Leases(store.path).living(locked=store.place.guarded):
        return False
    leaf = store.leaf(RUNS)
    return (leaf.dims["run"] if leaf else 0) == found.runs


def _gone(store: Store, one: gc.Waste) -> bool:
    """Removes a cell whose record is the one that was seen. False where another stands there, or none."""
    record, *files = one.files
    if store.place.read(record) != one.record:
        return False
    store.drop_at(one.group, one.position)
    for name in files:
        store.place.delete(name)
    if not store.place.guarded and store.place.read(record) is not None:  # a commit came in between
        store.drop_at(one.group, one.position)
        return False
    return True


def _empty(store: Store, path: str) -> bool:
    """Whether a group keeps no cell. One whose records can not be read is not known to be empty."""
    try:
        leaf = store.leaf(path)
        return leaf is not None and not len(leaf.records(fresh=True))
    except StoreError:
        return False


def _swept(store: Store, leftovers: Sequence[Leftover], quiet: bool, found: gc.Plan) -> list[Leftover]:
    """Removes leftover files that are as they were seen. Beside a run, chunks alone: it may be about to publish."""
    stamps, gone = store.place.stamps([one.name for one in leftovers]), []
    for one, stamp in zip(leftovers, stamps, strict=True):
        if not stamp:
            continue
        if stamp != one.stamp or not (quiet or (one.kind == "orphan" and store.place.guarded)):
            found.spared += 1
            continue
        store.place.delete(one.name)
        gone.append(one)
    return gone
