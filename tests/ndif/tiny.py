"""Turns architectures into tiny models of random weights on disk: the five families, and one of tuple outputs.

Wide weights (`std`) on purpose: a random model of the usual initialisation repeats one token whatever is done
to it, and would pass a test of steering that does nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WORDS = ["The tower is in the city of Paris .", "hello world , this is a tiny test .", "steering adds to the stream ."]
SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
KEYS = {"num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256, "initializer_range": 0.2}
FAMILIES = {
    "gpt2": {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 256, "initializer_range": 0.2},
    "bloom": {"hidden_size": 48, "n_layer": 4, "n_head": 4, "initializer_range": 0.2},  # blocks that return tuples
    "gemma2": SIZES | KEYS | {"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 12},
    "qwen2": SIZES | KEYS,
    "llama": SIZES | KEYS,
    "mistral": SIZES | KEYS,
}


def tokenizer() -> PreTrainedTokenizerFast:
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner = Tokenizer(models.BPE(unk_token=None))
    inner.pre_tokenizer, inner.decoder = byte, decoders.ByteLevel()
    inner.train_from_iterator(
        WORDS * 20,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    end = "<|end|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, pad_token=end, model_max_length=256
    )


def make(folder: Path, seed: int = 0, families: Iterable[str] = FAMILIES) -> dict[str, Path]:
    """The families' folders, made where they are absent."""
    folders = {name: folder / name for name in families}
    words = tokenizer()
    for name in folders:
        if not (folders[name] / "config.json").exists():
            set_seed(seed)
            config = CONFIG_MAPPING[name](
                vocab_size=len(words), bos_token_id=0, eos_token_id=0, pad_token_id=0, **FAMILIES[name]
            )
            AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(folders[name])
            words.save_pretrained(folders[name])
    return folders


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
