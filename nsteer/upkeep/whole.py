"""Turns the finished cells of a group into what is wrong with each: its record, its files, its values.

Records are read at once, files some thousand at a time, each opened once: its checksum is looked at, then its values
are decoded and compared with the fingerprint in the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from nsteer.errors import StoreError
from nsteer.store import chunks, decoding
from nsteer.store.content import content
from nsteer.store.group import CELL
from nsteer.store.leaf import Leaf
from nsteer.store.places import Place
from nsteer.store.records import Cell, parse
from nsteer.system.names import chunk_index
from nsteer.upkeep.findings import Finding

BATCH = 512
"""Cells whose files are read before they are looked at, at most."""

ROOM = 64 * 2**20
"""Bytes of values that these cells may hold together, as they are declared; one cell is always read whole."""

WIDTHS = {"bool": 1, "int32": 4, "float32": 4, "int64": 8, "float64": 8}
"""Bytes of a number; of a text 64 are assumed."""

At = tuple[int, ...]


@dataclass
class Seen:
    """What a look at the cells of a group found: how many, the files that they own, and which run made each.

    runs : position, run and stamp of the record, of each cell whose record is whole
    """

    cells: int = 0
    findings: list[Finding] = field(default_factory=list)
    owned: set[str] = field(default_factory=set)
    runs: list[tuple[At, int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    at: At
    fields: Sequence[float]
    stamp: int


def look(leaf: Leaf, told: Callable[[int], None] = lambda cells: None) -> Seen:
    """Looks at every finished cell of a group. `told` hears how many are done with."""
    seen = Seen()
    records = list(_records(leaf, seen))
    fields = np.array([record.fields for record in records]).reshape(len(records), len(Cell._fields))
    own = leaf.owns(np.array([record.at for record in records]).reshape(len(records), len(leaf.cell)), fields)
    cells = []
    for stored, mine in zip(records, own.tolist(), strict=True):
        if findings := list(_record(leaf, stored, mine)):
            _add(leaf, seen, stored.at, stored.stamp, findings)
        else:
            cells.append(stored)
    size = together(leaf)
    for start in range(0, len(cells), size):
        few = cells[start : start + size]
        _look_at(leaf, seen, few)
        told(len(few))
    return seen


def together(leaf: Leaf) -> int:
    """How many cells of a group are read at once: BATCH, or as few as ROOM holds."""
    count = max(1, math.prod(leaf.dims[axis] for axis in leaf.cell))
    variables = [document for name, document in leaf.arrays.items() if name != CELL]
    weight = sum(
        math.prod(leaf.dims[dim] for dim in variable["dimension_names"]) * WIDTHS.get(str(variable["data_type"]), 64)
        for variable in variables
    )
    return max(1, min(BATCH, ROOM * count // max(weight, 1)))


def _add(leaf: Leaf, seen: Seen, at: At, stamp: int, findings: list[Finding]) -> None:
    """Keeps what was found of a cell, unless it was computed again while we looked."""
    if leaf.changed([at])[0] == stamp:
        seen.findings += [replace(finding, stamp=stamp) for finding in findings]


# ---- files ------------------------------------------------------------------------------------------------------


def read(place: Place, names: Sequence[str]) -> Iterator[tuple[int, bytes] | StoreError | None]:
    """Stamp and bytes of each file, None for one that is not there, or why it can not be read: the others still are."""
    try:
        yield from list(place.read_stamped(names))
        return
    except StoreError:
        pass
    for name in names:
        try:
            yield from list(place.read_stamped([name]))
        except StoreError as error:
            yield error


def unreadable(error: StoreError) -> tuple[str, str]:
    """Kind and words of a file that can not be read. What is no regular file was put there by something else."""
    return ("damaged" if "not a regular file" in str(error) else "unreadable"), str(error)


# ---- records ----------------------------------------------------------------------------------------------------


def _records(leaf: Leaf, seen: Seen) -> Iterator[_Read]:
    """The records within the published axes whose bytes are whole; the others are found to be damaged."""
    sizes = [leaf.dims[axis] for axis in leaf.cell]
    indices = sorted(filter(None, map(chunk_index, leaf.place.names(f"{leaf.path}/{CELL}"))))
    places = [at[:-1] for at in indices]
    places = [at for at in places if len(at) == len(sizes) and all(i < n for i, n in zip(at, sizes, strict=True))]
    names = list(map(leaf.record_file, places))
    for at, name, content_ in zip(places, names, read(leaf.place, names), strict=True):
        if content_ is None or (not isinstance(content_, StoreError) and not content_[0]):
            continue  # un-committed since it was listed
        seen.cells += 1
        seen.owned.add(name)
        stamp = leaf.changed([at])[0] if isinstance(content_, StoreError) else content_[0]
        if isinstance(content_, StoreError):
            kind, words = unreadable(content_)
            kind = "record" if kind == "damaged" else kind
        else:
            try:
                yield _Read(at, parse(content_[1]), stamp)
                continue
            except ValueError:
                kind, words = "record", "the record is damaged or cut off"
        _add(leaf, seen, at, stamp, [_finding(leaf, at, kind, words, name)])


def _finding(leaf: Leaf, at: At, kind: str, words: str, file: str, **more: Any) -> Finding:
    return Finding(kind, leaf.path, words, file, at, chunks.cell_name(leaf, at), **more)


def _record(leaf: Leaf, stored: _Read, own: bool) -> Iterator[Finding]:
    """What is wrong with the numbers of a record."""
    number, run, finished, seconds, structure, mark, labels = stored.fields
    file = leaf.record_file(stored.at)
    bad = [
        name
        for name, value, fine in [
            ("fingerprint", number, _whole(number) and 0 <= number < 2**52),
            ("run", run, _whole(run) and run >= -1),
            ("finished", finished, math.isfinite(finished)),
            ("seconds", seconds, math.isfinite(seconds)),
            ("structure", structure, _whole(structure) and 0 <= structure < len(leaf.structures)),
            ("content", mark, _whole(mark) and -1 <= mark < 2**52),
            ("labels", labels, _whole(labels) and 0 <= labels < 2**52),
        ]
        if not fine
    ]
    for name in bad:
        yield _finding(leaf, stored.at, "record", f"its {name} is not well-formed", file)
    if not bad and not own:
        words = (
            "the record was made for other labels than stand at its place: an older or a newer copy was put over this"
        )
        yield _finding(leaf, stored.at, "record", words, file)


def _whole(number: float) -> bool:
    return math.isfinite(number) and number == int(number)


# ---- data -------------------------------------------------------------------------------------------------------


def _look_at(leaf: Leaf, seen: Seen, cells: Sequence[_Read]) -> None:
    """Looks at the files of some cells, read together."""
    records = [Cell.of(stored.fields) for stored in cells]
    files = [_files(leaf, seen, stored, record) for stored, record in zip(cells, records, strict=True)]
    contents = read(leaf.place, [chunk.name for some in files for chunk in some])
    for stored, record, some in zip(cells, records, files, strict=True):
        seen.owned.update(chunk.name for chunk in some)
        seen.runs.append((stored.at, record.run, stored.stamp))
        if some and (findings := list(_data(leaf, stored, record, [(chunk, next(contents)) for chunk in some]))):
            _add(leaf, seen, stored.at, stored.stamp, findings)


def _files(leaf: Leaf, seen: Seen, stored: _Read, record: Cell) -> list[chunks.Chunk]:
    """The files of a cell; none where it should have many that are not there, which is found then."""
    try:
        return list(chunks.of_cell(leaf, stored.at, leaf.structures[record.structure]))
    except StoreError as error:
        _add(leaf, seen, stored.at, stored.stamp, [_finding(leaf, stored.at, "missing", str(error), "")])
        return []


def _data(
    leaf: Leaf, stored: _Read, record: Cell, files: list[tuple[chunks.Chunk, tuple[int, bytes] | StoreError | None]]
) -> Iterator[Finding]:
    """What is wrong with the data of a finished cell."""
    wrong = False
    for chunk, got in files:
        if isinstance(got, StoreError):
            kind, words = unreadable(got)
        elif words := decoding.broken(got[1] if got else None, leaf.arrays[chunk.variable]):
            kind = "missing" if got is None else "damaged"
        else:
            continue
        wrong = True
        within = chunks.labels_within(leaf, chunk)
        yield _finding(leaf, stored.at, kind, words, chunk.name, variable=chunk.variable, within=within)
    if wrong or record.content < 0:
        return
    structure = leaf.structures[record.structure]
    try:
        if all(decoding.can_decode(leaf.arrays[name]) for name in structure["variables"]):
            arrays = [
                (chunk, decoding.decode(got[1], leaf.arrays[chunk.variable]))
                for chunk, got in files
                if isinstance(got, tuple)
            ]
            held = _values(arrays, leaf.arrays, chunks.extent(leaf, stored.at, structure["sizes"]))
        else:
            held = chunks.values(leaf, stored.at, structure)
    except (StoreError, ValueError, RuntimeError) as error:  # what a codec raises for bytes of another array
        yield _finding(leaf, stored.at, "damaged", f"the data can not be decoded: {error}", "")
        return
    if content(held) != record.content:
        yield _finding(leaf, stored.at, "content", "the values are not those that were committed", "")


def _values(
    files: Iterable[tuple[chunks.Chunk, np.ndarray]], arrays: Mapping[str, Mapping], slices: Mapping[str, slice]
) -> dict[str, np.ndarray]:
    """The values of a cell from its chunks: variable -> array over the slices of its dims."""
    values: dict[str, np.ndarray] = {}
    for chunk, array in files:
        document = arrays[chunk.variable]
        dims, sizes = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
        shape = [slices[dim].stop - slices[dim].start for dim in dims]
        own = tuple(
            slice((within := chunk.within[dim]).start % n, (within.start % n) + within.stop - within.start)
            for dim, n in zip(dims, sizes, strict=True)
        )
        if [chunk.within[dim] for dim in dims] == [slices[dim] for dim in dims]:
            values[chunk.variable] = array[own]
            continue
        whole = values.setdefault(chunk.variable, np.empty(shape, array.dtype))
        base = [slices[dim].start for dim in dims]
        at = tuple(slice(chunk.within[d].start - b, chunk.within[d].stop - b) for d, b in zip(dims, base, strict=True))
        whole[at] = array[own]
    return values
