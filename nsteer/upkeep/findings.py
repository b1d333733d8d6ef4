"""What verify finds, told by labels: one thing that is wrong, and the whole of a look at a store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsteer.upkeep import survey


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: of which kind, where, what, and the cell it breaks.

    stamp : of the cell's record as it was when this was found
    """

    kind: str
    group: str
    what: str
    file: str = ""
    position: tuple[int, ...] | None = None
    cell: Mapping[str, Any] = field(default_factory=dict)
    variable: str = ""
    within: Mapping[str, Any] = field(default_factory=dict)
    run: int = -1
    stamp: int = 0

    @property
    def hides_cells(self) -> bool:
        """Whether the cells of its group can not be named, or looked at."""
        if self.position is not None:
            return False
        return self.kind in ("labels", "unreadable") or bool(self.group and self.file == f"{self.group}/zarr.json")

    def __str__(self) -> str:
        where = [self.group or "root", _said(self.cell), self.variable, _said(self.within)]
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
    notes: list[str] = field(default_factory=list)  # what is true of the world around the store, and no fault of it

    @property
    def clean(self) -> bool:
        return not self.findings


def _said(labels: Mapping[str, Any]) -> str:
    return ", ".join(f"{dim} {_range(label)}" for dim, label in labels.items())


def _range(label: Any) -> str:
    return f"{label[0]}–{label[1]}" if isinstance(label, list) else str(label)
