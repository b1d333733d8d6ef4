"""Turns the published document of one group into labels, arrays and commit records.

Published means: as the consolidated document of the group says. Shapes on disk may be ahead of it while another
process prepares, or after one was killed doing so; what lies beyond the published shapes is not there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
import pandas as pd
import xarray as xr
import zarr

from nsteer.errors import StoreError, did_you_mean
from nsteer.store import documents
from nsteer.store.group import CELL, CELL_FIELD, cell_dims

CELL_ATTR, BLOCKS_ATTR = "nsteer_cell", "nsteer_blocks"  # marks a leaf of ours, and how it is cut
RECORD = struct.Struct("<4dI")  # fingerprint, run, finished, seconds; crc32c of them


class Cell(NamedTuple):
    """The commit record of one cell. `finished` in unix seconds, `run` an index into `runs`, -1 for none."""

    fingerprint: int
    run: int
    finished: float
    seconds: float


@dataclass(frozen=True)
class Leaf:
    """One group as published: `document` is its zarr.json, which lists its arrays."""

    root: Path
    path: str
    document: Mapping[str, Any]

    @property
    def folder(self) -> Path:
        return self.root / self.path

    @property
    def attrs(self) -> Mapping[str, Any]:
        return self.document["attributes"]

    @property
    def cell(self) -> tuple[str, ...]:
        """The cell axes, in order."""
        return tuple(self.attrs[CELL_ATTR])

    @property
    def blocks(self) -> dict[str, int]:
        return self.attrs[BLOCKS_ATTR]

    @property
    def arrays(self) -> dict[str, dict]:
        """Name of each published array -> its document."""
        return documents.members(self.document)

    @cached_property
    def dims(self) -> dict[str, int]:
        """Published size of every dim, coordinates of blocks included."""
        return {name: doc["shape"][0] for name, doc in self.arrays.items() if doc["dimension_names"] == [name]}

    @property
    def auxiliary(self) -> list[str]:
        return self.attrs.get("coordinates", "").split()

    @property
    def variables(self) -> list[str]:
        """Names of the data variables."""
        return [name for name in self.arrays if name not in {*self.dims, *self.auxiliary, CELL, CELL_FIELD}]

    @cached_property
    def handles(self) -> Mapping[str, Any]:
        """The arrays with their published shapes, open for writing."""
        group: Any = zarr.open_group(str(self.folder), mode="r+", use_consolidated=True)
        return {name: group[name].with_config({"write_empty_chunks": True}) for name in self.arrays}

    @cached_property
    def labels(self) -> dict[str, list]:
        """Published labels of every dim, in published order."""
        return {dim: self.handles[dim][:].tolist() for dim in self.dims if dim != CELL_FIELD}

    @cached_property
    def index(self) -> dict[str, pd.Index]:
        """Published labels of every dim as pandas holds them."""
        return {dim: pd.Index(labels) for dim, labels in self.labels.items()}

    @cached_property
    def where(self) -> dict[str, dict]:
        """Label -> position, for every dim."""
        return {dim: {label: at for at, label in enumerate(labels)} for dim, labels in self.labels.items()}

    @cached_property
    def cut(self) -> dict[str, int]:
        """Data dims along which cells are cut -> labels in one cell."""
        return cell_dims(self.cell, self.blocks)

    def position(self, cell: tuple) -> tuple[int, ...]:
        """Where a cell lies on the cell axes. StoreError for a label that is not published."""
        if len(cell) != len(self.cell):
            raise StoreError(f"{self.path}: a cell is {self.cell}, {len(self.cell)} labels; found {cell!r}")
        return tuple(int(self.indexer(axis, [label])[0]) for axis, label in zip(self.cell, cell, strict=True))

    def indexer(self, dim: str, labels: Sequence | pd.Index) -> np.ndarray:
        """Positions of labels on the published axis. StoreError names the first that is not there."""
        if isinstance(labels, pd.Index) and labels.equals(self.index[dim]):
            return np.arange(len(labels))
        found = [self.where[dim].get(label, -1) for label in _plain(labels)]
        if -1 in found:
            lost = list(labels)[found.index(-1)]
            raise StoreError(
                f"{self.path}: {dim} {lost!r} is not a published label; "
                f"{did_you_mean(lost if isinstance(lost, str) else '', list(map(str, self.labels[dim])))} "
                "(new labels come in by prepare)"
            )
        return np.array(found, dtype=int)

    def extent(self, cell: tuple) -> dict[str, slice]:
        """The part of each cut data dim that a cell covers, within the published sizes."""
        parts = {}
        for axis, (dim, size), at in zip(self.cell, self.cut.items(), self.position(cell), strict=True):
            stop = at + 1 if axis == dim else min(self.dims[dim], (at + 1) * size)
            parts[dim] = slice(at * size, stop)
        return parts

    def record_file(self, position: tuple[int, ...]) -> Path:
        """The one chunk that commits a cell."""
        return self.folder / CELL / ".".join(map(str, ("c", *position, 0)))

    def records(self) -> Iterator[tuple[tuple[int, ...], Cell, int]]:
        """Committed cells in published order: position, record, and the time of its file in ns."""
        sizes = [self.dims[axis] for axis in self.cell]
        try:
            names = os.listdir(self.folder / CELL)
        except FileNotFoundError:
            return
        positions = sorted(filter(None, map(_position_of, names)))
        for position in positions:
            at = position[:-1]
            inside = len(at) == len(sizes) and all(i < n for i, n in zip(at, sizes, strict=True))
            if inside and (read := self.record(at)):
                yield at, *read

    def record(self, position: tuple[int, ...]) -> tuple[Cell, int] | None:
        """The record at a position with the time of its file, or None when the cell is not committed."""
        path = self.record_file(position)
        try:
            with path.open("rb") as file:
                content, changed = file.read(), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None
        if len(content) != RECORD.size or RECORD.unpack(content)[4] != google_crc32c.value(content[:-4]):
            raise StoreError(f"{path}: this commit record is damaged; remove the file and run again")
        number, run, finished, seconds, _ = RECORD.unpack(content)
        return Cell(int(number), int(run), finished, seconds), changed

    def changed(self, position: tuple[int, ...]) -> int:
        """The time of the record file in ns, 0 when the cell is not committed."""
        try:
            return os.stat(self.record_file(position)).st_mtime_ns
        except FileNotFoundError:
            return 0

    def cell_labels(self, position: tuple[int, ...]) -> tuple:
        """The labels of the cell at a position."""
        return tuple(self.labels[axis][at] for axis, at in zip(self.cell, position, strict=True))

    def open(self) -> xr.Dataset:
        """The group as published, lazy, as plain xarray opens it."""
        return xr.open_zarr(str(self.folder), chunks=None)


def _plain(labels: Sequence | pd.Index) -> list:
    """Labels as dict keys. True is no label: Python would take it for 1."""
    listed = labels.tolist() if isinstance(labels, pd.Index | np.ndarray) else list(labels)
    return [None if isinstance(label, bool) else label for label in listed]


def _position_of(key: str) -> tuple[int, ...] | None:
    """'c.0.3.0' -> (0, 3, 0); None for what is no chunk, such as the remains of a killed write."""
    head, *parts = key.split(".")
    return tuple(map(int, parts)) if head == "c" and parts and all(map(str.isdecimal, parts)) else None


def read(root: Path, path: str) -> Leaf | None:
    """The leaf as published now, or None where there is none."""
    document = documents.read_document(root / path)
    if document is None or CELL_ATTR not in document.get("attributes", {}) or not documents.members(document):
        return None
    return Leaf(root, path, document)
