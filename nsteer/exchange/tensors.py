"""Vectors to and from safetensors, whose JSON metadata say what they are; and from numpy's .npz."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.exchange.contents import Contents, Layers, Outgoing

NUMBERED = re.compile(r"(?:.*[^0-9])?([0-9]+)")
"""A tensor of one layer: its number ends its name (`layer.12`, `direction.12`, `12`)."""


def write(path: Path, vectors: Sequence[Outgoing]) -> None:
    """One tensor `method/emotion` [layer, d_model] float32 a vector; the metadata `nsteer` is JSON about them."""
    from safetensors.numpy import save_file

    made = {f"{one.method}/{one.emotion}": np.stack(list(one.vectors.values())) for one in vectors}
    about = {
        "layers_are": "block-index",
        "vectors": {
            f"{one.method}/{one.emotion}": {
                "method": one.method,
                "emotion": one.emotion,
                "layers": list(one.vectors),
                **one.about,
            }
            for one in vectors
        },
    }
    save_file(made, path, metadata={"nsteer": json.dumps(about), "format": "pt"})


def read(path: Path) -> Contents:
    """A file of `write`, or one whose tensors are numbered by layer, or one tensor [layer, d_model]."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # numpy knows no bfloat16
            said = file.metadata() or {}
            found = {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
        about = json.loads(said["nsteer"]) if "nsteer" in said else None
    except (SafetensorError, ValueError, OSError) as error:
        raise ExchangeError(f"{path} is no safetensors file that can be read: {error}") from error
    if about is None:
        return Contents("safetensors", {("", ""): numbered(path, found)}, about=said)
    try:
        vectors = {
            (one["method"], one["emotion"]): {
                int(layer): found[name][i].astype(np.float32) for i, layer in enumerate(one["layers"])
            }
            for name, one in about["vectors"].items()
        }
        return Contents("safetensors of nsteer", vectors, about["layers_are"], about)
    except (LookupError, TypeError, AttributeError) as error:
        raise ExchangeError(f"{path}: its metadata do not fit its tensors: {error!r}") from error


def read_npz(path: Path) -> Contents:
    """Arrays numbered by layer, or one array [layer, d_model]. Arrays of objects, which are pickles, are refused."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError) as error:
        why = "it holds pickled objects, which can run code" if "allow_pickle" in str(error) else str(error)
        raise ExchangeError(f"{path} is no .npz that can be read: {why}") from error
    return Contents("npz", {("", ""): numbered(path, found)})


def numbered(path: Path, arrays: Mapping[Any, Any]) -> Layers:
    """Layer -> vector, of arrays whose names end in a layer, or of a single one [layer, d_model].

    Raises ExchangeError where it is not plain which vector belongs to which layer.
    """
    made: dict[int, np.ndarray] = {}
    if len(arrays) == 1 and np.ndim(next(iter(arrays.values()))) == 2:
        made = dict(enumerate(next(iter(arrays.values()))))
    else:
        for name, array in arrays.items():
            number = NUMBERED.fullmatch(str(name))
            if number is None or int(number[1]) in made or np.size(array) != np.shape(array)[-1:][0]:
                raise ExchangeError(
                    f"{path}: {name!r} {np.shape(array)} is no vector of one layer: expected arrays [d_model] whose "
                    "names end in different layers, or a single array [layer, d_model]"
                )
            made[int(number[1])] = np.reshape(array, -1)
    return floats(path, made)


def floats(path: Path, layers: Mapping[int, Any]) -> dict[int, np.ndarray]:
    """The same as float32, ascending. Raises ExchangeError for what is no number, and widths that differ."""
    made = {}
    for number in sorted(layers):
        array = np.asarray(layers[number])
        if array.dtype.kind not in "fiu" or array.ndim != 1 or not np.isfinite(array).all():
            raise ExchangeError(f"{path}: layer {number} is no vector of finite numbers ({array.dtype} {array.shape})")
        made[number] = array.astype(np.float32)
    widths = {array.size for array in made.values()}
    if len(widths) != 1:
        raise ExchangeError(f"{path}: its vectors have the widths {sorted(widths)}: expected vectors of one model")
    return made
