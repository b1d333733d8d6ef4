"""Turns the published document of one group into labels, arrays and commit records.

Published means: as the consolidated document of the group says. Shapes on disk may be ahead of it while another
process prepares, or after one was killed doing so; what lies beyond the published shapes is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr
import zarr
from zarr.core.sync import sync
from zarr.storage import StorePath

from nsteer.errors import NsteerError, RoomError, StoreError, did_you_mean
from nsteer.store import decoding, documents, records, room, schema
from nsteer.store.bound import bound, inner, labels_number
from nsteer.store.group import CELL, CELL_FIELD, cell_dims
from nsteer.store.places import Place
from nsteer.store.records import Cell, Records
from nsteer.system.names import chunk_name

MARKS = "nsteer_"  # how attributes begin that say how a leaf is laid out
CELL_ATTR, CHUNKS_ATTR = "nsteer_cell", "nsteer_chunks"  # marks a leaf of ours, and how it is cut
ORDER_ATTR = "nsteer_ordered_as"  # the group in whose order chunks count labels
LABELS_ATTR = "nsteer_labels"  # dim -> number of its published labels, against which what is read is held
STRUCTURES_ATTR = "nsteer_structures"  # what a cell held at each time: sizes of its dims, names of its variables

MAX_LABELS = 2**16  # labels in one file

T = TypeVar("T")
Selection = tuple[slice, ...]
"""A slice of an array, by where it begins and ends along each of its dims."""


class Handles(dict):
    """Arrays of a group, each opened at its first use.

    Made from the document given, never read again: the group may have grown since.
    """

    def __init__(self, files: Any, path: str, documents_: Mapping[str, Mapping[str, Any]]):
        self._files, self._path, self._documents = files, path, documents_

    def __missing__(self, name: str) -> Any:
        array: Any = zarr.Array.from_dict(StorePath(self._files, f"{self._path}/{name}"), dict(self._documents[name]))
        self[name] = array.with_config({"write_empty_chunks": True})
        return self[name]

    def read(self, slices: Mapping[str, Selection]) -> dict[str, np.ndarray]:
        """The values of these slices of arrays, all asked for at once. Raises what the first that fails raises."""
        values = _together(self[name].async_array.getitem(within) for name, within in slices.items())
        return dict(zip(slices, map(np.asarray, values), strict=True))

    def write(self, slices: Mapping[str, Selection], values: Mapping[str, np.ndarray]) -> None:
        """Writes these slices of arrays, all at once. When one fails the others have ended, and it is raised."""
        _together(self[name].async_array.setitem(within, values[name]) for name, within in slices.items())


def _together(calls: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """What calls of zarr return, made at once: its loop is another thread, which is entered once for all of them."""

    async def ended() -> list[T | BaseException]:
        return await asyncio.gather(*calls, return_exceptions=True)

    returned = sync(ended())
    if errors := [error for error in returned if isinstance(error, BaseException)]:
        raise errors[0]
    return [value for value in returned if not isinstance(value, BaseException)]


@dataclass(frozen=True)
class Leaf:
    """One group as published: `document` is its zarr.json, which lists its arrays."""

    place: Place
    path: str
    document: Mapping[str, Any]

    @property
    def attrs(self) -> Mapping[str, Any]:
        return self.document["attributes"]

    @property
    def cell(self) -> tuple[str, ...]:
        """The cell axes, in order."""
        return tuple(self.attrs[CELL_ATTR])

    @property
    def chunks(self) -> dict[str, int]:
        return self.attrs[CHUNKS_ATTR]

    @property
    def arrays(self) -> dict[str, dict]:
        """Name of each published array -> its document."""
        return documents.members(self.document)

    @cached_property
    def dims(self) -> dict[str, int]:
        """Published size of every dim, coordinates of chunks included."""
        return {name: doc["shape"][0] for name, doc in self.arrays.items() if doc["dimension_names"] == [name]}

    @property
    def auxiliary(self) -> list[str]:
        return self.attrs.get("coordinates", "").split()

    @property
    def variables(self) -> list[str]:
        """Names of the data variables."""
        return [name for name in self.arrays if name not in {*self.dims, *self.auxiliary, CELL, CELL_FIELD}]

    @cached_property
    def handles(self) -> Handles:
        """The arrays with their published shapes, open for writing, by name."""
        return Handles(self.place.files, self.path, self.arrays)

    @cached_property
    def labels(self) -> dict[str, list]:
        """Published labels of every dim, in published order."""
        return {dim: self.along(dim) for dim in self.dims if dim != CELL_FIELD}

    def along(self, dim: str) -> list:
        """Published labels of one dim, in published order; empty for one that the group has not.

        StoreError for others than were published: a copy that was restored in part, or another writer's.
        """
        if dim not in self._along:
            with self.reading():
                self._held(dim)
                labels = self._read_labels(dim).tolist() if dim in self.dims else []
            if labels and self.attrs.get(LABELS_ATTR, {}).get(dim) != labels_number(labels):
                raise StoreError(
                    f"{self.place.name}/{self.path} is damaged: the labels of {dim!r} are not those that were "
                    "published; see nsteer verify"
                )
            self._along[dim] = labels
        return self._along[dim]

    def _read_labels(self, dim: str) -> np.ndarray:
        """The labels in the files of a dim. Where one is not whole zarr reads them: it says what is wrong."""
        document, size = self.arrays[dim], self.dims[dim]
        if decoding.can_decode(document):
            [chunk] = document["chunk_grid"]["configuration"]["chunk_shape"]
            names = [f"{self.path}/{dim}/{chunk_name([at])}" for at in range(-(-size // chunk))]
            there = self.place.read_all(names)
            if not any(decoding.broken(there.get(name), document) for name in names):
                with contextlib.suppress(ValueError, RuntimeError):
                    return np.concatenate([decoding.decode(there[name], document) for name in names])[:size]
        return self.handles[dim][:]

    def _held(self, dim: str) -> None:
        """StoreError for more labels than the files of a dim can hold, before room is made for them."""
        if dim in self.dims:
            [chunk] = self.arrays[dim]["chunk_grid"]["configuration"]["chunk_shape"]
            needed = -(-self.dims[dim] // chunk)
            if chunk > MAX_LABELS or len(self.place.names(f"{self.path}/{dim}")) <= needed - (needed > 1):
                raise StoreError(
                    f"{self.place.name}/{self.path} is damaged: it declares {self.dims[dim]:,} labels of {dim!r}, "
                    "more than its files hold; see nsteer verify"
                )

    @cached_property
    def _along(self) -> dict[str, list]:
        return {}

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
        return cell_dims(self.cell, self.chunks)

    def position(self, cell: tuple) -> tuple[int, ...]:
        """Where a cell lies on the cell axes. StoreError for a label that is not published."""
        if len(cell) != len(self.cell):
            raise StoreError(f"{self.path}: a cell is {self.cell}, {len(self.cell)} labels; found {cell!r}")
        return tuple(int(self.indexer(axis, [label])[0]) for axis, label in zip(self.cell, cell, strict=True))

    def indexer(self, dim: str, labels: Sequence | pd.Index) -> np.ndarray:
        """Positions of labels on the published axis. StoreError names the first that is not there."""
        if isinstance(labels, pd.Index) and labels.equals(self.index[dim]):
            return np.arange(len(labels))
        positions = [self.where[dim].get(label, -1) for label in _keyable(labels)]
        if -1 in positions:
            lost = list(labels)[positions.index(-1)]
            raise StoreError(
                f"{self.path}: {dim} {lost!r} is not a published label; "
                f"{did_you_mean(lost if isinstance(lost, str) else '', list(map(str, self.labels[dim])))} "
                "(new labels come in by prepare)"
            )
        return np.array(positions, dtype=int)

    def extent(self, cell: tuple) -> dict[str, slice]:
        """The slice of each cut data dim that a cell covers, within the published sizes."""
        slices = {}
        for axis, (dim, size), at in zip(self.cell, self.cut.items(), self.position(cell), strict=True):
            stop = at + 1 if axis == dim else min(self.dims[dim], (at + 1) * size)
            slices[dim] = slice(at * size, stop)
        return slices

    @property
    def structures(self) -> list[dict]:
        """What cells held, by the `structure` of their records; the last one is what they hold now."""
        return self.attrs.get(STRUCTURES_ATTR, [])

    def record_file(self, position: tuple[int, ...]) -> str:
        """The one chunk that commits a cell."""
        return f"{self.path}/{CELL}/{chunk_name((*position, 0))}"

    def records(self, fresh: bool = False) -> Records:
        """The records of committed cells, in published order. StoreError for a damaged one.

        A record that was made for other labels than stand at its place today is none.

        fresh : whether to open every file, whatever is kept of them
        """
        return self.sorted_records(fresh)[0]

    def sorted_records(self, fresh: bool = False) -> tuple[Records, int]:
        """`records`, and how many more were made for other labels than stand at their places today."""
        group_records = records.read(self.place, self.path, [self.dims[axis] for axis in self.cell], fresh)
        own = self.owns(group_records.positions, group_records.fields)
        return (group_records, 0) if own.all() else (group_records.where(own), int((~own).sum()))

    def owns(self, positions: np.ndarray, fields: np.ndarray) -> np.ndarray:
        """Whether each record was made for the labels at its place: bool [record].

        positions : int [record, cell axis]
        fields : float [record, field], the fields of a Cell
        """
        told, own = fields[:, Cell._fields.index("structure")], np.zeros(len(fields), bool)
        for index in range(len(self.structures)):
            if (chosen := told == index).any():
                number = self.bound(positions[chosen], index)
                own[chosen] = fields[chosen, Cell._fields.index("labels")] == number
        return own

    def bound(self, positions: np.ndarray, structure: int) -> np.ndarray:
        """The numbers of the labels that cells at positions [cell, cell axis] hold under a structure, as records have
        them."""
        if structure not in self._inner:
            self._inner[structure] = inner(self.structures[structure], self.labels, self.cut)
        sizes = self.structures[structure]["sizes"]
        return bound(self._inner[structure], sizes, self.labels, self.cut, positions)

    @cached_property
    def _inner(self) -> dict[int, int]:
        return {}

    def those(self, cells: Iterable[tuple]) -> dict[tuple, Cell]:
        """The records of some cells, of those that are committed; a cell of unpublished labels is not."""
        files: dict[str, tuple[tuple, tuple[int, ...]]] = {}
        for cell in cells:
            with contextlib.suppress(StoreError):
                at = self.position(cell)
                files[self.record_file(at)] = cell, at
        contents = self.place.read_all(files)
        cell_records = {files[file]: self.parse_record(files[file][1], content) for file, content in contents.items()}
        if not cell_records:
            return {}
        own = self.owns(np.array([at for _, at in cell_records]), np.array(list(cell_records.values()), float))
        return {cell: record for ((cell, _), record), mine in zip(cell_records.items(), own, strict=True) if mine}

    def record(self, position: tuple[int, ...]) -> Cell | None:
        """The record at a position, or None when the cell is not committed. StoreError when it is damaged."""
        content = self.place.read(self.record_file(position))
        record = None if content is None else self.parse_record(position, content)
        return record if record and self.owns(np.array([position]), np.array([record], float)).all() else None

    def parse_record(self, position: tuple[int, ...], content: bytes) -> Cell:
        """A record from the bytes of its file. StoreError when they are damaged."""
        try:
            return Cell.of(records.parse(content))
        except ValueError as error:
            raise records.damaged(self.place, self.record_file(position)) from error

    def changed(self, positions: Sequence[tuple[int, ...]]) -> list[int]:
        """The stamps of the record files, 0 for a cell that is not committed."""
        return self.place.stamps(list(map(self.record_file, positions)))

    def room(self, name: str, count: int, files: int | None = None) -> None:
        """RoomError for values of an array that its files can not hold, or for which there is no memory."""
        room.values(self.place, f"{self.path}/{name}", self.arrays[name], count, len(self.variables) or 1, files)

    def beside(self, name: str) -> np.ndarray:
        """The values of an auxiliary array, as published."""
        with self.reading():
            self.room(name, math.prod(self.arrays[name]["shape"]))
            return np.asarray(self.handles[name][...])

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """What the place refuses, and what is damaged, becomes a StoreError that names the group."""
        try:
            yield
        except self.place.refusals as error:
            raise StoreError(f"{self.place.name}/{self.path} can not be read: {reason(error)}") from error
        except NsteerError:
            raise
        except MemoryError as error:
            words = "there is not enough memory; ask for a part of it"
            raise RoomError(f"{self.place.name}/{self.path}: {words}") from error
        except Exception as error:  # the codecs of zarr raise a dozen kinds over what they can not unpack
            words = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise StoreError(f"{self.place.name}/{self.path} is damaged ({words}); see nsteer verify") from error

    def cell_labels(self, position: tuple[int, ...]) -> tuple:
        """The labels of the cell at a position."""
        return tuple(self.labels[axis][at] for axis, at in zip(self.cell, position, strict=True))

    def cells_at(self, positions: np.ndarray) -> Iterator[tuple]:
        """The labels of the cells at positions [cell, cell axis], one after another."""
        columns = ([self.labels[axis][i] for i in at] for axis, at in zip(self.cell, positions.T.tolist(), strict=True))
        return zip(*columns, strict=True)

    def open(self) -> xr.Dataset:
        """The group as published, lazy, as plain xarray opens it."""
        with self.reading():
            return xr.open_zarr(self.place.target(self.path), chunks=None)


def reason(error: Exception) -> str:
    """What a system or a server says of its refusal."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _keyable(labels: Sequence | pd.Index) -> list:
    """Labels as dict keys. True is no label: Python would take it for 1."""
    listed = labels.tolist() if isinstance(labels, pd.Index | np.ndarray) else list(labels)
    return [None if isinstance(label, bool) else label for label in listed]


def leaf_of(place: Place, path: str, document: Mapping[str, Any] | None) -> Leaf | None:
    """The leaf that a document publishes, or None when it publishes none."""
    if document is None or CELL_ATTR not in document.get("attributes", {}) or not documents.members(document):
        return None
    try:
        schema.leaf(document)
    except schema.Unfit as error:
        raise StoreError(f"{documents.document_path(place, path)} is damaged: {error}; see nsteer verify") from None
    return Leaf(place, path, document)
