"""Tiny GGUF files: a tiny random llama with its tokenizer, written as llama.cpp's converter writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tinies

MAPPED = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _name(ours: str) -> str:
    if ours in MAPPED:
        return MAPPED[ours]
    _, _, block, rest = ours.split(".", 3)
    return f"blk.{block}.{IN_BLOCK[rest.removesuffix('.weight')]}.weight"


def _swapped(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection in llama.cpp's order: pairs beside each other, not halves."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    path: Path, *, quantised: bool = False, values: Any = (), without: str = "", tokens: int = tinies.VOCAB
) -> Any:
    """The file of `tinies.model("llama")`, and that model.

    quantised : whether what can be is kept as Q8_0
    values : settings (name, type, value) that come besides, or in place of others
    without : the name of a tensor that is left out
    tokens : of the vocabulary
    """
    import gguf

    model = tinies.model("llama")
    own, config = tinies.tokenizer(), model.config
    writer = gguf.GGUFWriter(path, "llama")
    changed = dict(values)
    writer.add_name("tiny")
    writer.add_uint32("llama.block_count", config.num_hidden_layers)
    writer.add_uint32("llama.context_length", config.max_position_embeddings)
    writer.add_uint32("llama.embedding_length", config.hidden_size)
    writer.add_uint32("llama.feed_forward_length", config.intermediate_size)
    writer.add_uint32("llama.attention.head_count", config.num_attention_heads)
    writer.add_uint32("llama.attention.head_count_kv", config.num_key_value_heads)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_uint32("llama.rope.dimension_count", config.head_dim)
    writer.add_float32("llama.rope.freq_base", config.rope_parameters["rope_theta"])
    writer.add_uint32("llama.vocab_size", config.vocab_size)
    core = own.backend_tokenizer
    words = sorted(core.get_vocab(), key=core.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list((words + [f"<more{i}>" for i in range(tokens)])[:tokens])
    writer.add_token_types([3 if i < len(tinies.SPECIALS) else 1 for i in range(tokens)])
    merges = json.loads(core.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tinies.BOS_ID)
    writer.add_eos_token_id(tinies.END)
    writer.add_pad_token_id(tinies.PAD)
    writer.add_chat_template(tinies.tokenizer(chat=True).chat_template)
    for name, value in changed.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    for ours, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        array = tensor.numpy()
        for part, count in heads.items():
            array = _swapped(array, count) if part in ours else array
        if _name(ours) == without:
            continue
        if quantised and array.ndim == 2 and array.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(_name(ours), gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(_name(ours), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
