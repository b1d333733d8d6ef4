"""How much fits: by algebra, by counting a real model's cache, and with free memory that is planted."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tinies
import torch
from hypothesis import given
from hypothesis import strategies as st

from nsteer.executors import common
from nsteer.executors.fake import Fake
from nsteer.executors.local import Local
from nsteer.program import budget
from nsteer.program.budget import FRACTION, Need, batch_bytes, row_bytes, shape, token_bytes, tokens
from nsteer.program.form import Decoding, EditSite, Form, ReadSite

GPT2 = budget.Shape(n_layers=12, d_model=768, kv=768, mlp=3072, heads=12, vocab=50257)
NEEDS = st.builds(Need, st.integers(0, 64), st.integers(0, 30), st.integers(0, 4), st.booleans(), st.booleans())


@given(NEEDS, st.integers(0, 1 << 40), st.integers(1, 512), st.integers(1, 1 << 20), st.sampled_from([2, 4]))
def test_a_full_batch_takes_no_more_than_its_share_and_one_token_more_would(need, free, rows, ceiling, width):
    batch_tokens = tokens(free, GPT2, need, width, rows, ceiling)
    assert 1 <= batch_tokens <= ceiling
    if batch_tokens > 1:
        assert batch_bytes(GPT2, need, width, rows, batch_tokens) <= free * FRACTION
    if batch_tokens < ceiling:
        assert batch_bytes(GPT2, need, width, rows, batch_tokens + 1) > free * FRACTION


@given(NEEDS, st.integers(0, 1 << 36), st.integers(1, 512))
def test_more_memory_or_a_smaller_need_never_means_fewer_tokens(need, free, rows):
    def fits(free=free, need=need, rows=rows, width=4):
        return tokens(free, GPT2, need, width, rows, 1 << 30)

    assert fits(free=2 * free) >= fits()
    assert fits(width=2) >= fits()
    assert fits(rows=rows + 1) <= fits()
    for field in ("new", "pooled", "streams"):
        assert fits(need=dataclasses.replace(need, **{field: getattr(need, field) + 1})) <= fits()
    assert fits(need=dataclasses.replace(need, edits=True, logits=True)) <= fits()


def test_keys_and_values_are_counted_as_the_model_keeps_them():
    """The cache of a real forward, byte for byte: grouped heads (llama) and full ones (gpt2)."""
    for name in ("llama", "gpt2", "qwen"):
        module = tinies.model(name)
        config = module.config
        own = shape(config.to_dict(), config.num_hidden_layers, config.hidden_size)
        with torch.no_grad():
            cache = module(input_ids=torch.ones(3, 7, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        kept = token_bytes(own, Need(new=1), 4) - token_bytes(own, Need(), 4)
        assert kept * 3 * 7 == held, name
        assert own.vocab == config.vocab_size


def test_logits_count_where_all_are_made_and_else_once_a_row():
    every = token_bytes(GPT2, Need(logits=True), 2) - token_bytes(GPT2, Need(), 2)
    assert every == GPT2.vocab * 2
    assert row_bytes(GPT2, Need(new=1), 2) >= GPT2.vocab * 2 > row_bytes(GPT2, Need(pooled=24), 2)


@pytest.mark.parametrize("config", [{}, {"n_head": None, "vocab_size": True}, {"text_config": {"n_head": 12}}])
def test_a_config_that_tells_little_gives_the_usual_shape(config):
    sizes = shape(config, 12, 768)
    assert (sizes.kv, sizes.mlp, sizes.heads) == (768, 3072, 12) and sizes.vocab > 10_000


def test_what_a_form_needs():
    how = Decoding(9, (), 0)
    form = Form((ReadSite(2, "none", "decoded"),), (EditSite(2, "add"),), how)
    assert common.need(form) == Need(new=9, pooled=2, edits=True)
    form = Form((ReadSite(2), ReadSite(2, "norm", "norm"), ReadSite(5, "none", "tokens")))
    assert common.need(form) == Need(pooled=2, streams=1)
    assert common.need(Form(score=True)) == Need(logits=True)
    assert common.need(Form(promote=3)) == Need()


def test_planted_free_memory_decides_what_the_local_executor_affords(monkeypatch):
    form = Form(decoding=Decoding(9, (), 0))
    budgets = []
    for free in (1 << 20, 1 << 24, 1 << 50):
        monkeypatch.setattr(common.machine, "free_memory", lambda free=free: free)
        executor = Local(tinies.model("llama"), tokenizer=tinies.tokenizer())
        budgets.append(executor.afford(form, 4))
        assert budgets[-1] == tokens(free, executor.shape, common.need(form), 4, 4, budget.CEILINGS["cpu"])
        json.dumps(executor.describe())
    assert budgets[0] < budgets[1] < budgets[2] == budget.CEILINGS["cpu"]
    assert Fake().afford(form, 4) == budget.CEILINGS["cpu"]


def test_no_gradient_is_kept_and_attention_is_sdpa():
    """Seen from inside: what torch says while the model's own modules run."""
    executor = Local(tinies.model("llama"), tokenizer=tinies.tokenizer())
    seen = []
    handle = executor.module.get_decoder().register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    from nsteer.program.form import Row, assemble, specimen

    try:
        with torch.enable_grad():
            for form in (Form(decoding=Decoding(3, (), 0)), Form(reads=(ReadSite(3),)), Form(score=True)):
                executor.run(specimen(form, 32))
                executor.run(assemble(Form(score=True), [Row(0, (5, 6), {"score": [0, 1]})]))
    finally:
        handle.remove()
    assert seen and not any(seen)
    described = executor.describe()
    assert described["settings"]["grad"] == "no_grad" and described["attn_implementation"] == "sdpa"
    assert described["settings"]["threads"] == torch.get_num_threads()
