"""Turns a model's folder into hashes of every file that loading it may read, remembered while a file stays the same.

A file is the same while its size, both its times and its place on the disk are: by its path alone never.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from nsteer.errors import ModelError
from nsteer.system import files

UNREAD_FOLDERS = re.compile(r"\..*|__pycache__|.*\.zarr|checkpoint-\d+")
UNREAD_FILES = re.compile(
    r"\..*|(readme|license|licence|notice|copying|use_policy)(\..*)?|.*\.(md|rst|pdf|png|jpe?g|gif|svg|webp|ya?ml|log|lock)"
    r"|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|events\.out\.tfevents.*",
    re.IGNORECASE,
)
"""What no loading of a model reads: caches, stores, words, pictures, plans, what a training left. All else counts."""

SETTLED = 2_000_000_000
"""Nanoseconds for which a file must have been left alone before its hash is remembered: clocks of disks are coarse."""

LARGE = 2**24
"""Bytes from which a file's hash is remembered between processes too."""

_REMEMBERED: dict[Stamp, str] = {}
_MOST = 4096
_AGAIN: ContextVar[bool] = ContextVar("_AGAIN", default=False)


@dataclass(frozen=True)
class Stamp:
    """A file as it is now, without its content. `name` is its path within the folder; times in nanoseconds.

    link : inode and change of what stands under the name, where that is a link to the file
    """

    name: str
    path: str
    size: int
    modified: int
    changed: int
    inode: tuple[int, int]
    link: tuple[int, int]


def stamps(folder: Path) -> tuple[Stamp, ...]:
    """Every file in a folder that loading a model may read, by name.

    Raises ModelError for a folder that can not be looked into.
    """
    try:
        file_stamps = list(_stamps(folder))
    except OSError as error:
        raise ModelError(f"the directory {str(folder)!r} can not be read: {error.strerror or error}") from error
    return tuple(sorted(file_stamps, key=lambda stamp: stamp.name))


def stamp(file: Path, name: str = "") -> Stamp:
    """A file as it is now; `name` is what it is called, its own name unless given. Raises ModelError."""
    try:
        return _stamp(str(file), name or file.name)
    except OSError as error:
        raise ModelError(f"{str(file)!r} can not be read: {error.strerror or error}") from error


def _stamp(path: str, name: str) -> Stamp:
    link, real = os.lstat(path), os.stat(path)
    return Stamp(
        name,
        path,
        real.st_size,
        real.st_mtime_ns,
        real.st_ctime_ns,
        (real.st_dev, real.st_ino),
        (link.st_ino, link.st_ctime_ns),
    )


def _stamps(folder: Path) -> Iterator[Stamp]:
    seen = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        here = os.stat(root)
        again = (here.st_dev, here.st_ino) in seen
        seen.add((here.st_dev, here.st_ino))
        folders[:] = [] if again else [name for name in folders if not UNREAD_FOLDERS.fullmatch(name)]
        for file in () if again else names:
            path = os.path.join(root, file)
            if UNREAD_FILES.fullmatch(file) or not os.path.isfile(path):
                continue
            yield _stamp(path, os.path.relpath(path, folder).replace(os.sep, "/"))


def _raise(error: OSError) -> None:
    raise error


def content(stamp: Stamp) -> str:
    """The SHA-256 of a file's content, read again unless it is the same file, or under `read_again`. Raises ModelError.

    Of a large file it is remembered between processes too, in the cache.
    """
    if not _AGAIN.get():
        if stamp in _REMEMBERED:
            return _REMEMBERED[stamp]
        if stamp.size >= LARGE and (kept := _kept(stamp)):
            return _remember(stamp, kept)
    started = time.time_ns()
    try:
        with open(stamp.path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise ModelError(f"a file {stamp.name!r} that can not be read: {error.strerror or error}") from error
    same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (stamp.size, stamp.modified, stamp.changed)
    if same and started - max(stamp.changed, stamp.modified, stamp.link[1]) > SETTLED:
        _remember(stamp, digest)
        if stamp.size >= LARGE:
            _keep(stamp, digest)
    return digest


@contextmanager
def read_again() -> Iterator[None]:
    """Meanwhile nothing is remembered of a file's content: a disk may change it and tell nothing."""
    token = _AGAIN.set(True)
    try:
        yield
    finally:
        _AGAIN.reset(token)


def _remember(stamp: Stamp, digest: str) -> str:
    if len(_REMEMBERED) >= _MOST:
        _REMEMBERED.clear()
    _REMEMBERED[stamp] = digest
    return digest


def _place(stamp: Stamp) -> Path:
    """Where the hash of a large file is kept: named by all that tells whether it is still the same."""
    said = repr((os.path.abspath(stamp.path), stamp.size, stamp.modified, stamp.changed, stamp.inode, stamp.link))
    return files.cache() / "hashes" / hashlib.sha256(said.encode()).hexdigest()


def _kept(stamp: Stamp) -> str:
    try:
        digest = _place(stamp).read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else ""


def _keep(stamp: Stamp, digest: str) -> None:
    place = _place(stamp)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with files.aside(place) as temporary:
            temporary.write_text(digest, encoding="ascii")
    except OSError:  # a home that may not be written to: it is hashed again next time
        return
