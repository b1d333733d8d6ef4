"""Turns what upkeep found and did into what a terminal or a script reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from nsteer.errors import printable
from nsteer.report.terminal import console, table
from nsteer.upkeep import diff, gc
from nsteer.upkeep.findings import Report
from nsteer.upkeep.merge import Merged
from nsteer.upkeep.survey import LEFTOVERS, Leftover

MAX_LINES = 40
"""Lines of a kind that a terminal shows; JSON holds all."""


def size(number: int) -> str:
    """Bytes in the largest fitting unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.1f} {unit}"
    return f"{number} B"


def lines(out: Any, texts: list[str]) -> None:
    """Texts a line, the first ones."""
    for text in texts[:MAX_LINES]:
        out.print(printable(text, lines=False))
    if len(texts) > MAX_LINES:
        out.print(f"... and {len(texts) - MAX_LINES} more")


def report_data(report: Report) -> dict[str, Any]:
    """A report of verify as JSON data."""
    data = asdict(report)
    for finding in data["findings"]:
        finding.pop("position"), finding.pop("stamp")
    return {**data, "clean": report.clean}


def print_report(report: Report) -> None:
    """What verify found."""
    out = console()
    lines(out, [f"repaired: {text}" for text in report.repaired])
    lines(out, list(map(str, report.findings)))
    lines(out, [f"note: {text}" for text in report.notes])
    print_leftovers(report.leftovers)
    files = f"{report.groups} groups, {report.cells} finished cells, {report.files} files, {size(report.bytes)}"
    if report.clean:
        out.print(f"{report.store}: no problems ({files})")
        return
    count = len(report.findings)
    out.print(f"{report.store}: {count} problem{'s' if count > 1 else ''} ({files})")
    if not report.repaired:
        out.print("--repair drops the records of broken cells, so that the next run computes them again")


def print_leftovers(leftovers: list[Leftover]) -> None:
    """Files that nothing needs, by kind."""
    if not leftovers:
        return
    kinds: dict[str, list[Leftover]] = defaultdict(list)
    for leftover in leftovers:
        kinds[leftover.kind].append(leftover)
    leftovers_table = table("harmless leftovers", "files", "bytes", "such as")
    for kind, files in kinds.items():
        leftovers_table.add_row(
            LEFTOVERS[kind], str(len(files)), size(sum(file.bytes for file in files)), files[0].name
        )
    console().print(leftovers_table)


def merged_data(merged: Merged) -> dict[str, Any]:
    """What a merge did as JSON data."""
    return asdict(merged)


def print_merged(merged: Merged, output: str) -> None:
    """What a merge did."""
    out = console()
    groups_table = table("group", "copied", "already there")
    for path in dict.fromkeys([*merged.copied, *merged.same]):
        groups_table.add_row(path, str(merged.copied.get(path, 0)), str(merged.same.get(path, 0)))
    out.print(groups_table)
    lines(out, [f"damaged: {cell}" for cell in merged.damaged])
    lines(out, [f"conflict: {conflict}" for conflict in merged.conflicts])
    count = len(merged.conflicts)
    told = f"; {count} conflict{'s' if count > 1 else ''} left out (--prefer first or last decides)" if count else ""
    told += f"; {merged.preferred} conflicts decided as told" if merged.preferred else ""
    copied, same = sum(merged.copied.values()), sum(merged.same.values())
    out.print(f"{output}: {copied} cells copied, {same} already there, {merged.runs} runs{told}")


def gc_data(removals: gc.Plan) -> dict[str, Any]:
    """What may go, or went, as JSON data."""
    cells = [
        {"group": cell.group, "cell": list(cell.cell), "why": cell.why, "bytes": cell.bytes} for cell in removals.cells
    ]
    leftovers = [
        {"kind": leftover.kind, "name": leftover.name, "bytes": leftover.bytes} for leftover in removals.leftovers
    ]
    counts = {name: getattr(removals, name) for name in ("groups", "young", "kept", "spared", "waiting", "deleted")}
    return {"cells": cells, "leftovers": leftovers, **counts, "bytes": removals.bytes}


def print_gc(store: str, removals: gc.Plan) -> None:
    """What may go, or went, by group and reason."""
    out = console()
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    for cell in removals.cells:
        rows[cell.group, cell.why].append(cell.bytes)
    for path, number in removals.groups.items():
        rows[path, "the group itself: no plan names it"] = [number]
    if rows:
        reasons_table = table("group", "why", "cells", "bytes")
        for (path, why), sizes in rows.items():
            reasons_table.add_row(path, why, str(len(sizes)), size(sum(sizes)))
        out.print(reasons_table)
    print_leftovers(removals.leftovers)
    if removals.young:
        out.print(
            f"{removals.young} leftover files are young and stay: somebody may be writing (--older-than 0 takes them)"
        )
    if removals.spared:
        out.print(f"{removals.spared} cells and files changed since the look, or a run may be writing them: they stay")
    if removals.waiting:
        out.print(
            f"{removals.waiting} cells and groups stay while a run is at work here: run gc again when it has ended"
        )
    done = "deleted" if removals.deleted else "to delete"
    counts = f"{len(removals.cells)} cells, {len(removals.groups)} groups, {len(removals.leftovers)} files"
    out.print(f"{store}: {counts}: {size(removals.bytes)} {done}; {removals.kept} cells stay")
    if not removals.deleted and removals.bytes:
        out.print("nothing was deleted; --delete does it")


def diff_data(difference: diff.Difference) -> dict[str, Any]:
    """A difference as JSON data."""
    return {"equal": difference.equal, **asdict(difference)}


def print_diff(difference: diff.Difference) -> None:
    """What differs, knobs first."""
    out = console()
    for title, apart in (
        ("plan", difference.knobs),
        ("protocols", difference.protocols),
        ("versions", difference.versions),
    ):
        if apart:
            knobs_table = table(title, "a", "b")
            for key, (a, b) in list(apart.items())[:MAX_LINES]:
                knobs_table.add_row(key, str(a), str(b))
            out.print(knobs_table)
    for side, name in ((difference.only_a, "a"), (difference.only_b, "b")):
        for path, cells in side.items():
            out.print(f"only in {name}: {path}: {len(cells)} cells, such as {labels_in_words(cells[0])}")
    for path, count in difference.settings.items():
        out.print(f"{path}: {count} cells that both hold were made with other settings or data")
    for path, count in difference.damaged.items():
        out.print(f"{path}: {count} cells are damaged in one of them; see nsteer verify")
    if difference.variables:
        variables_table = table(
            "group · variable", "cells", "equal", "max |a − b|", "relative", "missing values", "where"
        )
        for variable in difference.variables:
            numbers = (
                (f"{variable.max_abs:.3g}", f"{variable.max_rel:.3g}", str(variable.missing))
                if variable.worst
                else ("", "", "")
            )
            where = labels_in_words(variable.worst or variable.first)
            variables_table.add_row(
                f"{variable.group} · {variable.variable}", str(variable.cells), str(variable.equal), *numbers, where
            )
        out.print(variables_table)
    out.print(f"a: {difference.a}\nb: {difference.b}\n{'equal' if difference.equal else 'they differ'}")


def labels_in_words(labels: Mapping[str, Any]) -> str:
    """Labels in a line; texts are cut."""
    return ", ".join(
        f"{dim} {text if len(text := str(label)) < 60 else text[:57] + '…'}" for dim, label in labels.items()
    )
