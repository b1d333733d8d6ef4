"""Shows by two programs that an engine gives what transformers gives of the same weights, up to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nsteer.errors import AnatomyError
from nsteer.executors import batching, skeleton
from nsteer.executors.common import ends
from nsteer.executors.local import Local
from nsteer.program import anatomy
from nsteer.program.form import (
    SITES,
    Decoding,
    EditSite,
    Form,
    Program,
    Readouts,
    ReadSite,
    Row,
    RowEdit,
    assemble,
)

CLOSE = 1e-4
"""Relative difference of float32 numbers up to which it is rounding."""

TEXT = 7
"""Tokens of the text that is read."""


@dataclass(frozen=True)
class Known:
    """What is known of a model before its engine is made: from transformers, with its readouts or without weights."""

    anatomy: anatomy.Anatomy
    prefix: str  # what transformers calls the model below its head
    config: Any
    tokenizer: Any
    eos: tuple[int, ...]
    pad: int
    parameters: int
    programs: list[Program]
    readouts: list[Readouts]
    health: dict[str, Any]  # how transformers was seen to read a paragraph; nothing where it has no weights


def known(name: str, dtype: str, attention: str | None, settings: dict[str, Any]) -> Known:
    """A model as transformers has it on a CPU, with what the programs of the proof give there. Raises ModelError."""
    local = Local(name, dtype=dtype, device="cpu", attn_implementation=attention, leave=False, **settings)
    try:
        proof_programs = programs(local.anatomy, local.pad)
        given = [local.run(program) for program in proof_programs]
        ids = (local.eos, local.pad)
        return _known(local.module, local.tokenizer, local.anatomy, ids, proof_programs, given, local.health)
    finally:
        local.close()


def outlined(name: str, dtype: str, attention: str | None, settings: dict[str, Any]) -> Known:
    """A model without weights: nothing to compare an engine with. Raises ModelError."""
    bare, tokenizer = skeleton.build(name, None, attention, settings)
    model_anatomy, ids = skeleton.outline(bare), ends(bare._module, tokenizer)
    return _known(bare._module, tokenizer, model_anatomy, ids, programs(model_anatomy, ids[1])[:1], [], {})


def _known(
    module: Any,
    tokenizer: Any,
    model_anatomy: anatomy.Anatomy,
    ids: Any,
    proof_programs: Any,
    given: Any,
    seen: dict[str, Any],
) -> Known:
    count = sum(p.numel() for p in module.parameters())
    return Known(
        model_anatomy,
        module.base_model_prefix,
        module.config,
        tokenizer,
        ids[0],
        ids[1],
        count,
        proof_programs,
        given,
        seen,
    )


def programs(model_anatomy: anatomy.Anatomy, pad: int) -> list[Program]:
    """Every stream of a text, and its probability; a strong edit, its receipt, and how likely what follows is."""
    ids = tuple(token for token in range(model_anatomy.vocab // 2, model_anatomy.vocab) if token != pad)[:TEXT]
    even = np.full(len(ids), 1 / len(ids), np.float32)
    sites = [site for site in SITES if not anatomy.unknown(model_anatomy, (site,))]
    reads = tuple(ReadSite(layer, "text", "tokens", site) for layer in range(model_anatomy.n_layers) for site in sites)
    vector = np.random.default_rng(0).standard_normal(model_anatomy.d_model).astype(np.float32)
    edit = RowEdit(vector / np.linalg.norm(vector), 1.0, np.ones(len(ids), bool), True, even)
    steer = Form(edits=(EditSite(model_anatomy.n_layers // 2, "add", live=True),), decoding=Decoding(2, (), pad), top=1)
    return [
        assemble(Form(reads=reads, score=True), [Row("text", ids, {"text": even, "score": even})]),
        assemble(steer, [Row("edit", ids, {}, (edit,))]),
    ]


def allowed(dtype: str) -> float:
    """The relative difference that is rounding."""
    return batching.ROUNDING.get(getattr(torch, dtype), CLOSE)


def differences(mine: Sequence[Readouts], its: Sequence[Readouts]) -> dict[str, float]:
    """By how much of its size each thing differs that two executors read; of streams the site that differs most."""
    read, steered = zip(mine, its, strict=True)
    assert read[0].streams is not None and read[1].streams is not None
    pairs = list(zip(read[0].streams[0], read[1].streams[0], strict=True))
    distances = {"the stream": max(float(np.linalg.norm(a - b) / np.linalg.norm(b).clip(1e-12)) for a, b in pairs)}
    for what, pair, name in (
        ("the probability of a text", read, "score"),
        ("an edit's receipt", steered, "receipts"),
        ("the probability of a steered token", steered, "top_logprobs"),
    ):
        a, b = (getattr(model, name) for model in pair)
        distances[what] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1.0))
    return {what: float(f"{far:.2g}") for what, far in distances.items()}


def continued(readouts: Readouts, n_layers: int) -> None:
    """Raises AnatomyError where what a block gives is not what the next one reads, or is no number."""
    assert readouts.streams is not None
    streams = readouts.streams[0]
    sites = len(streams) // n_layers
    for layer in range(n_layers):
        after = streams[(layer + 1) * sites - 1]
        if not np.isfinite(after).all():
            raise AnatomyError(f"the stream is not finite at layer {layer}")
        if layer + 1 < n_layers and not np.array_equal(after, streams[(layer + 1) * sites]):
            raise AnatomyError(f"the output of layer {layer} is not what layer {layer + 1} reads")
