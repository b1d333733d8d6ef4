"""An executor of shaped numbers: every readout has its form and no meaning; for tests and dry runs.

Deterministic: a row's numbers depend on its tokens, edits and seed alone, not on the batch it stands in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from nsteer.errors import ExecutionError
from nsteer.executors import each
from nsteer.program import budget, code
from nsteer.program.anatomy import Anatomy, Sublayer
from nsteer.program.form import Batching, Form, Program, Readouts


class Fake:
    """A model of no weights. `tokenizer` is whatever the caller's prompts need; `fail_after` programs it breaks."""

    def __init__(
        self,
        model: str = "fake",
        *,
        n_layers: int = 4,
        d_model: int = 8,
        vocab: int = 64,
        tokenizer: Any = None,
        fail_after: int | None = None,
        **settings: Any,
    ):
        self.model = model
        paths = ("model.layers", "lm_head", "model.embed_tokens")
        inside = (Sublayer("self_attn", True), Sublayer("mlp"))
        self.anatomy = Anatomy(*paths, n_layers, d_model, vocab, attention=inside[0], mlp=inside[1], proved=True)
        self.tokenizer = tokenizer
        self.eos: tuple[int, ...] = (0,)
        self.pad = 0
        self.overhead = budget.OVERHEADS["cpu"]
        self.batching = Batching()
        self.ran = 0
        self._fail_after = fail_after

    def code(self, program: Program) -> str:
        return code.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """Readouts of the program's form. Raises ExecutionError when it has run `fail_after` programs."""
        if self._fail_after is not None and self.ran >= self._fail_after:
            raise ExecutionError(f"the fake executor fails after {self._fail_after} programs, as it was told")
        self.ran += 1
        self.code(program)  # a form that can not be compiled must not pass a dry run
        rows = [_row(program, i, self.anatomy) for i in range(program.rows)]
        kept: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
        ragged = {"streams", "tokens"}
        stacked: dict[str, Any] = {name: v if name in ragged else np.stack(v) for name, v in kept.items()}
        return Readouts(**stacked)

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        return each(self.run, programs)

    def settle(self) -> None:
        """Nothing to forget."""

    def afford(self, form: Form, rows: int) -> int:
        return budget.CEILINGS["cpu"]

    def describe(self) -> dict[str, Any]:
        return {"executor": "fake", "dtype": "float32", "device": "none", "attn_implementation": "", "parameters": 0}

    def close(self) -> None:
        pass


def _row(program: Program, i: int, anatomy: Anatomy) -> dict[str, Any]:
    form = program.form
    mask = program.arrays["attention_mask"][i].astype(bool)
    random = np.random.default_rng(_seed(program, i, mask))
    counts = {what: sum(site.what == what for site in form.reads) for what in ("pooled", "norm", "tokens", "decoded")}
    row: dict[str, Any] = {}
    if counts["pooled"]:
        row["pooled"] = random.standard_normal((counts["pooled"], anatomy.d_model), np.float32)
    if counts["norm"]:
        row["norms"] = random.random(counts["norm"], np.float32) + np.float32(1)
    if counts["tokens"]:
        row["streams"] = random.standard_normal((counts["tokens"], int(mask.sum()), anatomy.d_model), np.float32)
    if counts["decoded"]:
        row["prompt_end"] = random.standard_normal((counts["decoded"], anatomy.d_model), np.float32)
        row["written"] = random.standard_normal((counts["decoded"], anatomy.d_model), np.float32)
    if form.promote:
        row["promoted"] = -np.sort(-random.standard_normal(form.promote, np.float32))
        row["promoted_tokens"] = random.integers(0, anatomy.vocab, form.promote)
    if form.score:
        row["score"] = np.float32(-random.random())
    if form.against:  # as if the change grew with the square of the amount, whatever the vector
        strength = float(np.abs(program.arrays["amount"][:, i]).sum())
        row["against"] = np.array([strength**2, strength], np.float32)
    if form.decoding:
        steps = form.decoding.max_new_tokens
        row["tokens"] = tuple(int(token) for token in random.integers(1, anatomy.vocab, steps))
        if form.top:
            row["top_logprobs"] = -np.sort(random.random((steps, form.top), np.float32))
            row["top_tokens"] = random.integers(0, anatomy.vocab, (steps, form.top))
    if form.edits:
        touched = program.arrays["prompt"][:, i].sum(1) + (form.decoding.max_new_tokens if form.decoding else 0)
        row["receipts"] = np.stack([touched, touched * 0.01, touched * 0.99, touched], -1).astype(np.float32)
    return row


def _seed(program: Program, i: int, mask: np.ndarray) -> int:
    """From what the row is, without its padding."""
    digest = hashlib.sha256(program.arrays["input_ids"][i][mask].tobytes())
    for name in ("amount", "which", "reference", "uniform"):
        if name in program.arrays:
            array = program.arrays[name]
            digest.update(np.ascontiguousarray(array[i] if name == "uniform" else array[:, i]).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")
