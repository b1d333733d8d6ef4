"""Tells from a model's config how many positions it was made for, and what becomes of texts beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nsteer.program.budget import count

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")

TABLES = set(
    "gpt2 gpt_neo gpt_bigcode openai-gpt opt biogpt gptj codegen ctrl mpt imagegpt bert bert-generation electra "
    "rembert megatron-bert ernie roformer big_bird bart mbart plbart pegasus blenderbot blenderbot-small trocr".split()
)
"""Model types that look positions up in a table of so many rows: beyond it they fail."""

SHIFTED = set(
    "roberta xlm-roberta xlm-roberta-xl camembert data2vec-text xmod roberta-prelayernorm".split(),
)
"""Of these the first rows, up to that of the padding token, are no positions."""


LONGROPE = ("longrope", "su")
"""Rotary positions with two sets of frequencies, as configs name them."""


@dataclass(frozen=True)
class Context:
    """Positions of a model.

    table : whether no text may go beyond them; else it goes on where it was not trained
    turn : positions beyond which a text changes with what else is in its batch: with its longest text, which decides by
        which frequencies positions are coded (longrope: Phi-3, MiniCPM), or with padding, which is counted among the
        positions (Llama 4's attention temperature); 0 where there are none
    """

    positions: int
    table: bool
    turn: int = 0


def context(config: dict[str, Any]) -> Context | None:
    """What a config says of positions; None where it names none, or the model has none (ALiBi in Falcon)."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    positions = next((n for key in KEYS if (n := count(text.get(key)))), None)
    if positions is None or text.get("alibi"):
        return None
    kind = text.get("model_type")
    if kind in SHIFTED:
        pad = text.get("pad_token_id")
        return Context(positions - 1 - (pad if isinstance(pad, int) else 1), True)
    scale = count(text.get("floor_scale"))
    turns = [scale - 1] if text.get("attn_temperature_tuning") and scale else []
    for rope in _ropes(text):
        name = str(rope.get("rope_type") or rope.get("type") or "")
        if "dynamic" in name:  # beyond them the frequencies are by the longest text that it has read so far
            return Context(positions, True)
        if name in LONGROPE:
            key = "original_max_position_embeddings"
            turns.append(count(rope.get(key)) or count(text.get(key)))
    return Context(positions, kind in TABLES, min(filter(None, turns), default=0))


def _ropes(text: dict[str, Any]) -> list[dict[str, Any]]:
    """What a config says of its rotary positions; some models have several, by the type of layer."""
    said = [value for key in ("rope_parameters", "rope_scaling") if isinstance(value := text.get(key), dict)]
    return said + [value for several in said for value in several.values() if isinstance(value, dict)]


def positions_needed(tokens: int, new: int) -> int:
    """Positions of a text and the tokens that it is continued by: the last of them is never read."""
    return tokens + max(new - 1, 0)
