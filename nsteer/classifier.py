"""Turns texts into class probabilities with a transformers sequence classifier: the external judge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsteer.errors import ModelError


class Classifier:
    """A loaded classifier. Raises ModelError when it can not be loaded or has no named classes.

    classes : labels in the order of the probabilities
    """

    def __init__(self, source: str, revision: str | None = None, device: str = "auto", batch: int = 64):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from nsteer.executors.local import pick_device

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
            model = AutoModelForSequenceClassification.from_pretrained(source, revision=revision, dtype=torch.float32)
        except Exception as error:
            raise ModelError(f"the classifier {source!r} can not be loaded: {type(error).__name__}: {error}") from error
        self.device = torch.device(pick_device(device))
        self.model = model.to(self.device).eval()
        names = model.config.id2label
        self.classes: tuple[str, ...] = tuple(str(names[i]) for i in range(model.config.num_labels))
        self.batch = batch

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """P(class) of every text, [text, class]; NaN for an empty text, a hole."""
        import torch

        out = np.full((len(texts), len(self.classes)), np.nan, np.float32)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.batch):
            rows = order[start : start + self.batch]
            encoded = self.tokenizer([texts[i] for i in rows], return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                logits = self.model(**encoded.to(self.device)).logits
            out[rows] = logits.float().softmax(-1).cpu().numpy()
        return out
