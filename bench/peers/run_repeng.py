"""repeng: `batched_get_hiddens` reads, `ControlModel` steers. It reads a text's last token; means it does not offer."""

from __future__ import annotations

import contextlib
import io
from importlib import metadata

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from repeng.extract import batched_get_hiddens
from work import LAYER, Given, main, plain_generate, spelled, word_tokenizer


class Repeng:
    name, version, reads, own_batch = "repeng", metadata.version("repeng"), "last", 32
    notes = ("reads the last token of each text: it has no mean over tokens",)

    def __init__(self, given: Given):
        self.given = given
        self.tokenizer = word_tokenizer()
        self.plain = given.model()
        self.model = ControlModel(given.model(), [LAYER])

    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        out = np.empty((len(texts), len(layers), 768), np.float32)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            for group in groups:
                inputs = [spelled(texts[i]) for i in group]
                hidden_states = batched_get_hiddens(self.plain, self.tokenizer, inputs, layers, len(inputs))
                out[group] = np.stack([hidden_states[layer] for layer in layers], 1)
        return out

    def one_vector(self, prompts: list[list[int]], vector: np.ndarray, new: int) -> list[list[int]]:
        self.model.set_control(ControlVector(model_type="gpt2", directions={LAYER: vector}), 1.0)
        try:
            return plain_generate(self.model, prompts, new, self.given.device).tolist()
        finally:
            self.model.reset()

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[list[int]]:
        """Coaxed: `set_raw_control` is handed [row, 1, d_model], of which its documents say nothing."""
        self.model.set_raw_control({LAYER: torch.as_tensor(vectors[:, None]).to(self.given.device)})
        try:
            return plain_generate(self.model, prompts, new, self.given.device).tolist()
        finally:
            self.model.reset()


if __name__ == "__main__":
    main(Repeng)
