"""pyvene: `CollectIntervention` reads every token, `AdditionIntervention` adds. It runs the whole forward."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import numpy as np
import pyvene
import torch
from work import END, LAYER, Given, main, right, shares


class AddRows(pyvene.ConstantSourceIntervention):
    """Coaxed: an intervention of the user's own, whose source is [row, 1, d_model]; its own ones take [d_model]."""

    def forward(self, base: torch.Tensor, source: Any = None, subspaces: Any = None, **_: Any) -> torch.Tensor:
        return base + self.source_representation


def at(layer: int, intervention: Any) -> dict[str, Any]:
    return {"layer": layer, "component": "block_output", "intervention": intervention}


class Pyvene:
    name, version, reads, own_batch = "pyvene", metadata.version("pyvene"), "mean", 32
    notes = ("gives every token; the mean is taken by hand",)

    def __init__(self, given: Given):
        self.given, self.model = given, given.model()
        self.collecting: dict[tuple[int, ...], Any] = {}

    def _collect(self, layers: list[int]) -> Any:
        key = tuple(layers)
        if key not in self.collecting:
            config = [at(i, pyvene.CollectIntervention(embed_dim=768, keep_last_dim=True)) for i in layers]
            self.collecting[key] = pyvene.IntervenableModel(config, model=self.model)
        return self.collecting[key]

    def capture(self, texts: list[list[int]], groups: list[list[int]], layers: list[int]) -> np.ndarray:
        out = np.empty((len(texts), len(layers), 768), np.float32)
        model = self._collect(layers)
        for group in groups:
            batch = right([texts[i] for i in group], self.given.device)
            weights = shares(batch["attention_mask"])
            with torch.no_grad():
                (_, streams), _ = model(batch, use_cache=False)
            out[group] = torch.stack([(stream * weights).sum(1) for stream in streams], 1).cpu().numpy()
        return out

    def _generate(self, kind: Any, source: torch.Tensor, prompts: list[list[int]], new: int) -> list[list[int]]:
        intervention = kind(embed_dim=768, keep_last_dim=True, source_representation=source)
        model = pyvene.IntervenableModel(at(LAYER, intervention), model=self.model)
        batch = right(prompts, self.given.device)
        # with no locations and this switch it edits every position of the prompt and every new one
        settings = {"max_new_tokens": new, "do_sample": False, "pad_token_id": END}
        with torch.no_grad():
            _, tokens = model.generate(batch, unit_locations=None, intervene_on_prompt=True, **settings)
        return tokens[:, len(prompts[0]) :].tolist()

    def one_vector(self, prompts: list[list[int]], vector: np.ndarray, new: int) -> list[list[int]]:
        return self._generate(pyvene.AdditionIntervention, torch.as_tensor(vector).to(self.given.device), prompts, new)

    def row_vectors(self, prompts: list[list[int]], vectors: np.ndarray, new: int) -> list[list[int]]:
        return self._generate(AddRows, torch.as_tensor(vectors[:, None]).to(self.given.device), prompts, new)


if __name__ == "__main__":
    main(Pyvene)
