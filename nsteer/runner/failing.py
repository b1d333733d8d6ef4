"""Turns what went wrong into records of the group `failures`, and those into what a later run tries again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import xarray as xr

from nsteer.errors import (
    AnatomyError,
    EngineError,
    ExecutionError,
    InputError,
    NsteerError,
    RemoteError,
    RemoteProgramError,
    in_a_line,
)
from nsteer.stages import arrays
from nsteer.store import Store
from nsteer.system import machine
from nsteer.system.fingerprints import DIGITS, fingerprint

PERMANENT, TRANSIENT, WAITING = "permanent", "transient", "waiting"
"""`permanent`: it would fail again. `transient`: memory, network, a server. `waiting`: what it rests on failed."""

ENVIRONMENT = ("CUDA error", "CUBLAS_STATUS", "cuDNN", "MPS backend", "No space left on device")
"""Words of errors that blame the machine, not the cell."""


@dataclass(frozen=True)
class Failure:
    """A cell that could not be computed, and why."""

    stage: str
    cell: tuple
    reason: str
    kind: str = PERMANENT


def kind_of(error: BaseException) -> str:
    """Whether an error may pass by itself. What memory caused does, whatever it was told as."""
    if isinstance(error, OSError | InputError) or any(map(machine.out_of_memory, causes(error))):
        return TRANSIENT
    if isinstance(error, EngineError):
        return TRANSIENT
    if isinstance(error, RemoteError) and not isinstance(error, RemoteProgramError):
        return TRANSIENT
    if isinstance(error, ExecutionError) and any(words in str(error) for words in ENVIRONMENT):
        return TRANSIENT
    return PERMANENT


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def not_loaded(error: Exception, name: str, device: str) -> tuple[str, str]:
    """Why a model does not load, in a line, and of what kind that is: permanent where it is not as a model must be."""
    if isinstance(error, NsteerError):
        reason = str(error)
    else:
        reason = f"{name!r} can not be loaded: {in_a_line(error)}"
    if why := machine.lacks(device):
        reason = f"device {device!r}: {why} ({reason})"
    return reason, kind_of(error) if isinstance(error, AnatomyError) else TRANSIENT


@dataclass(frozen=True)
class Entry:
    """One record: the failure of a cell of a group, and whether it was made good since."""

    group: str
    failure: Failure
    fingerprint: int
    run: str
    attempts: int = 1
    resolved: bool = False


class Book:
    """The failures that a store keeps, one a cell: the latest. What is added is written by `flush`."""

    def __init__(self, store: Store, run: str = ""):
        self.store, self.run = store, run
        self.entries: dict[tuple[str, tuple], Entry] = {}
        self._changed: set[tuple[str, tuple]] = set()
        self.read()

    def read(self) -> None:
        """Takes in what other runs wrote meanwhile; what is not yet flushed stays as it is."""
        if not self.store.exists or "failures" not in self.store.groups():
            return
        data = self.store.read("failures").load()
        columns = {str(name): data[name].values.tolist() for name in arrays.FAILURE}
        for i in range(data.sizes["failure"]):
            row = {name: values[i] for name, values in columns.items()}
            if not row["group"]:  # a label without its record: the run that made it was killed
                continue
            failure = Failure(row["stage"], tuple(json.loads(row["labels"])), row["reason"], row["kind"])
            where = (row["group"], failure.cell)
            if where not in self._changed:
                rest = int(row["cell_fingerprint"]), row["run"], int(row["attempts"]), bool(row["resolved"])
                self.entries[where] = Entry(where[0], failure, *rest)

    def open(self, group: str, cell: tuple) -> Entry | None:
        """The record of a cell that is not made good."""
        entry = self.entries.get((group, cell))
        return None if entry is None or entry.resolved else entry

    def known_failure(self, group: str, cell: tuple, number: int) -> Failure | None:
        """The failure for which a cell is not tried: it is permanent, and nothing that it rests on has changed."""
        entry = self.open(group, cell)
        return entry.failure if entry and entry.failure.kind == PERMANENT and entry.fingerprint == number else None

    def add(self, group: str, failure: Failure, number: int) -> None:
        """A cell failed."""
        where = (group, failure.cell)
        before = self.entries.get(where)
        same = before and not before.resolved and (before.failure, before.fingerprint) == (failure, number)
        if same and failure.kind == WAITING:
            return  # nothing was tried
        self.entries[where] = Entry(group, failure, number, self.run, 1 + (before.attempts if before else 0))
        self._changed.add(where)

    def resolve(self, group: str, cell: tuple) -> None:
        """A cell that may have failed before is there now."""
        if self.open(group, cell):
            self.entries[group, cell] = replace(self.entries[group, cell], resolved=True)
            self._changed.add((group, cell))

    def flush(self) -> None:
        """Writes what has changed into the store."""
        if not self._changed:
            return
        changed = {name(*where): self.entries[where] for where in sorted(self._changed, key=str)}
        self.store.prepare([arrays.failures_group(list(changed))])
        for label, entry in changed.items():
            self.store.commit("failures", (label,), _data(entry), fingerprint=fingerprint(label))
        self._changed.clear()


def name(group: str, cell: tuple) -> str:
    """The label of a cell's record: the same whenever and wherever it fails."""
    return f"{group}:{fingerprint([group, list(cell)]):0{DIGITS}x}"


def _data(entry: Entry) -> xr.Dataset:
    failure = entry.failure
    values: dict[str, Any] = {
        "stage": failure.stage,
        "group": entry.group,
        "model": next(map(str, failure.cell), ""),
        "labels": json.dumps(list(failure.cell)),
        "reason": failure.reason,
        "kind": failure.kind,
        "run": entry.run,
        "cell_fingerprint": entry.fingerprint,
        "attempts": entry.attempts,
        "resolved": entry.resolved,
    }
    return xr.Dataset({name: ((), value) for name, value in values.items()})
