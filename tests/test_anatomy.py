"""Blocks, head and logits are found in many architectures, proved, and missed loudly."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tinies
import torch

from nsteer.errors import AnatomyError, ExecutionError, OutOfMemoryError
from nsteer.executors.local import Local
from nsteer.program.anatomy import LOGIT_SCALING, Anatomy, find, logits_without_weights, prove
from nsteer.program.form import Decoding, Form, ReadSite, Row, assemble, lens

HEADS = {"gpt_neox": "embed_out"}
EMBEDDINGS = {"gpt2": "transformer.wte", "gptj": "transformer.wte", "bloom": "transformer.word_embeddings"}
EMBEDDINGS |= {"gpt_neox": "gpt_neox.embed_in", "opt": "model.decoder.embed_tokens"}
SCALED = {"gemma": ("softcap", 1.5), "cohere": ("multiply", 0.25), "granite": ("divide", 4.0)}


@pytest.fixture(scope="module")
def module():
    """A tiny model by name, each made once."""
    models = {}

    def get(name):
        if name not in models:
            models[name] = tinies.model(name)
        return models[name]

    return get


def gives_tuples(model, blocks: str) -> bool:
    """Whether its blocks return tuples, as a plain hook sees it."""
    seen = []
    hook = model.get_submodule(f"{blocks}.0").register_forward_hook(lambda block, given, out: seen.append(type(out)))
    with torch.no_grad():
        model(torch.arange(6).reshape(2, 3))
    hook.remove()
    return seen[0] is tuple


@pytest.mark.parametrize("name", tinies.ALL)
def test_every_architecture_is_found_and_proved(module, name):
    anatomy = replace(prove(module(name)), attention=None, mlp=None, proved=False)  # these: tests/test_sites.py
    config = module(name).config
    assert anatomy == Anatomy(
        blocks=tinies.ALL[name][2],
        head=HEADS.get(name, "lm_head") if hasattr(module(name), HEADS.get(name, "lm_head")) else anatomy.head,
        embedding=EMBEDDINGS.get(name, "model.embed_tokens"),
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        vocab=tinies.VOCAB,
        tuple_output=gives_tuples(module(name), tinies.ALL[name][2]),  # a version of transformers decides
        scaling=SCALED.get(name),
        takes_positions=name != "bloom",
    )


@pytest.mark.parametrize("name", tinies.ALL)
def test_the_same_is_found_without_weights(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tinies.config(name))
    assert next(empty.parameters()).is_meta
    anatomy, proved = logits_without_weights(empty, find(empty)), prove(tinies.model(name))
    later = dict.fromkeys(("tuple_output", "proved", "attention", "mlp"))
    assert {**vars(anatomy), **later} == {**vars(proved), **later}
    assert not anatomy.proved
    if proved.proved and name != "bloom":  # whose names do not tell that its modules add the stream themselves
        assert (anatomy.attention.path, anatomy.mlp.path) == (proved.attention.path, proved.mlp.path)


@pytest.mark.parametrize("name", SCALED)
def test_logits_are_the_scaled_output_of_the_head(module, name):
    """And the scaling matters: without it they are not."""
    model, caught = module(name), []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: caught.append(out))
    with torch.no_grad():
        logits = model(torch.arange(5, 12)[None]).logits
    handle.remove()
    function, value = prove(model).scaling
    assert torch.allclose(LOGIT_SCALING[function](caught[0], value), logits, atol=1e-6)
    assert not torch.allclose(caught[0], logits, atol=1e-2)


@pytest.mark.parametrize("name", SCALED)
def test_log_probs_of_a_program_are_the_models(tiny, name):
    executor = tiny(name)
    form = Form(decoding=Decoding(1, (), 0), top=tinies.VOCAB)
    tokens = tuple(range(8, 14))
    readouts = executor.run(assemble(form, [Row(0, tokens)]))
    with torch.no_grad():
        truth = executor.module(torch.tensor([tokens])).logits[0, -1].log_softmax(-1).numpy()
    np.testing.assert_allclose(readouts.top_logprobs[0, 0], np.sort(truth)[::-1], atol=1e-5)
    assert readouts.top_tokens[0, 0, 0] == truth.argmax()


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


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size"])
def test_a_model_whose_config_tells_no_size(key):
    model = tinies.model("llama")
    told = SimpleNamespace(**model.config.to_dict() | {key: None})
    model.config = SimpleNamespace(get_text_config=lambda: told)
    with pytest.raises(AnatomyError, match=f"LlamaForCausalLM is not one stack of blocks: its config has no {key}"):
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


def test_a_field_of_the_config_that_does_nothing_is_not_believed():
    """Granite divides by `logits_scaling`, HyperCLOVA X multiplies, and a Llama that has it does neither."""
    model = tinies.model("llama")
    model.config.logits_scaling = 4.0
    assert prove(model).scaling is None and not prove(model).returned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "field, value, function", [("made_up", 0.04, "multiply"), ("logits_soft_cap", 30.0, "softcap")]
)
def test_a_scaling_of_any_name_is_found_by_what_it_does(dtype, field, value, function):
    """Also where the model's own logits are so small that a cap of 30 is beyond their rounding."""
    model = tinies.model("llama", initializer_range=0.001).to(dtype)
    setattr(model.config, field, value)
    scaled(model, lambda logits: LOGIT_SCALING[function](logits, value))
    assert prove(model).scaling == (function, value)


def scaled(model, change):
    """Has a model change its head's output before it gives it as logits."""
    plain = model.forward

    def forward(*args, **more):
        out = plain(*args, **more)
        out.logits = change(out.logits)
        return out

    model.forward = forward


STRANGE = {
    "by a curve": lambda logits: logits.sinh() / 4,
    "cut": lambda logits: logits[..., : tinies.VOCAB - 20],
    "cut, then scaled": lambda logits: 0.5 * logits[..., : tinies.VOCAB - 20],
}


@pytest.mark.parametrize("name", STRANGE)
def test_logits_of_another_kind_are_read_where_the_model_returns_them(name):
    """No arithmetic on the head's output is known: log-probabilities and sampling are exact all the same."""
    model = tinies.model("llama")
    scaled(model, STRANGE[name])
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    assert executor.anatomy.returned and not executor.anatomy.lens
    assert executor.anatomy.vocab == tinies.VOCAB - 20 * ("cut" in name)
    tokens, top = (tuple(range(8, 14)), (9, 8, 30)), executor.anatomy.vocab
    for sample in (False, True):
        form = Form(decoding=Decoding(3, (), 0, sample=sample), top=top)
        rows = [Row(i, t, uniform=np.array([0.2, 0.9, 0.5]) if sample else None) for i, t in enumerate(tokens)]
        readouts = executor.run(assemble(form, rows))
        for i, text in enumerate(tokens):
            for step, token in enumerate(readouts.tokens[i]):
                with torch.no_grad():
                    logits = model(torch.tensor([[*text, *readouts.tokens[i][:step]]])).logits[0, -1]
                truth = logits.log_softmax(-1).numpy()
                np.testing.assert_allclose(readouts.top_logprobs[i, step], np.sort(truth)[::-1], atol=1e-4)
                order, mass = np.argsort(-truth, kind="stable"), np.exp(np.sort(truth)[::-1].astype(np.float64))
                drawn = order[np.searchsorted(mass.cumsum(), (0.2, 0.9, 0.5)[step] * mass.sum(), side="right")]
                assert token == (drawn if sample else truth.argmax())
        assert readouts.tokens[0] != readouts.tokens[1]
    score = Form(score=True)
    rows = [Row(i, t, {"score": np.r_[np.zeros(2), np.ones(len(t) - 2)]}) for i, t in enumerate(tokens)]
    for total, text in zip(executor.run(assemble(score, rows)).score, tokens, strict=True):
        with torch.no_grad():
            truth = model(torch.tensor([text])).logits[0].log_softmax(-1)
        assert total == pytest.approx(sum(float(truth[p - 1, text[p]]) for p in range(2, len(text))), abs=1e-4)


def test_a_lens_is_refused_where_logits_fall_with_what_the_head_gives():
    model = tinies.model("llama")
    scaled(model, lambda logits: -logits)
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    with pytest.raises(ExecutionError, match="no logit lens: its logits do not rise with what its head gives"):
        executor.run(lens(3, np.ones((2, 32), np.float32)))


def test_a_lens_goes_through_what_lies_between_the_stream_and_the_head():
    """As in OPT 350M, whose head reads 512 numbers of a stream of 1024."""
    model = tinies.model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    assert executor.anatomy.projection == "model.decoder.project_out"
    vectors = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    readouts = executor.run(lens(5, vectors))
    with torch.no_grad():
        truth = model.lm_head(model.model.decoder.project_out(torch.tensor(vectors)))
    np.testing.assert_allclose(readouts.promoted, truth.sort(-1, descending=True).values[:, :5], rtol=1e-4)
    np.testing.assert_array_equal(readouts.promoted_tokens, truth.argsort(-1, descending=True)[:, :5])


def test_a_lens_is_refused_where_the_head_reads_something_else():
    model = tinies.model("opt", word_embed_proj_dim=16, do_layer_norm_before=False)
    plain = model.model.decoder.project_out
    model.model.decoder.project_out = torch.nn.Sequential(plain, torch.nn.Tanh())
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    with pytest.raises(ExecutionError, match="no logit lens: what 'lm_head' reads is not the stream"):
        executor.run(lens(5, np.ones((1, 32), np.float32)))


def test_blocks_that_return_lists():
    """The first GPT's do."""
    from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    sizes = dict(vocab_size=tinies.VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.2)
    model = OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()
    executor = Local(model, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    assert executor.anatomy.tuple_output
    form = Form(reads=tuple(ReadSite(layer, what="tokens") for layer in (1, 2)))
    rows = [Row(0, (8, 9, 10, 11)), Row(1, (12, 13))]
    with torch.no_grad():
        for row, streams in zip(rows, executor.run(assemble(form, rows)).streams, strict=True):
            states = model(torch.tensor([row.tokens]), output_hidden_states=True).hidden_states
            np.testing.assert_allclose(streams, torch.cat(states[2:4]).numpy(), atol=1e-5)


def test_a_decoder_that_get_decoder_does_not_give():
    """ModernBERT's decoder calls its head's part so."""
    model = tinies.model("llama")
    model.get_decoder = lambda: model.lm_head
    assert prove(model).blocks == "model.layers"


def test_a_stream_that_overflows_is_told_as_what_it_is():
    model = tinies.model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(3e5)
    prove(model)
    with pytest.raises(AnatomyError, match="not finite in float16 at layer 1: take bfloat16 or float32"):
        prove(model.half())


@pytest.mark.parametrize("error", [RuntimeError("sizes"), AttributeError("x"), TypeError("y"), IndexError("z")])
def test_whatever_a_model_raises_is_one_error_with_its_name(error):
    def failing(*args, **more):
        raise error

    for break_it in (
        lambda model: setattr(model, "get_input_embeddings", failing),
        lambda model: setattr(model.model.norm, "forward", failing),
        lambda model: model.lm_head.register_forward_hook(failing),
    ):
        model = tinies.model("llama")
        break_it(model)
        with pytest.raises(AnatomyError, match=f"LlamaForCausalLM .*{error}") as caught:
            prove(model)
        assert "\n" not in str(caught.value) and caught.value.__cause__ is error
        assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_says_nothing_about_the_model(error):
    def failing(*args, **more):
        raise error

    model = tinies.model("llama")
    model.model.norm.forward = failing
    with pytest.raises(OutOfMemoryError, match="LlamaForCausalLM ran out of memory"):
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
    model.config.num_hidden_layers = 7
    with pytest.raises(AnatomyError):
        Local(model, tokenizer=tinies.tokenizer(), device="cpu")
