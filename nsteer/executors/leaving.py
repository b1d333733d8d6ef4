"""Rows that have ended leave their batch: transformers' greedy decoding loop, with fewer rows as it goes on.

A program's text knows which rows have left without being told: where it finds fewer rows than before, those whose end
of text it has seen are gone. So a row stays for the step in which its end of text is read, and the same text runs where
transformers' own `generate` keeps every row.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from nsteer.program.anatomy import entry
from nsteer.program.code import GREEDY

WORTH = 1 / 8
"""The share of a batch that must have ended before it is made smaller: that copies the KV cache of the others."""


def decode(
    model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any
) -> Any:
    """What `generate(custom_generate=...)` calls in place of its own loop: ids [row, position], padded after an end.

    Every row of the call is in what comes back, in its place. `inputs` go to the model, the KV cache among them.
    It is greedy: a program that samples forces what it drew.
    """
    if inputs.get("past_key_values") is None:
        raise ValueError("no past_key_values: the model keeps no KV cache")
    length = input_ids.shape[1]
    written = input_ids.new_full((len(input_ids), generation_config.max_length), generation_config.pad_token_id)
    written[:, :length] = input_ids
    rows = torch.arange(len(input_ids), device=input_ids.device)
    over = torch.zeros_like(rows, dtype=torch.bool)
    ended = 0  # how many of these rows have; their last token is read in the step that comes
    outputs = model(
        **model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs), return_dict=True
    )
    with model._optimize_model_for_decode():
        while True:
            inputs = model._update_model_kwargs_for_generation(outputs, inputs)
            scores = logits_processor(input_ids, outputs.logits[:, -1].to(torch.float32, copy=True))
            del outputs  # the prompt's may be large
            chosen = scores.argmax(-1).masked_fill(over, generation_config.pad_token_id)
            input_ids = torch.cat([input_ids, chosen[:, None]], 1)
            written[rows, length] = chosen
            length += 1
            read, over = over, over | stopping_criteria(input_ids, None)
            gone, ended = ended, int(over.sum())
            if ended == len(over):
                return written[:, :length]
            if gone >= max(1, WORTH * len(over)):
                stay = (~read).nonzero()[:, 0]
                inputs = {name: _of_rows(value, stay, len(read)) for name, value in inputs.items()}
                inputs["past_key_values"].batch_select_indices(stay)
                input_ids, rows, over, ended = input_ids[stay], rows[stay], over[stay], ended - gone
            step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
            outputs = model(**step, return_dict=True)


def _of_rows(value: Any, stay: Any, rows: int) -> Any:
    """A model's input for the rows that stay: masks and positions [row, position] are cut, the rest is as it was."""
    return value[stay] if isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) == rows else value


def objection(module: Any, pad: int) -> str:
    """Why rows of this model can not leave a batch; empty where they can.

    Shown on two dummy texts: the first ends at once, and the other must go on as it does where both stay.
    """
    ids = (torch.arange(6, device=entry(module)) % module.get_output_embeddings().weight.shape[0]).reshape(2, 3)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    given = {"input_ids": ids, "attention_mask": mask, **GREEDY, "max_new_tokens": 3}
    logits: list[list[torch.Tensor]] = []
    sizes: list[int] = []

    def ends(ids: Any, scores: Any) -> Any:
        return ids[:, 0] == 0

    def keep(ids: Any, scores: Any) -> Any:
        logits[-1].append(scores[-1].clone())
        sizes.append(len(scores))
        return scores

    try:
        for loop in (None, decode):
            logits.append([])
            module.generate(
                **given,
                eos_token_id=None,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([keep]),
                stopping_criteria=StoppingCriteriaList([ends]),
                custom_generate=loop,
            )
    except Exception as error:  # a cache, a signature: whatever a model has of its own
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]
    kept, fewer = (torch.stack(scores) for scores in logits)
    if sizes != [2, 2, 2, 2, 2, 1]:
        return "its rows stay"
    close = torch.allclose(kept, fewer, rtol=1e-2, atol=1e-2 * kept.abs().max().item())
    return "" if close else "the logits of a row change when another leaves"
