"""Turns a store into a list of what is wrong with it, each thing by its labels; repairs what can be.

A finished cell tells in its record what it held (`structure`) and a fingerprint of its values (`content`), so a file
that was removed is told from one that was never there, and a file of older values from the right one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import google_crc32c
import numpy as np

from nsteer.arrays.products import product_of
from nsteer.errors import StoreError
from nsteer.store import Store, chunks, slug
from nsteer.store.content import content
from nsteer.store.documents import FILE, file_of, read_document
from nsteer.store.group import CELL, CELL_FIELD, CELL_FIELDS, block_dim
from nsteer.store.leaf import Leaf
from nsteer.store.names import chunk_index
from nsteer.store.records import Cell, parse
from nsteer.upkeep import survey

RUNS = "runs"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: of which kind, where, what, and the cell it breaks."""

    kind: str
    group: str
    what: str
    file: str = ""
    position: tuple[int, ...] | None = None
    cell: Mapping[str, Any] = field(default_factory=dict)
    variable: str = ""
    part: Mapping[str, Any] = field(default_factory=dict)
    run: int = -1

    def __str__(self) -> str:
        where = [self.group or "root", _said(self.cell), self.variable, _said(self.part)]
        return f"{self.kind}: {' · '.join(filter(None, where))}: {self.what}"


@dataclass
class Report:
    """What was looked at, what is wrong, what lies about, and what a repair did."""

    store: str
    groups: int = 0
    cells: int = 0
    files: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    leftovers: list[survey.Leftover] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)

    @property
    def clean(self) -> bool:
        return not self.findings


def _said(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{dim} {_range(label)}" for dim, label in labels.items())


def _range(label: Any) -> str:
    return f"{label[0]}–{label[1]}" if isinstance(label, list) else str(label)


def verify(store: Store) -> Report:
    """Reads every file of a store. Safe beside writers: a cell computed anew meanwhile is passed over.

    Raises StoreError where there is no store, StoreVersionError for another layout.
    """
    report = Report(store.place.name)
    root, wrong = survey.root_document(store)
    if wrong:
        report.findings.append(Finding("metadata", "", wrong, FILE))
    paths = survey.published(root) if root else sorted(survey.leaf_paths(store.place))
    leaves: dict[str, Leaf] = {}
    owned: set[str] = {FILE}
    for path in paths:
        report.groups += 1
        leaf, found = _leaf(store, root, path)
        report.findings += found
        if leaf is None:
            continue
        leaves[path] = leaf
        owned |= survey.needed(leaf)
        if not found:
            found = list(_structure(store, leaf))
            report.findings += found
        if any(one.kind == "labels" or one.file == file_of(path) for one in found):
            owned |= {name for name, _ in store.place.walk(path)}  # its cells can not be named
            continue
        owned |= _cells(store, leaf, report)
    report.findings += _provenance(leaves)
    report.leftovers = survey.leftovers(store, leaves, owned)
    sizes = [size for _, size in store.place.walk()]
    report.files, report.bytes = len(sizes), sum(sizes)
    return report


# ---- structure ------------------------------------------------------------------------------------------------


def _leaf(store: Store, root: Mapping | None, path: str) -> tuple[Leaf | None, list[Finding]]:
    """A group by its own document, or by the root's where that is gone or damaged."""
    told = survey.leaf_from_root(store.place, root, path)
    try:
        leaf = store.leaf(path)
        wrong = "" if leaf else f"{file_of(path)} is gone"
    except StoreError as error:
        leaf, wrong = None, str(error)
    if wrong:
        return told, [Finding("metadata", path, wrong, file_of(path))]
    assert leaf is not None
    if told and (words := _contradiction(told, leaf)):
        return leaf, [Finding("metadata", path, words, FILE)]
    return leaf, []


def _contradiction(told: Leaf, leaf: Leaf) -> str:
    """How what the root tells differs from what the group publishes; a group may be ahead after a kill."""
    for name, document in told.arrays.items():
        own = leaf.arrays.get(name)
        if own is None:
            return f"the root knows an array {name!r} that the group does not"
        if {**own, "shape": 0} != {**document, "shape": 0}:
            return f"the root and the group tell different things of {name!r}"
        if any(a > b for a, b in zip(document["shape"], own["shape"], strict=True)):
            return f"the root knows more labels of {name!r} than the group"
    return ""


def _structure(store: Store, leaf: Leaf) -> Iterator[Finding]:
    """Array documents, labels and auxiliary arrays of a group."""
    for path in survey.ancestors(leaf.path):
        yield from _document(store, path, None)
    for name, document in leaf.arrays.items():
        yield from _document(store, f"{leaf.path}/{name}", document, leaf.path, name)
    broken = set()
    for name in [*leaf.dims, *leaf.auxiliary]:
        for chunk in chunks.whole(leaf, name):
            if wrong := _file(store, chunk.name, leaf.arrays[name]):
                broken.add(name)
                kind = "labels" if name in leaf.dims else "auxiliary"
                yield Finding(kind, leaf.path, wrong, chunk.name, variable=name)
    for dim in leaf.dims:
        if broken & set(leaf.dims) or dim == CELL_FIELD:
            continue
        if words := _label_problem(leaf, dim):
            yield Finding("labels", leaf.path, words, variable=dim)
    cell = leaf.arrays.get(CELL)
    wanted = [*leaf.cell, CELL_FIELD]
    if cell is None or cell["dimension_names"] != wanted or leaf.dims.get(CELL_FIELD) != len(CELL_FIELDS):
        yield Finding("metadata", leaf.path, f"its array of records is not over {wanted}", file_of(leaf.path))


def _document(store: Store, path: str, told: Mapping | None, group: str = "", name: str = "") -> Iterator[Finding]:
    """An array's own document must be there and hold at least what the group publishes of it."""
    file = file_of(path)
    try:
        document = read_document(store.place, path)
    except StoreError as error:
        yield Finding("metadata", group or path, str(error), file, variable=name)
        return
    if document is None:
        yield Finding("metadata", group or path, f"{file} is gone", file, variable=name)
    elif told is not None:
        smaller = any(a < b for a, b in zip(document.get("shape", []), told["shape"], strict=False))
        if smaller or {**document, "shape": 0} != {**told, "shape": 0}:
            yield Finding("metadata", group, f"{file} differs from what the group publishes", file, variable=name)


def _label_problem(leaf: Leaf, dim: str) -> str:
    try:
        labels = leaf.along(dim)
    except StoreError as error:
        return str(error)
    if len(labels) != leaf.dims[dim]:
        return f"{len(labels)} labels on an axis of {leaf.dims[dim]}"
    if len(set(labels)) < len(labels):
        return f"label {next(one for one in labels if labels.count(one) > 1)!r} stands there twice"
    if dim in map(block_dim, leaf.blocks) and labels != list(range(len(labels))):
        return "blocks are not numbered from 0"
    if dim == "model" and product_of(leaf.path).by_model:
        try:
            own = [slug(label) for label in labels]
        except StoreError as error:
            return str(error)
        if own != [leaf.path.rpartition("/")[2]]:
            return f"the group is named otherwise than its model: {', '.join(map(repr, labels))}"
    return ""


def _file(store: Store, name: str, document: Mapping[str, Any]) -> str:
    """What is wrong with the file of a chunk: gone, or damaged; "" for nothing."""
    content = store.place.read(name)
    if content is None:
        return "the file is gone"
    if document["codecs"][-1]["name"] == "crc32c":
        if len(content) < 4:
            return f"the file is cut off: {len(content)} bytes"
        if google_crc32c.value(content[:-4]) != int.from_bytes(content[-4:], "little"):
            return "the checksum is wrong: the file is damaged or cut off"
    return ""


# ---- cells ----------------------------------------------------------------------------------------------------


def records(store: Store, leaf: Leaf) -> Iterator[tuple[tuple[int, ...], bytes, int]]:
    """Position, bytes and stamp of every record within the published axes, damaged ones included."""
    sizes = [leaf.dims[axis] for axis in leaf.cell]
    for index in sorted(filter(None, map(chunk_index, store.place.names(f"{leaf.path}/{CELL}")))):
        at = index[:-1]
        if len(at) == len(sizes) and all(i < n for i, n in zip(at, sizes, strict=True)):
            stamp = leaf.changed([at])[0]
            raw = store.place.read(leaf.record_file(at))
            if stamp and raw is not None:
                yield at, raw, stamp


def _cells(store: Store, leaf: Leaf, report: Report) -> set[str]:
    """Looks at every finished cell of a group. Returns the files that they own."""
    owned = set()
    for at, raw, stamp in records(store, leaf):
        report.cells += 1
        owned.add(leaf.record_file(at))
        found = list(_record(leaf, at, raw))
        if not found:
            record = leaf.parse_record(at, raw)
            structure = chunks.structure_of(leaf, record)
            files = list(chunks.of_cell(leaf, at, structure))
            owned |= {chunk.name for chunk in files}
            found = list(_data(store, leaf, at, record, files))
        if found and leaf.changed([at])[0] == stamp:  # else it was computed anew while we looked
            report.findings += found
    return owned


def _record(leaf: Leaf, at: tuple[int, ...], raw: bytes) -> Iterator[Finding]:
    """What is wrong with the bytes of a record."""
    where = {"position": at, "cell": chunks.cell_name(leaf, at), "file": leaf.record_file(at)}
    try:
        fields = parse(raw)
        number, run, finished, seconds, structure, mark, labels = fields
    except ValueError:
        yield Finding("record", leaf.path, "the record is damaged or cut off", **where)  # type: ignore[arg-type]
        return
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
        yield Finding("record", leaf.path, f"its {name} is not well-formed", **where)  # type: ignore[arg-type]
    if not bad and not leaf.owns(np.array([at]), np.array([fields])).all():
        words = (
            "the record was made for other labels than stand at its place: an older or a newer copy was put over this"
        )
        yield Finding("record", leaf.path, words, **where)  # type: ignore[arg-type]


def _whole(number: float) -> bool:
    return math.isfinite(number) and number == int(number)


def _data(store: Store, leaf: Leaf, at: tuple[int, ...], record: Cell, files: list[chunks.Chunk]) -> Iterator[Finding]:
    """What is wrong with the data of a finished cell."""
    cell = chunks.cell_name(leaf, at)
    structure, broken = chunks.structure_of(leaf, record), False
    for chunk in files:
        if wrong := _file(store, chunk.name, leaf.arrays[chunk.variable]):
            broken = True
            kind = "missing" if wrong.endswith("gone") else "damaged"
            yield Finding(
                kind, leaf.path, wrong, chunk.name, at, cell, chunk.variable, chunks.part_name(leaf, chunk)
            )  # fmt: skip
    if broken or record.content < 0:
        return
    try:
        found = content(chunks.values(leaf, at, structure))
    except (StoreError, ValueError, RuntimeError) as error:  # what a codec raises for bytes of another array
        yield Finding("damaged", leaf.path, f"the data can not be decoded: {error}", "", at, cell)
        return
    if found != record.content:
        yield Finding("content", leaf.path, "the values are not those that were committed", "", at, cell)


def _provenance(leaves: Mapping[str, Leaf]) -> Iterator[Finding]:
    """Cells whose run has no record."""
    runs = leaves.get(RUNS)
    there: set[int] = set()
    if runs is not None:
        there = {index[0] for name in runs.place.names(f"{RUNS}/{CELL}") if (index := chunk_index(name))}
    for path, leaf in leaves.items():
        try:
            found = [(at, record.run) for at, record, _ in leaf.records(fresh=True) if record.run >= 0]
        except StoreError:
            continue  # a damaged record: found already
        for at, run in found:
            if run not in there:
                what = f"made by run {run}, of which there is no record"
                yield Finding("provenance", path, what, position=at, cell=chunks.cell_name(leaf, at), run=run)
