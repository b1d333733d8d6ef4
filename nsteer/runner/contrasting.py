"""Turns the texts of a contrast, or of a mean, into pooled streams: given ones, or answers that the model wrote."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError
from nsteer.models.templates import shown
from nsteer.plan.prompts import Question, again, encode, located, questions, weights
from nsteer.plan.schema import SIDES, Contrast, Mean
from nsteer.program.form import Row
from nsteer.program.randomness import draw_label, generator
from nsteer.runner.model import ModelRun
from nsteer.runner.responding import kept_of
from nsteer.runner.runs import WAVE
from nsteer.science.directions import sides_shuffled
from nsteer.stages import forms

STAGE = "directions"

KEPT = 2**28
"""Bytes of the samples of a method, or of the streams of a contrast, up to which they are kept for further draws of
shuffled labels; larger ones are read for each."""


class Sided(NamedTuple):
    """A row that is a text of one side of a contrast."""

    side: str
    place: int


def mean_of(model: ModelRun, name: str, side: str) -> tuple[np.ndarray, list[Any]]:
    """The mean of one side's pooled streams [layer, d_model], and its texts; zeros of no text.

    Raises as `pooled` does.
    """
    total, texts = np.zeros(1), list[Any]()
    for streams, some in pooled(model, name, side):
        total = total + np.sum(streams, 0, dtype=np.float64)
        texts += some
    return np.asarray(total / max(len(texts), 1), np.float32), texts


def pooled(model: ModelRun, name: str, side: str) -> Iterator[tuple[np.ndarray, list[Any]]]:
    """The pooled streams of one side of a direction, some texts at a time: [text, layer, d_model], and the texts.

    Raises ExecutionError for a text that has none of the positions that are pooled, InputError for answers that are not
    as they were committed.
    """
    spec = model.plan.directions[name]
    groups = spec.contrast or spec.mean
    assert groups is not None
    if spec.contrast is not None and spec.contrast.generate is not None:
        batches = answer_rows(model, name, side, spec.contrast)
    else:
        batches = text_rows(model, groups, side)
    for rows, texts in batches:
        results = model.execute(STAGE, forms.sentences(model.facts.n_layers), rows)
        model.run.stop.check()
        for error in results.failed.values():
            raise error
        yield np.stack([results.readouts[row.key]["pooled"] for row in rows]), texts


def text_rows(model: ModelRun, groups: Contrast | Mean, side: str) -> Iterator[tuple[list[Row], list[Any]]]:
    """The rows of the texts that are given on one side, WAVE at a time, and the texts. Raises ExecutionError."""
    texts = list(enumerate(getattr(groups, side)))
    for first in range(0, len(texts), WAVE):
        some = texts[first : first + WAVE]
        yield [text_row(model, groups, Sided(side, i), text) for i, text in some], [text for _, text in some]


def text_row(model: ModelRun, groups: Contrast | Mean, key: Sided, text: Any) -> Row:
    tokenizer, how = model.executor.tokenizer, (model.study.moment, model.plan.chat_arguments)
    prompt = encode(tokenizer, text, groups.chat, None, *how)
    if groups.pooling.sought:
        prompt = located(tokenizer, prompt, text, groups.chat, *how)
    pool = weights(groups.pooling, prompt, len(prompt.tokens))
    if not pool.any():
        raise ExecutionError(
            f"{key.side}[{key.place}], {shown(text)[:40]!r}, has none of the positions that are pooled"
        )
    return Row(key, prompt.tokens, {"text": pool})


def answer_rows(model: ModelRun, name: str, side: str, spec: Contrast) -> Iterator[tuple[list[Row], list[str]]]:
    """The rows of one side's answers that are kept, WAVE at a time, and their texts.

    Raises ExecutionError, InputError."""
    rows, read, asked = list[Row](), list[str](), questions(spec, side)
    for cell in kept_of(model, name, side):
        for number in cell.response.values.tolist():
            answer = cell.sel({"response": number})
            rows.append(response_row(model, spec, Sided(side, number), answer, asked[number]))
            read.append(str(answer.text.item()))
        if len(rows) >= WAVE:
            yield rows, read
            rows, read = [], []
    if rows:
        yield rows, read


def response_row(model: ModelRun, spec: Contrast, key: Sided, answer: xr.Dataset, asked: Question) -> Row:
    """An answer behind its prompt, with the weights of the contrast's pooling. Raises ExecutionError where none is
    pooled."""
    tokenizer = model.executor.tokenizer
    prompt = again(tokenizer, answer.prompt.item(), True)
    if spec.pooling.sought:
        how = (model.study.moment, model.plan.chat_arguments, asked.system)
        prompt = located(tokenizer, prompt, asked.text, "always", *how)
    new = tuple(int(token) for token in answer.token_id.values[: int(answer.generated_tokens)])
    pool = weights(spec.pooling, prompt, len(prompt.tokens) + len(new))
    if not pool.any():
        text = str(answer.text.item())
        raise ExecutionError(f"{key.side} answer {key.place}, {text[:40]!r}, has none of the positions that are pooled")
    return Row(key, prompt.tokens + new, {"text": pool})


# ---- sides shuffled ----------------------------------------------------------------------------------------------


def shuffled(model: ModelRun, name: str, draw: int) -> np.ndarray:
    """The vector of a contrast whose texts stand on sides that are shuffled, [layer, d_model], in a draw from 1 on.

    Its texts are read once more: the store keeps their means alone. Raises as `pooled` does.
    """
    if name not in model.sides:
        model.sides[name] = tuple(np.concatenate([streams for streams, _ in pooled(model, name, s)]) for s in SIDES)
    positive, negative = model.sides[name]
    if positive.nbytes + negative.nbytes > KEPT:
        del model.sides[name]
    drawn = generator("shuffled", model.plan.seed, "contrast", name, *draw_label(draw))
    here = sides_shuffled(len(positive), len(negative), drawn)
    together = np.concatenate([positive, negative])
    means = [np.asarray(together[side].mean(0, dtype=np.float64)) for side in (here, ~here)]
    return (means[0] - means[1]).astype(np.float32)
