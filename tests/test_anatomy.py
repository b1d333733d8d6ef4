"""Blocks, head and logits are found in many architectures, proved, and missed loudly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tinies
import torch

from nsteer.anatomy import LOGIT_SCALING, Anatomy, find, prove
from nsteer.errors import AnatomyError
from nsteer.executors.local import Local
from nsteer.program import Decoding, Form, Row, assemble

HEADS = {"gpt_neox": "embed_out"}
EMBEDDINGS = {"gpt2": "transformer.wte", "gptj": "transformer.wte", "bloom": "transformer.word_embeddings"}
EMBEDDINGS |= {"gpt_neox": "gpt_neox.embed_in", "opt": "model.decoder.embed_tokens"}
SCALED = {
    "gemma": ("final_logit_softcapping", 1.5),
    "cohere": ("logit_scale", 0.25),
    "granite": ("logits_scaling", 4.0),
}


@pytest.fixture(scope="module")
def module():
    """A tiny model by name, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = tinies.model(name)
        return made[name]

    return get


@pytest.mark.parametrize("name", tinies.ALL)
def test_every_architecture_is_found_and_proved(module, name):
    found = replace(prove(module(name)), attention=None, mlp=None, proved=False)  # these: tests/test_sites.py
    config = module(name).config
    assert found == Anatomy(
        blocks=tinies.ALL[name][2],
        head=HEADS.get(name, "lm_head") if hasattr(module(name), HEADS.get(name, "lm_head")) else found.head,
        embedding=EMBEDDINGS.get(name, "model.embed_tokens"),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab=tinies.VOCAB,
        tuple_output=name in tinies.TUPLES,
        scaling=SCALED.get(name),
        takes_positions=name != "bloom",
    )


@pytest.mark.parametrize("name", tinies.ALL)
def test_the_same_is_found_without_weights(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tinies.config(name))
    assert next(empty.parameters()).is_meta
    found, proved = find(empty), prove(tinies.model(name))
    later = dict.fromkeys(("tuple_output", "proved", "attention", "mlp"))
    assert {**vars(found), **later} == {**vars(proved), **later}
    assert not found.proved
    if proved.proved:
        assert (found.attention.path, found.mlp.path) == (proved.attention.path, proved.mlp.path)


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_the_scaled_output_of_the_head(module, name):
    """And the scaling matters: without it they are not."""
    model, caught = module(name), []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        logits = model(torch.arange(5, 12)[None]).logits
    handle.remove()
    field, value = prove(model).scaling
    assert torch.allclose(LOGIT_SCALING[field](caught[0], value), logits, atol=1e-6)
    assert not torch.allclose(caught[0], logits, atol=1e-2)


@pytest.mark.parametrize("name", SCALED)
def test_log_probs_of_a_program_are_the_models(tiny, name):
    executor = tiny(name)
    form = Form(decoding=Decoding(1, (), 0), top=tinies.VOCAB)
    tokens = tuple(range(8, 14))
    found = executor.run(assemble(form, [Row(0, tokens)]))
    with torch.no_grad():
        truth = executor.module(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).numpy()
    np.testing.assert_allclose(found.top_logprobs[0, 0], np.sort(truth)[::-1], atol=1e-5)
    assert found.top_tokens[0, 0, 0] == truth.argmax()


# ---- what is refused -------------------------------------------------------------------------------------


def test_a_model_whose_blocks_are_not_in_a_list():
    model = tinies.model("llama")
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    with pytest.raises(AnatomyError, match=r"no list of 4 blocks under the decoder of LlamaForCausalLM"):
        find(model)


def test_a_model_whose_config_tells_another_depth():
    model = tinies.model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(AnatomyError, match="no list of 7 blocks"):
        find(model)


def test_a_model_without_a_head():
    from transformers import AutoModel

    with pytest.raises(AnatomyError, match="LlamaModel has no output embeddings: not a causal language model"):
        find(AutoModel.from_config(tinies.config("llama")))


def test_a_model_that_skips_a_block():
    model = tinies.model("llama")
    blocks = model.model.layers
    blocks[2].forward = lambda hidden_states, **kwargs: blocks[1](hidden_states, **kwargs)
    with pytest.raises(AnatomyError):
        prove(model)


def test_a_model_that_does_something_between_its_blocks():
    model = tinies.model("llama")
    handle = model.model.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] * 2, *args[1:]), kwargs) if args else (args, kwargs), with_kwargs=True
    )
    with pytest.raises(AnatomyError, match="the output of layer 1 is not what layer 2 reads"):
        prove(model)
    handle.remove()
    prove(model)


def test_a_block_whose_output_is_no_stream():
    model = tinies.model("llama")
    last = model.model.layers[3]
    handle = last.register_forward_hook(lambda m, a, out: out[..., :16].repeat(1, 1, 1))
    with pytest.raises(AnatomyError):
        prove(model)
    handle.remove()


def test_a_model_whose_logits_are_not_its_heads_output():
    model = tinies.model("llama")
    model.config.logits_scaling = 4.0
    with pytest.raises(AnatomyError, match="the output of 'lm_head' does not give its logits"):
        prove(model)


def test_a_model_that_fails_says_what_it_says():
    model = tinies.model("llama")
    model.model.norm.forward = lambda x: 1 / 0
    with pytest.raises(AnatomyError, match="LlamaForCausalLM fails on three dummy tokens: division by zero"):
        prove(model)


def test_proving_leaves_no_hook_behind():
    model = tinies.model("llama")
    prove(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    model.model.norm.forward = lambda x: 1 / 0
    with pytest.raises(AnatomyError):
        prove(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_executor_refuses_what_can_not_be_proved():
    model = tinies.model("llama")
    model.config.logits_scaling = 4.0
    with pytest.raises(AnatomyError):
        Local(model, tokenizer=tinies.tokenizer(), device="cpu")
