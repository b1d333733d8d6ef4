"""Vectors to and from EasySteer's JSON payload of a direction, which its engine and its server take as `data`.

Its layers are block indices, block 0 included; the engine computes h + scale * v, so `scale` 1 is what was exported.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.vectors.exchange.bounded import array, damaged, floats, mapping, parsed
from nsteer.vectors.exchange.contents import Contents, Outgoing, labels_of

VERSION, KIND, PREFIX = 1, "direction", "layer."


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """One vector, as a payload of version 1; the key `nsteer`, which EasySteer passes over, says what it is."""
    (outgoing,) = vectors
    tensors = {f"{PREFIX}{layer}": np.ascontiguousarray(vector, "<f4") for layer, vector in outgoing.vectors.items()}
    payload: dict[str, Any] = {
        "version": VERSION,
        "kind": KIND,
        "tensors": {
            name: {"shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}
            for name, array in tensors.items()
        },
        "extra": {},
        "sha256": _digest(tensors),
        "nsteer": outgoing.told(),
    }
    path.write_text(json.dumps(payload), encoding="utf-8")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """The identity of a payload: kind and version, then every tensor by name: name, shape, bytes."""
    digest = hashlib.sha256(f"{KIND}:{VERSION}".encode())
    for name in sorted(tensors):
        digest.update(name.encode() + str(tensors[name].shape).encode() + tensors[name].tobytes())
    return digest.hexdigest()


def read(path: Path, data: bytes) -> Contents:
    """A payload of directions. Raises ExchangeError for another JSON file, or one that does not fit its digest."""
    with damaged(path, "EasySteer payload"):
        payload = mapping(parsed(data))
        if payload["kind"] != KIND or payload["version"] != VERSION:
            format_name = f"{str(payload['kind'])[:64]!r} of version {str(payload['version'])[:64]}"
            raise ExchangeError(f"{path}: a payload {format_name}: expected {KIND!r} of version {VERSION}")
        tensors = {
            name: array("<f4", entry["shape"], base64.b64decode(entry["data"], validate=True))
            for name, entry in mapping(payload["tensors"]).items()
        }
        layers = {int(name.removeprefix(PREFIX)): vector for name, vector in tensors.items()}
        if payload["sha256"] != _digest(tensors) or not layers:
            raise ExchangeError(f"{path}: its tensors are not those its sha256 was taken of")
        about = mapping(payload.get("nsteer") or {})
        named = labels_of(about)
        kept = {"nsteer": about} if about else {}
        return Contents("EasySteer payload", {named: floats(path, layers)}, "block-index", kept)
