"""Stage `activations`: the residual streams of every sample, pooled inside the forward pass, into the store."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsteer import arrays, cells, forms
from nsteer.conductor.session import Clock, Session
from nsteer.conductor.writing import numbers
from nsteer.layers import resolve
from nsteer.plan import Method
from nsteer.program import Row
from nsteer.prompts import again, norm_weights, weights
from nsteer.store import slug

STAGE = "activations"


def capture(session: Session) -> None:
    """Fills the missing cells of `activations` for the model at hand."""
    facts = session.facts
    assert facts is not None
    path = f"activations/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in cells.activations(session.study, facts).items()}
    todo = session.missing(STAGE, path, wanted)
    if not todo:
        return
    layers = resolve(session.study.plan.layers, facts.n_layers)
    form = forms.capture(layers)
    texts = session.store.read(f"samples/{slug(facts.label)}")
    clock = Clock()
    for wave in session.waves(todo, lambda key: len(numbers(session, key))):
        rows = [row for key in wave for row in cell_rows(session, texts, key)]
        found = dict(session.execute(STAGE, form, rows))
        share = clock.share(len(wave))
        for key in wave:
            session.commit(STAGE, path, key, cell_data(session, key, rows, found, layers), todo[key], share)
            session.finished(STAGE, key)


def method_of(session: Session, key: tuple) -> Method:
    return session.study.plan.methods[key[1]]


def cell_rows(session: Session, texts: xr.Dataset, key: tuple) -> list[Row]:
    """The rows of one cell, from the texts that the store keeps."""
    label, name, emotion, _ = key
    method = method_of(session, key)
    block = list(numbers(session, key))
    cell = texts.sel({"model": label, "method": name, "emotion": emotion, "sample": block}).load()
    rows = []
    for k in block:
        one = cell.sel({"sample": k})
        prompt = again(session.executor.tokenizer, one.prompt.item(), bool(one.chat))
        new = tuple(int(t) for t in one.token_id.values[: int(one.generated_tokens)])
        total = len(prompt.tokens) + len(new)
        pools = {"text": weights(method.pooling, prompt, total), "norm": norm_weights(total, prompt.bos)}
        rows.append(Row((key, k), prompt.tokens + new, pools))
    return rows


def cell_data(session: Session, key: tuple, rows: list[Row], found: dict, layers: tuple[int, ...]) -> Any:
    """The dataset of one cell of `activations`; a sample without a position to pool is a hole (NaN)."""
    mine = [row for row in rows if row.key[0] == key]  # type: ignore[index]
    positions = [int((row.weights["text"] > 0).sum()) for row in mine]
    pooled = np.stack([found[row.key]["pooled"] for row in mine])
    pooled[[n == 0 for n in positions]] = np.nan
    if not np.isfinite(pooled[[n > 0 for n in positions]]).all():
        session.warnings.append(f"{key}: a residual stream that is not finite (overflow of the model's dtype?)")
    return arrays.dataset(
        {"sample": [row.key[1] for row in mine], "layer": layers, "d_model": range(pooled.shape[-1])},  # type: ignore[index]
        {
            "pooled": (("sample", "layer", "d_model"), pooled),
            "token_norm": (("sample", "layer"), np.stack([found[row.key]["norms"] for row in mine])),
            "positions": (("sample",), positions),
        },
    )
