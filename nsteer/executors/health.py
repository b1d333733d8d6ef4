"""Looks at a model once it is loaded for what spoils results without an error: how it reads a plain text with BOS and
without, and what of its tokenizer its embedding has no row for.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isfinite
from typing import Any

import torch

from nsteer.errors import ModelError
from nsteer.program.anatomy import entry

PARAGRAPH = (
    "The library on the corner opens at nine in the morning and closes at six. Most people come for the newspapers, "
    "which lie on a long table by the window, but there are also shelves of novels, a room for children, and two old "
    "computers that anyone may use for an hour. On Saturdays the staff read stories aloud, and in winter they make tea."
)
"""Plain English, of which a language model of English should make sense."""

MOST = 64
"""Tokens of it that are read."""

FACTOR = 2.0
"""How many times larger a perplexity must be for the way a text is read to be called wrong."""

SENSE = 500.0
"""The better of the two must be below this: where a model makes no sense of the text, neither is telling."""


def look(module: Any, tokenizer: Any, positions: int | None) -> dict[str, Any]:
    """What was seen, as plain data.

    positions : of the model; None where they have no end
    `perplexity_with_bos`, `perplexity_without_bos` are of the same tokens of a plain paragraph, `adds_bos` says how
    texts are read; None where the tokenizer has no BOS, or the model could not be asked.
    Raises ModelError for a tokenizer whose own tokens the embedding has no rows for.
    """
    rows = int(module.get_input_embeddings().weight.shape[0])
    own = int(getattr(tokenizer, "vocab_size", 0) or 0)
    if own > rows:
        raise ModelError(
            f"its tokenizer has {own:,} tokens, its embedding {rows:,} rows: is the tokenizer another model's?"
        )
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    read: tuple[float | None, float | None] = (None, None)
    adds = False
    if bos is not None and 0 <= bos < rows:
        adds = list(tokenizer("a").input_ids[:1]) == [bos]
        tokens = tokenizer(PARAGRAPH, add_special_tokens=False, verbose=False).input_ids[
            : min(MOST, (positions or MOST) - 1)
        ]
        if len(tokens) > 1 and max(tokens) < rows:
            read = _perplexity(module, [bos], tokens), _perplexity(module, [], tokens)
    return {
        "adds_bos": adds,
        "perplexity_with_bos": read[0],
        "perplexity_without_bos": read[1],
        "vocabulary": rows,
        "pad_without_a_row": pad is not None and not 0 <= pad < rows,
    }


def _perplexity(module: Any, before: Sequence[int], tokens: Sequence[int]) -> float | None:
    """Of all tokens but the first, which without anything before it has no probability."""
    ids = torch.tensor([[*before, *tokens]], device=entry(module))
    try:
        with torch.no_grad():
            logits = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    except Exception:  # what a model fails with on a text that none of the plan's needs is not the plan's affair
        return None
    if max(tokens) >= logits.shape[-1]:  # cut to a smaller vocabulary
        return None
    first = len(before)
    chances = logits[0, first:-1].float().log_softmax(-1).gather(-1, ids[0, first + 1 :, None].to(logits.device))
    found = -float(chances.mean())
    return exp(min(found, 700.0)) if isfinite(found) else None


def warnings(seen: dict[str, Any]) -> list[str]:
    """What a user should know of what was seen, a sentence each."""
    marked, bare, adds = seen["perplexity_with_bos"], seen["perplexity_without_bos"], seen["adds_bos"]
    if marked is None or bare is None:
        return []
    used, other = (marked, bare) if adds else (bare, marked)
    if other * FACTOR > used or other > SENSE:
        return []
    how, else_ = ("begins texts with BOS", "without it") if adds else ("adds no BOS", "with it")
    return [
        f"its tokenizer {how}, and a plain paragraph has perplexity {used:.0f} so, {other:.0f} {else_}: texts are not "
        f"read as the model learnt them; `add_bos_token: {str(not adds).lower()}` in its tokenizer's config?"
    ]
