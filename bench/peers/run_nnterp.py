"""nnterp on the nnsight that it runs on (0.7): a trace that pools and stops, `steer` in a generation."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import torch
from nnterp import StandardizedTransformer
from work import END, LAYER, Given, main, right, shares, word_tokenizer


class Nnterp:
    name, version, reads, own_batch = "nnterp", metadata.version("nnterp"), "mean", 32
    notes = (f"on nnsight {metadata.version('nnsight')}",)

    def __init__(self, given: Given):
        self.given = given
        self.model = StandardizedTransformer(
            given.model(), tokenizer=word_tokenizer(), device_map=None, check_renaming=True
        )

    @torch.no_grad()
    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        """Takes token ids padded on the right: strings it would pad on the left, with positions that are wrong."""
        out = np.empty((len(texts), len(layers), 768), np.float32)
        model = self.model
        for group in groups:
            batch = right([texts[i] for i in group], self.given.device)
            weights = shares(batch["attention_mask"])
            with model.trace(batch, use_cache=False) as tracer:
                means = [].save()
                for layer in layers:
                    means.append((model.layers_output[layer] * weights).sum(1))
                tracer.stop()
            out[group] = torch.stack(list(means), 1).cpu().numpy()
        return out

    @torch.no_grad()
    def _generate(self, added: torch.Tensor, prompts: list[list[int]], new: int) -> list[list[int]]:
        model: Any = self.model
        batch = right(prompts, self.given.device)
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": END}
        with model.generate(batch, **settings) as tracer:
            with tracer.all():  # a trace must stand alone in its `with`
                model.steer(LAYER, added)
            tokens = model.generator.output.save()
        return tokens[:, len(prompts[0]) :].tolist()

    def one_vector(self, prompts: list[list[int]], vector: np.ndarray, new: int) -> list[list[int]]:
        return self._generate(torch.as_tensor(vector), prompts, new)

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[list[int]]:
        """Coaxed: `steer` is handed [row, 1, d_model], of which its documents say nothing."""
        return self._generate(torch.as_tensor(vectors[:, None]), prompts, new)


if __name__ == "__main__":
    main(Nnterp)
