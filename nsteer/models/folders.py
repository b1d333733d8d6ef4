"""Turns a model's folder into hashes of every file that loading it may read, remembered while a file stays the same.

A file is the same while its size, both its times and its place on the disk are: by its path alone never.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nsteer.errors import ModelError

UNREAD_FOLDERS = re.compile(r"\..*|__pycache__|.*\.zarr|checkpoint-\d+")
UNREAD_FILES = re.compile(
    r"\..*|(readme|license|licence|notice|copying|use_policy)(\..*)?|.*\.(md|rst|pdf|png|jpe?g|gif|svg|webp|ya?ml|log|lock)"
    r"|optimizer\.pt|scheduler\.pt|scaler\.pt|rng_state.*\.pth|trainer_state\.json|events\.out\.tfevents.*",
    re.IGNORECASE,
)
"""What no loading of a model reads: caches, stores, words, pictures, plans, what a training left. All else counts."""

SETTLED = 2_000_000_000
"""Nanoseconds for which a file must have been left alone before its hash is remembered: clocks of disks are coarse."""

_REMEMBERED: dict[Stamp, str] = {}
_MOST = 4096


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
        found = list(_stamps(folder))
    except OSError as error:
        raise ModelError(f"the directory {str(folder)!r} can not be read: {error.strerror or error}") from error
    return tuple(sorted(found, key=lambda one: one.name))


def _stamps(folder: Path) -> Iterator[Stamp]:
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = os.stat(root)
        again = (here.st_dev, here.st_ino) in seen
        seen.add((here.st_dev, here.st_ino))
        folders[:] = [] if again else [one for one in folders if not UNREAD_FOLDERS.fullmatch(one)]
        for file in () if again else files:
            path = os.path.join(root, file)
            if UNREAD_FILES.fullmatch(file) or not os.path.isfile(path):
                continue
            link, real = os.lstat(path), os.stat(path)
            yield Stamp(
                os.path.relpath(path, folder).replace(os.sep, "/"),
                path,
                real.st_size,
                real.st_mtime_ns,
                real.st_ctime_ns,
                (real.st_dev, real.st_ino),
                (link.st_ino, link.st_ctime_ns),
            )


def _raise(error: OSError) -> None:
    raise error


def content(stamp: Stamp) -> str:
    """The SHA-256 of a file's content, read anew unless it is the same file. Raises ModelError."""
    if stamp in _REMEMBERED:
        return _REMEMBERED[stamp]
    started = time.time_ns()
    try:
        with open(stamp.path, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise ModelError(f"a file {stamp.name!r} that can not be read: {error.strerror or error}") from error
    same = (after.st_size, after.st_mtime_ns, after.st_ctime_ns) == (stamp.size, stamp.modified, stamp.changed)
    if same and started - max(stamp.changed, stamp.modified, stamp.link[1]) > SETTLED:
        if len(_REMEMBERED) >= _MOST:
            _REMEMBERED.clear()
        _REMEMBERED[stamp] = found
    return found
