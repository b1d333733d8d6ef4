"""Turns the bytes of a chunk's file into its values, by the codecs that nsteer's own documents name.

zarr takes most of a millisecond to read one small array: labels are read by every command, and `verify` reads each
array of each cell. Here it is some microseconds. What a document names besides is left to zarr.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd

from nsteer.store.regular import bounded

UNPACK: dict[str, Callable[[bytes], bytes]] = {"blosc": Blosc().decode, "zstd": Zstd().decode}
SEAL = 4  # bytes of a checksum


def broken(content: bytes | None, document: Mapping[str, Any]) -> str:
    """What is wrong with the bytes of a chunk: gone, cut off, another checksum; "" for nothing."""
    if content is None:
        return "the file is gone"
    if document["codecs"][-1]["name"] == "crc32c":
        if len(content) < SEAL:
            return f"the file is cut off: {len(content)} bytes"
        if google_crc32c.value(content[:-SEAL]) != int.from_bytes(content[-SEAL:], "little"):
            return "the checksum is wrong: the file is damaged or cut off"
    return ""


def can_decode(document: Mapping[str, Any]) -> bool:
    """Whether an array is written as nsteer writes it: little-endian or text, packed once at most, sealed last."""
    first, *packed, last = [codec["name"] for codec in document["codecs"]]
    little = document["codecs"][0].get("configuration", {}).get("endian", "little") == "little"
    return first in ("bytes", "vlen-utf8") and little and last == "crc32c" and set(packed) <= set(UNPACK)


def decode(content: bytes, document: Mapping[str, Any]) -> np.ndarray:
    """The values of one chunk of a known document. ValueError or RuntimeError for bytes that are no such chunk."""
    bounded(content[:32], len(content))
    body: Any = content[:-SEAL]
    for codec in reversed(document["codecs"][1:-1]):
        body = UNPACK[codec["name"]](body)
    shape = document["chunk_grid"]["configuration"]["chunk_shape"]
    if document["codecs"][0]["name"] == "vlen-utf8":
        texts = VLenUTF8().decode(body)
        return np.array(texts.tolist(), np.dtypes.StringDType()).reshape(shape)
    return np.frombuffer(body, np.dtype(document["data_type"]).newbyteorder("<")).reshape(shape)
