"""Turns free memory into how many padded tokens may be in one batch. Arithmetic alone: bytes in, tokens out.

What a token takes is an estimate, in places by half too much; what it decides is how large batches are, never what
comes of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FRACTION = 0.5
"""Share of the free memory that one batch may take: the estimate is rough, and others live on the machine too."""

CEILINGS = {"cpu": 8192, "mps": 16384, "cuda": 65536}
"""Padded tokens a batch by class of device, above which more at once is assumed to be no faster."""

OVERHEADS = {"cpu": 128, "mps": 512, "cuda": 2048}
"""What a batch costs besides its tokens, in tokens, by class of device: on a GPU small batches are all overhead.

Assumed, all of them: of the CPU by the order of a trace (2 ms) over a token of a small model, not by a sweep of times.
"""

CONTEXT = 1024
"""Positions that a token is assumed to look back on where attention weights are made (`eager`)."""

FLOAT = 4
"""Bytes of what programs compute themselves: float32, whatever the model's dtype."""


@dataclass(frozen=True)
class Shape:
    """What of a model decides how many bytes a token takes.

    kv : width of the keys of one block, and of its values
    mlp : width of the hidden layer of an MLP
    """

    n_layers: int
    d_model: int
    kv: int
    mlp: int
    heads: int
    vocab: int


@dataclass(frozen=True)
class Need:
    """What a program keeps besides one block at work.

    new : tokens generated a row, for which keys and values of all blocks are kept; 0 where nothing is generated
    pooled : vectors of d_model kept a row
    streams : streams kept whole
    edits : whether streams are edited
    logits : whether every position has its logits
    """

    new: int = 0
    pooled: int = 0
    streams: int = 0
    edits: bool = False
    logits: bool = False


def count(value: Any) -> int:
    """A whole number above 0 of a config; 0 for what is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def shape(config: Mapping[str, Any], n_layers: int, d_model: int) -> Shape:
    """A model's shape from its config; what that does not tell is taken to be as in most models."""
    text = config.get("text_config")
    text = text if isinstance(text, Mapping) else config

    def first(keys: tuple[str, ...], otherwise: int) -> int:
        return next((n for key in keys if (n := count(text.get(key)))), otherwise)

    heads = first(("num_attention_heads", "n_head", "n_heads", "num_heads"), max(1, d_model // 64))
    each = first(("head_dim",), max(1, d_model // heads))
    return Shape(
        n_layers,
        d_model,
        first(("num_key_value_heads", "num_kv_heads"), heads) * each,
        first(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), 4 * d_model),
        heads,
        first(("vocab_size",), 50_000),
    )


def token_bytes(shape: Shape, need: Need, width: int, eager: bool = False) -> int:
    """Bytes that a padded token takes in a model of `width` bytes a number.

    One block at work: streams before and after, their norms, queries, keys, values, attention's output, the MLP's
    hidden layer in its factors; then what stays.
    """
    block = 4 * shape.d_model + (2 * shape.d_model + 2 * shape.kv) + 4 * shape.mlp
    scratch = block * width
    weights = (shape.heads * 2 if eager else 1) * CONTEXT * FLOAT // 2  # half of a square: or the mask alone
    kept = 2 * shape.n_layers * shape.kv * width if need.new else 0
    own = (4 * need.edits + 2 * bool(need.pooled) + need.streams) * shape.d_model * FLOAT
    return scratch + weights + kept + own + (shape.vocab * width if need.logits else 0)


def row_bytes(shape: Shape, need: Need, width: int) -> int:
    """Bytes that a row takes whatever its length: pooled vectors, and the logits of its next token, thrice."""
    return need.pooled * shape.d_model * FLOAT + (shape.vocab * (width + 2 * FLOAT) if need.new else 0)


def tokens(free: int, shape: Shape, need: Need, width: int, rows: int, ceiling: int, eager: bool = False) -> int:
    """The most padded tokens in a batch of at most `rows` rows, when `free` bytes are free: 1 to `ceiling`."""
    room = free * FRACTION - rows * row_bytes(shape, need, width)
    return int(max(1, min(ceiling, room // token_bytes(shape, need, width, eager))))


def batch_bytes(shape: Shape, need: Need, width: int, rows: int, tokens: int, eager: bool = False) -> int:
    """Bytes of a full batch."""
    return tokens * token_bytes(shape, need, width, eager) + rows * row_bytes(shape, need, width)
