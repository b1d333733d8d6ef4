"""Stage `activations`: the residual streams of every sample, pooled inside the forward pass, into the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from nsteer.plan.prompts import Encoded, again, encode, located, norm_weights, sample_text, system_text, weights
from nsteer.plan.schema import Method, Pooling
from nsteer.program.form import Row
from nsteer.runner import sharing
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock
from nsteer.stages import arrays, cells, forms
from nsteer.stages.counting import samples_of
from nsteer.stages.keys import SampleChunk, SampleRow

STAGE = "activations"


def capture(model: ModelRun) -> None:
    """Fills the missing cells of `activations` for the current model."""
    path, todo = model.path(STAGE), model.missing(STAGE)
    if not todo:
        return
    layers = model.job.layers
    form = forms.capture(layers)
    written = model.path("samples")
    samples = model.wanted(cells.samples)
    gone = model.run.lacking(written, samples)
    for key in gone & set(todo):
        model.run.wait_for(STAGE, path, key, todo[key], written, key)
    every = {key: fp for key, fp in todo.items() if key not in gone}
    todo, copies = sharing.parted(model, path, every)
    clock = Clock()
    for wave in model.run.waves(STAGE, path, todo, lambda key: len(samples_of(model.job, key))):
        rows: list[Row] = []
        for key in wave:
            with model.run.guarded(STAGE, path, key, todo[key]):
                texts = model.run.inputs(written, {key: samples[key]})[key]
                rows += cell_rows(model, texts, key)
        results = model.execute(STAGE, form, rows)
        share = clock.share(len(wave))
        for key in wave:
            mine = [row for row in rows if row.key.cell == key]
            if not mine or not model.run.came_back(STAGE, path, key, todo[key], [row.key for row in mine], results):
                continue
            data, broken = cell_data(mine, results.readouts, layers)
            model.run.commit(path, key, data, todo[key], share)
            model.run.finished(STAGE, key)
            if broken:
                model.run.fail(STAGE, path, key, todo[key], not_finite(model, broken))
    sharing.copy(model, STAGE, path, every, copies)


def not_finite(model: ModelRun, broken: dict[int, list[int]]) -> str:
    """Which samples are missing values, because their stream overflows, and at which layers."""
    said = [f"sample {k} at layer {', '.join(map(str, layers))}" for k, layers in broken.items()]
    dtype = model.job.model.dtype
    return f"a residual stream that is not finite in {dtype} ({'; '.join(said)}): a missing value in its place"


def cell_rows(model: ModelRun, texts: xr.Dataset, key: SampleChunk) -> list[Row]:
    """The rows of one cell, from the texts that the store keeps."""
    method = model.plan.methods[key.method]
    samples = list(samples_of(model.job, key))
    cell = texts.sel({"sample": samples})
    rows = []
    for k in samples:
        sample = cell.sel({"sample": k})
        prompt, new = as_read(model, method, sample, sample)
        prompt = where_it_stands(model, method, key, k, prompt) if method.pooling.sought else prompt
        rows.append(pooled_row(SampleRow(key, k), method, prompt, new))
    return rows


def as_read(model: ModelRun, method: Method, asked: xr.Dataset, told: xr.Dataset) -> tuple[Encoded, tuple[int, ...]]:
    """What a sample is read as: what stands before its own text, and the tokens of that.

    asked, told : the samples whose instruction, and whose text, is read; the same but where instructions are swapped
    A text that is read alone has its BOS before it; where it has no tokens, it has no own text behind its instruction.
    """
    tokenizer = model.executor.tokenizer
    if method.source == "generation" and method.context == "text" and str(told.text.item()).strip():
        whole = encode(tokenizer, told.text.item())
        return replace(whole, tokens=whole.tokens[: whole.bos]), whole.tokens[whole.bos :]
    prompt = again(tokenizer, asked.prompt.item(), bool(asked.chat))
    alone = method.source == "generation" and method.context == "text"
    new = () if alone else told.token_id.values[: int(told.generated_tokens)]
    return prompt, tuple(int(t) for t in new)


def pooled_row(key: Any, method: Method, prompt: Encoded, new: tuple[int, ...], pooling: Pooling | None = None) -> Row:
    """The row of a text behind what stands before it, with its weights: by the method's pooling, or another."""
    total = len(prompt.tokens) + len(new)
    pooled = weights(pooling or method.pooling, prompt, total)
    if method.source == "generation" and method.context == "text" and not new:
        pooled = np.zeros_like(pooled)
    return Row(key, prompt.tokens + new, {"text": pooled, "norm": norm_weights(total, prompt.bos)})


def where_it_stands(model: ModelRun, method: Method, key: SampleChunk, sample: int, prompt: Encoded) -> Encoded:
    """A sample's prompt with the characters of its tokens and turns. Raises ModelError where they can not be
    determined."""
    assert model.study.texts is not None
    which = (method, model.study.texts, key.emotion, sample)
    text, system = sample_text(*which), system_text(*which)
    told = model.plan.chat_arguments
    return located(model.executor.tokenizer, prompt, text, method.chat, model.study.moment, told, system)


def cell_data(mine: list[Row], readouts: dict, layers: tuple[int, ...]) -> tuple[Any, dict[int, list[int]]]:
    """The dataset of one cell of `activations`, and the layers at which a sample's stream is not finite.

    Such a sample is NaN (NaN) at all layers, like one without a position to pool: every layer's vector then rests
    on the same samples.
    """
    samples = [row.key.sample for row in mine]
    pooled, positions, bad = pooled_of(mine, readouts)
    broken = {
        k: [layer for layer, b in zip(layers, row, strict=True) if b] for k, row in zip(samples, bad, strict=True)
    }
    data = arrays.dataset(
        {"sample": samples, "layer": layers, "d_model": range(pooled.shape[-1])},
        {
            "pooled": (("sample", "layer", "d_model"), pooled),
            "token_norm": (("sample", "layer"), np.stack([readouts[row.key]["norms"] for row in mine])),
            "positions": (("sample",), positions),
        },
    )
    return data, {k: places for k, places in broken.items() if places}


def pooled_of(mine: Sequence[Row], readouts: Mapping[Any, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pooled streams [row, read, d_model], positions pooled [row], and what is not finite [row, read]; NaN if missing.

    A row with anything that is not finite is a missing value at every read, and has no position.
    """
    positions = np.array([int((row.weights["text"] > 0).sum()) for row in mine])
    pooled = np.stack([readouts[row.key]["pooled"] for row in mine])
    broken = ~np.isfinite(pooled).all(-1) & (positions > 0)[:, None]
    positions[broken.any(-1)] = 0
    pooled[positions == 0] = np.nan
    return pooled, positions, broken
