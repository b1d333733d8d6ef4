"""nsteer itself, on the same work: its own programs through its own executor. Runs where nsteer is installed."""

from __future__ import annotations

import numpy as np
from work import LAYER, Given, main  # first: it puts bench/ on the path

# isort: split
from forwards import capture_programs
from subjects import END, Ends

import nsteer
from nsteer.executors.local import Local
from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit, programs
from nsteer.stages import forms


class Nsteer:
    name, version, reads = "nsteer", nsteer.__version__, "mean"
    cannot = {"one_vector": "not timed: rows carry their own vectors"}  # noqa: RUF012

    def __init__(self, given: Given):
        self.given = given
        self.local = Local(given.model(), device=given.device, tokenizer=Ends())

    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        """Makes its batches itself; `groups` were taken from it."""
        out = np.empty((len(texts), len(layers), 768), np.float32)
        for program in capture_programs(forms.capture(layers), texts):
            out[list(program.keys)] = self.local.run(program).pooled
        return out

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[tuple[int, ...]]:
        form = Form(edits=(EditSite(LAYER, "add"),), decoding=Decoding(new, (), END))
        width = len(prompts[0])
        touched, even = np.ones(width, bool), np.full(width, 1 / width)
        rows = [
            Row(i, tuple(prompt), {}, (RowEdit(vector, 1.0, touched, True, even),))
            for i, (prompt, vector) in enumerate(zip(prompts, vectors, strict=True))
        ]
        generations: list[tuple[int, ...]] = [()] * len(rows)
        for program in programs(form, rows, budget=10**9, max_rows=len(rows)):
            for key, tokens in zip(program.keys, self.local.run(program).tokens or [], strict=True):
                generations[key] = tokens
        return generations


if __name__ == "__main__":
    main(Nsteer)
