"""Tells from a model's config how many positions it was made for, and whether it fails beyond them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Context:
    """Positions of a model. `table`: whether it fails beyond them; else it goes on where it was not trained."""

    positions: int
    table: bool


def context(config: dict[str, Any]) -> Context | None:
    """What a config says of positions; None where it names none, or the model has none (ALiBi in Falcon)."""
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    found = next((text[key] for key in KEYS if isinstance(text.get(key), int) and text[key] > 0), None)
    if found is None or text.get("alibi"):
        return None
    kind = text.get("model_type")
    if kind in SHIFTED:
        pad = text.get("pad_token_id")
        return Context(found - 1 - (1 if pad is None else pad), True)
    return Context(found, kind in TABLES)


def needed(tokens: int, new: int) -> int:
    """Positions of a text and the tokens that it is continued by: the last of them is never read."""
    return tokens + max(new - 1, 0)
