"""Turns results into committed cells of a Zarr store, and a store back into labelled arrays.

The structure changes only in `prepare`, under a lock. A cell is committed by one chunk of the array `cell`, put
in place by one rename after all its data; no two cells share a file, so different cells need no lock.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import ChangedError, StoreError, did_you_mean
from nsteer.science.axis import AXES, CONCEPT, EMOTION, outward
from nsteer.store import documents, records, runs, structure
from nsteer.store.align import align
from nsteer.store.content import content
from nsteer.store.declare import array_of, check_all
from nsteer.store.group import Group, under
from nsteer.store.leaf import CELL_ATTR, Leaf, leaf_of, reason
from nsteer.store.leases import Leases
from nsteer.store.places import Changed, place_of
from nsteer.store.records import Cell
from nsteer.system.files import is_url
from nsteer.system.fingerprints import fingerprint as fingerprint_of

K = TypeVar("K", bound=tuple)

TRIES = 5
"""Times that a cell is put while others put it."""

FEW = 1024
"""Cells of a larger group that are looked up one by one instead of listing all."""


class Store:
    """A store at a path. Making one touches no disk; `durable` also asks the system to survive a power loss.

    axis : what it is to call the axis of emotions; what it calls it already, when left out
    """

    def __init__(self, path: str | os.PathLike, durable: bool = False, axis: str = ""):
        self.place = place_of(path)
        self.path: Path | str = str(path) if is_url(path) else Path(path)
        self.durable = durable
        self._axis = axis
        self._leaves: dict[str, tuple[bytes, Leaf]] = {}
        self._root: tuple[bytes | None, dict | None] = (None, None)  # its file, and what it says
        self._declared: dict[str, set[str]] = {}  # what commits of this Store must bring

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def exists(self) -> bool:
        """True when an nsteer store of this layout is there. Raises as `check_version` does for anything else."""
        return self._published() is not None

    def _published(self) -> dict | None:
        """The root document as it stands now, looked through again where it changed. Raises as `check_version` does."""
        raw = self.place.read(documents.file_of(""))
        if raw is None or raw != self._root[0]:
            self._root = raw, structure.root_of(self.place, raw)
        return self._root[1]

    def check_version(self) -> None:
        """Raises StoreError when no nsteer store is there, StoreVersionError when it has another layout."""
        if not self.exists:
            raise StoreError(f"no store at {self.path}")

    def prepare(self, groups: Iterable[Group]) -> None:
        """Publishes the union of these groups with what is there. Labels are only appended; nothing is removed.

        Raises StoreError, before this group is touched, for one that the store could not hold safely.
        """
        groups = self._named(groups)
        check_all(groups)
        structure.check_root(self.place)  # foreign data: refused before even a lock file is made beside it
        paths = [group.path for group in groups]
        with self.changing("prepare"):
            if structure.check_root(self.place) is None:
                structure.make_root(self.place)
            leaders = {path: self.leaf(path) for group in groups if (path := group.ordered_as)}
            groups = [structure.ordered(group, leaders.get(group.ordered_as)) for group in groups]
            structure.examine(self.place, groups, [self.leaf(path) for path in paths])
            self.place.sweep(structure.folders(paths))
            for group in groups:
                structure.grow(self.place, group, self.leaf(group.path))
            self._sync()
            structure.publish(self.place, paths)
            self._sync()
        self.declare(groups)

    def declare(self, groups: Iterable[Group]) -> None:
        """Says what this Store's commits to groups must bring, where another process has prepared them."""
        groups = self._named(groups)
        paths = [group.path for group in groups]
        self._declared |= {path: {n for g in groups if g.path == path for n in g.variables} for path in paths}

    @property
    def axis(self) -> str:
        """What the store calls the axis of emotions, or will, as long as it has no cell with one."""
        return self.published_axis() or self._axis or EMOTION

    def published_axis(self) -> str:
        """What the store calls the axis of emotions in its published cells; "" where none has one."""
        members = documents.members(self._published()).values()
        cells = [dim for member in members for dim in member.get("attributes", {}).get(CELL_ATTR, ())]
        return next((name for name in AXES if name in cells), "")

    def _named(self, groups: Iterable[Group]) -> list[Group]:
        """Groups with the axis of emotions under this store's name for it. StoreError where they need another."""
        groups = list(groups)
        there, given = self.published_axis(), {name for name in AXES for group in groups if name in group.cell}
        asked = self._axis or (CONCEPT if CONCEPT in given else there or EMOTION)
        if there and given and asked != there:
            raise StoreError(
                f"{self.path} has the axis {there!r}, what is to go into it the axis {asked!r}: name another store, or "
                f"say `{there}s:` in the plan"
            )
        return [under(group, asked) for group in groups]

    def committed(self, path: str) -> dict[tuple, Cell]:
        """Labels of every committed cell, in published order -> its record; empty when the group is not there."""
        leaf = self.leaf(path)
        commits = leaf.records() if leaf else None
        return dict(zip(leaf.cells_at(commits.positions), commits.cells, strict=True)) if leaf and commits else {}

    def missing(self, path: str, wanted: Mapping[K, int]) -> list[K]:
        """The wanted cells, in their order, that are absent or were committed with another fingerprint."""
        leaf, done = self.leaf(path), dict[tuple, float]()
        if leaf and len(wanted) <= FEW < math.prod(leaf.dims[axis] for axis in leaf.cell):
            done = {cell: record.fingerprint for cell, record in leaf.those(wanted).items()}
        elif leaf and (commits := leaf.records()):
            done = dict(zip(leaf.cells_at(commits.positions), commits.fields[:, 0].tolist(), strict=True))
        return [cell for cell, number in wanted.items() if done.get(cell) != number]

    @contextlib.contextmanager
    def adding(self) -> Iterator[None]:
        """Says while it lasts that this process adds to the store, as a run does: what it has prepared stays beside
        nsteer gc though it has no cell yet. Raises StoreError where the store can not be written."""
        structure.check_root(self.place)  # foreign data: refused before anything is made beside it
        with Leases(self.path).here():
            yield

    def keep_records(self) -> None:
        """Puts the commit records of large groups together, each group's into one file: read at once from then on."""
        for path in self.groups():
            if leaf := self.leaf(path):
                with self._reporting(f"keep the records of {path}"):
                    records.keep(self.place, path, len(leaf.cell))

    def commit(
        self,
        path: str,
        cell: tuple,
        data: xr.Dataset,
        *,
        fingerprint: int,
        run: int = -1,
        seconds: float = 0.0,
        finished: float | None = None,
        partial: bool = False,
    ) -> None:
        """Writes one cell: un-commits it, writes its data, commits it. Different cells may be written at once.

        `data` is over the non-cell dims, with labels; labels it lacks hold the fill, and with `partial` so do
        variables. `finished`: unix seconds, now unless given. Raises StoreError, with the cell untouched, for data
        that do not fit; and, with the cell uncommitted, when the disk refuses.
        """
        leaf = self._leaf_or_raise(path)
        if not 0 <= fingerprint < 2**52:
            raise StoreError(f"{path}: fingerprint {fingerprint} is not a number of 52 bits; use fingerprint()")
        if any(CONCEPT in name for name in leaf.arrays):
            data = outward(data, CONCEPT)
        required = [] if partial else self._declared.get(path, leaf.variables)
        arrays = align(leaf, tuple(cell), data, required)
        extent, position = leaf.extent(tuple(cell)), leaf.position(tuple(cell))
        with self._reporting(f"commit {path} {tuple(cell)!r}"):
            mark = content(arrays) if path != runs.PATH else -1  # how a run ended is written after its commit
            done = time.time() if finished is None else finished
            now = len(leaf.structures) - 1
            held = int(leaf.bound(np.array([position]), now)[0])
            record = Cell(fingerprint, run, done, seconds, now, mark, held)
            slices = {
                name: tuple(extent.get(dim, slice(None)) for dim in leaf.arrays[name]["dimension_names"])
                for name in arrays
            }
            self._put(leaf, leaf.record_file(position), record, arrays, slices)

    def _put(
        self, leaf: Leaf, file: str, record: Cell, arrays: Mapping[str, np.ndarray], slices: Mapping[str, tuple]
    ) -> None:
        """Un-commits, writes and commits a cell. Where two do it at once, one comes after the other; on object storage
        a record is only put where none is, so that whose data were overwritten does it again."""
        for _ in range(TRIES):
            with self.place.committing(leaf.path), contextlib.suppress(Changed):
                self._uncommit(file)
                leaf.handles.write(slices, arrays)
                self._sync()
                self.place.seal(file, record.pack())
                self._sync()
                return
        with self.place.committing(leaf.path):
            self._uncommit(file)  # what lies there is of both
        raise ChangedError(
            f"{leaf.path}: another run writes the same cell again and again; run again when it has ended, or name "
            "another store"
        )

    def drop(self, path: str, cell: tuple) -> None:
        """Un-commits one cell: the next run computes it again. Its data stay until then, or until nsteer gc."""
        self.drop_at(path, self._leaf_or_raise(path).position(tuple(cell)))

    def drop_at(self, path: str, position: tuple[int, ...]) -> None:
        """`drop`, for a cell that is known by its place on the cell axes."""
        with self._reporting(f"drop {path} {position!r}"), self.place.committing(path):
            self._uncommit(self._leaf_or_raise(path).record_file(position))

    @contextlib.contextmanager
    def changing(self, doing: str) -> Iterator[None]:
        """Holds the lock of the structure. What the place refuses becomes a StoreError."""
        with self._reporting(doing), self.place.lock():
            yield

    def forget(self) -> None:
        """Drops what is held of the structure: it was changed by other means than `prepare`."""
        self._leaves.clear()

    def _uncommit(self, record: str) -> None:
        if self.place.delete(record):
            self._sync()

    def read(self, path: str) -> xr.Dataset:
        """The group as plain xarray opens it: lazy, uncommitted cells included as they lie on disk."""
        return self._leaf_or_raise(path).open()

    def labels(self, path: str, dim: str) -> list:
        """The published labels of a dim of a group, in their order; none where there is no such group."""
        leaf = self.leaf(path) if self.exists else None
        return leaf.along(dim) if leaf else []

    def attrs(self) -> dict[str, Any]:
        """Attributes of the store: its layout, what made it, when."""
        self.check_version()
        return documents.document_at(self.place, "")["attributes"]

    def groups(self) -> list[str]:
        """Paths of the published groups of results, sorted."""
        published = documents.members(self._published()).items()
        return sorted(path for path, doc in published if CELL_ATTR in doc.get("attributes", {}))

    def leaf(self, path: str) -> Leaf | None:
        """The group as published now; kept until its document changes."""
        raw = self.place.read(documents.file_of(path))
        if raw is None:
            return None
        if path not in self._leaves or self._leaves[path][0] != raw:
            leaf = leaf_of(self.place, path, documents.parse(self.place, path, raw))
            if leaf is None:
                return None
            self._leaves[path] = (raw, leaf)
        return self._leaves[path][1]

    def add_run(
        self, *, plan: str, environment: Mapping[str, Any], started: str, argv: Sequence[str] | str = ()
    ) -> int:
        """Records that a run begins. Returns its index into `runs`, as commits carry it."""
        label = runs.label(started)
        self.prepare([runs.group(label)])
        index = self._leaf_or_raise(runs.PATH).position((label,))[0]
        number = fingerprint_of([plan, label])
        data = runs.record(plan, environment, started, argv)
        self.commit(runs.PATH, (label,), data, fingerprint=number, run=index)
        return index

    def finish_run(self, run: int, finished: str, status: str) -> None:
        """Records how a run ended. Two renames, without un-commit: a kill can not lose the record of the plan."""
        leaf = self._leaf_or_raise(runs.PATH)
        if not 0 <= run < leaf.dims["run"]:
            raise StoreError(f"run {run} is not in {self.path}; it holds {leaf.dims['run']}")
        with self._reporting("finish the run"):
            for name, value in (("finished", finished), ("status", status)):
                leaf.handles[name][run : run + 1] = array_of([value])
            self._sync()

    def _leaf_or_raise(self, path: str) -> Leaf:
        if leaf := self.leaf(path):
            return leaf
        self.check_version()
        raise StoreError(f"{self.path} holds no group {path!r}; {did_you_mean(path, self.groups()) or 'it is empty'}")

    @contextlib.contextmanager
    def _reporting(self, doing: str) -> Iterator[None]:
        """What the system refuses becomes a StoreError that says what was being done."""
        try:
            yield
        except self.place.refusals as error:
            raise StoreError(
                f"{self.path}: can not {doing}: {reason(error)}. "
                "Committed cells are kept; run again when this is mended"
            ) from error

    def _sync(self) -> None:
        if self.durable:
            self.place.sync()
