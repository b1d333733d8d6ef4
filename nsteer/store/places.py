"""Where a store lies: files under names, each put in place whole, and one lock for changes of structure.

Everything the store does besides reading and writing arrays goes through a `Place`, so the protocol of commits is
the same on a disk and on object storage (`nsteer.store.remote`). Names are relative to the root and use `/`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import filelock

from nsteer.errors import StoreError
from nsteer.system import locks
from nsteer.system.files import is_url

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_SECONDS = 600
PARTIAL = ".partial"
RECORDS = "cell"  # the folder of a group's commit records
MAX_FILE = 2**27
"""Bytes of the largest file that is read: cells are cut into chunks of about 1 MiB, only their texts may take more."""

READ = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)


class Changed(Exception):
    """A file was put by somebody else since it was read."""


class Place(Protocol):
    """Where a store lies."""

    name: str
    timed: bool
    """Whether stamps are unix nanoseconds: of two changes right after each other both may bear one."""

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """What zarr may raise here when the place refuses."""

    def occupied(self) -> bool:
        """Whether anything is there, the remains of a killed first write aside."""

    def read(self, name: str) -> bytes | None:
        """The bytes under a name, None where there are none. StoreError when they are refused."""

    def versioned(self, name: str) -> tuple[bytes | None, str]:
        """The bytes with the version under which `write` knows them."""

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        """The bytes under each of these names that is there."""

    def read_stamped(self, names: Sequence[str]) -> Iterator[tuple[int, bytes] | None]:
        """For each file its stamp and its bytes, None for one that is not there. A file put in between, which has
        another stamp than its bytes, has the older one."""

    def stamps(self, names: list[str]) -> list[int]:
        """For each file a number that changes when it is put again; 0 for one that is not there. For a folder one that
        changes when a file is put into it or goes; 0 where folders have none."""

    def write(self, name: str, content: bytes, over: str | None = None) -> None:
        """Puts bytes under a name at once, or not at all. Raises Changed when it is known not to be over `over`."""

    def delete(self, name: str) -> bool:
        """Removes one file. True if it was there."""

    def remove(self, folder: str) -> None:
        """Removes a folder with all that is in it."""

    def names(self, folder: str) -> list[str]:
        """The names of the files right in a folder; empty when there is none."""

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        """Every file below a folder: name from the root, and bytes."""

    def age(self, name: str) -> float:
        """Seconds since a file was put; 0 for one that is gone."""

    @property
    def files(self) -> Any:
        """The root as zarr reads and writes it."""

    def target(self, name: str) -> Any:
        """What xarray opens for a group."""

    def sweep(self, folders: Iterable[str]) -> None:
        """Removes what killed processes left beside documents. Only under the lock: nobody else writes them."""

    guarded: bool
    """Whether `committing` keeps others out."""

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """One holder at a time, over all processes. StoreError when it stays taken."""

    def committing(self, group: str) -> contextlib.AbstractContextManager[None]:
        """One committer of a group at a time, over all processes, where the place has locks that die with their
        holders; whoever takes cells away holds it too. StoreError when it stays taken."""

    def seal(self, name: str, content: bytes) -> None:
        """Puts a commit record where none is. Raises Changed where another one came in since."""

    def assure(self) -> None:
        """The lock is still ours: versions that were read since it was taken are of before anybody else's turn.
        StoreError where it was lost."""

    def sync(self) -> None:
        """Waits until what was written would survive a power loss."""


def place_of(path: str | os.PathLike) -> Place:
    """The place of a store: a directory, or what a URL names. Touches nothing."""
    if is_url(path):
        from nsteer.store.remote import Remote

        return Remote(str(path))
    return Local(Path(path))


class Local:
    """A directory. Bytes are put by a rename; the lock is flock, which the kernel frees when its holder dies."""

    refusals: tuple[type[Exception], ...] = (OSError,)
    timed = True
    guarded = True

    def __init__(self, root: Path):
        self.root = root
        self.name = str(root)

    def occupied(self) -> bool:
        with self._reading(""):
            return self.root.exists() and not (self.root.is_dir() and all(map(_debris, self.root.iterdir())))

    def read(self, name: str) -> bytes | None:
        try:
            with self._reading(name):
                return _content(f"{os.fspath(self.root)}/{name}")[1]
        except (FileNotFoundError, NotADirectoryError):
            return None

    def versioned(self, name: str) -> tuple[bytes | None, str]:
        return self.read(name), ""  # the lock is enough here

    def read_all(self, names: Iterable[str]) -> dict[str, bytes]:
        contents = ((name, self.read(name)) for name in names)
        return {name: content for name, content in contents if content is not None}

    def read_stamped(self, names: Sequence[str]) -> Iterator[tuple[int, bytes] | None]:
        root = os.fspath(self.root)
        for name in names:
            try:
                stamped_content = _content(f"{root}/{name}")
            except (FileNotFoundError, NotADirectoryError):
                yield None
            except OSError as error:
                raise StoreError(f"{root}/{name} can not be read: {error.strerror or error}") from error
            else:
                yield stamped_content

    def stamps(self, names: list[str]) -> list[int]:
        root = os.fspath(self.root)
        return [_stamp(f"{root}/{name}") for name in names]

    def write(self, name: str, content: bytes, over: str | None = None) -> None:
        put(self.root / name, content)

    def delete(self, name: str) -> bool:
        try:
            (self.root / name).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def remove(self, folder: str) -> None:
        if (self.root / folder).exists():
            shutil.rmtree(self.root / folder)

    def names(self, folder: str) -> list[str]:
        try:
            with self._reading(folder), os.scandir(self.root / folder) as entries:
                return [entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def walk(self, folder: str = "") -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(self.root / folder) as scan:
                entries = list(scan)
        except OSError:  # gone, or not ours to list: what must lie there is asked for by name
            return
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir(follow_symlinks=False):
                yield from self.walk(name)
                continue
            with contextlib.suppress(FileNotFoundError):  # gone since it was listed
                yield name, entry.stat(follow_symlinks=False).st_size

    def age(self, name: str) -> float:
        stamp = _stamp(self.root / name)
        return time.time() - stamp / 1e9 if stamp else 0.0

    @property
    def files(self) -> Any:
        from nsteer.store.regular import Files

        return Files(self.root)

    def target(self, name: str) -> Any:
        from nsteer.store.regular import Files

        return Files(self.root / name)

    def sweep(self, folders: Iterable[str]) -> None:
        for folder in folders:
            for temporary in (self.root / folder).glob(f"zarr.*{PARTIAL}"):
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with self._alone(f"{self.root}.lock"):
            yield

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        lock = locks.lock(name, LOCK_SECONDS)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise StoreError(locks.lock_problem(lock, LOCK_SECONDS)) from error
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def committing(self, group: str) -> Iterator[None]:
        """flock of the folder of the group's records: no file of its own. Where folders can not be locked (NFS,
        Windows, or no such locks at all) a lock file beside the store. Where no folder is, nobody is kept out."""
        if not (self.root / group / RECORDS).is_dir():
            yield
            return
        with contextlib.ExitStack() as held:
            if not self._folder_locked(group, held):
                held.enter_context(self._alone(f"{self.root}.{group.replace('/', '.')}.lock"))
            yield

    def _folder_locked(self, group: str, held: contextlib.ExitStack) -> bool:
        """Holds the lock of a folder until `held` ends. False where there is none that reaches every machine."""
        if fcntl is None or not locks.reaches(os.path.dirname(os.path.abspath(self.root))):
            return False
        try:
            folder = os.open(self.root / group / RECORDS, os.O_RDONLY)
        except OSError:
            return False
        held.callback(os.close, folder)
        return _flock(folder, f"{self.root}/{group}")

    def seal(self, name: str, content: bytes) -> None:
        self.write(name, content)  # the lock is enough here

    def assure(self) -> None:
        """It is: the system takes it from nobody who lives."""

    def sync(self) -> None:
        try:
            syncfs = ctypes.CDLL(None, use_errno=True).syncfs
        except (AttributeError, TypeError, OSError):  # not Linux
            if not hasattr(os, "sync"):
                raise StoreError(
                    "this system can not be asked to write a whole disk: durable=True is of POSIX"
                ) from None
            os.sync()
            return
        folder = os.open(self.root, os.O_RDONLY)
        try:
            if syncfs(folder):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise StoreError(f"{self.root / name} can not be read: {error.strerror or error}") from error


def _flock(folder: int, name: str) -> bool:
    """Waits for a lock that the system frees when its holder dies; False where a folder has none. StoreError when it
    stays taken."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                words = f"another process has been committing to {name} for {LOCK_SECONDS} s; wait for it"
                raise StoreError(words) from None
            time.sleep(0.002)
        except OSError:
            return False


def put(path: Path, content: bytes) -> None:
    """Puts a file by a rename: whoever reads it sees all of it, or what was there before."""
    temporary = path.parent / f"zarr.{secrets.token_hex(8)}{PARTIAL}"
    try:
        try:
            temporary.write_bytes(content)
        except FileNotFoundError:  # most folders are there
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _content(path: str) -> tuple[int, bytes]:
    """Stamp and bytes of a regular file. OSError for anything else, which could wait, or go on, for ever.

    One call a folder: groups have a file for each cell, so this is what listing one costs.
    """
    file = os.open(path, READ)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if status.st_size > MAX_FILE:
            raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, and is no file of a store")
        pieces, left = [], status.st_size
        while left and (piece := os.read(file, left)):
            pieces.append(piece)
            left -= len(piece)
    finally:
        os.close(file)
    return status.st_mtime_ns, b"".join(pieces)


def _stamp(path: str | Path) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError:  # links in a circle: it is there, and reading it says what it is
        return _link_stamp(path)


def _link_stamp(path: str | Path) -> int:
    try:
        return os.lstat(path).st_mtime_ns
    except OSError as error:
        raise StoreError(f"{path} can not be read: {error.strerror or error}") from error


def _debris(entry: Path) -> bool:
    return entry.name.startswith("zarr.") and entry.name.endswith(PARTIAL)
