"""Makes a tiny model with random weights of every decoder family that the installed transformers has.

The families are those of transformers' own table of causal language models. A config is made small by rules on the
names of its fields, in each of its parts (a checkpoint of several modalities has several); what a family needs besides
is in OWN.
"""

from __future__ import annotations

from typing import Any

VOCAB, DEPTH, WIDTH, INNER, HEADS, FEW = 320, 6, 32, 48, 4, 4

SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("emb_dim", "lru_width", "out_hidden_size", "projection_dim", "output_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "decoder_ffn_dim", "dff"), INNER),
    **dict.fromkeys(("encoder_ffn_dim", "d_ff", "feed_forward_size", "intermediate_size_mlp", "dim_ff"), INNER),
    **dict.fromkeys(("shared_intermediate_size", "ffn_hidden_size", "mlp_hidden_size"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), INNER // 3),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), DEPTH),
    **dict.fromkeys(("encoder_layers", "depth", "num_encoder_layers", "num_decoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), FEW),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "num_expert_group"), 1),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_state"), WIDTH // HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **{"linear_num_value_heads": 4, "qk_rope_head_dim": 4, "query_pre_attn_scalar": 8, "rotary_dim": 4},
    **{"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "sliding_window": 5, "vocab_size": VOCAB},
    **{"image_size": 28, "patch_size": 14},
    **dict.fromkeys(("attention_chunk_size", "local_attention", "keep_window_size", "block_size", "chunk_size"), 8),
    **dict.fromkeys(("window_size", "sliding_window_size"), 5),  # texts of the bench reach beyond all of these
    **{"index_n_heads": 16, "index_head_dim": WIDTH // HEADS, "index_topk": 4},  # with few heads scores tie at 0
    **{"index_block_size": 4, "index_topk_blocks": 2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What is made small, by the name of its field in a config; a field that a config has not is left out."""

HALF = ["linear_attention", "full_attention"] * (DEPTH // 2)
WINDOWS = ["sliding_attention", "full_attention"] * (DEPTH // 2)
CONVOLUTIONS = ["conv", "full_attention"] * (DEPTH // 2)
ENCODERS = (
    *("bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
    *("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "big_bird", "roc_bert"),
)
HALVES = ("minimax", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
WINDOWED = ("exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "vaultgemma", "cwm")
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
LOW_RANK = {"num_key_value_heads": HEADS, "first_k_dense_replace": 1}
OWN: dict[str, dict[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in ENCODERS},
    **{kind: {"layer_types": HALF} for kind in HALVES},
    **{kind: {"layer_types": WINDOWS} for kind in WINDOWED},
    **dict.fromkeys(("deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), LOW_RANK),
    **{kind: LOW_RANK | {"head_dim": 4} for kind in ("axk1", "deepseek_v3", "youtu")},
    "axk2": {"num_key_value_heads": HEADS},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": HEADS},
    "bamba": STATES | {"attn_layer_indices": [1, 3, 5]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "patch_size": 4},
    **{part: {"hidden_size_global": WIDTH} for part in ("blt_local_encoder", "blt_local_decoder")},
    "cohere": {"logit_scale": 0.25},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cohere2": {"logit_scale": 0.25, "layer_types": WINDOWS},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": FEW, "moe_top_k": 2, "hidden_size": WIDTH},
    },
    "falcon": {"alibi": False, "multi_query": True, "parallel_attn": True},
    "falcon_h1": {"lm_head_multiplier": 0.04},
    "gemma3n_text": {
        **{"layer_types": WINDOWS, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
        **{"hidden_size_per_layer_input": 8, "intermediate_size": [INNER] * DEPTH},
        "activation_sparsity_pattern": [0.0] * DEPTH,
    },
    "gemma4_text": {
        **{"layer_types": WINDOWS, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 8},
        "global_head_dim": 8,
    },
    "gemma4_unified_text": {"layer_types": WINDOWS, "global_head_dim": 8},
    "glm4_moe": {"first_k_dense_replace": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "gpt_neox_japanese": {"intermediate_multiple_size": 2},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    "granitemoehybrid": STATES | {"layer_types": ["mamba", "attention"] * (DEPTH // 2), "residual_multiplier": 0.5},
    "hyperclovax": {"logits_scaling": 0.25},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"use_mamba_kernels": False, "mamba_dt_rank": 4},
    },
    "jetmoe": {"kv_channels": 8},
    "kimi_linear": {"layer_types": HALF, "num_key_value_heads": HEADS},
    "lfm2": {"layer_types": CONVOLUTIONS, "block_ff_dim": INNER},
    "lfm2_moe": {"layer_types": CONVOLUTIONS, "num_dense_layers": 1},
    "longcat_flash": {"num_layers": DEPTH // 2, "num_key_value_heads": HEADS},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    },
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "qwen4_exp_text": {
        **{"layer_types": HALF, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 4},
    },
    "recurrent_gemma": {"attention_window_size": 16, "logits_soft_cap": 1.0},
    "reformer": {
        **{"is_decoder": True, "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "attention_head_size": 8},
        **{"attn_layers": ["local"] * DEPTH, "local_attn_chunk_length": 16},
    },
    "rwkv": {"attention_hidden_size": WIDTH},
    "xlm": {"causal": True},
    "xlstm": {
        **{"num_heads": 2, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "max_inference_chunksize": 16, "chunk_size": 16},
        **{"mode": "inference", "chunkwise_kernel": "chunkwise--native_autograd", "step_kernel": "native"},
        "sequence_kernel": "native_sequence__native",
    },
    "zamba": {
        **{"attn_layer_period": 3, "attn_layer_offset": 2, "n_mamba_heads": 2, "mamba_dt_rank": 4},
        **{"use_mamba_kernels": False, "attention_head_dim": 16, "num_key_value_heads": HEADS},
        "attention_hidden_size": 2 * WIDTH,
    },
    "zamba2": {
        **{"layers_block_type": ["mamba", "mamba", "hybrid"] * 2, "mamba_ngroups": 1, "n_mamba_heads": 8},
        **{"mamba_headdim": 8, "chunk_size": 8, "num_mem_blocks": 1, "attention_head_dim": 16},
        **{"num_key_value_heads": HEADS, "use_mem_rope": True},
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides, or what makes it the harder case that its checkpoints are."""


def names() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small(config: Any, own: dict[str, Any]) -> Any:
    """A tiny config of a class, its parts as well. `own` goes before SIZES."""
    default = config()
    aliases = getattr(config, "attribute_map", {})
    sizes = {
        field: value
        for field, value in SIZES.items()
        if field in default.to_dict() and aliases.get(field, field) == field
    }
    parts = [type(getattr(default, part, None)) for part in config.sub_configs]
    inside = {
        field: small(part, OWN.get(part.model_type, {})).to_dict()
        for field, part in zip(config.sub_configs, parts, strict=True)
        if part is not type(None)
    }
    return config(**sizes | inside | own)


def build(kind: str) -> Any:
    """A tiny model of a family; the same weights each time. Raises what transformers raises where sizes do not fit."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, kind)))
        model = AutoModelForCausalLM.from_config(small(CONFIG_MAPPING[kind], OWN.get(kind, {}))).float().eval()
        for name, value in model.named_parameters():
            wide = value.ndim > 1 and "A_log" not in name
            value.data += (0.2 if wide else 0.1) * torch.randn_like(value) * ("A_log" not in name)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def tokenizer() -> Any:
    """A tokenizer of VOCAB tokens: texts here are ids, but an executor asks for what pads and ends a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
