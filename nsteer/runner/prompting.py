"""The prompts of a plan as the current model gets them, encoded when they are used."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from nsteer.errors import ModelError
from nsteer.plan import positions
from nsteer.plan.prompts import Encoded, encode, located, prompt_set, token_ids
from nsteer.plan.schema import Continuing, Editing, Read
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import LoadError
from nsteer.runner.writing import one_bos

K = TypeVar("K", bound=tuple)

KEPT = 8
"""Sets of prompts that are kept encoded: those of a plan may be large, or many."""

At = Iterable[Editing | Read]
"""What has positions: edits, or reads."""


def encoded(model: ModelRun, texts: Continuing, at: At = ()) -> dict[str, Encoded]:
    """Prompts by label; with the characters of their tokens where some of the positions rest on them.

    Raises ModelError for a prompt without a token, and for a template that is refused.
    """
    at, told = list(at), model.plan.chat_arguments
    pools = [read.pooling for read in at if isinstance(read, Read) and read.pooling is not None]
    sought = any(positions.sought(place.positions) for place in at) or any(pool.sought for pool in pools)
    labelled, tokenizer, moment = (
        prompt_set(texts.prompts, model.study.texts),
        model.executor.tokenizer,
        model.study.moment,
    )
    key = (json.dumps(labelled), texts.chat, sought)
    prompts = model.encoded.pop(key, None)
    if prompts is None:
        prompts = {label: encode(tokenizer, text, texts.chat, None, moment, told) for label, text in labelled.items()}
        for label, prompt in prompts.items():
            one_bos(model, f"the prompt {label[:40]!r}", prompt)
        if sought:
            prompts = {
                label: located(tokenizer, prompt, labelled[label], texts.chat, moment, told)
                for label, prompt in prompts.items()
            }
    model.encoded[key] = prompts  # behind the others: what was used last stays
    if len(model.encoded) > KEPT:
        del model.encoded[next(iter(model.encoded))]
    return prompts


def prompts_of(
    model: ModelRun, texts: Continuing, at: At, stage: str, path: str, todo: Mapping[K, int]
) -> dict[str, Encoded] | None:
    """Prompts by label; None where they, or tokens that edits name, are refused, which fails all these cells."""
    at = list(at)
    try:
        prompts = encoded(model, texts, at)
        check_words(model, at)
    except LoadError:
        raise
    except ModelError as error:
        for key, number in todo.items():
            model.run.fail(stage, path, key, number, str(error))
        return None
    return prompts


def check_words(model: ModelRun, at: At) -> None:
    """Raises ModelError where a token that is named is none of the model's."""
    for place in at:
        listed: list[Any] = [given.get("ids", []) for _, given in positions.said(place.positions)]
        named = [token for ids in listed for token in positions.many(ids)]
        when = place.when if isinstance(place, Editing) else None
        token_ids(model.executor.tokenizer, [*((when.after if when else None) or ()), *named])
