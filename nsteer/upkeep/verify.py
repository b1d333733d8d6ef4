"""Turns a store into a list of what is wrong with it, each thing by its labels.

A finished cell tells in its record what it held (`structure`) and a fingerprint of its values (`content`), so a file
that was removed is told from one that was never there, and a file of older values from the right one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping

from nsteer.errors import LabelError, ModelError, StoreError
from nsteer.models import facts, folders
from nsteer.plan.schema import Model
from nsteer.stages.products import product_of
from nsteer.store import Store, chunks, decoding, slug
from nsteer.store.documents import FILE, file_of, read_document
from nsteer.store.group import CELL, CELL_FIELD, CELL_FIELDS, chunk_dim
from nsteer.store.leaf import Leaf
from nsteer.store.results import Results
from nsteer.store.runs import PATH as RUNS
from nsteer.system.names import chunk_index
from nsteer.upkeep import survey, whole
from nsteer.upkeep.findings import Finding, Report

Told = Callable[[str, int], None]
"""Hears of a group how many more of its cells were looked at."""


def verify(store: Store, told: Told = lambda group, cells: None) -> Report:
    """Reads every file of a store. Safe beside writers: what is found wrong is looked at again before it is told.

    Raises StoreError where there is no store, StoreVersionError for another layout.
    """
    report, leaves = documents(store)
    if report.findings:  # a process may have been changing the structure: none is under the lock
        with contextlib.suppress(StoreError), store.changing("verify"):
            store.forget()
            report, leaves = documents(store)
    owned: set[str] = {FILE}
    seen: dict[str, whole.Seen] = {}
    lost = {finding.group for finding in report.findings if finding.hides_cells}
    for path, leaf in leaves.items():
        if path in lost:
            owned |= {name for name, _ in store.place.walk(path)}  # its cells can not be named
            continue
        owned |= survey.needed_files(leaf)
        try:
            seen[path] = whole.look(leaf, lambda cells, path=path: told(path, cells))  # type: ignore[misc]
        except StoreError as error:  # its records can not be listed
            report.findings.append(Finding("unreadable", path, str(error)))
            owned |= {name for name, _ in store.place.walk(path)}
            continue
        report.cells += seen[path].cells
        report.findings += seen[path].findings
        owned |= seen[path].owned
    report.findings += _provenance(store, leaves, seen)
    files = dict(store.place.walk())
    report.leftovers = survey.leftovers(store, leaves, owned, files)
    report.files, report.bytes = len(files), sum(files.values())
    report.notes = list(_models(store))
    return report


def documents(store: Store) -> tuple[Report, dict[str, Leaf]]:
    """What is wrong with documents, labels and what stands beside them; the groups that can be read, by path."""
    report = Report(store.place.name)
    root, wrong = survey.root_document(store)
    if wrong:
        report.findings.append(Finding("metadata", "", wrong, FILE))
    leaves: dict[str, Leaf] = {}
    for path in survey.published(root) if root else sorted(survey.leaf_paths(store.place)):
        report.groups += 1
        leaf, findings = _leaf(store, root, path)
        report.findings += findings
        if leaf is not None:
            leaves[path] = leaf
            if not findings:
                report.findings += _structure(store, leaf)
    return report, leaves


# ---- structure ------------------------------------------------------------------------------------------------


def _leaf(store: Store, root: Mapping | None, path: str) -> tuple[Leaf | None, list[Finding]]:
    """A group by its own document, or by the root's where that is gone or damaged."""
    try:
        told, unfit = survey.leaf_from_root(store.place, root, path), ""
    except StoreError as error:
        told, unfit = None, str(error)
    try:
        leaf = store.leaf(path)
        wrong = "" if leaf else f"{file_of(path)} is gone"
    except StoreError as error:
        leaf, wrong = None, str(error)
    if wrong:
        return told, [Finding(_kind("metadata", wrong), path, wrong, file_of(path))]
    assert leaf is not None
    if unfit:
        return leaf, [Finding("metadata", path, unfit, FILE)]
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
        try:
            some = list(chunks.whole_chunks(leaf, name))
        except StoreError as error:
            broken.add(name)
            yield Finding("labels", leaf.path, str(error), variable=name)
            continue
        for chunk, got in zip(some, whole.read(leaf.place, [chunk.name for chunk in some]), strict=True):
            wrong = str(got) if isinstance(got, StoreError) else ""
            if wrong := wrong or decoding.broken(got[1] if isinstance(got, tuple) else None, leaf.arrays[name]):
                broken.add(name)
                kind = _kind("labels" if name in leaf.dims else "auxiliary", wrong)
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
        yield Finding(_kind("metadata", str(error)), group or path, str(error), file, variable=name)
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
        return f"label {next(value for value in labels if labels.count(value) > 1)!r} stands there twice"
    if dim in map(chunk_dim, leaf.chunks) and labels != list(range(len(labels))):
        return "chunks are not numbered from 0"
    if dim == "model" and product_of(leaf.path).by_model:
        try:
            own = [slug(label) for label in labels]
        except StoreError as error:
            return str(error)
        if own != [leaf.path.rpartition("/")[2]]:
            return f"the group is named otherwise than its model: {', '.join(map(repr, labels))}"
    return ""


def _kind(kind: str, wrong: str) -> str:
    """What a repair may put right is of a kind of its own; what the system does not let us read is not."""
    return "unreadable" if "can not be read" in wrong and "not a regular file" not in wrong else kind


# ---- provenance -----------------------------------------------------------------------------------------------


def _provenance(store: Store, leaves: Mapping[str, Leaf], seen: Mapping[str, whole.Seen]) -> Iterator[Finding]:
    """Cells whose run has no record. A run may have begun since its group was looked at: those are looked up now."""
    names = store.place.names(f"{RUNS}/{CELL}")
    there = {index[0] for name in names if (index := chunk_index(name))}
    for path, look in seen.items():
        leaf = leaves[path]
        for at, run, stamp in look.runs:
            if run >= 0 and run not in there and leaf.changed([at])[0] == stamp:
                what = f"made by run {run}, of which there is no record"
                cell = chunks.cell_name(leaf, at)
                yield Finding("provenance", path, what, position=at, cell=cell, run=run, stamp=stamp)


def _models(store: Store) -> Iterator[str]:
    """Models whose files are here and are no longer those that the store's cells were made from.

    Their content is read, whatever was remembered of it.
    """
    try:
        models = Results(store)["models"]
    except (StoreError, LabelError, OSError):
        return  # its findings say why
    known = {name: models[name].fillna("").values for name in ("id", "gguf", "adapter", "identity")}
    for label, *told in zip(models.model.values, *known.values(), strict=True):
        of = dict(zip(known, map(str, told), strict=True))
        here = of["gguf"] or of["id"]
        if not of["identity"].startswith(facts.HASHED) or not os.path.exists(here):
            continue
        try:
            with folders.read_again():
                now = facts.facts(Model(id=here, peft=of["adapter"] or None)).identity
        except ModelError as error:
            yield f"model {label}: {error}"
            continue
        if now != of["identity"]:
            yield f"model {label}: {here} holds other files than those that its cells were made from"
