"""Vectors to lm-eval's `steered` config, and from .pt files of tensors. Only weights are unpickled, never code."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.vectors.exchange.bounded import MAX_ARRAYS, MAX_BYTES, damaged, floats, mapping, members, parsed
from nsteer.vectors.exchange.contents import Contents, Outgoing, labels_of

HOOKPOINT = re.compile(r"(?:.*[^0-9])?([0-9]{1,6})")
"""lm-eval's name of a block ends in its index (`layers.3`, `h.3`)."""

MAX_PICKLE = 16 * 2**20
"""Bytes of the pickle that names the tensors."""

DEEPEST = 8
"""Levels of mappings in a file."""


def write(path: Path, outgoing: Outgoing, action: str, hookpoint: str) -> None:
    """The config of `lm_eval --model steered`: an entry a layer, keyed by the name of its block under the base model.

    action : `add` (all positions get coefficient x vector) or `clamp` (the projection on the vector at length 1 is set
    to the coefficient). hookpoint : the blocks' name, such as `layers`
    """
    import torch

    said = json.dumps(outgoing.told())
    config = {
        f"{hookpoint}.{layer}": {
            "steering_vector": torch.from_numpy(np.array(outgoing.units[layer] if action == "clamp" else vector)),
            "steering_coefficient": float(outgoing.amounts[layer]) if action == "clamp" else 1.0,
            "action": action,
            "bias": None,
            "head_index": None,
            "nsteer": said,
        }
        for layer, vector in outgoing.vectors.items()
    }
    torch.save(config, path)


def read(path: Path, data: bytes) -> Contents:
    """Tensors alone or in mappings, under their keys; or lm-eval's `steered` config.

    Raises ExchangeError for a file that brings anything but tensors, numbers, text and containers of them.
    """
    if not data.startswith(b"PK"):
        raise ExchangeError(
            f"{path} is not read: it is no zip archive, as torch.save writes since version 1.6 "
            "(an older file is a bare pickle: load it with torch and save it again)"
        )
    with damaged(path, ".pt of tensors alone (a pickle can run code)"):
        content = _unpacked(data)
        if isinstance(content, Mapping) and content and all(map(_steering, content.values())):
            return _steered(path, content)
        arrays: dict[tuple[str, ...], np.ndarray] = {}
        about: dict[str, Any] = {}
        _collect((), content, arrays, about, [0])
        return Contents("tensors of torch", about=about, arrays=arrays)


def _unpacked(data: bytes) -> Any:
    """What a .pt holds: torch's own reader of weights, every tensor on the bytes that are there for it.

    torch.load believes the size that the pickle declares of a storage, and reads beyond what the archive holds of it.
    """
    import torch
    from torch._weights_only_unpickler import Unpickler

    entries = members(data)
    (place,) = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    root = place.removesuffix("data.pkl")
    if entries.get(f"{root}byteorder", b"little") != b"little":
        raise ValueError("big-endian tensors")
    if len(entries[place]) > MAX_PICKLE:
        raise ValueError(f"a pickle of {len(entries[place]):,} bytes; at most {MAX_PICKLE:,} are read")
    storages: dict[str, Any] = {}

    def persistent_load(said: Any) -> Any:
        _, kind, key, _, count = said
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        raw = entries[f"{root}data/{key}"]
        if type(count) is not int or count * dtype.itemsize != len(raw):
            raise ValueError(f"{count} numbers of {dtype} declared, {len(raw):,} bytes found")
        if key not in storages:
            whole = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            storages[key] = whole.untyped_storage()
        return torch.storage.TypedStorage(wrap_storage=storages[key], dtype=dtype, _internal=True)

    reader = Unpickler(io.BytesIO(entries[place]), encoding="utf-8")
    reader.persistent_load = persistent_load  # type: ignore[method-assign]
    sizes = [len(raw) for raw in entries.values()]
    content = reader.load()
    if any(storage.nbytes() not in sizes for storage in storages.values()):
        raise ValueError("a tensor that is larger than its bytes")
    return content


def _steering(value: Any) -> bool:
    return isinstance(value, Mapping) and "steering_vector" in value


def _collect(
    path: tuple[str, ...], value: Any, arrays: dict[tuple[str, ...], np.ndarray], about: dict[str, Any], seen: list[int]
) -> None:
    """The tensors of nested mappings under their keys; short texts and numbers beside them."""
    import torch

    seen[0] += 1
    if seen[0] > MAX_ARRAYS or len(path) > DEEPEST:
        raise ValueError("too many values, or mappings too deep")
    if isinstance(value, torch.Tensor):
        arrays[path or ("",)] = numbers(value)
        if sum(array.nbytes for array in arrays.values()) > MAX_BYTES:
            raise ValueError("its tensors are larger than its bytes")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            _collect((*path, str(key)[:200]), inner, arrays, about, seen)
    elif isinstance(value, list | tuple) and value and all(isinstance(row, torch.Tensor) for row in value):
        rows = [numbers(row) for row in value[: MAX_ARRAYS + 1]]
        if len(value) > MAX_ARRAYS or sum(row.nbytes for row in rows) > MAX_BYTES:
            raise ValueError("too many tensors")
        arrays[path or ("",)] = np.stack(rows)
    elif isinstance(value, list | tuple) and value and all(type(row) in (int, str) for row in value):
        arrays[path or ("",)] = np.array(value[:MAX_ARRAYS])  # labels of layers or emotions
    elif type(value) is int and -(2**31) < value < 2**31:
        arrays[path or ("",)] = np.array(value)
    elif isinstance(value, str | float | bool) or value is None:
        about["/".join(path)] = value[:1000] if isinstance(value, str) else value
    else:
        raise ValueError(f"it holds {type(value).__name__}: expected tensors, or mappings of tensors")


def numbers(tensor: Any) -> np.ndarray:
    """A dense tensor as numpy's own. Raises ValueError for another, and one that is larger than what it lies on."""
    import torch

    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_complex() or tensor.is_quantized:
        raise ValueError(f"a tensor that is {tensor.layout}, {tensor.dtype} on {tensor.device}: expected dense numbers")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor {list(tensor.shape)[:8]} over {tensor.untyped_storage().nbytes():,} bytes")
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous().numpy()


def _steered(path: Path, config: Mapping[str, Any]) -> Contents:
    """lm-eval's config: vectors that are added are read at the length at which it adds them."""
    layers: dict[int, Any] = {}
    actions = {str(entry.get("action")) for entry in config.values()}
    coefficient: Callable[[Mapping[str, Any]], float] = lambda entry: float(entry.get("steering_coefficient", 1.0))  # noqa: E731
    for hookpoint, entry in config.items():
        number = HOOKPOINT.fullmatch(str(hookpoint))
        if number is None or int(number[1]) in layers or entry.get("head_index") is not None:
            raise ExchangeError(f"{path}: the hookpoint {hookpoint!r} is no block: its name must end in its index")
        factor = coefficient(entry) if entry.get("action") == "add" else 1.0
        layers[int(number[1])] = numbers(entry["steering_vector"]).squeeze() * factor
    said: dict[str, Any] = {"action": sorted(actions)}
    said |= {"coefficients": {str(k): coefficient(entry) for k, entry in config.items()}}
    about = mapping(parsed(next(iter(config.values())).get("nsteer") or "{}"))
    named = labels_of(about)
    said |= {"nsteer": about} if about else {}
    return Contents("lm-eval steered config", {named: floats(path, layers)}, "block-index", said)
