"""Turns files of a folder into bytes for zarr: regular files alone, and none that unpacks into more than it may."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path
from typing import Any

import zstandard
from zarr.storage import LocalStore

from nsteer.store.places import MAX_FILE

MAX_UNPACKED = MAX_FILE
"""Bytes that a compressed chunk may unpack into; zarr unpacks some ten at once."""

ZSTD = zstandard.FRAME_HEADER
BLOSC = struct.Struct("<BBBBIII")  # versions, flags, size of a value; bytes unpacked, of a block, packed
CRC = 4


class Files(LocalStore):
    """zarr's store over a folder, which a stranger may have filled."""

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Any:
        """The bytes of a file, None where there is none. Raises ValueError for what is no file of a store."""
        _regular(Path(self.root) / key)
        buffer = await super().get(key, prototype, byte_range)
        if buffer is not None and byte_range is None and not key.endswith(".json"):
            bounded(buffer.as_numpy_array()[:32].tobytes(), len(buffer))
        return buffer


def _regular(file: Path) -> None:
    try:
        status = os.stat(file)
    except OSError:
        return  # zarr says what it is
    if stat.S_ISDIR(status.st_mode):
        return
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{file.name} is no regular file")
    if status.st_size > MAX_FILE:
        raise ValueError(f"{file.name} has {status.st_size:,} bytes")


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
