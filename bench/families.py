"""Which decoder families of the installed transformers are read and steered exactly: tiny random models, plain hooks.

Each family is built tiny, with random weights, and put through programs in batches of texts of unequal length. The
truth beside it is made with nothing of nsteer: forward hooks of torch on one text at a time, without padding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

VOCAB, NEW, DEPTH, LAYERS = 320, 6, 6, (5, 2)
TEXTS = ((11, 12, 13, 14), (20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), (40, 41))
STRENGTH = 4.0  # times a unit vector: enough that texts change, and no more than that

WIDTH, INNER, HEADS, FEW = 32, 48, 4, 4
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "decoder_ffn_dim", "dff"), INNER),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), INNER // 3),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), FEW),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "n_group", "topk_group", "mamba_n_groups"), 1),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_topk", "linear_num_key_heads"), 2),
    **dict.fromkeys(("head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_nope_head_dim"), WIDTH // HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_d_state"), WIDTH // HEADS),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **{"linear_num_value_heads": 4, "qk_rope_head_dim": 4, "query_pre_attn_scalar": 8, "rotary_dim": 4},
    **{"mamba_n_heads": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8, "sliding_window": 5, "vocab_size": VOCAB},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
"""What is made small, by the name of its field in a family's config; a field that a family has not is left out."""

HALF = ["linear_attention", "full_attention"] * (DEPTH // 2)
WINDOWS = ["sliding_attention", "full_attention"] * (DEPTH // 2)
DECODERS = (
    *(
        "bert",
        "bert-generation",
        "camembert",
        "data2vec-text",
        "electra",
        "ernie",
        "megatron-bert",
        "rembert",
        "roberta",
    ),
    *("roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod", "big_bird"),
)
STATES = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 8}
LOW_RANK = {"num_key_value_heads": HEADS, "first_k_dense_replace": 1}
OWN: dict[str, dict[str, Any]] = {
    **{name: {"is_decoder": True} for name in DECODERS},
    **{
        name: {"layer_types": HALF}
        for name in ("minimax", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
    },
    **{
        name: {"layer_types": WINDOWS}
        for name in ("exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "vaultgemma")
    },
    **dict.fromkeys(("deepseek_v2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "minicpm3"), LOW_RANK),
    **{name: LOW_RANK | {"head_dim": 4} for name in ("axk1", "deepseek_v3", "youtu")},
    "bamba": STATES | {"attn_layer_indices": [1, 3, 5]},
    "cohere": {"logit_scale": 0.25},
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
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    "granitemoehybrid": STATES | {"layer_types": ["mamba", "attention"] * (DEPTH // 2), "residual_multiplier": 0.5},
    "hyperclovax": {"logits_scaling": 0.25},
    "jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
        **{"use_mamba_kernels": False, "mamba_dt_rank": 4},
    },
    "jetmoe": {"kv_channels": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2), "block_ff_dim": INNER},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2), "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "mpt": {"expansion_ratio": 2},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
        **{"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8},
    },
    "opt": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "recurrent_gemma": {"lru_width": WIDTH, "attention_window_size": 16, "logits_soft_cap": 1.0},
    "rwkv": {"attention_hidden_size": WIDTH},
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
}
"""What a family needs besides."""


def names() -> list[str]:
    """Every model type that transformers has a causal language model for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def build(kind: str) -> Any:
    """A tiny model of a family; the same weights each time. Raises what transformers raises where sizes do not fit."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]
    known = config().to_dict()
    aliases = getattr(config, "attribute_map", {})
    sizes = {name: value for name, value in SIZES.items() if name in known and aliases.get(name, name) == name}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(map(ord, kind)))
        model = AutoModelForCausalLM.from_config(config(**sizes | OWN.get(kind, {}))).float().eval()
        for name, value in model.named_parameters():
            wide = value.ndim > 1 and "A_log" not in name
            value.data += (0.2 if wide else 0.1) * torch.randn_like(value) * ("A_log" not in name)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


@contextmanager
def hooked(model: Any, path: str, layers: Any, act: Any) -> Iterator[None]:
    """Has `act(layer, stream)` see what blocks give; what it returns takes its place."""

    def hook(layer: int) -> Any:
        def after(module: Any, given: Any, out: Any) -> Any:
            if not isinstance(out, (tuple, list)):
                return act(layer, out)
            return (act(layer, out[0]), *out[1:])

        return after

    handles = [model.get_submodule(f"{path}.{layer}").register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batched(executor: Any, form: Any, rows: list[Any]) -> list[Any]:
    """The programs of these rows, in batches as this model bears them."""
    from nsteer.program.form import programs

    return list(programs(form, rows, budget=10_000, most=len(rows), overhead=10_000, mates=executor.batching.mates))


def capture_is_exact(executor: Any, layers: tuple[int, ...]) -> float:
    """The largest relative difference of a captured stream from the one that a hook sees, over texts and layers."""
    import torch

    from nsteer.program.form import Form, ReadSite, Row

    form = Form(reads=tuple(ReadSite(layer, what="tokens") for layer in sorted(layers)))
    found: dict[Any, Any] = {}
    for program in batched(executor, form, [Row(i, text) for i, text in enumerate(TEXTS)]):
        found |= dict(zip(program.keys, executor.run(program).streams, strict=True))
    worst = 0.0
    for text, streams in ((text, found[i]) for i, text in enumerate(TEXTS)):
        seen: dict[int, Any] = {}
        keep = seen.setdefault
        with torch.no_grad(), hooked(executor.module, executor.anatomy.blocks, layers, keep):
            executor.module(input_ids=torch.tensor([text]), use_cache=False)
        for place, layer in enumerate(sorted(layers)):
            truth = seen[layer][0].numpy()
            worst = max(worst, float(np.abs(streams[place] - truth).max() / np.abs(truth).max()))
    return worst


def steering_is_exact(executor: Any, layers: tuple[int, ...]) -> tuple[int, int, int]:
    """(equal, of, moved): steered greedy texts equal to those of hooks, and those that steering changed at all."""
    import torch

    from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit

    width = executor.anatomy.d_model
    vectors = np.random.default_rng(7).standard_normal((len(TEXTS), width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    form = Form(edits=tuple(EditSite(at, "add") for at in sorted(layers)), decoding=Decoding(NEW, (), 0))
    rows = [
        Row(i, text, edits=(RowEdit(v, STRENGTH, np.ones(len(text), bool), True, np.ones(len(text))),) * len(layers))
        for i, (text, v) in enumerate(zip(TEXTS, vectors, strict=True))
    ]
    found: dict[Any, Any] = {}
    for program in batched(executor, form, rows):
        found |= dict(zip(program.keys, executor.run(program).tokens, strict=True))

    def written(text: tuple[int, ...], vector: Any) -> tuple[int, ...]:
        ids = torch.tensor([text])
        given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
        pushed = hooked(executor.module, executor.anatomy.blocks, layers, lambda at, h: h + STRENGTH * vector)
        with torch.no_grad(), pushed:
            return tuple(executor.module.generate(ids, **given)[0, len(text) :].tolist())

    truth = [written(text, torch.tensor(v)) for text, v in zip(TEXTS, vectors, strict=True)]
    plain = [written(text, torch.zeros(width)) for text in TEXTS]
    equal = sum(found[i] == one for i, one in enumerate(truth))
    return equal, len(TEXTS), sum(a != b for a, b in zip(truth, plain, strict=True))


def look(kind: str, tokenizer: Any) -> dict[str, Any]:
    """One family's row: how far capture is off, steered texts equal, sites; or what it was refused with."""
    from nsteer.errors import NsteerError
    from nsteer.executors.local import Local

    row: dict[str, Any] = {"family": kind}
    try:
        model = build(kind)
        row["class"] = type(model).__name__
    except Exception as error:  # sizes that do not fit are this table's fault, not nsteer's
        return row | {"not_built": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    try:
        executor = Local(model, tokenizer=tokenizer, device="cpu", threads=1)
        found = executor.anatomy
        layers = LAYERS if found.n_layers == DEPTH else (found.n_layers - 1, 0)
        sites = f"{found.attention.path}, {found.mlp.path}" if found.attention and found.mlp else ""
        row |= {"sites": sites, "scaling": "returned" if found.returned else found.scaling}
        row |= {"batches": executor.batching.mates, "stays": executor.stays}
        row["capture"] = capture_is_exact(executor, layers)
        row["equal"], row["of"], row["moved"] = steering_is_exact(executor, layers)
    except NsteerError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["broken"] = f"{type(error).__name__}: {error}"
    return row


def tokenizer() -> Any:
    """A tokenizer of VOCAB tokens: texts here are ids, but an executor asks for what pads and ends a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    core = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _child(kind: str, send: Any) -> None:
    import logging

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    send.send(look(kind, tokenizer()))


def apart(kind: str, seconds: float) -> dict[str, Any]:
    """`look` in a process of its own, ended after so many seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, send))
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else {"family": kind, "not_built": "takes too long"}
    except EOFError:
        return {"family": kind, "broken": "its process died"}
    finally:
        process.kill()
        process.join()


HEAD = "| family | capture off by | steered texts equal | `attn_out`, `mlp_out` | logits | |\n|---|---|---|---|---|---|"


def line(row: dict[str, Any]) -> str:
    """A family's row of the Markdown table."""
    said = next((f"{word}: {row[word]}" for word in ("refused", "broken", "not_built") if word in row), "")
    off = f"{row['capture']:.0e}" if "capture" in row else ""
    equal = f"{row['equal']} of {row['of']} ({row['moved']} changed)" if "equal" in row else ""
    scaling = row.get("scaling")
    made = scaling if isinstance(scaling, str) else f"{scaling[0]} {scaling[1]:g}" if scaling else ""
    return f"| {row['family']} | {off} | {equal} | {row.get('sites', '')} | {made} | {said.replace('|', '/')} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, as in transformers' configs; all where none is named")
    parser.add_argument("--seconds", type=float, default=120.0, help="for one family")
    parser.add_argument("-o", "--output", help="also write the rows, as JSON")
    args = parser.parse_args()
    import transformers  # noqa: F401  before the forks, so that it is loaded once

    rows = []
    print(HEAD)
    for kind in args.families or names():
        rows.append(apart(kind, args.seconds))
        print(line(rows[-1]), flush=True)
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
