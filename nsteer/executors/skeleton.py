"""Turns a model's name into the model without its weights: its modules and their paths, and its key on a server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnsight
import torch
import transformers
from nnsight import TransformersModel

from nsteer.errors import ModelError, NsteerError
from nsteer.program import anatomy, sublayers


def build(name: str, tokenizer: Any, attention: str | None, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model without weights, and its tokenizer (passed in: transformers 5.23 can not find it by itself)."""
    extra = {"attn_implementation": attention} if attention else {}
    try:
        if tokenizer is None or isinstance(tokenizer, str):
            tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer or name, **settings)
        model = TransformersModel(name, tokenizer=tokenizer, task="text-generation", **extra, **settings)
        model._module.generation_config = _generation_config(name, model._module.config, settings["revision"])
    except NsteerError:
        raise
    except Exception as error:  # as in local: a dozen kinds, and their words say which
        raise ModelError(f"{name!r} can not be built without weights: {type(error).__name__}: {error}") from error
    return model, tokenizer


def _generation_config(name: str, config: Any, revision: str | None) -> Any:
    """The checkpoint's own, as loading with weights would have it: which ids end a text stands there."""
    try:
        return transformers.GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # it has none
        return transformers.GenerationConfig.from_model_config(config)


def outline(model: Any) -> anatomy.Anatomy:
    """The anatomy of a model without weights. What gives tuples comes from a forward pass on tensors without numbers.

    Its sublayers are taken by name: `proved` is false.
    """
    model_anatomy = anatomy.logits_without_weights(model._module, anatomy.find(model._module))
    blocks = model.get(model_anatomy.blocks)
    known = [sublayer for sublayer in (model_anatomy.attention, model_anatomy.mlp) if sublayer is not None]
    paths = [sublayer.at(layer)[0] for layer in range(model_anatomy.n_layers) for sublayer in known]
    with (
        anatomy.telling(model._module, "can not be tried without weights"),
        torch.no_grad(),
        model.scan({"input_ids": torch.zeros(1, 3, dtype=torch.long)}),
    ):
        inner = nnsight.save([])
        for i, path in enumerate(paths):
            inner.append(isinstance(blocks[i // 2].get(path).output, (tuple, list)))
        whole = nnsight.save(isinstance(blocks[-1].output, (tuple, list)))
    given = list(zip(paths, map(bool, inner), strict=True))
    pair = sublayers.joined(list(zip(given[::2], given[1::2], strict=True)), (1.0, 1.0)) if known else (None, None)
    return replace(model_anatomy, tuple_output=bool(whole), attention=pair[0], mlp=pair[1])


def model_key(model: Any, name: str, revision: str | None) -> str:
    """What the server calls the model. A folder is named by its path: a server on this machine can read it."""
    try:
        if not Path(name).is_dir():
            return model.to_model_key()
    except Exception as error:  # the hub's client raises its own kinds, requests' and httpx's
        raise ModelError(f"the hub does not know {name!r}: {type(error).__name__}: {error}") from error
    about = {"repo_id": str(Path(name).resolve()), "revision": revision, "task": "text-generation"}
    return f"nnsight.modeling.transformers.TransformersModel:{json.dumps(about)}"
