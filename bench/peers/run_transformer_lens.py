"""TransformerLens: `run_with_cache` reads, a hook of `TransformerBridge` adds. It needs eager attention, as it says.

Its `stop_at_layer` ends a forward before a block: that helps at half depth. After the last block it has no place to
stop, so reading all layers runs the whole forward.
"""

from __future__ import annotations

import tempfile
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge
from work import LAYER, Given, main, right, shares, word_tokenizer


class TransformerLens:
    name, version, reads, own_batch = "transformer_lens", metadata.version("transformer-lens"), "mean", 32
    notes = ("gives every token; the mean is taken by hand", "eager attention", "b: by stop_at_layer")

    def __init__(self, given: Given):
        self.given = given
        with tempfile.TemporaryDirectory() as folder:
            given.model().save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            self.model = TransformerBridge.boot_transformers(folder, device=given.device)

    @torch.no_grad()
    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        out = np.empty((len(texts), len(layers), 768), np.float32)
        names = [f"blocks.{layer}.hook_out" for layer in layers]
        stop = layers[-1] + 1 if layers[-1] + 1 < len(self.model.blocks) else None
        for group in groups:
            batch = right([texts[i] for i in group], self.given.device)
            weights, mask = shares(batch["attention_mask"]), batch["attention_mask"]
            _, cache = self.model.run_with_cache(
                batch["input_ids"], attention_mask=mask, names_filter=names, stop_at_layer=stop
            )
            out[group] = torch.stack([(cache[name] * weights).sum(1) for name in names], 1).cpu().numpy()
        return out

    @torch.no_grad()
    def _generate(self, added: torch.Tensor, prompts: list[list[int]], new: int) -> list[list[int]]:
        def add(stream: torch.Tensor, hook: Any) -> torch.Tensor:
            return stream + added

        settings = {"do_sample": False, "stop_at_eos": False, "prepend_bos": False, "verbose": False}
        ids = right(prompts, self.given.device)["input_ids"]
        with self.model.hooks(fwd_hooks=[(f"blocks.{LAYER}.hook_out", add)]):
            tokens: Any = self.model.generate(ids, max_new_tokens=new, return_type="tokens", **settings)
        return tokens[:, len(prompts[0]) :].tolist()

    def one_vector(self, prompts: list[list[int]], vector: np.ndarray, new: int) -> list[list[int]]:
        return self._generate(torch.as_tensor(vector).to(self.given.device), prompts, new)

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[list[int]]:
        """Coaxed: the hook adds [row, 1, d_model]."""
        return self._generate(torch.as_tensor(vectors[:, None]).to(self.given.device), prompts, new)


if __name__ == "__main__":
    main(TransformerLens)
