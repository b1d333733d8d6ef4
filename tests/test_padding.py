"""Padding: how much there is in the programs of a real plan, and models that let it in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tinies
import torch
from kit import padding_share
from test_oracle import texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import nsteer
from nsteer import runner
from nsteer.errors import AnatomyError, ExecutionError
from nsteer.executors.fake import Fake
from nsteer.executors.local import Local
from nsteer.models.facts import local_folder
from nsteer.plan import check
from nsteer.program.form import (
    Decoding,
    EditSite,
    Form,
    ReadSite,
    Row,
    RowEdit,
    assemble,
    programs,
    size,
)
from nsteer.runner.model import ModelRun

PLANS = Path(__file__).parent.parent / "plans"


def test_less_than_a_tenth_of_what_the_quickstart_runs_is_padding(tmp_path, monkeypatch):
    shutil.copy(PLANS / "quickstart.yaml", tmp_path / "plan.yaml")
    study = check.load(tmp_path / "plan.yaml", ["judge=null", f"store={tmp_path}/plan.zarr"])
    tokenizer = AutoTokenizer.from_pretrained(str(local_folder("zoo/llama")))
    seen = []

    class Watched(Fake):
        def run(self, program):
            seen.append(program)
            return super().run(program)

    def load(model):
        facts = model.facts
        return Watched(n_layers=facts.n_layers, d_model=facts.d_model, vocab=len(tokenizer), tokenizer=tokenizer)

    monkeypatch.setattr(ModelRun, "load", load)
    summary = runner.run(study)
    assert not summary.failures and summary.done["steering"] == 30
    assert sum(map(padding_share, seen)) and len(seen) < 20  # there is padding, and not a batch for every length
    positions = sum(map(size, seen))
    assert sum(padding_share(program) * size(program) for program in seen) < 0.1 * positions
    print({"programs": len(seen), "padding": sum(padding_share(p) * size(p) for p in seen) / positions})
    captured = [program for program in seen if not program.form.decoding]
    assert sum(padding_share(p) * size(p) for p in captured) < 0.1 * sum(map(size, captured))


# ---- models that let padding in ----------------------------------------------------------------------------------

SMALL = {
    "recurrent_gemma": dict(num_hidden_layers=6, lru_width=32, attention_window_size=16, num_attention_heads=4),
    "rwkv": dict(num_hidden_layers=6, attention_hidden_size=32),
    "minimax": dict(
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        block_size=16,
        num_local_experts=4,
        layer_types=["linear_attention", "full_attention"] * 3,
    ),
    "roberta": dict(num_hidden_layers=6, num_attention_heads=4, is_decoder=True, pad_token_id=1, bos_token_id=0),
    "bert": dict(num_hidden_layers=6, num_attention_heads=4, is_decoder=True),
    "mamba": dict(num_hidden_layers=6, state_size=8),
    "lfm2": dict(
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        block_ff_dim=48,
        layer_types=["conv", "full_attention"] * 3,
    ),
    "llama": dict(num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2),
}
MATES = dict.fromkeys(SMALL, "any") | {"recurrent_gemma": "equal", "rwkv": "none", "minimax": "equal"}
MATES |= {"roberta": "equal"}
BLOCKS = dict.fromkeys(SMALL, "model.layers") | {"rwkv": "rwkv.blocks", "mamba": "backbone.layers"}
BLOCKS |= {name: f"{name}.encoder.layer" for name in ("roberta", "bert")}
LAYERS, PUSH = [5, 2], 8.0


def of_family(name: str, **changes):
    """A tiny model whose weights are as large as trained ones."""
    ids = dict(vocab_size=tinies.VOCAB, pad_token_id=tinies.PAD, bos_token_id=tinies.BOS_ID, eos_token_id=tinies.END)
    kind = name.replace("_", "-") if name not in CONFIG_MAPPING else name
    more = {"max_position_embeddings": 128} if "bert" in name or name == "llama" else {}
    config = CONFIG_MAPPING[kind](**ids | dict(hidden_size=32, intermediate_size=48) | more | SMALL[name] | changes)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p) if p.ndim > 1 else 0
    return model


def first(output):
    return output[0] if isinstance(output, tuple) else output


def streams_alone(model, blocks, tokens) -> dict[int, np.ndarray]:
    """By plain hooks, called with nothing but the text."""
    seen: dict[int, np.ndarray] = {}
    hooks = [
        blocks[layer].register_forward_hook(lambda m, a, out, at=layer: seen.update({at: first(out)[0].numpy()}))
        for layer in LAYERS
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def steered_alone(model, blocks, tokens, vector, new) -> tuple[int, ...]:
    """Greedy by `generate` with its cache, `vector` added at LAYERS of what is generated, by plain hooks."""

    def push(module, given, output):
        h = first(output)
        if h.shape[1] == 1:
            h = h + vector
        return (h, *output[1:]) if isinstance(output, tuple) else h

    hooks = [blocks[layer].register_forward_hook(push) for layer in LAYERS]
    with torch.no_grad():
        sequences = model.generate(
            torch.tensor([tokens]), do_sample=False, max_new_tokens=new, eos_token_id=None, pad_token_id=0
        )
    for hook in hooks:
        hook.remove()
    return tuple(sequences[0, len(tokens) :].tolist())


@pytest.mark.parametrize("name", SMALL)
def test_a_row_gives_what_it_gives_alone_whatever_its_batch(name, monkeypatch):
    model = of_family(name)
    blocks = model.get_submodule(BLOCKS[name])
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu")
    assert executor.batching.mates == MATES[name] and not executor.batching.stepless
    said = executor.describe()
    assert said["health"]["batches_of"] == MATES[name]
    assert bool(said["health"]["batches_because"]) == bool(said["warnings"]) == (MATES[name] != "any")
    vector = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    vector /= np.linalg.norm(vector)
    rows = [
        Row(i, tokens, {"last": np.eye(len(tokens), dtype=np.float32)[-1]}, edits(tokens, vector))
        for i, tokens in enumerate(texts(executor, (6, 17, 3, 6, 11, 3)))
    ]
    reads = Form(reads=tuple(ReadSite(layer, "last") for layer in sorted(LAYERS)))
    steer = Form(
        edits=tuple(EditSite(layer, "add") for layer in sorted(LAYERS)), decoding=Decoding(5, (), executor.pad)
    )
    overhead = 0 if MATES[name] == "none" else 10_000
    how = dict(budget=10_000, max_rows=4, overhead=overhead, mates=executor.batching.mates)
    sizes = []
    for program in programs(reads, [Row(r.key, r.tokens, r.weights) for r in rows], **how):
        readouts = executor.run(program)
        sizes.append(program.rows)
        for i, key in enumerate(program.keys):
            true = streams_alone(model, blocks, rows[key].tokens)
            for place, layer in enumerate(sorted(LAYERS)):
                np.testing.assert_allclose(
                    readouts.pooled[i, place], true[layer][-1], atol=1e-4 * abs(true[layer]).max()
                )
    assert sorted(sizes) == {"any": [2, 4], "equal": [1, 1, 2, 2], "none": [1] * 6}[MATES[name]]
    plain = set()
    for program in programs(steer, rows, **how):
        for key, tokens in zip(program.keys, executor.run(program).tokens, strict=True):
            assert tokens == steered_alone(model, blocks, rows[key].tokens, torch.tensor(PUSH * vector), 5)
            plain.add(tokens == steered_alone(model, blocks, rows[key].tokens, torch.tensor(0 * vector), 5))
    assert False in plain, "an edit that changes no token shows nothing"


def test_a_model_that_counts_padding_out_by_its_own_positions_gets_no_padding():
    """Called by itself it is exact in any batch, with this padding id; but nnsight adds positions of its own."""
    model = of_family("roberta", pad_token_id=0, bos_token_id=1)
    blocks = model.get_submodule(BLOCKS["roberta"])
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu")
    rows = [Row(i, tokens) for i, tokens in enumerate(texts(executor, (9, 4, 9)))]
    form = Form(reads=tuple(ReadSite(layer, what="tokens") for layer in sorted(LAYERS)))
    for program in programs(form, rows, budget=10_000, max_rows=4, overhead=10_000, mates=executor.batching.mates):
        for key, streams in zip(program.keys, executor.run(program).streams, strict=True):
            true = streams_alone(model, blocks, rows[key].tokens)
            for place, layer in enumerate(sorted(LAYERS)):
                np.testing.assert_allclose(streams[place], true[layer], atol=1e-4 * abs(true[layer]).max())


def edits(tokens, vector) -> tuple[RowEdit, ...]:
    none = np.zeros(len(tokens), bool)
    return (RowEdit(vector, PUSH, none, True, np.full(len(tokens), 1 / len(tokens), np.float32)),) * len(LAYERS)


def test_rows_share_batches_as_they_may():
    rows = [Row(i, (1,) * n) for i, n in enumerate((3, 9, 3, 4, 9, 3))]
    form = Form(reads=(ReadSite(0, what="tokens"),))

    def lengths(mates) -> list[list[int]]:
        batches = programs(form, rows, budget=1000, max_rows=4, overhead=1000, mates=mates)
        return [program.arrays["attention_mask"].sum(1).tolist() for program in batches]

    assert lengths("equal") == [[9, 9], [4], [3, 3, 3]]
    assert lengths("none") == [[9], [9], [4], [3], [3], [3]]
    assert sorted(map(len, lengths("any"))) == [2, 4]


@pytest.mark.parametrize(
    ("new", "batches"),
    [
        (0, [[9], [8, 8], [5, 4, 3, 3]]),
        (2, [[9], [8, 8], [5], [4, 3, 3]]),  # the second new token is never read
        (4, [[9], [8, 8], [5], [4], [3, 3]]),
    ],
)
def test_rows_that_come_beyond_a_turn_share_batches_of_equal_length(new, batches):
    rows = [Row(i, (1,) * n) for i, n in enumerate((3, 8, 9, 4, 5, 8, 3))]
    form = Form(reads=(ReadSite(0, what="tokens"),), decoding=Decoding(new, (), 0) if new else None)
    for max_rows, given in ((8, batches), (1, [[n] for batch in batches for n in batch])):
        batch_programs = programs(form, rows, budget=1000, max_rows=max_rows, overhead=1000, turn=5)
        assert [program.arrays["attention_mask"].sum(1).tolist() for program in batch_programs] == given


ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 12}
ROPE |= {"short_factor": [1.0] * 4, "long_factor": [5.0, 3.0, 2.0, 4.0]}
TURNS = {
    "phi3": {"original_max_position_embeddings": 12, "rope_parameters": ROPE},  # 4,096 in Phi-3 of 128k positions
    "llama4_text": {"floor_scale": 13, "attn_temperature_tuning": True, "no_rope_layers": [1, 1, 0, 1, 0, 0]},
}
TURNS["llama4_text"] |= {"num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48, "attn_scale": 2.0}


@pytest.mark.parametrize("kind", TURNS)
def test_a_long_text_changes_no_short_one_where_the_longest_decides_how_positions_are_coded(tmp_path, kind):
    sizes = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    sizes |= {"vocab_size": tinies.VOCAB, "hidden_size": 32, "intermediate_size": 48}
    ids = {"pad_token_id": tinies.PAD, "bos_token_id": tinies.BOS_ID, "eos_token_id": tinies.END}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **ids, **TURNS[kind])).float().eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p) if p.ndim > 1 else 0
    model.save_pretrained(tmp_path / "m")
    tokenizer = tinies.tokenizer()
    tokenizer.save_pretrained(tmp_path / "m")
    prompts = {"s": "tom ran", "t": "a cat sat", "l": "tom sat on the wall while a cat ran to the warm fire"}
    prompts["m"] = f"{prompts['l']} and wept"
    lengths = {key: len(tokenizer(text)["input_ids"]) for key, text in prompts.items()}
    assert max(lengths["s"], lengths["t"]) <= 12 < lengths["l"] < lengths["m"], lengths
    plan = {"name": "p", "models": [{"id": str(tmp_path / "m"), "label": "m"}], "texts": "zoo", "prompts": prompts}
    plan |= {"reads": {"last": {"layers": LAYERS, "pooling": "last"}}, "store": str(tmp_path / "p.zarr")}
    (tmp_path / "p.yaml").write_text(json.dumps(plan))
    assert not nsteer.run(nsteer.load(tmp_path / "p.yaml", allow_outside=True)).failures
    streams = nsteer.open(tmp_path / "p.zarr").sel(
        "reads", variable="stream", model="m", read="last", edit="none", strength=0
    )
    for key, text in prompts.items():
        true = streams_alone(model, model.model.layers, tokenizer(text)["input_ids"])
        for layer in LAYERS:
            mine = streams.sel({"prompt": key, "layer": layer}).values.squeeze()
            np.testing.assert_allclose(mine, true[layer][-1], atol=1e-4 * abs(true[layer]).max())


def test_a_run_says_it_and_is_right(tmp_path):
    of_family("recurrent_gemma").save_pretrained(tmp_path / "m")
    tinies.tokenizer().save_pretrained(tmp_path / "m")
    prompts = {"s": "the cat sat", "l": "rain fell on the garden wall while tom read a book by the fire and wept"}
    streams = {}
    for name, given in (("alone", {"s": prompts["s"]}), ("both", prompts)):
        plan = {"name": "p", "models": [{"id": str(tmp_path / "m"), "label": "m"}], "texts": "zoo", "prompts": given}
        plan |= {"reads": {"last": {"layers": LAYERS, "pooling": "last"}}, "store": str(tmp_path / f"{name}.zarr")}
        (tmp_path / "p.yaml").write_text(json.dumps(plan))
        summary = nsteer.run(nsteer.load(tmp_path / "p.yaml", allow_outside=True))
        assert not summary.failures
        [said] = summary.warnings
        assert said.startswith("m: only texts of equal length share a batch: a text's streams change by ")
        results = nsteer.open(tmp_path / f"{name}.zarr")
        health = json.loads(results["models"].health.sel({"model": "m"}).item())
        assert health["batches_of"] == "equal" and health["batches_because"] in said
        where = {"model": "m", "read": "last", "edit": "none", "strength": 0, "prompt": "s", "layer": LAYERS}
        streams[name] = results.sel("reads", variable="stream", **where).values
    np.testing.assert_allclose(streams["both"], streams["alone"], rtol=1e-6)


def test_rows_that_change_each_other_stay_alone(monkeypatch):
    """As where experts have room for so many tokens of a batch."""
    model = tinies.model("llama")
    block = model.model.layers[2]
    block.register_forward_hook(lambda m, a, out: out + 0.5 * out.mean(0, keepdim=True) * (len(out) > 1))
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu")
    [said] = executor.describe()["warnings"]
    assert executor.batching.mates == "none" and said.startswith("no two texts share a batch: ")
    assert "with another beside it" in said and executor.health["batches_of"] == "none"
    push = RowEdit(np.ones(32, np.float32), 1.0, np.ones(3, bool), True, np.full(3, 1 / 3, np.float32))
    form = Form(edits=(EditSite(1, "add"),), against=True)
    weights = {"later": np.array([0, 0, 1.0]), "score": np.array([0, 0, 1.0])}
    with pytest.raises(ExecutionError, match="no steered text can be compared with its unsteered one in a batch"):
        executor.run(assemble(form, [Row(0, (5, 6, 7), weights, (push,))]))


@pytest.mark.parametrize("layout", ["position first", "flat"])
def test_a_stream_of_another_layout_is_refused_in_a_line(layout):
    model = tinies.model("llama")

    def turned(module, given, output):
        return output.transpose(0, 1) if layout == "position first" else output.flatten(0, 1)

    def back(module, given, kwargs):
        rows = 2 if layout == "flat" else None
        hidden = given[0]
        return ((hidden.unflatten(0, (rows, -1)) if rows else hidden.transpose(0, 1)), *given[1:]), kwargs

    for i, block in enumerate(model.model.layers):
        block.register_forward_hook(turned)
        if i:
            block.register_forward_pre_hook(back, with_kwargs=True)
    model.model.norm.register_forward_pre_hook(lambda m, a: back(m, a, {})[0])
    with pytest.raises(
        AnatomyError, match=r"^layer 0 gives \((3, 2|6), 32\), not \[row, position, d_model\] \(2, 3, 32\)$"
    ):
        Local(model, tokenizer=tinies.tokenizer(), device="cpu")
