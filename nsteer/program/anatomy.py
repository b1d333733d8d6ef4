"""Finds where a model keeps its residual stream, its head and its logits, and proves it on a dummy input.

Family knowledge is discovered, not listed: the blocks are the shallowest ModuleList under the decoder with as
many entries as the config says; what a block's attention and MLP add to the stream is found by `sublayers`; what
becomes of the head's output on its way to the logits is seen by giving numbers in its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

from nsteer.errors import AnatomyError, OutOfMemoryError
from nsteer.program import sublayers
from nsteer.program.sublayers import Block, Sublayer
from nsteer.system.machine import out_of_memory


def softcap(logits, value):
    """value * tanh(logits / value) (Gemma 2)."""
    return (logits / value).tanh() * value


def multiply(logits, value):
    """logits * value (Cohere)."""
    return logits * value


def divide(logits, value):
    """logits / value (Granite)."""
    return logits / value


LOGIT_SCALING = {function.__name__: function for function in (multiply, divide, softcap)}
"""What models do to their head's output to make logits, with a number of their config."""

DUMMY = (2, 3)
"""Rows and positions of the dummy input: unequal, so that a stream with its dims in another order shows."""


@dataclass(frozen=True)
class Anatomy:
    """Module paths and sizes of one model.

    blocks, head, embedding : dotted paths from the model's root (`model.layers`, `lm_head`, `model.embed_tokens`)
    vocab : logits that the model gives; its head may have further rows, which are cut off
    tuple_output : whether a block returns a tuple whose first entry is the residual stream
    scaling : the function and number by which the head's output becomes logits (see LOGIT_SCALING), or None
    returned : whether that is not known: log-probabilities are read from what the model returns, not at its head
    takes_positions : whether the model's forward accepts `position_ids`
    attention, mlp : the modules of every block whose outputs are added to the stream; None where they are not known
    proved : whether they were seen to add up; without weights they are taken by name, and proved when a program runs
    projection : what the last stream goes through before the head, where that is narrower (OPT 350M); else ""
    lens : why no logit lens can be taken of a vector in this model; "" where one can
    """

    blocks: str
    head: str
    embedding: str
    n_layers: int
    d_model: int
    vocab: int
    tuple_output: bool = False
    scaling: tuple[str, float] | None = None
    returned: bool = False
    takes_positions: bool = True
    attention: Sublayer | None = None
    mlp: Sublayer | None = None
    proved: bool = False
    projection: str = ""
    lens: str = ""


def find(model: Any) -> Anatomy:
    """The anatomy of a transformers causal LM (meta device will do; block outputs are taken to be tensors).

    Raises AnatomyError when blocks or head can not be found.
    """
    with telling(model, "its modules can not be found"):
        return _find(model)


def _find(model: Any) -> Anatomy:
    import inspect

    config = model.config.get_text_config()
    for key in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(config, key, None), int):
            raise AnatomyError(f"{type(model).__name__} is not one stack of blocks: its config has no {key}")
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is None:
        raise AnatomyError(f"{type(model).__name__} has no output embeddings: not a causal language model?")
    blocks = _blocks(model, config.num_hidden_layers)
    attention, mlp = sublayers.by_name(blocks)
    anatomy = Anatomy(
        blocks=_path(model, blocks),
        head=_path(model, head),
        embedding=_path(model, model.get_input_embeddings()),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab=head.weight.shape[0],
        takes_positions="position_ids" in inspect.signature(model.forward).parameters,
        attention=attention,
        mlp=mlp,
    )
    return _with_lens(model, anatomy, head)


def entry(model: Any) -> Any:
    """The device on which a model takes its token ids: where its embedding runs.

    Of a model that accelerate spread over devices its weights do not tell: what is on disk or in the host's memory is
    on `meta`, and moved to where it runs for each call.
    """
    embedding = model.get_input_embeddings()
    device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return embedding.weight.device if device is None else device


def unknown(anatomy: Anatomy, sites: Sequence[str]) -> str:
    """Why one of the sites can not be reached in this model; empty where all can."""
    for site, sublayer in (("attn_out", anatomy.attention), ("mlp_out", anatomy.mlp)):
        if site in sites and sublayer is None:
            return (
                f"this model has no {site} that is known: no two modules in each of its blocks give outputs that, "
                "added to the block's input, make the block's output. Take resid_pre or resid_post"
            )
    return ""


def factors(anatomy: Anatomy) -> dict[str, float]:
    """What the model multiplies a site's values by before it adds them, where it does."""
    both = (("attn_out", anatomy.attention), ("mlp_out", anatomy.mlp))
    return {site: sublayer.factor for site, sublayer in both if sublayer is not None and sublayer.factor != 1}


def multiplied(anatomy: Anatomy, sites: Sequence[str]) -> str:
    """What is to be said of sites whose values the model multiplies before it adds them; empty where it does not."""
    chosen = {site: factor for site, factor in factors(anatomy).items() if site in sites}
    if not chosen:
        return ""
    said = ", ".join(f"{site} by {factor:g}" for site, factor in chosen.items())
    return f"its blocks multiply what they add to the stream ({said}): these sites are read and edited before that"


def prove(model: Any) -> Anatomy:
    """`find`, then compared with a forward pass on a dummy input: the last word before the model is trusted.

    Checked: every block runs once, in order, and its output is a stream [row, position, d_model], finite, which
    the next block gets as its input; and what becomes of the head's output, in whose place known numbers go on.
    `attention` and `mlp` are what was seen to add up in every block, else None. Raises AnatomyError with what failed,
    OutOfMemoryError where memory ran out.
    """
    import torch

    anatomy = find(model)
    seen = _Seen(model, anatomy)
    try:
        with telling(model, "fails on three dummy tokens"), torch.no_grad():
            ids = torch.arange(6, device=entry(model)).reshape(DUMMY) % anatomy.vocab
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    finally:
        seen.remove()
    with telling(model, "its residual stream can not be proved"):
        anatomy = _with_outputs(anatomy, seen)
        _check_streams(anatomy, seen.blocks)
    with telling(model, "its logits can not be proved"):
        if not seen.heads:
            raise AnatomyError(f"{type(model).__name__}: {anatomy.head!r} does not run, so it does not give the logits")
        if anatomy.projection and not any((out == seen.read).all() for out in seen.projected):
            anatomy = replace(anatomy, projection="", lens=f"what {anatomy.head!r} reads is not the stream")
        anatomy = _with_logits(anatomy, model, seen.heads[-1], logits)
    with telling(model, "its sublayers can not be proved"):
        attention, mlp = sublayers.proved(seen.blocks)
    return replace(anatomy, attention=attention, mlp=mlp, proved=attention is not None)


class _Seen:
    """Hooks on a model's blocks, all in them, and its head; and what they saw. The head's output is replaced."""

    def __init__(self, model: Any, anatomy: Anatomy):
        self.blocks: list[Block] = []
        self.calls: list[tuple[int, bool]] = []  # which block ended, and whether with a tuple
        self.heads: list[Any] = []  # what went on in place of the head's output
        self.read: Any = None  # what the head read
        self.projected: list[Any] = []
        self.handles: list[Any] = []
        try:
            for layer, block in enumerate(model.get_submodule(anatomy.blocks)):
                self._watch(layer, block)
            head = model.get_submodule(anatomy.head)
            self.handles.append(head.register_forward_hook(self._head))
            if anatomy.projection:
                hook = model.get_submodule(anatomy.projection).register_forward_hook
                self.handles.append(hook(lambda m, a, out: self.projected.append(out)))
        except BaseException:
            self.remove()
            raise

    def _watch(self, layer: int, block: Any) -> None:
        kept = Block()
        self.blocks.append(kept)

        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            kept.before = (args[0] if args else next(iter(kwargs.values()))).detach().clone()

        def after(module: Any, args: tuple, output: Any) -> None:
            many = isinstance(output, (tuple, list))
            kept.after = (output[0] if many else output).detach().clone()
            self.calls.append((layer, many))

        self.handles += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            *(
                module.register_forward_hook(lambda m, a, out, path=path: kept.keep(path, out))
                for path, module in block.named_modules()
                if path
            ),
            block.register_forward_hook(after),
        ]

    def _head(self, module: Any, args: tuple, output: Any) -> Any:
        self.read = args[0]
        self.heads.append(ramp(output))
        return self.heads[-1]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def ramp(output: Any) -> Any:
    """Whole numbers from -64 to 64 in the shape and dtype of a head's output, in no order along any axis."""
    import torch

    places = torch.arange(output.numel(), device=output.device).reshape(output.shape)
    return (places * 7919 % 129 - 64).to(output.dtype)


def logits_without_weights(model: Any, anatomy: Anatomy) -> Anatomy:
    """`anatomy`, with what becomes of the head's output in the model's own code, its decoder and head not run.

    A model without weights has no numbers, but what it does behind its head needs only those put in the head's place.
    Where that can not be tried, log-probabilities are read from what the model returns.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Decoded(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:
            """Nothing, for whatever else a family's decoder gives."""

    decoder, head = model.base_model, model.get_submodule(anatomy.head)
    given = ramp(torch.empty(1, 3, head.weight.shape[0]))
    stream = torch.zeros(1, 3, anatomy.d_model)
    stand_ins = {
        decoder: lambda *args, **more: Decoded(last_hidden_state=cast(Any, stream)),
        head: lambda *args, **more: given,
    }
    before = {module: module.__dict__.get("forward") for module in stand_ins}
    try:
        for module, forward in stand_ins.items():
            module.__dict__["forward"] = forward
        with torch.no_grad():
            logits = model(input_ids=torch.zeros(1, 3, dtype=torch.long)).logits
    except Exception:  # its forward wants more of its decoder
        return replace(anatomy, returned=True)
    finally:
        for module, kept in before.items():
            if kept is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = kept
    return _with_logits(anatomy, model, given, logits)


def _with_logits(anatomy: Anatomy, model: Any, given: Any, logits: Any) -> Anatomy:
    """`anatomy`, with what makes the logits [1, position, vocab] of what was given in place of the head's output."""
    if logits.ndim != 3 or logits.shape[:2] != given.shape[:2]:
        raise AnatomyError(f"{type(model).__name__} gives logits {tuple(logits.shape)}, not [row, position, vocab]")
    vocab = logits.shape[-1]
    given = given[..., :vocab].to(logits.device).float()
    logits = logits.float()
    best = min(_scalings(model), key=lambda scaling: _off(scaling, given[..., :2048], logits[..., :2048]))
    known = _off(best, given, logits) <= 1 and vocab == model.get_submodule(anatomy.head).weight.shape[0]
    anatomy = replace(anatomy, vocab=vocab, returned=not known, scaling=best if known else None)
    order = given.flatten().argsort(stable=True)
    if (logits.flatten()[order].diff() < -1e-2 * logits.abs().max()).any():
        return replace(anatomy, lens=anatomy.lens or "its logits do not rise with what its head gives")
    return anatomy


def _scalings(model: Any) -> list[tuple[str, float] | None]:
    """Nothing, and every function of LOGIT_SCALING with every number of the config; those named after logits first."""
    fields: dict[str, Any] = {**model.config.to_dict(), **model.config.get_text_config().to_dict()}
    named = sorted(fields, key=lambda name: "logit" not in name and "head" not in name)
    numeric = [fields[name] for name in named if isinstance(fields[name], (int, float)) and fields[name] not in (0, 1)]
    numbers = dict.fromkeys(float(value) for value in numeric if abs(value) < float("inf"))
    return [None, *((name, value) for value in numbers for name in LOGIT_SCALING)]


def _off(scaling: tuple[str, float] | None, given: Any, logits: Any) -> float:
    """How far a scaling is off, in what rounding to bfloat16 would explain: up to 1 it holds."""
    scaled = given if scaling is None else LOGIT_SCALING[scaling[0]](given, scaling[1])
    return float(((scaled - logits).abs() / (1e-2 * logits.abs() + 1e-3 * logits.abs().max())).max())


def _with_lens(model: Any, anatomy: Anatomy, head: Any) -> Anatomy:
    """`anatomy`, with what leads from the stream to its head's weight [vocab, width]."""
    import torch

    width = head.weight.shape[-1]
    if head.weight.ndim != 2:
        return replace(anatomy, lens=f"its head {anatomy.head!r} has a weight {tuple(head.weight.shape)}")
    if width == anatomy.d_model:
        return anatomy
    fit = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and (module.in_features, module.out_features) == (anatomy.d_model, width)
        and module.bias is None
        and not name.startswith(anatomy.blocks)
    ]
    if len(fit) == 1:
        return replace(anatomy, projection=fit[0])
    return replace(anatomy, lens=f"its head {anatomy.head!r} reads {width} numbers, its stream has {anatomy.d_model}")


@contextmanager
def telling(model: Any, what: str) -> Iterator[None]:
    """Makes one AnatomyError, with the model's name, of what goes wrong inside; OutOfMemoryError of lack of memory."""
    try:
        yield
    except AnatomyError:
        raise
    except Exception as error:  # models fail in a hundred ways, and their words say which
        if out_of_memory(error):
            raise OutOfMemoryError(f"{type(model).__name__} ran out of memory while it was proved") from error
        words = (str(error).splitlines() or [""])[0][:300]
        kind = "" if isinstance(error, (ZeroDivisionError, ValueError, RuntimeError)) else f"{type(error).__name__}: "
        raise AnatomyError(f"{type(model).__name__} {what}: {kind}{words}") from error


def narrowed(stream: Any) -> Any:
    """A float32 stream in the narrowest dtype that holds it exactly: the one that it was computed in."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        if (stream.to(dtype).float() == stream).all():
            return stream.to(dtype)
    return stream


def _with_outputs(anatomy: Anatomy, seen: _Seen) -> Anatomy:
    order = [layer for layer, _ in seen.calls]
    if len(order) != anatomy.n_layers:
        raise AnatomyError(
            f"{len(order)} block calls in one forward of {anatomy.n_layers} blocks at {anatomy.blocks!r}"
        )
    if order != sorted(order):
        raise AnatomyError(f"the blocks at {anatomy.blocks!r} run in the order {order}")
    return replace(anatomy, tuple_output=seen.calls[0][1])


def _check_streams(anatomy: Anatomy, blocks: Sequence[Block]) -> None:
    for layer, block in enumerate(blocks):
        stream = block.after
        if why := other_layout(tuple(stream.shape), (*DUMMY, anatomy.d_model)):
            raise AnatomyError(f"layer {layer} {why}")
        if not stream.isfinite().all():
            raise AnatomyError(not_finite(str(stream.dtype).removeprefix("torch."), layer))
        if layer + 1 < anatomy.n_layers and not (blocks[layer + 1].before.to(stream.device) == stream).all():
            raise AnatomyError(f"the output of layer {layer} is not what layer {layer + 1} reads")


def not_finite(dtype: str, layer: int) -> str:
    """What is said of a stream that overflows, or has no number, from a layer on."""
    advice = "take bfloat16 or float32" if dtype == "float16" else "are its weights whole?"
    return f"the stream is not finite in {dtype} at layer {layer}: {advice}"


def other_layout(shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What is wrong with a stream that should be [row, position, d_model] = `wanted`; empty where nothing is."""
    return "" if shape == wanted else f"gives {shape}, not [row, position, d_model] {wanted}"


def _blocks(model: Any, n_layers: int) -> Any:
    """The shallowest list of blocks, under what the model calls its decoder, else anywhere in it."""
    import torch

    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        lists = [
            (name.count("."), module)
            for name, module in (root.named_modules() if root is not None else ())
            if isinstance(module, torch.nn.ModuleList) and len(module) == n_layers
        ]
        if lists:
            return min(lists, key=lambda pair: pair[0])[1]
    raise AnatomyError(f"no list of {n_layers} blocks under the decoder of {type(model).__name__}")


def _path(model: Any, target: Any) -> str:
    for name, module in model.named_modules():
        if module is target:
            return name
    raise AnatomyError(f"{type(target).__name__} is no submodule of {type(model).__name__}")
