"""Turns the bytes of a chunk's file into its values, by the codecs that nsteer's own documents name.

zarr takes most of a millisecond to read one small array, and `verify` reads each array of each cell; here it is some
microseconds. What a document names besides is left to zarr.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.blosc import Blosc
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd

from nsteer.store.chunks import Chunk
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


def values(
    files: Iterable[tuple[Chunk, np.ndarray]], arrays: Mapping[str, Mapping], parts: Mapping[str, slice]
) -> dict[str, np.ndarray]:
    """The values of a cell from its chunks: variable -> array over the parts of its dims."""
    found: dict[str, np.ndarray] = {}
    for chunk, array in files:
        document = arrays[chunk.variable]
        dims, sizes = document["dimension_names"], document["chunk_grid"]["configuration"]["chunk_shape"]
        shape = [parts[dim].stop - parts[dim].start for dim in dims]
        own = tuple(
            slice((part := chunk.part[dim]).start % n, (part.start % n) + part.stop - part.start)
            for dim, n in zip(dims, sizes, strict=True)
        )
        if [chunk.part[dim] for dim in dims] == [parts[dim] for dim in dims]:
            found[chunk.variable] = array[own]
            continue
        whole = found.setdefault(chunk.variable, np.empty(shape, array.dtype))
        base = [parts[dim].start for dim in dims]
        at = tuple(slice(chunk.part[d].start - b, chunk.part[d].stop - b) for d, b in zip(dims, base, strict=True))
        whole[at] = array[own]
    return found
