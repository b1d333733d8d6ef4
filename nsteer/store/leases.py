"""Turns cells that several runs want into cells that one of them computes.

A run holds a lock on a file of its own beside the store for as long as it lives, and writes there which cells it has
it computes. The kernel frees the lock when the run dies, by SIGKILL too, and its cells are free again: no clock
decides. Leases save work and guard nothing: two runs that fill one cell write the same numbers. Where a file system
has no such locks, or none that other machines see, there are no leases: runs do not know of each other, and look at
what is committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import filelock

from nsteer.errors import StoreError
from nsteer.system import locks
from nsteer.system.files import is_url

WAIT = 600
Cell = tuple[str, tuple]  # group, labels


class Leases:
    """What one run does in a store. Nothing is on disk before `open`, nor after the last `close`."""

    def __init__(self, store: str | os.PathLike):
        base = str(store)
        if is_url(base):  # the runs of this machine share work; those of others do not know of each other
            base = str(Path(tempfile.gettempdir()) / f"nsteer-{hashlib.sha256(base.encode()).hexdigest()[:16]}")
        self.folder = Path(f"{base}.leases")
        self._beside = os.path.dirname(os.path.abspath(base))
        self._mutex: filelock.BaseFileLock = filelock.FileLock(f"{base}.lock", timeout=WAIT, poll_interval=0.01)
        self._own: filelock.BaseFileLock | None = None
        self._name = secrets.token_hex(8)
        self._seen: tuple[int, int] = (0, 0)

    def open(self) -> None:
        """Says that this run is here. Raises StoreError when the folder can not be written."""
        if not locks.reaches(self._beside):
            return
        with self._exclusively():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = filelock.FileLock(self.folder / f"{self._name}.alive")
            self._own.acquire(timeout=0)
            self._write([])
            self._seen = (0, 0)

    def close(self) -> None:
        """Gives back the cells of this run."""
        if self._own is None:
            return
        with contextlib.suppress(OSError, StoreError), self._exclusively():
            (self.folder / f"{self._name}.json").unlink(missing_ok=True)
            self._own.release()
            (self.folder / f"{self._name}.alive").unlink(missing_ok=True)
            self._own = None
            self.folder.rmdir()  # the last one out; refused while another is here

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """From `open` to `close`, for who adds to a store without taking cells: nsteer gc waits with groups."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def take(self, choose: Callable[[set[Cell], bool], Iterable[Cell]]) -> list[Cell]:
        """Has `choose(held, changed)` pick cells while no other run may, and holds what it picked.

        held : cells that other living runs compute
        changed : whether another run was here since the last look, so that cells may have been committed
        """
        if self._own is None:
            return list(choose(set(), not locks.reaches(self._beside)))
        with self._exclusively():
            others = self._others()
            changed = self._changed(bool(others))
            chosen = list(choose({cell for other in others for cell in self._claims(other)}, changed))
            self._write(chosen)
        return chosen

    def release(self) -> None:
        """What it took is committed, or given up."""
        if self._own is not None:
            self._write([])

    def living(self, locked: bool) -> bool:
        """Whether another run is at work on the store; so it is said where there are no leases, too.

        locked : whether the caller holds the lock of the store's structure, which is that of the leases on a disk
        """
        if not locks.reaches(self._beside):
            return True
        with contextlib.nullcontext() if locked else self._exclusively():
            return bool(self._others())

    # ---- files -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        try:
            with self._mutex:
                yield
        except filelock.Timeout as error:
            raise StoreError(locks.lock_problem(self._mutex, WAIT)) from error
        except OSError as error:
            raise StoreError(f"{self.folder}: {error.strerror or error}") from error

    def _others(self) -> list[str]:
        """Other runs that live; what dead ones left is removed."""
        living = []
        for file in sorted(self.folder.glob("*.alive")):
            if file.stem == self._name:
                continue
            lock = filelock.FileLock(file)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                living.append(file.stem)
                continue
            file.with_suffix(".json").unlink(missing_ok=True)
            file.unlink(missing_ok=True)
            lock.release()
        return living

    def _changed(self, others: bool) -> bool:
        """Runs that come and go change the folder, so one that did both between two looks is seen too."""
        now = os.stat(self.folder)
        before, self._seen = self._seen, (now.st_mtime_ns, now.st_ino)
        return others or before != self._seen

    def _claims(self, name: str) -> list[Cell]:
        try:
            held = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it is just beginning, or was cut off while it wrote: it holds nothing
            return []
        return [(group, tuple(labels)) for group, labels in held]

    def _write(self, cells: Iterable[Cell]) -> None:
        text = json.dumps([[group, list(labels)] for group, labels in cells])
        (self.folder / f"{self._name}.json").write_text(text, encoding="utf-8")
