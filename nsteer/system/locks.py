"""Locks that processes share by a file's name: those of the system where they reach every machine, else marker files.

A network file system may refuse the locks of the system, or keep them on one machine (NFS mounted with `nolock`, Lustre
with `localflock`). Making a file that must not be there is atomic on all of them; but nobody takes such a marker away
when its holder was killed on another machine: who waits for it in vain is told its name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import cache
from pathlib import Path

import filelock

try:
    import fcntl
except ImportError:  # Windows: filelock has another lock there, and no file system that lacks it is known
    fcntl = None  # type: ignore[assignment]

MOUNTS = Path("/proc/self/mounts")
HERE_ALONE = {"nolock", "local_lock=all", "local_lock=flock", "localflock"}
"""Options of a mounted file system with which a lock is seen by processes of its own machine alone."""


def lock(path: str | os.PathLike, seconds: float) -> filelock.BaseFileLock:
    """A lock under a name, waited for so many seconds; the folder in which it lies must be there."""
    if reaches(os.path.dirname(os.path.abspath(path))):
        return filelock.FileLock(path, timeout=seconds, poll_interval=0.01)
    return filelock.SoftFileLock(f"{os.fspath(path)}.held", timeout=seconds, poll_interval=0.05)


def lock_problem(lock: filelock.BaseFileLock, seconds: float) -> str:
    """What to say of a lock that stayed taken."""
    said = f"another process has held {lock.lock_file} for {seconds:g} s; wait for it"
    if isinstance(lock, filelock.SoftFileLock):
        said += ", or remove that file if no process is at work there (this file system frees no lock of a dead one)"
    return said


@cache
def reaches(folder: str) -> bool:
    """Whether the system's locks of files in a folder keep out processes of every machine that sees it."""
    return not (HERE_ALONE & set(mounted(folder))) and granted(folder)


def granted(folder: str) -> bool:
    """Whether the file system grants such a lock at all; also where nothing may be written: then nobody locks."""
    if fcntl is None:
        return True
    probe = os.path.join(folder, f".nsteer-{secrets.token_hex(8)}")
    try:
        file = os.open(probe, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(file)
        with contextlib.suppress(OSError):
            os.unlink(probe)
    return True


def mounted(folder: str) -> list[str]:
    """The options of the mounted file system on which a folder lies; none where the system has no list of them."""
    try:
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    mount: tuple[str, list[str]] = ("", [])
    real = os.path.realpath(folder)
    for line in lines:
        _, point, _, options, *_ = [*line.split(" "), "", "", "", ""]
        point = point.replace("\\040", " ")
        if (real == point or real.startswith(point.rstrip("/") + "/")) and len(point) >= len(mount[0]):
            mount = (point, options.split(","))
    return mount[1]
