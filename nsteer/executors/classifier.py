"""Turns texts into class scores with a transformers sequence classifier: the external judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nsteer.errors import ExecutionError, ModelError, OutOfMemoryError, in_a_line
from nsteer.models import facts as models
from nsteer.system import machine

HEADS: dict[str, Callable[[Any], Any]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "regression": lambda logits: logits,
}
"""The head of a classifier, as `models.head` names it -> scores of logits [text, class]."""


class Classifier:
    """A loaded classifier. Raises ModelError when it can not be loaded or has no named classes.

    classes : labels in the order of the scores
    head : the function that makes scores of logits, a key of HEADS
    """

    def __init__(
        self,
        name_or_path: str,
        revision: str | None = None,
        device: str = "auto",
        batch: int = 64,
        say: Callable[[str], None] = lambda text: None,
    ):
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from nsteer.executors.local import pick_device
        from nsteer.models import loading

        try:
            with loading.quiet():
                self.tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=False)
                model, told = AutoModelForSequenceClassification.from_pretrained(
                    name_or_path,
                    revision=revision,
                    dtype=torch.float32,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
        except Exception as error:
            raise ModelError(f"the classifier {name_or_path!r} can not be loaded: {in_a_line(error)}") from error
        loading.has_all_weights(name_or_path, told)
        self.device = torch.device(pick_device(device))
        self.model = model.to(self.device).eval()
        names = model.config.id2label
        self.head = models.head(model.config.to_dict(), model.config.num_labels)
        self.classes: tuple[str, ...] = tuple(str(names[i]) for i in range(model.config.num_labels))
        self.batch, self.say = batch, say

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The scores of every text, [text, class]; NaN for an empty text, a missing value.

        By the head's own function, as a text-classification pipeline of transformers gives them: `softmax` over the
        classes; `sigmoid` of each, where a text may have several or there is one class; raw ones of a `regression`.

        Batches that do not fit in memory are halved, and stay so. Raises OutOfMemoryError for a single text that does
        not fit, ExecutionError for what else fails.
        """
        out = np.full((len(texts), len(self.classes)), np.nan, np.float32)
        order = sorted((i for i, text in enumerate(texts) if text.strip()), key=lambda i: -len(texts[i]))
        while order:
            rows = order[: self.batch]
            scores = self._batch([texts[i] for i in rows])
            if scores is None:  # here, where no traceback holds what did not fit
                self._halve(len(rows))
                continue
            out[rows] = scores
            order = order[len(rows) :]
        return out

    def _batch(self, texts: Sequence[str]) -> np.ndarray | None:
        """The scores of one batch; None when it does not fit in memory."""
        import torch

        try:
            encoded = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
            with torch.no_grad():
                logits = self.model(**encoded.to(self.device)).logits
            return HEADS[self.head](logits.float()).cpu().numpy()
        except Exception as error:
            if machine.out_of_memory(error):
                return None
            raise ExecutionError(f"the judge failed: {type(error).__name__}: {error}") from error

    def _halve(self, rows: int) -> None:
        from nsteer.executors.common import free

        free(self.device)
        if rows == 1:
            raise OutOfMemoryError(
                "the judge ran out of memory with one text: judge on a larger device, or `device: cpu`"
            )
        self.batch = -(-rows // 2)
        self.say(f"the judge is out of memory with {rows} texts: halved to {self.batch}")
