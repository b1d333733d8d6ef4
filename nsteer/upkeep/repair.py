"""Turns what `verify` found into a store that verifies: documents put back, broken cells to be computed again.

Nothing that can be read is lost: a broken cell loses its record, so the next run computes it again. Only a group
whose labels can not be read is removed whole, since none of its cells can be named.
"""

from __future__ import annotations

import contextlib

import numpy as np
import xarray as xr

from nsteer.errors import StoreError
from nsteer.store import Store, fingerprint, structure
from nsteer.store.documents import FILE, document_at, group_document, write_document
from nsteer.store.leaf import Leaf
from nsteer.system.names import chunk_name
from nsteer.upkeep import survey
from nsteer.upkeep.findings import Finding, Report
from nsteer.upkeep.verify import RUNS, Told, documents, verify

ROUNDS = 8
"""Looks at a store: what one of them has put right may show more."""
STRUCTURE = {"metadata", "labels", "auxiliary"}


def repair(store: Store, told: Told = lambda group, cells: None) -> Report:
    """Mends what can be until nothing more is found. `repaired` of the report says what was done.

    A cell is looked at again as it is dropped: one that was computed again since stays. What the system does not let us
    read (permissions, a failing disk) is told and left as it is. Killed at any point and started again it ends at the
    same store.
    """
    done: list[str] = []
    for _ in range(ROUNDS):
        report = verify(store, told)
        if report.clean:
            break
        if not (some := _mend(store, report)):
            report = verify(store, told)  # what was found may have been computed again since
            break
        done += some
    report.repaired = done
    return report


def _mend(store: Store, report: Report) -> list[str]:
    """Puts right what stands first: documents and labels, then runs, then cells."""
    if any(finding.kind in STRUCTURE for finding in report.findings):
        with store.changing("repair"):
            store.forget()
            done = _documents(store, documents(store)[0])
        store.forget()
        if done:
            return done
    if done := _runs(store, report.findings):
        return done
    broken: dict[tuple[str, tuple], list[Finding]] = {}
    for finding in report.findings:
        if finding.position is not None and finding.kind != "unreadable":
            broken.setdefault((finding.group, finding.position), []).append(finding)
    return [words for (group, at), findings in broken.items() if (words := _cell(store, group, at, findings))]


def _cell(store: Store, group: str, at: tuple[int, ...], findings: list[Finding]) -> str:
    """What was done to a broken cell; "" for one that was computed again, or dropped, since."""
    leaf = store.leaf(group)
    if leaf is None:
        return ""
    with store.place.committing(group):
        if leaf.changed([at])[0] != findings[0].stamp:
            return ""
        if all(finding.kind == "provenance" for finding in findings):
            return _disown(store, leaf, at)
        store.place.delete(leaf.record_file(at))
    return f"{_name(findings[0])}: record dropped; the next run computes this cell again"


def _runs(store: Store, findings: list[Finding]) -> list[str]:
    """Keeps of damaged runs what can be read. What made a cell is worth more than a clean record of it."""
    kinds = {"record", "missing", "damaged", "content"}
    broken = {
        finding.position[0]
        for finding in findings
        if finding.group == RUNS and finding.position and finding.kind in kinds
    }
    broken |= {finding.run for finding in findings if finding.kind == "provenance"}
    leaf, done = store.leaf(RUNS), []
    for at in sorted(broken):
        if leaf is None or at >= leaf.dims["run"]:
            continue
        label, values = leaf.labels["run"][at], {}
        for name in leaf.variables:
            with contextlib.suppress(StoreError, ValueError, RuntimeError), leaf.reading():
                if store.place.read(f"{RUNS}/{name}/{chunk_name((at,))}") is not None:
                    values[name] = leaf.handles[name][at : at + 1].item()
        if not any(values.values()):
            continue  # nothing is left of it
        lost = [name for name in leaf.variables if name not in values]
        data = xr.Dataset({name: ((), values.get(name, "")) for name in leaf.variables})
        number = fingerprint([values.get("plan", ""), label])
        store.commit(RUNS, (label,), data, fingerprint=number, run=at)
        done.append(f"run {at}: kept" + (f"; {', '.join(lost)} could not be read" if lost else ""))
    return done


def _name(finding: Finding) -> str:
    return f"{finding.group} ({', '.join(map(str, finding.cell.values()))})"


def _documents(store: Store, report: Report) -> list[str]:
    """Puts documents back from each other: the root from its groups, a group from the root, an array from its group."""
    done, place = [], store.place
    root, wrong = survey.root_document(store)
    lost = sorted({finding.group for finding in report.findings if finding.kind == "labels"})
    for path in lost:
        place.delete(f"{path}/{FILE}")  # a group without its document is not there
        done.append(f"{path}: removed, since its labels can not be read; the next run computes it again")
    for path in survey.published(root):
        told = survey.leaf_from_root(place, root, path)
        if told is None or path in lost:
            continue
        if _unreadable(store, path):
            write_document(place, path, told.document)
            done.append(f"{path}/{FILE}: put back as the root tells it")
    store.forget()
    paths = list(survey.leaf_paths(place))
    for path in paths:
        leaf = store.leaf(path)
        assert leaf is not None
        for ancestor in survey.ancestors(path):
            if _unreadable(store, ancestor):
                write_document(place, ancestor, group_document({}))
                done.append(f"{ancestor}/{FILE}: put back")
        for name, document in leaf.arrays.items():
            if _unreadable(store, f"{path}/{name}", document):
                write_document(place, f"{path}/{name}", document)
                done.append(f"{path}/{name}/{FILE}: put back as the group tells it")
    for group, name in sorted(
        {(finding.group, finding.variable) for finding in report.findings if finding.kind == "auxiliary"}
    ):
        if (leaf := store.leaf(group)) is not None:
            handle = leaf.handles[name]
            structure.fill(place, f"{group}/{name}", np.full(handle.shape, handle.metadata.fill_value, handle.dtype))
            done.append(f"{group}/{name}: emptied, since it can not be read; the next run writes it again")
    if wrong:
        structure.restore(place, paths)
        done.append(f"{FILE} of the root: made again from its groups")
    structure.retire(place, lost, paths)
    return done


def _unreadable(store: Store, path: str, told: dict | None = None) -> bool:
    """Whether the document of a path is gone, damaged, or less than is told of it."""
    try:
        document = document_at(store.place, path)
    except StoreError:
        return True
    return told is not None and {**document, "shape": 0} != {**told, "shape": 0}


def _disown(store: Store, leaf: Leaf, at: tuple[int, ...]) -> str:
    """A whole cell whose run is not known: keeps its data, says so in its record."""
    record = leaf.record(at)
    if record is None:
        return ""
    store.place.write(leaf.record_file(at), record._replace(run=-1).pack())
    return f"{leaf.path} {leaf.cell_labels(at)!r}: kept; its record no longer names the run that is lost"
