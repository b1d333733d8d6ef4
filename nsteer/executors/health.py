"""Looks at a model once it is loaded for what spoils results without an error: how it reads a paragraph with BOS and
without, whether its streams are numbers there, what padding does to them, and what of its tokenizer its embedding has
no row for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import exp, isfinite
from typing import Any

import torch

from nsteer.errors import ModelError
from nsteer.program.anatomy import Anatomy, entry, not_finite
from nsteer.program.form import Batching

PARAGRAPH = (
    "The library on the corner opens at nine in the morning and closes at six. Most people come for the newspapers, "
    "which lie on a long table by the window, but there are also shelves of novels, a room for children, and two old "
    "computers that anyone may use for an hour. On Saturdays the staff read stories aloud, and in winter they make tea."
)
"""English, of which a language model of English should make sense."""

MAX_TOKENS = 64
"""Tokens of it that are read."""

FACTOR = 2.0
"""How many times larger a perplexity must be for the way a text is read to be called wrong."""

SENSE = 500.0
"""The better of the two must be below this: where a model makes no sense of the text, neither is telling."""


def look(
    module: Any, tokenizer: Any, positions: int | None, anatomy: Anatomy | None = None, rows_are: Batching | None = None
) -> dict[str, Any]:
    """What was seen, as JSON data.

    positions : of the model; None where they have no end
    anatomy : its blocks are watched for streams that are not finite; rows_are : what was proved of its batches
    `perplexity_with_bos`, `perplexity_without_bos` are of the same tokens of an English paragraph, `adds_bos` says how
    texts are read; None where the tokenizer has no BOS, or the model could not be asked. `not_finite_at`: the first
    layer whose stream is not finite in that paragraph, read as texts are; None where all are. The rest: `of_batches`.
    Raises ModelError for a tokenizer whose own tokens the embedding has no rows for.
    """
    rows = int(module.get_input_embeddings().weight.shape[0])
    own = int(getattr(tokenizer, "vocab_size", 0) or 0)
    if own > rows:
        raise ModelError(
            f"its tokenizer has {own:,} tokens, its embedding {rows:,} rows: is the tokenizer another model's?"
        )
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    marked = bos is not None and 0 <= bos < rows
    reads = callable(tokenizer)  # not a stand-in that has its special tokens alone
    adds = reads and marked and list(tokenizer("a").input_ids[:1]) == [bos]
    tokens = tokenizer(PARAGRAPH, add_special_tokens=False, verbose=False).input_ids if reads else []
    tokens = tokens[: min(MAX_TOKENS, (positions or MAX_TOKENS) - 1)]
    read: dict[bool, tuple[float | None, int | None]] = {}
    if len(tokens) > 1 and max(tokens) < rows:
        read = {way: _read(module, [bos] * way, tokens, anatomy) for way in ((True, False) if marked else (False,))}
    with_bos, without = (read.get(way, (None, None))[0] if marked else None for way in (True, False))
    return {
        "adds_bos": adds,
        "perplexity_with_bos": with_bos,
        "perplexity_without_bos": without,
        "not_finite_at": read.get(adds, (None, None))[1],
        "vocabulary": rows,
        "pad_without_a_row": pad is not None and not 0 <= pad < rows,
        **of_batches(rows_are or Batching()),
    }


def of_batches(rows_are: Batching) -> dict[str, str]:
    """What was proved of a model's batches: which rows may share one, and why not any; why no step can be edited."""
    return {
        "batches_of": rows_are.mates,
        "batches_because": rows_are.because,
        "no_edits_while_generating_because": rows_are.stepless,
    }


def _read(
    module: Any, before: Sequence[int], tokens: Sequence[int], anatomy: Anatomy | None
) -> tuple[float | None, int | None]:
    """The perplexity of all tokens but the first, which without anything before it has no probability; and the first
    layer whose stream is not finite."""
    ids = torch.tensor([[*before, *tokens]], device=entry(module))
    with _watched(module, anatomy) as broken:
        try:
            with torch.no_grad():
                logits = module(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        except Exception:  # what a model fails with on a text that none of the plan's needs is not the plan's affair
            return None, None
    at = min(broken, default=None)
    if max(tokens) >= logits.shape[-1]:  # cut to a smaller vocabulary
        return None, at
    first = len(before)
    chances = logits[0, first:-1].float().log_softmax(-1).gather(-1, ids[0, first + 1 :, None].to(logits.device))
    loss = -float(chances.mean())
    return (exp(min(loss, 700.0)) if isfinite(loss) else None), at


@contextmanager
def _watched(module: Any, anatomy: Anatomy | None) -> Iterator[list[int]]:
    """A list that gets the layers whose streams are not finite, as they run."""
    broken: list[int] = []

    def watch(layer: int, output: Any) -> None:
        stream = output[0] if isinstance(output, (tuple, list)) else output
        if not bool(stream.isfinite().all()):
            broken.append(layer)

    blocks = module.get_submodule(anatomy.blocks) if anatomy else ()
    hooks = [b.register_forward_hook(lambda m, a, out, layer=k: watch(layer, out)) for k, b in enumerate(blocks)]
    try:
        yield broken
    finally:
        for hook in hooks:
            hook.remove()


def warnings(seen: dict[str, Any], dtype: str) -> list[str]:
    """What a user should know of what was seen of a model in a dtype, a sentence each."""
    rows_are = Batching(seen["batches_of"], seen["batches_because"], seen["no_edits_while_generating_because"])
    layer = seen["not_finite_at"]
    overflow = [] if layer is None else [f"{not_finite(dtype, layer)} (in an English paragraph; a text is NaN then)"]
    return [*rows_are.notes, *overflow, *_bos(seen)]


def _bos(seen: dict[str, Any]) -> list[str]:
    marked, bare, adds = seen["perplexity_with_bos"], seen["perplexity_without_bos"], seen["adds_bos"]
    if marked is None or bare is None:
        return []
    used, other = (marked, bare) if adds else (bare, marked)
    if other * FACTOR > used or other > SENSE:
        return []
    how, else_ = ("begins texts with BOS", "without it") if adds else ("adds no BOS", "with it")
    return [
        f"its tokenizer {how}, and an English paragraph has perplexity {used:.0f} so, {other:.0f} {else_}: texts are "
        f"not read as the model learnt them; `add_bos_token: {str(not adds).lower()}` in its tokenizer's config?"
    ]
