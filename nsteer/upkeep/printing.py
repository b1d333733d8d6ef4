"""Turns what upkeep found and did into what a terminal or a script reads."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from nsteer.terminal import console, table
from nsteer.upkeep.merge import Merged
from nsteer.upkeep.survey import LEFTOVERS, Leftover
from nsteer.upkeep.verify import Report

MOST = 40
"""Lines of a kind that a terminal shows; JSON holds all."""


def size(number: int) -> str:
    """Bytes in the largest fitting unit."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if number >= 1 << power:
            return f"{number / (1 << power):.1f} {unit}"
    return f"{number} B"


def lines(out: Any, texts: list[str]) -> None:
    """Texts a line, the first ones."""
    for text in texts[:MOST]:
        out.print(text, markup=False)
    if len(texts) > MOST:
        out.print(f"... and {len(texts) - MOST} more")


def report_data(report: Report) -> dict[str, Any]:
    """A report of verify as plain data."""
    data = asdict(report)
    for one in data["findings"]:
        one.pop("position")
    return {**data, "clean": report.clean}


def print_report(report: Report) -> None:
    """What verify found."""
    out = console()
    lines(out, [f"repaired: {text}" for text in report.repaired])
    lines(out, list(map(str, report.findings)))
    print_leftovers(report.leftovers)
    if report.unsealed:
        out.print(f"{report.unsealed} cells were committed under layout 1: a file that was removed does not show there")
    files = f"{report.groups} groups, {report.cells} finished cells, {report.files} files, {size(report.bytes)}"
    if report.clean:
        out.print(f"{report.store}: no problems ({files})", markup=False)
        return
    count = len(report.findings)
    out.print(f"{report.store}: {count} problem{'s' if count > 1 else ''} ({files})", markup=False)
    if not report.repaired:
        out.print("--repair drops the records of broken cells, so that the next run computes them again")


def print_leftovers(leftovers: list[Leftover]) -> None:
    """Files that nothing needs, by kind."""
    if not leftovers:
        return
    kinds: dict[str, list[Leftover]] = defaultdict(list)
    for one in leftovers:
        kinds[one.kind].append(one)
    made = table("harmless leftovers", "files", "bytes", "such as")
    for kind, found in kinds.items():
        made.add_row(LEFTOVERS[kind], str(len(found)), size(sum(one.bytes for one in found)), found[0].name)
    console().print(made)


def merged_data(merged: Merged) -> dict[str, Any]:
    """What a merge did as plain data."""
    return asdict(merged)


def print_merged(merged: Merged, output: str) -> None:
    """What a merge did."""
    out = console()
    made = table("group", "copied", "already there")
    for path in dict.fromkeys([*merged.copied, *merged.same]):
        made.add_row(path, str(merged.copied.get(path, 0)), str(merged.same.get(path, 0)))
    out.print(made)
    lines(out, [f"conflict: {one}" for one in merged.conflicts])
    count = len(merged.conflicts)
    told = f"; {count} conflict{'s' if count > 1 else ''} left out (--prefer first or last decides)" if count else ""
    told += f"; {merged.preferred} conflicts decided as told" if merged.preferred else ""
    copied, same = sum(merged.copied.values()), sum(merged.same.values())
    out.print(f"{output}: {copied} cells copied, {same} already there, {merged.runs} runs{told}", markup=False)
