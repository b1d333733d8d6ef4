"""Finds where a model keeps its residual stream, its head and its logits, and proves it on a dummy input.

Family knowledge is discovered, not listed: the blocks are the shallowest ModuleList under the decoder with as
many entries as the config says. What has to be listed is a row in LOGIT_SCALING.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nsteer.errors import AnatomyError


def softcap(logits, value):
    """value * tanh(logits / value) (Gemma 2)."""
    return (logits / value).tanh() * value


def multiply(logits, value):
    """logits * value (Cohere)."""
    return logits * value


def divide(logits, value):
    """logits / value (Granite)."""
    return logits / value


LOGIT_SCALING = {"final_logit_softcapping": softcap, "logit_scale": multiply, "logits_scaling": divide}
"""config field -> what the model does with it to its head's output to make logits."""


@dataclass(frozen=True)
class Anatomy:
    """Module paths and sizes of one model.

    blocks, head, embedding : dotted paths from the model's root (`model.layers`, `lm_head`, `model.embed_tokens`)
    tuple_output : whether a block returns a tuple whose first entry is the residual stream
    scaling : the config field and value by which the head's output becomes logits (see LOGIT_SCALING), or None
    takes_positions : whether the model's forward accepts `position_ids`
    """

    blocks: str
    head: str
    embedding: str
    n_layers: int
    d_model: int
    vocab: int
    tuple_output: bool = False
    scaling: tuple[str, float] | None = None
    takes_positions: bool = True


def find(model: Any) -> Anatomy:
    """The anatomy of a transformers causal LM (meta device will do; block outputs are taken to be tensors).

    Raises AnatomyError when blocks or head can not be found.
    """
    import inspect

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        raise AnatomyError(f"{type(model).__name__} has no output embeddings: not a causal language model?")
    return Anatomy(
        blocks=_path(model, _blocks(model, config.num_hidden_layers)),
        head=_path(model, head),
        embedding=_path(model, model.get_input_embeddings()),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab=head.weight.shape[0],
        scaling=_scaling(config),
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
    )


def prove(model: Any) -> Anatomy:
    """`find`, then held against a forward pass on a dummy input: the last word before the model is trusted.

    Checked: every block runs once, in order, and its output is a stream [1, position, d_model] which
    the next block gets as its input; and the head's output, scaled, is the model's logits.
    Raises AnatomyError with what failed.
    """
    import torch

    found = find(model)
    blocks, head = model.get_submodule(found.blocks), model.get_submodule(found.head)
    inputs, outputs, heads = [], [], []
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, k: inputs.append(a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        for block in blocks
    ]
    hooks += [block.register_forward_hook(lambda m, a, out: outputs.append(out)) for block in blocks]
    hooks.append(head.register_forward_hook(lambda m, a, out: heads.append(out)))
    try:
        with torch.no_grad():
            ids = torch.arange(3, device=next(model.parameters()).device)[None] % found.vocab
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    except Exception as error:
        raise AnatomyError(f"{type(model).__name__} fails on three dummy tokens: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    found = _with_outputs(found, outputs)
    streams = [out[0] if found.tuple_output else out for out in outputs]
    _check_streams(found, inputs, streams)
    scaled = heads[-1].float()
    if found.scaling is not None:
        field, value = found.scaling
        scaled = LOGIT_SCALING[field](scaled, value)
    tolerance = 1e-2 * logits.float().abs().max().item()
    if not torch.allclose(scaled, logits.float(), rtol=1e-2, atol=tolerance):
        raise AnatomyError(f"{type(model).__name__}: the output of {found.head!r} does not give its logits")
    return found


def _with_outputs(found: Anatomy, outputs: list) -> Anatomy:
    if len(outputs) != found.n_layers:
        raise AnatomyError(f"{len(outputs)} block calls in one forward of {found.n_layers} blocks at {found.blocks!r}")
    return replace(found, tuple_output=isinstance(outputs[0], tuple))


def _check_streams(found: Anatomy, inputs: list, streams: list) -> None:
    for layer, stream in enumerate(streams):
        if stream.ndim != 3 or stream.shape[-1] != found.d_model:
            raise AnatomyError(f"layer {layer} gives {tuple(stream.shape)}, not [row, position, {found.d_model}]")
        if layer + 1 < found.n_layers and not (inputs[layer + 1].to(stream.device) == stream).all():
            raise AnatomyError(f"the output of layer {layer} is not what layer {layer + 1} reads")


def _blocks(model: Any, n_layers: int) -> Any:
    import torch

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    found = [
        (name.count("."), module)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers
    ]
    if not found:
        raise AnatomyError(f"no list of {n_layers} blocks under the decoder of {type(model).__name__}")
    return min(found, key=lambda pair: pair[0])[1]


def _path(model: Any, target: Any) -> str:
    for name, module in model.named_modules():
        if module is target:
            return name
    raise AnatomyError(f"{type(target).__name__} is no submodule of {type(model).__name__}")


def _scaling(config: Any) -> tuple[str, float] | None:
    for field in LOGIT_SCALING:
        value = getattr(config, field, None)
        if value is not None and value != 1:
            return field, float(value)
    return None
