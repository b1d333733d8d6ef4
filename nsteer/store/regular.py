"""Turns files of a folder into bytes for zarr: regular files alone, and none that unpacks into more than it may."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import zstandard
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from nsteer.store.places import MAX_FILE, put

MAX_UNPACKED = MAX_FILE
"""Bytes that a compressed chunk may unpack into; zarr unpacks some ten at once."""

SMALL = 2**18
"""Bytes of a file that is read and written at once."""

ZSTD = zstandard.FRAME_HEADER
BLOSC = struct.Struct("<BBBBIII")  # versions, flags, size of a value; bytes unpacked, of a block, packed
CRC = 4


class Files(LocalStore):
    """zarr's store over a folder, which a stranger may have filled.

    A small file is read and written at once: handing it to another thread, as zarr does, takes longer than that.
    """

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """The bytes of a file, None where there is none. Raises ValueError for what is no file of a store."""
        file = Path(self.root) / key
        size = _size(file)
        if byte_range is None and 0 <= size <= SMALL:
            try:
                content = file.read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
            buffer: Any = (prototype or default_buffer_prototype()).buffer.from_bytes(content)
        else:
            buffer = await super().get(key, prototype, byte_range)
        if buffer is not None and byte_range is None and not key.endswith(".json"):
            bounded(buffer.as_numpy_array()[:32].tobytes(), len(buffer))
        return buffer

    async def set(self, key: str, value: Any) -> None:
        """Puts the bytes of a file, by a rename."""
        if len(value) > SMALL:
            return await super().set(key, value)
        self._check_writable()
        put(Path(self.root) / key, value.to_bytes())


def _size(file: Path) -> int:
    """Bytes of a regular file; -1 for what zarr is to say itself. Raises ValueError for any other kind of file."""
    try:
        status = os.stat(file)
    except OSError:
        return -1
    if stat.S_ISDIR(status.st_mode):
        return -1
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is no regular file")
    if status.st_size > MAX_FILE:
        raise ValueError(f"{file.name} has {status.st_size:,} bytes")
    return status.st_size


def bounded(head: bytes, size: int) -> None:
    """Raises ValueError for a compressed chunk that declares more than it may unpack into, before it is unpacked."""
    if head.startswith(ZSTD):
        unpacked = zstandard.frame_content_size(head)
        if not 0 <= unpacked <= MAX_UNPACKED:
            raise ValueError("a compressed chunk does not say how large it is, or is too large")
    elif len(head) >= BLOSC.size:
        *_, unpacked, _, packed = BLOSC.unpack_from(head)
        if packed + CRC == size and unpacked > MAX_UNPACKED:
            raise ValueError("a compressed chunk is too large")
