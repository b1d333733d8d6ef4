"""The commit records of a group as arrays, and one file in which those already read are kept together.

A record is a file of its own, so commits need no lock. But a group of a million cells would be a million files to
open: after a run its records lie in one file beside them too. Of that file only what is surely unchanged is
believed: all of it while the folder of the records is as it was, else each record whose own file is as it was.
Removing it loses nothing.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import google_crc32c
import numpy as np

from nsteer.errors import StoreError
from nsteer.store.group import CELL, CELL_FIELD
from nsteer.store.places import Place

RECORD = struct.Struct("<7dI")  # the fields of a Cell; crc32c of them
KEPT = "records"
HEAD = struct.Struct("<8sqqqI")  # MARK, cell axes, `moment` and `taken` of a Kept, crc32c of what follows
MARK = b"nsteer-2"
WORTH = 4096
"""Records that had to be opened one by one from which they are kept together."""
MARGIN = 2 * 10**9
"""Nanoseconds: two changes so close to each other may have one stamp, so what is younger is looked at again."""


class Cell(NamedTuple):
    """The commit record of one cell. `finished` in unix seconds, `run` an index into `runs`, -1 for none.

    `structure` is an index into the group's structures, which tell what the cell held when it was committed;
    `content` a fingerprint of its values, -1 where none was taken; `labels` a number of the labels that it held, which
    binds the record to them: a record that lies at the place of other labels is none of theirs.
    """

    fingerprint: int
    run: int
    finished: float
    seconds: float
    structure: int = -1
    content: int = -1
    labels: int = -1

    def pack(self) -> bytes:
        """The record as its file holds it."""
        fields = RECORD.pack(*self, 0)[:-4]
        return fields + google_crc32c.value(fields).to_bytes(4, "little")

    @classmethod
    def of(cls, fields: Sequence[float]) -> Cell:
        """A record from its seven numbers; what should be whole and is not is -1, which verify tells apart."""
        number, run, finished, seconds, structure, content, labels = fields
        return cls(_whole(number), _whole(run), finished, seconds, _whole(structure), _whole(content), _whole(labels))


def _whole(number: float) -> int:
    return int(number) if math.isfinite(number) else -1


@dataclass(frozen=True)
class Records:
    """Records in the order of their positions.

    positions : int64 [record, cell axis]
    fields : float64 [record, field], the fields of a Cell
    stamps : int64 [record], of their files: a number that changes when a file is put again
    """

    positions: np.ndarray
    fields: np.ndarray
    stamps: np.ndarray

    def __len__(self) -> int:
        return len(self.stamps)

    def __iter__(self) -> Iterator[tuple[tuple[int, ...], Cell, int]]:
        """Position, record and stamp of each."""
        rows = zip(self.positions.tolist(), self.fields.tolist(), self.stamps.tolist(), strict=True)
        return ((tuple(at), Cell.of(fields), stamp) for at, fields, stamp in rows)

    def where(self, chosen: np.ndarray) -> Records:
        """Those that a mask or an index chooses."""
        return Records(self.positions[chosen], self.fields[chosen], self.stamps[chosen])

    @property
    def cells(self) -> list[Cell]:
        return [Cell.of(fields) for fields in self.fields.tolist()]


@dataclass(frozen=True)
class Kept(Records):
    """Records as one file holds them. `moment`: stamp of their folder, 0 for none; `taken`: when, unix nanoseconds."""

    moment: int = 0
    taken: int = 0


def parse(content: bytes) -> tuple[float, ...]:
    """The seven numbers in the bytes of a record. Raises ValueError for damaged ones."""
    if len(content) != RECORD.size or RECORD.unpack(content)[-1] != google_crc32c.value(content[:-4]):
        raise ValueError("a damaged record")
    return RECORD.unpack(content)[:-1]


def damaged(place: Place, name: str) -> StoreError:
    """What a damaged record is refused with."""
    return StoreError(
        f"{place.name}/{name}: this commit record is damaged; "
        "remove the file (nsteer verify --repair does) and run again"
    )


def read(place: Place, group: str, sizes: Sequence[int], fresh: bool = False) -> Records:
    """The records of a group within the published sizes of its cell axes.

    fresh : whether to open every file, whatever is kept of them

    Raises StoreError, which names the file, for a damaged record.
    """
    kept = None if fresh else _kept(place, group, len(sizes))
    if kept is not None and kept.moment and kept.moment == _moment(place, group):
        return kept.where(np.all(kept.positions < sizes, 1))
    return _looked_at(place, *_listed(place, group, sizes), kept)[0]


def keep(place: Place, group: str, axes: int) -> bool:
    """Puts the records of a group together into one file where that is worth it. True if it did.

    Raises StoreError, which names the file, for a damaged record.
    """
    kept, moment, taken = _kept(place, group, axes), _moment(place, group), time.time_ns()
    if kept is not None and moment and kept.moment == moment:
        return False
    positions, names = _listed(place, group, [10**9] * axes)
    if kept is None and len(names) < WORTH:  # the usual case: nothing is opened
        return False
    records, opened = _looked_at(place, positions, names, kept)
    if opened < WORTH:
        return False
    still = moment == _moment(place, group) and moment + MARGIN < time.time_ns()
    rows = np.empty(len(records), _row(axes))
    rows["position"], rows["fields"], rows["stamp"] = records.positions, records.fields, records.stamps
    body = rows.tobytes()
    head = HEAD.pack(MARK, axes, moment if still else 0, taken, google_crc32c.value(body))
    place.write(kept_file(group), head + body)
    return True


def kept_file(group: str) -> str:
    """Not in the folder of the records: being put there would change its stamp."""
    return f"{group}/{CELL_FIELD}/{KEPT}"


def _row(axes: int) -> np.dtype:
    return np.dtype([("position", "<i8", (axes,)), ("fields", "<f8", (len(Cell._fields),)), ("stamp", "<i8")])


def _kept(place: Place, group: str, axes: int) -> Kept | None:
    """What is kept of a group's records; None for nothing, and for what is cut off, damaged or of other axes."""
    content = place.read(kept_file(group)) or b""
    body, row = memoryview(content)[HEAD.size :], _row(axes)
    if len(content) < HEAD.size or len(body) % row.itemsize:
        return None
    mark, wide, moment, taken, check = HEAD.unpack_from(content)
    if mark != MARK or wide != axes or check != google_crc32c.value(bytes(body)):
        return None
    rows = np.frombuffer(body, row)
    return Kept(rows["position"], rows["fields"], rows["stamp"], moment, taken)


def _moment(place: Place, group: str) -> int:
    """The stamp of the folder of a group's records; 0 where folders have none, as on object storage."""
    return place.stamps([f"{group}/{CELL}"])[0]


def _listed(place: Place, group: str, sizes: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """Positions of the records of a group that lie within sizes, sorted [record, cell axis], and their files."""
    # nine digits: no axis is longer; what is no chunk, such as the remains of a killed write, does not fit
    name = re.compile(r"c((?:\.(?:0|[1-9]\d{0,8})){" + str(len(sizes)) + r"})\.0", re.ASCII)
    matches = [match for match in map(name.fullmatch, place.names(f"{group}/{CELL}")) if match]
    numbers = itertools.chain.from_iterable(match[1][1:].split(".") for match in matches)
    positions = np.fromiter(map(int, numbers), np.int64, len(matches) * len(sizes)).reshape(-1, len(sizes))
    order = np.lexsort(positions.T[::-1])
    order = order[np.all(positions[order] < sizes, 1)]
    return positions[order], [f"{group}/{CELL}/{matches[i][0]}" for i in order.tolist()]


def _looked_at(place: Place, positions: np.ndarray, names: list[str], kept: Kept | None) -> tuple[Records, int]:
    """The records at positions, and how many were opened: all but those kept whose files are as they were."""
    fields, stamps = np.zeros((len(names), len(Cell._fields))), np.zeros(len(names), np.int64)
    if kept is not None:
        at = _index(kept.positions, positions)
        known = np.flatnonzero(at >= 0)
        at, now = at[known], np.array(place.stamps([names[i] for i in known.tolist()]), np.int64)
        same = (now == kept.stamps[at]) & (now > 0)
        if place.timed:
            same &= now < kept.taken - MARGIN
        fields[known[same]], stamps[known[same]] = kept.fields[at[same]], now[same]
    rest = np.flatnonzero(stamps == 0).tolist()
    for i, stamped_content in zip(rest, place.read_stamped([names[i] for i in rest]), strict=True):
        if stamped_content is not None and stamped_content[0]:
            stamps[i] = stamped_content[0]
            try:
                fields[i] = parse(stamped_content[1])
            except ValueError as error:
                raise damaged(place, names[i]) from error
    return Records(positions, fields, stamps).where(stamps > 0), len(rest)


def _index(of: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted row stands among others, -1 for nowhere [wanted]."""
    sizes = np.concatenate([of, wanted, np.zeros((1, wanted.shape[1]), np.int64)]).max(0) + 1
    if not len(of) or math.prod(sizes.tolist()) > np.iinfo(np.int64).max:
        return np.full(len(wanted), -1)
    flat, asked = (np.ravel_multi_index(tuple(cells.T), tuple(sizes)) for cells in (of, wanted))
    order = np.argsort(flat)
    at = order[np.searchsorted(flat, asked, sorter=order).clip(max=len(flat) - 1)]
    return np.where(flat[at] == asked, at, -1)
