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
from nsteer.exchange.contents import Contents, Outgoing
from nsteer.exchange.tensors import floats

VERSION, KIND, PREFIX = 1, "direction", "layer."


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """One vector, as a payload of version 1; the key `nsteer`, which EasySteer passes over, says what it is."""
    (one,) = vectors
    tensors = {f"{PREFIX}{layer}": np.ascontiguousarray(vector, "<f4") for layer, vector in one.vectors.items()}
    payload: dict[str, Any] = {
        "version": VERSION,
        "kind": KIND,
        "tensors": {
            name: {"shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode("ascii")}
            for name, array in tensors.items()
        },
        "extra": {},
        "sha256": _digest(tensors),
        "nsteer": {"method": one.method, "emotion": one.emotion, **one.about},
    }
    path.write_text(json.dumps(payload), encoding="utf-8")


def _digest(tensors: dict[str, np.ndarray]) -> str:
    """The identity of a payload: kind and version, then every tensor by name: name, shape, bytes."""
    made = hashlib.sha256(f"{KIND}:{VERSION}".encode())
    for name in sorted(tensors):
        made.update(name.encode() + str(tensors[name].shape).encode() + tensors[name].tobytes())
    return made.hexdigest()


def read(path: Path) -> Contents:
    """A payload of directions. Raises ExchangeError for another JSON file, or one that does not fit its digest."""
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
        if payload["kind"] != KIND or payload["version"] != VERSION:
            raise ExchangeError(f"{path}: a payload {payload['kind']!r} of version {payload['version']}: "
                                f"expected {KIND!r} of version {VERSION}")  # fmt: skip
        tensors = {
            name: np.frombuffer(base64.b64decode(one["data"], validate=True), "<f4").reshape(one["shape"])
            for name, one in payload["tensors"].items()
        }
        layers = {int(name.removeprefix(PREFIX)): array for name, array in tensors.items()}
        intact, about = payload["sha256"] == _digest(tensors), payload.get("nsteer") or {}
        named = str(about.get("method", "")), str(about.get("emotion", ""))
    except (ValueError, OSError, LookupError, TypeError, AttributeError) as error:
        raise ExchangeError(f"{path} is no EasySteer payload: {error!r}") from error
    if not intact or not layers:
        raise ExchangeError(f"{path}: its tensors are not those its sha256 was taken of")
    return Contents(
        "EasySteer payload", {named: floats(path, layers)}, "block-index", {"nsteer": about} if about else {}
    )
