"""A loaded model is looked at once: BOS by perplexity, a tokenizer too large, chats; kept in the store."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import tinies
import torch
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.errors import ModelError
from nsteer.executors import health
from nsteer.executors.local import Local

PLAN = """
name: h
models: [{id: %s, label: m}]
prompts: [tom]
reads: {r: {layers: [2], pooling: last}}
store: h.zarr
"""


class Reader(torch.nn.Module):
    """Knows the paragraph by heart: gives its next token the probability `sure`, only behind a BOS where `marked`."""

    def __init__(self, tokens, sure: float, marked: bool):
        super().__init__()
        self.table, self.sure, self.marked = torch.nn.Embedding(tinies.VOCAB, 2), sure, marked
        self.next = dict(enumerate(tokens))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask, use_cache):
        leads = input_ids[0, 0].item() == tinies.BOS_ID
        sure = self.sure if leads == self.marked else 1 / tinies.VOCAB
        chances = torch.full((1, input_ids.shape[1], tinies.VOCAB), (1 - sure) / (tinies.VOCAB - 1))
        for place in range(input_ids.shape[1]):
            if (token := self.next.get(place + 1 - leads)) is not None:
                chances[0, place, token] = sure
        return SimpleNamespace(logits=chances.log())


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("marked", [True, False])
def test_a_model_that_reads_the_other_way_better_is_told(adds, marked):
    tokenizer = tinies.tokenizer(bos=adds)
    tokens = tokenizer(health.PARAGRAPH, add_special_tokens=False).input_ids
    seen = health.look(Reader(tokens, 0.25, marked), tokenizer, None)
    better, worse = ("with", "without") if marked else ("without", "with")
    assert seen["adds_bos"] is adds
    assert math.isclose(seen[f"perplexity_{better}_bos"], 4, rel_tol=1e-3), "1 / 0.25"
    assert math.isclose(seen[f"perplexity_{worse}_bos"], tinies.VOCAB, rel_tol=1e-3), "uniform"
    said = health.warnings(seen, "float32")
    assert len(said) == (adds != marked)
    if said:
        how = "begins texts with BOS" if adds else "adds no BOS"
        assert said[0].startswith(f"its tokenizer {how}, and an English paragraph has perplexity 320 so, 4 ")
        assert f"`add_bos_token: {str(marked).lower()}`" in said[0]


def test_neither_way_is_telling_where_the_model_makes_no_sense_of_the_text():
    tokenizer = tinies.tokenizer()
    tokens = tokenizer(health.PARAGRAPH, add_special_tokens=False).input_ids
    seen = health.look(Reader(tokens, 1 / 200, True), tokenizer, None)
    assert health.warnings(seen, "float32") == [], "no factor of two between them"
    seen |= {"perplexity_with_bos": 600.0, "perplexity_without_bos": 6e6}
    assert health.warnings(seen, "float32") == []


def test_perplexities_are_those_of_a_plain_pass(tiny):
    executor = tiny("llama")
    ids = executor.tokenizer(health.PARAGRAPH, add_special_tokens=False).input_ids[: health.MAX_TOKENS]
    for name, before in (("with", [tinies.BOS_ID]), ("without", [])):
        given = torch.tensor([[*before, *ids]])
        with torch.no_grad():
            losses = torch.nn.functional.cross_entropy(
                executor.module(given).logits[0, :-1], given[0, 1:], reduction="none"
            )
        true = losses[len(before) :].mean().exp().item()
        assert math.isclose(executor.health[f"perplexity_{name}_bos"], true, rel_tol=1e-4)


def test_a_model_whose_logits_leave_tokens_out_is_not_asked():
    tokenizer = tinies.tokenizer()

    class Cut(Reader):
        def forward(self, **given):
            return SimpleNamespace(logits=super().forward(**given).logits[..., :100])

    tokens = tokenizer(health.PARAGRAPH, add_special_tokens=False).input_ids
    assert max(tokens) >= 100
    seen = health.look(Cut(tokens, 0.25, True), tokenizer, None)
    assert seen["perplexity_with_bos"] is None and health.warnings(seen, "float32") == []


def heavy(layer: int):
    """Its float16 overflows at a block, at one word of the paragraph; all else of it is far from that."""
    model = tinies.model("llama", num_hidden_layers=6)
    ids = tinies.tokenizer()(health.PARAGRAPH, add_special_tokens=False, verbose=False).input_ids[: health.MAX_TOKENS]
    word = next(token for token in ids if 6 < token < tinies.VOCAB // 2)  # in none of the dummy texts of the proofs
    mlp, seen = model.model.layers[layer].mlp, []
    hook = mlp.register_forward_hook(lambda m, a, out: seen.append(float(out.abs().max())))
    with torch.no_grad():
        model.model.embed_tokens.weight[word] = torch.where(torch.arange(32) % 2 == 0, 65_000.0, -65_000.0)
        model(torch.tensor([ids]))
        hook.remove()
        mlp.down_proj.weight.mul_(3_000 / seen[0])
    return model.half()


def test_a_stream_that_overflows_on_a_plain_text_is_named_by_its_layer(tmp_path):
    heavy(3).save_pretrained(tmp_path / "m")
    tinies.tokenizer().save_pretrained(tmp_path / "m")
    plan = (PLAN % "m").replace("label: m}", "label: m, dtype: float16}")
    (tmp_path / "p.yaml").write_text(plan)
    summary = nsteer.run(nsteer.load(tmp_path / "p.yaml"))
    assert not summary.failures, "the prompt of the plan is read as ever"
    advice = "take bfloat16 or float32 (in an English paragraph; a text is NaN then)"
    assert summary.warnings == [f"m: the stream is not finite in float16 at layer 3: {advice}"]
    seen = json.loads(nsteer.open("h.zarr")["models"].health.sel(model="m").item())
    assert seen["not_finite_at"] == 3 and seen["batches_of"] == "any"
    whole = Local(heavy(3).float(), tokenizer=tinies.tokenizer(), device="cpu")
    assert whole.health["not_finite_at"] is None and whole.describe()["warnings"] == []


def test_what_was_seen_is_in_the_store(folder, tmp_path):
    (tmp_path / "p.yaml").write_text(PLAN % folder("llama"))
    result = CliRunner().invoke(cli.main, ["run", "p.yaml"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    seen = json.loads(nsteer.open("h.zarr")["models"].health.sel(model="m").item())
    assert seen["adds_bos"] is True and seen["perplexity_with_bos"] > 1 and seen["pad_without_a_row"] is False
    assert seen["not_finite_at"] is None and seen["batches_of"] == "any" and seen["batches_because"] == ""
    assert {name: seen[name] for name in seen if name.startswith("chat") or name == "positions"} == {
        "chat": True,
        "chat_bos": 1,
        "chat_system": True,
        "chat_reads_clock": False,
        "positions": 128,
    }


def test_a_tokenizer_that_reads_no_text_asks_nothing_of_the_model():
    """As that of the benchmarks: its special tokens alone."""
    ends = SimpleNamespace(eos_token_id=2, pad_token_id=2, bos_token_id=1, eos_token="</s>", pad_token="</s>")
    seen = health.look(tinies.model("llama"), ends, None)
    assert seen["perplexity_without_bos"] is None and health.warnings(seen, "float32") == []


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(folder, tmp_path):
    small = tmp_path / "small"
    tinies.model("llama", vocab_size=200).save_pretrained(small)
    tinies.tokenizer(bos=True).save_pretrained(small)
    words = "320 tokens"
    with pytest.raises(ModelError, match=f"its tokenizer has {words}, its embedding 200 rows"):
        Local(tinies.model("llama", vocab_size=200), tokenizer=tinies.tokenizer(), device="cpu")
    (tmp_path / "p.yaml").write_text(PLAN % "small")
    result = CliRunner().invoke(cli.main, ["check", "p.yaml"], catch_exceptions=False)
    assert result.exit_code != 0 and not (tmp_path / "h.zarr").exists()
    assert "'small', with 320 tokens in its tokenizer.json and 200 rows of its embedding" in " ".join(
        result.output.split()
    )
