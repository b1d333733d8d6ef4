"""Turns a store of an older layout into one of this layout, in place, safe to kill at any moment.

`MIGRATIONS` holds one function for each layout that there was: it turns a store of that layout into the next. While
one runs the root says so ("1 to 2"), and everything but `nsteer migrate` refuses the store; each function does again
what it had done before, so an interrupted migration is finished by starting it again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from nsteer.errors import StoreError, StoreVersionError
from nsteer.store import Cell, Store
from nsteer.store.content import content
from nsteer.store.declare import array_of, structure
from nsteer.store.documents import document_at, group_document, write_document
from nsteer.store.group import CELL, CELL_FIELD, CELL_FIELDS
from nsteer.store.leaf import STRUCTURES_ATTR, Leaf, read
from nsteer.store.names import chunk_index
from nsteer.store.places import Place
from nsteer.store.runs import PATH as RUNS
from nsteer.store.structure import LAYOUT, MARK, fill, republish
from nsteer.upkeep import survey

LINK = " to "  # between the layouts, in the mark of a store that is being migrated


def migrate(store: Store) -> list[str]:
    """Brings a store up to the layout of this nsteer. Returns a line for each step; none when nothing was to do.

    Raises StoreError where there is no store, StoreVersionError for a newer layout or one without a migration.
    """
    place, done = store.place, []
    if place.read("zarr.json") is None:
        store.check_version()
    with store.changing("migrate"):
        while (now := _layout(place)) != LAYOUT:
            _mark(place, f"{now}{LINK}{now + 1}")
            MIGRATIONS[now](place)
            _mark(place, now + 1)
            done.append(f"layout {now} to {now + 1}")
    store.forget()
    return done


def _layout(place: Place) -> int:
    """The layout of a store; that which it had, where a migration was interrupted."""
    mark = document_at(place, "").get("attributes", {}).get(MARK)
    if mark is None:
        raise StoreError(f"{place.name} is a zarr store, but not an nsteer store; nothing was written")
    found = int(mark.split(LINK)[0]) if isinstance(mark, str) and LINK in mark else mark
    if found != LAYOUT and found not in MIGRATIONS:
        known = ", ".join(map(str, sorted(MIGRATIONS)))
        raise StoreVersionError(
            f"{place.name}: store layout {mark}; this nsteer migrates layouts {known} to {LAYOUT}; upgrade nsteer "
            "(pip install -U nsteer)"
        )
    return found


def _mark(place: Place, mark: int | str) -> None:
    document = document_at(place, "")
    write_document(place, "", {**document, "attributes": {**document["attributes"], MARK: mark}}, over=document)


# ---- layout 1: records of four fields, no structures -------------------------------------------------------------

OLD_RECORD = struct.Struct("<4dI")


def one_to_two(place: Place) -> None:
    """Records come to tell what their cell held, and a fingerprint of its values.

    A cell that has not all files of today's structure was committed before the group grew, or lost one: its record
    tells neither (structure and content -1).
    """
    paths = survey.published(document_at(place, ""))
    for path in paths:
        leaf = read(place, path)
        if leaf is not None and leaf.dims[CELL_FIELD] < len(CELL_FIELDS):
            _longer_records(leaf)
    republish(place, [path for path in paths if read(place, path) is not None])


def _longer_records(leaf: Leaf) -> None:
    place, arrays = leaf.place, {name: dict(doc) for name, doc in leaf.arrays.items()}
    arrays[CELL] = _widened(arrays[CELL], chunk=len(CELL_FIELDS))
    arrays[CELL_FIELD] = _widened(arrays[CELL_FIELD])
    now = structure(arrays, leaf.cell, leaf.auxiliary)
    for name in [*leaf.labels, *leaf.auxiliary]:  # what was all fill had no file
        if any(place.read(chunk.name) is None for chunk in survey.whole(leaf, name)):
            fill(place, f"{leaf.path}/{name}", leaf.handles[name][...])
    for index in filter(None, map(chunk_index, place.names(f"{leaf.path}/{CELL}"))):
        at = index[:-1]
        raw = place.read(leaf.record_file(at))
        if raw is not None and len(raw) == OLD_RECORD.size and _inside(leaf, at):
            place.write(leaf.record_file(at), _new_record(leaf, at, raw, now).pack())
    write_document(place, f"{leaf.path}/{CELL}", arrays[CELL])
    write_document(place, f"{leaf.path}/{CELL_FIELD}", arrays[CELL_FIELD])
    fill(place, f"{leaf.path}/{CELL_FIELD}", array_of(list(CELL_FIELDS)))
    attrs = {**leaf.attrs, STRUCTURES_ATTR: [now]}
    write_document(place, leaf.path, group_document(attrs, arrays), over=leaf.document)


def _widened(document: dict, chunk: int | None = None) -> dict:
    """The document of an array whose last dim is the fields of a record."""
    wide = {**document, "shape": [*document["shape"][:-1], len(CELL_FIELDS)]}
    if chunk:
        shape = [*document["chunk_grid"]["configuration"]["chunk_shape"][:-1], chunk]
        wide["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": shape}}
    return wide


def _inside(leaf: Leaf, at: tuple[int, ...]) -> bool:
    return len(at) == len(leaf.cell) and all(i < leaf.dims[axis] for i, axis in zip(at, leaf.cell, strict=True))


def _new_record(leaf: Leaf, at: tuple[int, ...], raw: bytes, now: dict) -> Cell:
    number, run, finished, seconds, _ = OLD_RECORD.unpack(raw)
    old = Cell(int(number), int(run), finished, seconds)
    if any(leaf.place.read(chunk.name) is None for chunk in survey.chunks(leaf, at, now)):
        return old
    try:
        mark = -1 if leaf.path == RUNS else content(survey.values(leaf, at, now))
    except (StoreError, ValueError, RuntimeError):  # damaged: for verify to tell
        return old
    return old._replace(structure=0, content=mark)


MIGRATIONS: dict[int, Callable[[Place], None]] = {1: one_to_two}
"""Layout -> what turns a store of it into the next one, in place."""
