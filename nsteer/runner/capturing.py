"""Stage `activations`: the residual streams of every sample, pooled inside the forward pass, into the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsteer.plan.layers import resolve
from nsteer.plan.prompts import again, norm_weights, weights
from nsteer.plan.schema import Method
from nsteer.program.form import Row
from nsteer.runner import sharing
from nsteer.runner.session import Clock, Session
from nsteer.runner.sharing import numbers
from nsteer.stages import arrays, cells, forms
from nsteer.store import slug

STAGE = "activations"


def capture(session: Session) -> None:
    """Fills the missing cells of `activations` for the model at hand."""
    facts = session.facts
    assert facts is not None
    path = f"activations/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.activations).items()}
    todo = session.missing(STAGE, path, wanted)
    if not todo:
        return
    layers = resolve(session.study.plan.layers, facts.n_layers)
    form = forms.capture(layers)
    written = f"samples/{slug(facts.label)}"
    samples = {(facts.label, *key): number for key, number in session.wanted(cells.samples).items()}
    gone = session.lacking(written, samples)
    for key in gone & set(todo):
        session.wait_for(STAGE, path, key, todo[key], written, key)
    every = {key: fp for key, fp in todo.items() if key not in gone}
    todo, copies = sharing.parted(session, path, every)
    clock = Clock()
    for wave in session.waves(STAGE, path, todo, lambda key: len(numbers(session, key))):
        rows: list[Row] = []
        for key in wave:
            with session.guarded(STAGE, path, key, todo[key]):
                texts = session.inputs(written, {key: samples[key]})[key]
                rows += cell_rows(session, texts, key)
        results = session.execute(STAGE, form, rows)
        share = clock.share(len(wave))
        for key in wave:
            mine = [row for row in rows if row.key[0] == key]  # type: ignore[index]
            if not mine or not session.came_back(STAGE, path, key, todo[key], [row.key for row in mine], results):
                continue
            data, broken = cell_data(mine, results.found, layers)
            session.commit(STAGE, path, key, data, todo[key], share)
            session.finished(STAGE, key)
            if broken:
                session.fail(STAGE, path, key, todo[key], not_finite(session, broken))
    sharing.copy(session, STAGE, path, every, copies)


def not_finite(session: Session, broken: dict[int, list[int]]) -> str:
    """Which samples are holes, because their stream overflows, and at which layers."""
    assert session.facts is not None
    said = [f"sample {k} at layer {', '.join(map(str, layers))}" for k, layers in broken.items()]
    dtype = cells.model_of(session.study, session.facts).dtype
    return f"a residual stream that is not finite in {dtype} ({'; '.join(said)}): a hole in its place"


def method_of(session: Session, key: tuple) -> Method:
    return session.study.plan.methods[key[1]]


def cell_rows(session: Session, texts: xr.Dataset, key: tuple) -> list[Row]:
    """The rows of one cell, from the texts that the store keeps."""
    method = method_of(session, key)
    block = list(numbers(session, key))
    cell = texts.sel({"sample": block})
    rows = []
    for k in block:
        one = cell.sel({"sample": k})
        prompt = again(session.executor.tokenizer, one.prompt.item(), bool(one.chat))
        new = tuple(int(t) for t in one.token_id.values[: int(one.generated_tokens)])
        total = len(prompt.tokens) + len(new)
        pools = {"text": weights(method.pooling, prompt, total), "norm": norm_weights(total, prompt.bos)}
        rows.append(Row((key, k), prompt.tokens + new, pools))
    return rows


def cell_data(mine: list[Row], found: dict, layers: tuple[int, ...]) -> tuple[Any, dict[int, list[int]]]:
    """The dataset of one cell of `activations`, and the layers at which a sample's stream is not finite.

    Such a sample is a hole (NaN) at all layers, like one without a position to pool: every layer's vector then rests
    on the same samples.
    """
    samples = [row.key[1] for row in mine]  # type: ignore[index]
    positions = np.array([int((row.weights["text"] > 0).sum()) for row in mine])
    pooled = np.stack([found[row.key]["pooled"] for row in mine])
    bad = ~np.isfinite(pooled).all(-1) & (positions > 0)[:, None]
    broken = {
        k: [layer for layer, b in zip(layers, row, strict=True) if b] for k, row in zip(samples, bad, strict=True)
    }
    positions[bad.any(-1)] = 0
    pooled[positions == 0] = np.nan
    data = arrays.dataset(
        {"sample": samples, "layer": layers, "d_model": range(pooled.shape[-1])},
        {
            "pooled": (("sample", "layer", "d_model"), pooled),
            "token_norm": (("sample", "layer"), np.stack([found[row.key]["norms"] for row in mine])),
            "positions": (("sample",), positions),
        },
    )
    return data, {k: places for k, places in broken.items() if places}
