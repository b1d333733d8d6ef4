"""Models and texts that the benchmarks work on: real sizes, random weights (speed does not depend on them)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

TEXTS, SHORTEST, LONGEST = 256, 16, 96
END = 0
SMOLLM2 = "models/SmolLM2-135M-Instruct.Q4_1.gguf"


def model(name: str, device: str) -> Any:
    """`gpt2`: GPT-2 124M. `wide`: Llama-shaped, 12 blocks of 768, a vocabulary of 131,072 (a costly lm_head).

    `smollm2`: SmolLM2-135M-Instruct with its own weights, which `scripts/get-smollm2` fetches.
    """
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    torch.manual_seed(0)
    if name == "smollm2":
        from nsteer.models import facts
        from nsteer.plan.schema import Model

        known = facts.facts(Model(id=SMOLLM2))
        with facts.unchanged(known, print):  # converted from its file the first time
            return AutoModelForCausalLM.from_pretrained(known.name_or_path, dtype=torch.float32).to(device).eval()
    if name == "gpt2":
        config: Any = GPT2Config(bos_token_id=END, eos_token_id=END)
    else:
        config = LlamaConfig(
            vocab_size=131072,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            bos_token_id=END,
            eos_token_id=END,
            tie_word_embeddings=True,
        )
    return AutoModelForCausalLM.from_config(config).to(device).eval()


class Ends:
    """As much of a tokenizer as an executor needs: which token ends a text, and which one pads."""

    eos_token_id = pad_token_id = END
    bos_token_id = None
    eos_token, pad_token = "<end>", "<end>"
    padding_side = "left"
    chat_template = None
    name_or_path = "bench"


def texts(count: int = TEXTS, shortest: int = SHORTEST, longest: int = LONGEST, vocab: int = 49000) -> list[list[int]]:
    """Token ids of texts of every length between two, in no order. The end token is in none."""
    draw = random.Random(0)
    return [[draw.randrange(1, vocab) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def padded(batch: Sequence[Sequence[int]], device: str) -> dict[str, Any]:
    """A batch as plain HF takes it, padded on the left."""
    import torch

    width = max(map(len, batch))
    ids = torch.full((len(batch), width), END)
    mask = torch.zeros(len(batch), width, dtype=torch.long)
    for row, tokens in enumerate(batch):
        ids[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    places = (mask.cumsum(1) - 1).clamp(min=0)
    tensors = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    return {name: value.to(device) for name, value in tensors.items()}
