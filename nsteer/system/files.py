"""Reads a file whole within bounds, and writes one aside so that a failure leaves the old one."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def opened(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A regular file to read. Raises OSError; ValueError for a pipe, a device or a folder, before anything is read."""
    # without waiting: opening a pipe that nobody writes to would never return
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("no regular file")
        yield file


def content(path: str | os.PathLike, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `most` bytes.

    Raises ValueError for a larger file, before anything of it is read, and what `opened` raises.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise ValueError(f"{size:,} bytes; at most {max_bytes:,} are read")
        return file.read(max_bytes)  # a file that grows meanwhile is cut, and then damaged


@contextmanager
def aside(path: str | os.PathLike) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place when the block ends well and is removed when it does not.

    A link is followed, the permissions of an older file are kept.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def cache() -> Path:
    """The folder of what can be made again: `NSTEER_CACHE`, else `nsteer` in the user's folder of caches."""
    return Path(
        os.environ.get("NSTEER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "nsteer")
    ).expanduser()


def is_url(path: str | os.PathLike) -> bool:
    """Whether a path names object storage. A Path does not: it has lost one of the two slashes."""
    return isinstance(path, str) and "://" in path
