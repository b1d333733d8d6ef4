"""Hooks by hand: torch and transformers alone, as a careful user writes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from work import LAYER, Given, main, plain_generate, right, shares


class Stop(Exception):
    """Ends a forward at the deepest block that is read."""


class Hooks:
    name, version, reads, own_batch = "hooks by hand", f"torch {torch.__version__}", "mean", 32

    def __init__(self, given: Given):
        self.given, self.model = given, given.model()
        self.blocks = self.model.transformer.h

    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        out = np.empty((len(texts), len(layers), 768), np.float32)
        for group in groups:
            batch = right([texts[i] for i in group], self.given.device)
            weights = shares(batch["attention_mask"])
            means: dict[int, torch.Tensor] = {}

            def read(layer: int, weights: torch.Tensor = weights, means: dict[int, torch.Tensor] = means) -> Any:
                def hook(_: Any, __: Any, stream: torch.Tensor) -> None:
                    means[layer] = (stream * weights).sum(1)
                    if layer == layers[-1]:
                        raise Stop

                return hook

            handles = [self.blocks[layer].register_forward_hook(read(layer)) for layer in layers]
            try:
                with torch.no_grad():
                    self.model(**batch, use_cache=False)
            except Stop:
                pass
            finally:
                for handle in handles:
                    handle.remove()
            out[group] = torch.stack([means[layer] for layer in layers], 1).cpu().numpy()
        return out

    def _adding(self, prompts: list[list[int]], added: np.ndarray, new: int) -> list[list[int]]:
        delta = torch.as_tensor(added).to(self.given.device)
        handle = self.blocks[LAYER].register_forward_hook(lambda _, __, stream: stream + delta)
        try:
            return plain_generate(self.model, prompts, new, self.given.device).tolist()
        finally:
            handle.remove()

    def one_vector(self, prompts: list[list[int]], vector: np.ndarray, new: int) -> list[list[int]]:
        return self._adding(prompts, vector, new)

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[list[int]]:
        return self._adding(prompts, vectors[:, None], new)


if __name__ == "__main__":
    main(Hooks)
