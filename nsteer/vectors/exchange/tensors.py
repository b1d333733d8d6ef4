"""Vectors to and from safetensors and numpy's .npz, whose JSON metadata say what they are; and from .npy."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.vectors.exchange.bounded import MAX_JSON, array, brain, damaged, floats, mapping, members, parsed
from nsteer.vectors.exchange.contents import Contents, Outgoing, labels_of

ABOUT = "nsteer"
"""What our own metadata are kept under."""

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2"}
TYPES |= {"I8": "|i1", "U8": "|u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BOOL": "|b1"}
"""Types of safetensors -> of numpy; others (8-bit floats) hold no vectors that are added."""


def _arrays_and_about(vectors: Sequence[Outgoing]) -> tuple[dict[str, np.ndarray], str]:
    """One array `method/emotion` [layer, d_model] float32 a vector, and JSON about them."""
    arrays = {f"{vector.method}/{vector.emotion}": np.stack(list(vector.vectors.values())) for vector in vectors}
    about = {
        "layers_are": "block-index",
        "vectors": {
            f"{vector.method}/{vector.emotion}": {
                **vector.told(),
                "layers": list(vector.vectors),
            }
            for vector in vectors
        },
    }
    return arrays, json.dumps(about)


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """safetensors: a tensor a vector; the metadata `nsteer` is JSON about them."""
    from safetensors.numpy import save_file

    arrays, about = _arrays_and_about(vectors)
    save_file(arrays, path, metadata={ABOUT: about, "format": "pt"})


def write_npz(path: Path, vectors: Sequence[Outgoing]) -> None:
    """.npz: an array a vector; the array `nsteer` is JSON about them, as text."""
    arrays, about = _arrays_and_about(vectors)
    with open(path, "wb") as file:  # a name without .npz would get it
        np.savez(file, allow_pickle=False, **arrays, **{ABOUT: np.array(about)})


def read(path: Path, data: bytes) -> Contents:
    """A file of `write`, or the tensors of another under their names."""
    with damaged(path, "safetensors file"):
        size = int.from_bytes(data[:8], "little")
        if len(data) < 10 or size > min(len(data) - 8, MAX_JSON):
            raise ValueError(f"a header of {size:,} bytes in a file of {len(data):,}")
        header = mapping(parsed(data[8 : 8 + size]))
        said = mapping(header.pop("__metadata__", {}))
        body = memoryview(data)[8 + size :]
        arrays = {name: _tensor(mapping(entry), body) for name, entry in header.items()}
        if ABOUT in said:
            return _own("safetensors of nsteer", path, arrays, said[ABOUT])
        return Contents("safetensors", about=said, arrays={(name,): values for name, values in arrays.items()})


def _tensor(entry: Mapping[str, Any], body: memoryview) -> np.ndarray:
    kind = TYPES.get(entry["dtype"])
    if kind is None:
        raise ValueError(f"tensors of {str(entry['dtype'])[:20]!r}: expected {', '.join(TYPES)}")
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= len(body):
        raise ValueError(f"offsets {start} to {end} in {len(body):,} bytes")
    numbers = array(kind, entry["shape"], body[start:end])
    return brain(numbers) if entry["dtype"] == "BF16" else numbers


def read_npz(path: Path, data: bytes) -> Contents:
    """A file of `write_npz`, or the arrays of another under their names. Arrays of objects, pickles, are refused."""
    with damaged(path, ".npz"):
        arrays = {name.removesuffix(".npy"): _array(raw) for name, raw in members(data).items()}
        if ABOUT in arrays:
            return _own("npz of nsteer", path, arrays, str(arrays.pop(ABOUT)))
        return Contents("npz", arrays={(name,): values for name, values in arrays.items()})


def read_npy(path: Path, data: bytes) -> Contents:
    """The one array of a .npy. An array of objects, which is a pickle, is refused."""
    with damaged(path, ".npy"):
        return Contents("npy", arrays={("",): _array(data)})


def _array(raw: bytes) -> np.ndarray:
    """An array as numpy writes it, its declared shape compared with its bytes before anything is made."""
    head = io.BytesIO(raw)
    version = np.lib.format.read_magic(head)
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in headers:
        raise ValueError(f"version {version} of numpy's format")
    shape, by_column, dtype = headers[version](head)
    if dtype.hasobject:
        raise ValueError("it holds pickled objects, which can run code")
    if dtype.kind not in "fiubUS":
        raise ValueError(f"an array of {dtype}")
    rest = memoryview(raw)[head.tell() :]
    if by_column:
        return array(dtype.str, shape[::-1], rest).T
    return array(dtype.str, shape, rest)


def _own(kind: str, path: Path, arrays: Mapping[str, np.ndarray], said: str) -> Contents:
    about = mapping(parsed(said))
    vectors: dict[tuple[str, str], Any] = {}
    for name, vector in mapping(about["vectors"]).items():
        pair, layers = labels_of(vector), [int(layer) for layer in vector["layers"]]
        if pair in vectors or len(set(layers)) != len(layers) or len(layers) != len(arrays[name]):
            raise ExchangeError(f"{path}: its metadata do not fit its arrays at {name!r}")
        vectors[pair] = floats(path, dict(zip(layers, arrays[name], strict=True)))
    if not vectors:
        raise ExchangeError(f"{path} holds no vector")
    return Contents(kind, vectors, str(about["layers_are"]), about)
