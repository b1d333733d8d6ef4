"""Shows on two dummy texts which rows may share a batch: those that give in it what they give alone.

Attention masks padding out; state-space layers, convolutions and positions counted from token ids may let it in. A
library version or a model's own code decides, so it is measured when a model is loaded, not listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from nsteer.program.anatomy import Anatomy, entry
from nsteer.program.code import GREEDY
from nsteer.program.form import READ_PAD, Batching

LENGTHS = (7, 4)
"""Tokens of the two texts: the second is padded by fewer tokens than a convolution of Mamba's looks back."""

ROUNDING = {torch.bfloat16: 0.06, torch.float16: 0.01}
"""Relative change of a stream, by the model's dtype, up to which it is rounding; 0.001 in float32."""

COUPLED = 0.3
"""Relative change of a stream by another row of equal length, from which rows are held to change each other."""


def prove(module: Any, anatomy: Anatomy, pad: int) -> tuple[Anatomy, Batching]:
    """How rows of this model may be batched, and its anatomy, without position ids where ours are not the model's.

    A text's stream, read and while generating, must be the same in a padded batch as alone; where it is not, in a batch
    of texts of equal length; where it is not there either, rows stay alone.
    """
    texts = _texts(anatomy.vocab, pad)
    short = texts[1]  # READ_PAD is in neither
    tolerance = ROUNDING.get(module.dtype, 0.001) * (4 if getattr(module, "is_quantized", False) else 1)
    with _listening(module, anatomy) as seen:
        alone = _capture(module, seen, replace(anatomy, takes_positions=False), [short])
        if anatomy.takes_positions and _apart(_capture(module, seen, anatomy, [short]), alone) > tolerance:
            anatomy = replace(anatomy, takes_positions=False)  # they count otherwise than from 0 (RoBERTa)
        try:
            written, widths = _generation(module, seen, anatomy, [short], pad)
            stepless = _other_widths(widths, len(short))
        except Exception as error:  # a signature, a missing method: whatever a model has of its own
            stepless = f"it does not generate ({type(error).__name__}: {error})".splitlines()[0][:200]
        steps = not stepless

        def changed(rows: Sequence[list[int]]) -> float:
            """By how much the last of these rows differs from the same row alone."""
            difference = _apart(_capture(module, seen, anatomy, rows), alone)
            if not steps:
                return difference
            return max(difference, _apart(_generation(module, seen, anatomy, rows, pad)[0], written))

        padded = changed(texts)
        if padded <= tolerance:
            return anatomy, Batching(stepless=stepless)
        equal = changed([texts[0][: len(short)], short])
    if equal >= COUPLED:
        return anatomy, Batching("none", f"a text's streams {_changed(equal)} with another beside it", stepless)
    if padded <= 4 * equal:  # as much as without padding: rounding, or experts that change at a near tie
        return anatomy, Batching(stepless=stepless)
    return anatomy, Batching("equal", f"a text's streams {_changed(padded)} with padding before it", stepless)


def _texts(vocab: int, pad: int) -> list[list[int]]:
    """Two texts of unlike tokens from the middle of the vocabulary, where no special ones are; the longer first."""
    ids = [
        token for token in ((vocab // 2 + i) % vocab for i in range(sum(LENGTHS) + 2)) if token not in (pad, READ_PAD)
    ]
    return [ids[: LENGTHS[0]], ids[LENGTHS[0] : sum(LENGTHS)]]


def _changed(by: float) -> str:
    return f"change by {by:.0%} of their length" if by < float("inf") else "are no numbers, or of another shape,"


def _other_widths(widths: Sequence[int], prompt: int) -> str:
    if list(widths) == [prompt, 1]:
        return ""
    return f"its steps read {', '.join(map(str, widths))} positions of a text of {prompt}: it keeps no KV cache"


@contextmanager
def _listening(module: Any, anatomy: Anatomy) -> Any:
    """A list that gets the stream after each block, [row, position, d_model], as they run."""
    seen: list[torch.Tensor] = []

    def keep(block: Any, given: Any, output: Any) -> None:
        stream = output[0] if anatomy.tuple_output else output
        seen.append(stream.detach().float().cpu().clone())

    hooks = [block.register_forward_hook(keep) for block in module.get_submodule(anatomy.blocks)]
    try:
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _inputs(module: Any, anatomy: Anatomy, rows: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """What programs give the model: padded on the left, positions counted from each row's first token.

    To a padded batch without position ids nnsight adds these, whatever the model would count itself.
    """
    width = max(map(len, rows))
    device = entry(module)
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    inputs = {"input_ids": ids, "attention_mask": mask}
    added = bool((mask == 0).any()) and "position_ids" in inspect.signature(module.forward).parameters
    return inputs | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if anatomy.takes_positions or added else {})


def _capture(module: Any, seen: list, anatomy: Anatomy, rows: Sequence[list[int]]) -> list[torch.Tensor]:
    """The last row's stream after each block, its own positions alone."""
    seen.clear()
    module(**_inputs(module, anatomy, rows, READ_PAD), use_cache=False)
    return [stream[-1, -len(rows[-1]) :] for stream in seen]


def _generation(
    module: Any, seen: list, anatomy: Anatomy, rows: Sequence[list[int]], pad: int
) -> tuple[list[torch.Tensor], list[int]]:
    """`_capture` of a text and of the step after it, and how many positions the passes had; the token is given."""
    token = rows[-1][0]

    def force(ids: Any, scores: Any) -> Any:
        return torch.full_like(scores, -1.0).index_fill(1, torch.tensor([token], device=scores.device), 1.0)

    seen.clear()
    ends = {"eos_token_id": None, "pad_token_id": pad, "max_new_tokens": 2}
    module.generate(
        **_inputs(module, anatomy, rows, pad), **GREEDY, **ends, logits_processor=LogitsProcessorList([force])
    )
    widths = [stream.shape[1] for stream in seen[:: anatomy.n_layers]]
    return [stream[-1, -len(rows[-1]) :] for stream in seen], widths


def _apart(streams: Sequence[torch.Tensor], alone: Sequence[torch.Tensor]) -> float:
    """The largest change of a stream at any position, relative to its length; what is not finite alone is left out."""
    if [stream.shape for stream in streams] != [stream.shape for stream in alone]:
        return float("inf")
    worst = 0.0
    for stream, true in zip(streams, alone, strict=True):
        length = true.norm(dim=-1).clamp(min=1e-12)
        change = ((stream - true).norm(dim=-1) / length)[torch.isfinite(length)].nan_to_num(float("inf"))
        worst = max([worst, *change.tolist()])
    return worst
