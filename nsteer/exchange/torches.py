"""Vectors to lm-eval's `steered` config, and from .pt files of tensors. Only weights are unpickled, never code."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.exchange.contents import Contents, Outgoing
from nsteer.exchange.tensors import NUMBERED, floats, numbered


def write(path: Path, one: Outgoing, action: str, hookpoint: str) -> None:
    """The config of `lm_eval --model steered`: an entry a layer, keyed by the name of its block under the base model.

    action : `add` (all positions get coefficient x vector) or `clamp` (the projection on the vector at length 1 is set
    to the coefficient). hookpoint : the blocks' name, such as `layers`
    """
    import torch

    said = json.dumps({"method": one.method, "emotion": one.emotion, **one.about})
    config = {
        f"{hookpoint}.{layer}": {
            "steering_vector": torch.from_numpy(np.array(one.units[layer] if action == "clamp" else vector)),
            "steering_coefficient": float(one.amounts[layer]) if action == "clamp" else 1.0,
            "action": action,
            "bias": None,
            "head_index": None,
            "nsteer": said,
        }
        for layer, vector in one.vectors.items()
    }
    torch.save(config, path)


def read(path: Path) -> Contents:
    """A tensor [layer, d_model] (persona vectors), {layer: tensor}, or lm-eval's `steered` config.

    Raises ExchangeError for a file that brings anything but tensors, numbers, text and containers of them.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch did not write
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise ExchangeError(
            f"{path} is not read: it is no .pt of tensors alone (a pickle can run code): {first[0]}"
        ) from error
    if isinstance(found, torch.Tensor):
        found = {"": found}
    if not isinstance(found, Mapping) or not found:
        raise ExchangeError(
            f"{path} holds {type(found).__name__}: expected a tensor [layer, d_model] or {{layer: tensor}}"
        )
    if all(isinstance(one, Mapping) and "steering_vector" in one for one in found.values()):
        return _steered(path, found)
    wrong = [name for name, one in found.items() if not isinstance(one, torch.Tensor)]
    if wrong:
        raise ExchangeError(
            f"{path}: {wrong[0]!r} is no tensor: expected a tensor [layer, d_model] or {{layer: tensor}}"
        )
    arrays = {name: tensor.detach().float().numpy() for name, tensor in found.items()}
    return Contents("tensors of torch", {("", ""): numbered(path, arrays)})


def _steered(path: Path, config: Mapping[str, Any]) -> Contents:
    """lm-eval's config: vectors that are added are read at the length at which it adds them."""
    layers: dict[int, Any] = {}
    actions = {one.get("action") for one in config.values()}
    for hookpoint, one in config.items():
        number = NUMBERED.fullmatch(str(hookpoint))
        if number is None or int(number[1]) in layers or one.get("head_index") is not None:
            raise ExchangeError(f"{path}: the hookpoint {hookpoint!r} is no block: its name must end in its index")
        factor = float(one.get("steering_coefficient", 1.0)) if one.get("action") == "add" else 1.0
        layers[int(number[1])] = one["steering_vector"].detach().float().numpy().squeeze() * factor
    said: dict[str, Any] = {"action": sorted(map(str, actions))}
    said |= {"coefficients": {str(k): float(one.get("steering_coefficient", 1.0)) for k, one in config.items()}}
    about = json.loads(next(iter(config.values())).get("nsteer") or "{}")
    named = str(about.get("method", "")), str(about.get("emotion", ""))
    said |= {"nsteer": about} if about else {}
    return Contents("lm-eval steered config", {named: floats(path, layers)}, "block-index", said)
