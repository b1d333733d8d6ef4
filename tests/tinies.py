"""Tiny random models of many architectures, and a tiny tokenizer.

Initialised wide: a random model of the usual initialisation repeats one token whatever is done to it, and would
pass a test of an edit that does nothing.
"""

from __future__ import annotations

from typing import Any

PAD, BOS_ID, END = 0, 1, 2
SPECIALS = ["<pad>", "<s>", "</s>", "<user>", "<model>"]
LESSON = (
    "the cat sat on the warm mat and the dog ran to the old house . rain fell on the garden wall while tom read a "
    "book by the fire . a happy girl sang in the sun and a sad boy wept at night . they were calm and then afraid ."
)

COMMON = dict(
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=128,
)
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", dict(n_embd=32, n_layer=4, n_head=4, n_positions=128), "transformer.h"),
    "gemma": (
        "gemma2",
        COMMON
        | dict(
            num_hidden_layers=5,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            final_logit_softcapping=1.5,
            attn_logit_softcapping=2.0,
        ),
        "model.layers",
    ),
    "qwen": ("qwen3", COMMON | dict(num_hidden_layers=5, head_dim=12), "model.layers"),
    "llama": ("llama", COMMON, "model.layers"),
    "mistral": ("mistral", COMMON | dict(hidden_size=40, sliding_window=5), "model.layers"),
}
"""name -> (model type, config, where its blocks are). Sliding windows shorter than the tests' texts, on purpose."""

TUPLES: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("bloom", dict(hidden_size=32, n_layer=4, n_head=4), "transformer.h"),
    "gptj": ("gptj", dict(n_embd=32, n_layer=4, n_head=4, n_positions=128, rotary_dim=4), "transformer.h"),
}
"""Families whose blocks still return tuples."""

OTHERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt_neox": (
        "gpt_neox",
        dict(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=128,
        ),
        "gpt_neox.layers",
    ),
    "opt": (
        "opt",
        dict(
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=128,
        ),
        "model.decoder.layers",
    ),
    "phi3": ("phi3", COMMON, "model.layers"),
    "cohere": ("cohere", COMMON | dict(logit_scale=0.25), "model.layers"),
    "granite": (
        "granite",
        COMMON | dict(logits_scaling=4.0, residual_multiplier=0.5, embedding_multiplier=2.0),
        "model.layers",
    ),
    "gemma3": ("gemma3_text", COMMON | dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=6), "model.layers"),
    "olmo2": ("olmo2", COMMON, "model.layers"),
    "stablelm": ("stablelm", COMMON, "model.layers"),
    "qwen2": ("qwen2", COMMON, "model.layers"),
}

ALL = FAMILIES | TUPLES | OTHERS
NORMED = ("post_attention_layernorm", "post_feedforward_layernorm")
INSIDE = dict.fromkeys(ALL, ("self_attn", "mlp")) | {"gpt2": ("attn", "mlp"), "gptj": ("attn", "mlp")}
INSIDE |= {"gpt_neox": ("attention", "mlp"), **dict.fromkeys(("gemma", "gemma3", "olmo2"), NORMED)}
INSIDE |= {"bloom": ("self_attention.dense", "mlp.dense_4h_to_h")}
"""name -> the modules of a block that add to the stream, as its code reads: attention and MLP."""
FACTORS = {"granite": 0.5}
"""What a block multiplies by what it adds to the stream, where that is not 1."""
UNSITED = ("opt",)
"""Families whose sublayers are not read: OPT flattens the stream."""
BOS = dict.fromkeys(ALL, False) | {"gemma": True, "llama": True, "mistral": True}
VOCAB = 320


def tokenizer(bos: bool = False, chat: bool = False):
    """A byte-level BPE tokenizer of VOCAB tokens, its BOS added where `bos`; any text can be encoded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([LESSON] * 4, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = (
            "{{ '<s>' }}{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}<model>{% endif %}"
        )
    return fast


def config(name: str, **changes: Any):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind, settings, _ = ALL[name]
    ids = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS_ID, eos_token_id=END)
    return CONFIG_MAPPING[kind](**ids | dict(initializer_range=0.2) | settings | changes)


def model(name: str, seed: int = 0, **changes: Any):
    """The model of a family with random weights: the same name and seed give the same."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed + sum(map(ord, name)))
        module = AutoModelForCausalLM.from_config(config(name, **changes)).float().eval()
        for key, value in module.named_parameters():
            if key.endswith("bias") or "norm" in key or "ln" in key:  # trained ones are not 0 and 1 either
                value.data += 0.1 * torch.randn_like(value)
    return module


def blocks(name: str, module: Any) -> list:
    """The decoder blocks of a family's model, by the table above (not by nsteer's search)."""
    return list(module.get_submodule(ALL[name][2]))
