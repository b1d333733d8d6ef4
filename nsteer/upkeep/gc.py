"""Turns a store and the plans that are still of interest into what may go (`collect` removes it when told to).

Kept without question: every cell that a plan wants, every run (the diary of the store), every group that this does
not know, and every file that is not nsteer's. Axes keep their labels: a label without cells costs a few bytes, and
taking one away would shift all cells behind it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nsteer.plan.check import Study
from nsteer.stages.products import product_of
from nsteer.store import Store, chunks
from nsteer.store.leaf import Leaf
from nsteer.store.runs import PATH as RUNS
from nsteer.upkeep import survey
from nsteer.upkeep.stored import StoredCell, committed_cells
from nsteer.upkeep.wanted import Wanted, names, searched, wanted_cells

HOUR = 3600.0
"""Age from which a leftover file is surely nobody's: a cell that is being written has young files."""


@dataclass(frozen=True)
class Waste:
    """A cell that no plan wants: its group, its labels, why, its files (the record first), and its record as seen."""

    group: str
    cell: tuple
    position: tuple[int, ...]
    why: str
    files: tuple[str, ...]
    record: bytes
    bytes: int


@dataclass
class Plan:
    """What may go: cells, groups left without any that no plan names, leftover files; and what is too young.

    runs : that the store knew of at the look
    spared : cells and files that are not as they were seen, or that a run may be writing: they stay
    waiting : cells and groups that can only go when no run is at work
    """

    cells: list[Waste] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    leftovers: list[survey.Leftover] = field(default_factory=list)
    young: int = 0
    kept: int = 0
    runs: int = 0
    spared: int = 0
    waiting: int = 0
    deleted: bool = False

    @property
    def bytes(self) -> int:
        files = [cell.bytes for cell in self.cells] + [leftover.bytes for leftover in self.leftovers]
        return sum(files) + sum(self.groups.values())


def plan(store: Store, studies: Sequence[Study], older: float = HOUR) -> Plan:
    """What no study wants any more. Raises StoreError where there is no store, or one that must be repaired first."""
    store.check_version()
    sizes = dict(store.place.walk())
    leaves = {path: leaf for path in store.groups() if (leaf := store.leaf(path))}
    needed, removals = wanted_cells(studies, store), Plan(runs=leaves[RUNS].dims["run"] if RUNS in leaves else 0)
    brought = {cell: record.fingerprint for cell, record in store.committed("imports").items()}
    labels: dict[str, set[str]] = {}
    for study in studies:
        for group, known in names(study).items():
            labels.setdefault(group, set()).update(known)
    searches = set[str]().union(*map(searched, studies))
    owned: set[str] = set()
    runs, makers = set[int](), list[StoredCell]()
    for path, leaf in leaves.items():
        if path == "programs":
            continue
        for key, cell in committed_cells(store, path):
            files = tuple(chunk.name for chunk in chunks.of_cell(leaf, cell.at, chunks.structure_of(leaf, cell.record)))
            owned |= {*files, leaf.record_file(cell.at)}
            if path.startswith("vectors/") and brought.get(key) == cell.record.fingerprint:
                removals.kept += 1  # from a file: no run makes it again
                continue
            kept = product_of(path).searched and named(leaf, key)["op"] in searches  # what a search walked through
            if why := "" if kept else _unwanted(path, key, cell.record.fingerprint, needed, labels):
                removals.cells.append(_waste(cell, key, why, files, sizes))
                continue
            removals.kept += 1
            runs.add(cell.record.run)
            if "program" in leaf.variables:
                makers.append(cell)
    if leaf := leaves.get("programs"):
        programs: set[str] = set()  # read where no run vouches for a program: each is in a file of its cell
        for key, cell in committed_cells(store, "programs"):
            files = tuple(chunk.name for chunk in chunks.of_cell(leaf, cell.at, chunks.structure_of(leaf, cell.record)))
            owned |= {*files, leaf.record_file(cell.at)}
            (digest,) = key
            if cell.record.run in runs or digest in (programs := programs or _programs(makers)):
                removals.kept += 1
            else:
                removals.cells.append(_waste(cell, key, "no cell that stays was made by it", files, sizes))
    removals.groups = _empty(leaves, removals, needed, sizes)
    owned = owned.union(*map(survey.needed_files, leaves.values()))
    gone = tuple(f"{path}/" for path in removals.groups)
    for leftover in survey.leftovers(store, leaves, owned, sizes):
        if leftover.kind == "unknown" or leftover.name.startswith(gone):
            continue
        if store.place.age(leftover.name) < older:
            removals.young += 1
        else:
            removals.leftovers.append(leftover)
    return removals


def named(leaf: Leaf, key: tuple) -> dict[str, Any]:
    """The labels of a cell by the dims that they are on."""
    return dict(zip(leaf.cell, key, strict=True))


def _programs(cells: Iterable[StoredCell]) -> set[str]:
    """The digests of the programs that cells were made by."""
    digests = {""}
    for cell in cells:
        chosen = {**cell.structure, "variables": ["program"]}
        with cell.leaf.reading():
            digests.update(chunks.values(cell.leaf, cell.at, chosen)["program"].ravel().tolist())
    return digests


def _unwanted(path: str, key: tuple, number: int, needed: Wanted, labels: Mapping[str, set[str]]) -> str:
    """Why a cell may go; "" for one that stays."""
    product = product_of(path)
    if product.explains:
        label, *_ = key
        return "" if label in labels.get(path, ()) else f"no plan names this {product.explains}"
    if not product.wanted:
        return ""
    asked = needed.get(path, {}).get(key)
    if not asked:
        return "no plan asks for it"
    return "" if number in asked else "made with other settings than any plan's"


def _waste(cell: StoredCell, key: tuple, why: str, files: Iterable[str], sizes: Mapping[str, int]) -> Waste:
    every = (cell.leaf.record_file(cell.at), *(name for name in files if name in sizes))
    size = sum(sizes.get(name, 0) for name in every)
    return Waste(cell.leaf.path, key, cell.at, why, every, cell.record.pack(), size)


def _empty(leaves: Mapping[str, Leaf], removals: Plan, needed: Wanted, sizes: Mapping[str, int]) -> dict[str, int]:
    """Groups of results that no plan names and that keep no cell -> bytes besides those of its cells."""
    gone: dict[str, int] = {}
    for path, leaf in leaves.items():
        if not product_of(path).wanted or needed.get(path):
            continue
        going = [cell for cell in removals.cells if cell.group == path]
        if len(going) == len(leaf.records()):
            mine = sum(size for name, size in sizes.items() if name.startswith(f"{path}/"))
            gone[path] = mine - sum(cell.bytes for cell in going)
    return gone
