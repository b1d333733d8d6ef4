"""Finds where a model keeps its residual stream, its head and its logits, and proves it on a dummy input.

Family knowledge is discovered, not listed: the blocks are the shallowest ModuleList under the decoder with as
many entries as the config says; what its attention and its MLP add to the stream are the two modules of a block whose
outputs, added to its input, make its output. What has to be listed is a row in LOGIT_SCALING, and one in SUMMANDS for
models without weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
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


SUMMANDS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
"""Modules of a block with norms after its sublayers (Gemma 2, OLMo 2, GLM 4), where they are what is added."""

ATTENTION = re.compile(r"attn|attention")
OTHER = re.compile(r"norm|ln|dropout")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "fc2")


@dataclass(frozen=True)
class Sublayer:
    """A module of a block whose output is added to the stream: its path in the block, and whether it gives a tuple."""

    path: str
    tuple_output: bool = False


@dataclass(frozen=True)
class Anatomy:
    """Module paths and sizes of one model.

    blocks, head, embedding : dotted paths from the model's root (`model.layers`, `lm_head`, `model.embed_tokens`)
    tuple_output : whether a block returns a tuple whose first entry is the residual stream
    scaling : the config field and value by which the head's output becomes logits (see LOGIT_SCALING), or None
    takes_positions : whether the model's forward accepts `position_ids`
    attention, mlp : the modules of every block whose outputs are added to the stream; None where they are not known
    proved : whether they were seen to add up; without weights they are taken by name, and proved when a program runs
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
    attention: Sublayer | None = None
    mlp: Sublayer | None = None
    proved: bool = False


def find(model: Any) -> Anatomy:
    """The anatomy of a transformers causal LM (meta device will do; block outputs are taken to be tensors).

    Raises AnatomyError when blocks or head can not be found.
    """
    import inspect

    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None:
        raise AnatomyError(f"{type(model).__name__} has no output embeddings: not a causal language model?")
    blocks = _blocks(model, config.num_hidden_layers)
    attention, mlp = _by_name(blocks[0])
    return Anatomy(
        blocks=_path(model, blocks),
        head=_path(model, head),
        embedding=_path(model, model.get_input_embeddings()),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab=head.weight.shape[0],
        scaling=_scaling(config),
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
        attention=attention,
        mlp=mlp,
    )


def unknown(found: Anatomy, sites: Sequence[str]) -> str:
    """Why one of the sites can not be reached in this model; empty where all can."""
    for site, sublayer in (("attn_out", found.attention), ("mlp_out", found.mlp)):
        if site in sites and sublayer is None:
            return (
                f"this model has no {site} that is known: no two modules in each of its blocks give outputs that, "
                "added to the block's input, make the block's output. Take resid_pre or resid_post"
            )
    return ""


def prove(model: Any) -> Anatomy:
    """`find`, then held against a forward pass on a dummy input: the last word before the model is trusted.

    Checked: every block runs once, in order, and its output is a stream [1, position, d_model] which
    the next block gets as its input; and the head's output, scaled, is the model's logits. `attention` and `mlp` are
    what was seen to add up in every block, else None. Raises AnatomyError with what failed.
    """
    import torch

    found = find(model)
    blocks, head = model.get_submodule(found.blocks), model.get_submodule(found.head)
    inputs, outputs, heads = [], [], []
    hooks = [
        block.register_forward_pre_hook(
            lambda m, a, k: inputs.append(a[0] if a else next(iter(k.values()))), with_kwargs=True
        )
        for block in blocks
    ]
    parts: list[list[tuple[str, Any]]] = [[] for _ in blocks]
    hooks += [
        child.register_forward_hook(lambda m, a, out, kept=kept, name=name: kept.append((name, out)))
        for kept, block in zip(parts, blocks, strict=True)
        for name, child in block.named_children()
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
    summands = _summands(parts, inputs, streams)
    return replace(found, attention=summands[0], mlp=summands[1], proved=None not in summands)


def _by_name(block: Any) -> tuple[Sublayer | None, Sublayer | None]:
    """The sublayers of a block, by the names of its children alone."""
    names = [name for name, _ in block.named_children()]
    for pair in SUMMANDS:
        if set(pair) <= set(names):
            return Sublayer(pair[0]), Sublayer(pair[1])
    mixing = [name for name in names if ATTENTION.search(name) and not OTHER.search(name)]
    feeding = [name for name in FEED_FORWARD if name in names]
    return (Sublayer(mixing[0]), Sublayer(feeding[0])) if mixing and feeding else (None, None)


def _summands(
    parts: Sequence[list[tuple[str, Any]]], inputs: Sequence[Any], outputs: Sequence[Any]
) -> tuple[Sublayer | None, Sublayer | None]:
    """The first two children that, in every block, ran once and make its output of its input, attention before MLP."""
    blocks = []
    for ran, before, after in zip(parts, inputs, outputs, strict=True):
        names = [name for name, _ in ran]
        once = [(name, out) for name, out in ran if names.count(name) == 1]
        streams = {name: out[0] if isinstance(out, tuple) else out for name, out in once}
        shaped = {name: one for name, one in streams.items() if getattr(one, "shape", None) == after.shape}
        blocks.append((dict(once), shaped, before.to(after.device), after))
    for first, second in _pairs(list(blocks[0][1])):
        if all(
            {first, second} <= set(shaped) and adds_up(before, shaped[first], shaped[second], after)
            for _, shaped, before, after in blocks
        ):
            whole = blocks[0][0]
            one, other = (Sublayer(name, isinstance(whole[name], tuple)) for name in (first, second))
            return one, other
    return None, None


def _pairs(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every two children in the order in which they ended, the first of them the attention or after it."""
    mixing = [i for i, name in enumerate(names) if ATTENTION.search(name) and not OTHER.search(name)]
    for i in range(mixing[0] if mixing else len(names), len(names)):
        yield from ((names[i], other) for other in names[i + 1 :])


def adds_up(before: Any, attention: Any, mlp: Any, after: Any) -> bool:
    """Whether after = before + attention + mlp up to rounding, which it is not without either of them."""
    import torch

    terms = [one.to(after.device).float() for one in (before, attention, mlp)]
    allowed = 4 * torch.finfo(after.dtype).eps * (sum(one.abs() for one in terms) + after.float().abs())

    def holds(chosen: Sequence[Any]) -> bool:
        return bool(((after.float() - sum(chosen)).abs() <= allowed).all())

    return holds(terms) and not holds(terms[:2]) and not holds(terms[::2])


def narrowed(stream: Any) -> Any:
    """A float32 stream in the narrowest dtype that holds it exactly: the one that it was computed in."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if (stream.to(dtype).float() == stream).all():
            return stream.to(dtype)
    return stream


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
