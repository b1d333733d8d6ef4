"""`nsteer.steer` on a plain model: what compiled programs do, token for token and stream for stream."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import xarray as xr
from kit import spread
from test_runner import run as run_plan
from transformers import AutoModelForCausalLM

import nsteer
from nsteer.errors import AnatomyError, EditError, PlanError, SteerError
from nsteer.executors.common import tensors
from nsteer.plan.editing import compiled_edit, row_edit
from nsteer.plan.prompts import Encoded
from nsteer.plan.schema import Editing
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, Row, assemble
from nsteer.program.ops import OPS, REFERENCED, SCALES, UNSCALED
from nsteer.zoo import names, path

FAMILIES = names()[:5]
PROMPTS = [(5, 9, 7, 3, 11, 6), (8, 4), (12, 7, 30)]
LAYERS, NEW, NORM = [4, 1], 6, 40.0
STRENGTH = {"raw": 15.0, "unit": 30.0, "stream_norm": 0.6, "reference_norm": 0.6}
FRACTION = {"project_out": 15.0, "set_mean": 15.0, "rotate": 60.0}
"""Fractions beyond 1, since a random direction that is just removed may change no token."""
FACTORS = [1.0, -0.5, 0.7]


@pytest.fixture
def executor_of(zoo_model):
    """nsteer's own executor of an embedded model, which knows its name."""

    def named(name: str):
        executor = zoo_model(name)
        executor.name = name
        return executor

    return named


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def labelled(values: np.ndarray, layers, **rows) -> xr.DataArray:
    dims = (*rows, "layer", "d_model")
    return xr.DataArray(values, dims=dims, coords={**rows, "layer": list(layers)})


@cache
def plain(name: str):
    """An embedded model as transformers loads it: nnsight has not touched it."""
    return AutoModelForCausalLM.from_pretrained(path(name), dtype=torch.float32).eval()


class Case:
    """One edit, as a program of nsteer and as hooks, with a vector and a strength a row."""

    def __init__(self, executor, op: str, scale: str, positions: str = "all", skip: int = 0, layers=LAYERS):
        self.executor, self.width, self.layers = executor, executor.anatomy.d_model, layers
        self.module = plain(executor.name)
        self.vectors = drawn(1, len(PROMPTS), len(layers), self.width)
        self.mean = drawn(2, len(layers), self.width) * 3
        self.how = {"op": op, "positions": positions, "norm_skip": skip if scale == "stream_norm" else 0}
        self.how |= {} if op in UNSCALED else {"scale": scale}
        base = FRACTION.get(op, STRENGTH[scale])
        self.strengths = [base * factor for factor in FACTORS]

    @property
    def hooks(self) -> dict:
        """The arguments of `steer`."""
        op, scale = self.how["op"], self.how.get("scale")
        more = {"mean": labelled(self.mean, self.layers)} if op in REFERENCED else {}
        more |= {"norm": NORM} if scale == "reference_norm" else {}
        vector = labelled(self.vectors, self.layers, row=range(len(PROMPTS)))
        return {"vector": vector, "strength": self.strengths, **self.how, **more}

    def program(self, side: str = "left", **form):
        block, ordered = Editing(**self.how), sorted(self.layers)
        rows = []
        for r, tokens in enumerate(PROMPTS):
            edits = []
            for layer in ordered:
                vector, place = self.vectors[r, self.layers.index(layer)], self.layers.index(layer)
                edit = compiled_edit(block, layer, vector, self.strengths[r], norm=NORM, mean=self.mean[place])
                edits.append(row_edit(block, edit, Encoded("", tuple(tokens), 0), NEW))
            rows.append(Row(r, tokens, {}, tuple(edits)))
        live = block.scale == "stream_norm" and block.op not in UNSCALED
        sites = tuple(EditSite(layer, block.op, live) for layer in ordered)
        return assemble(Form(edits=sites, **form), rows, side)

    def written(self) -> np.ndarray:
        """Tokens [row, step] by nsteer's own program."""
        readouts = self.executor.run(self.program(decoding=Decoding(NEW, (), self.executor.pad)))
        self.receipts = readouts.receipts
        return np.array(readouts.tokens)

    def by_hooks(self, **more) -> np.ndarray:
        with nsteer.steer(self.module, **self.hooks) as self.steering:
            return continued(self.executor, self.program(), **more)


def continued(executor, program, **more) -> np.ndarray:
    """Tokens that the plain model generates, greedily."""
    inputs = tensors(program, executor.anatomy)["inputs"]
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": executor.pad, "eos_token_id": None, **more}
    with torch.no_grad():
        return plain(executor.name).generate(**given, **settings)[:, given["input_ids"].shape[1] :].numpy()


def stream(executor, program, layer: int) -> np.ndarray:
    """The residual stream after a block of the plain model, [row, position, d_model]."""
    seen = {}
    block = plain(executor.name).get_submodule(f"{executor.anatomy.blocks}.{layer}")
    handle = block.register_forward_hook(lambda m, i, o: seen.update(h=o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        plain(executor.name)(**tensors(program, executor.anatomy)["inputs"])
    handle.remove()
    return seen["h"].float().numpy()


def hooks_of(module) -> int:
    return sum(len(submodule._forward_hooks) + len(submodule._forward_pre_hooks) for submodule in module.modules())


# ---- the same as compiled programs -------------------------------------------------------------------------------


SCALED = [(op, scale) for op in OPS for scale in (SCALES if op not in UNSCALED else SCALES[:1])]


@pytest.mark.parametrize("family, how", spread(FAMILIES, SCALED))
def test_equal_tokens(executor_of, family, how):
    case = Case(executor_of(family), *how, skip=1)
    plain, tokens = continued(case.executor, case.program()), case.by_hooks()
    np.testing.assert_array_equal(tokens, case.written())
    assert (tokens != plain).any(), "an edit that changes no token shows nothing"
    for layer, receipt in case.steering.receipts.items():
        touched, relative, cosine, injected = case.receipts[:, sorted(LAYERS).index(layer)].sum(0)
        assert receipt["touched"] == touched == sum(map(len, PROMPTS)) + 3 * (NEW - 1)
        told = [receipt[name] for name in ("relative_change", "cosine", "injected")]
        np.testing.assert_allclose(told, np.array([relative, cosine, injected]) / touched, rtol=1e-4)


@pytest.mark.parametrize("family, positions", spread(FAMILIES, ["all", "prompt", "generated", "last"]))
def test_equal_tokens_wherever_it_acts(executor_of, family, positions):
    case = Case(executor_of(family), "add", "stream_norm", positions)
    np.testing.assert_array_equal(case.by_hooks(), case.written())


@pytest.mark.parametrize("family, how", spread(FAMILIES, [(side, op) for side in ("left", "right") for op in OPS]))
def test_equal_streams(executor_of, family, how):
    """At the deeper of the steered layers, whatever the padding; and padding is not touched."""
    side, op = how
    case = Case(executor_of(family), op, "stream_norm", "last" if op == "add" else "prompt", skip=1)
    program = case.program(side, reads=(ReadSite(4, what="tokens"),))
    true = case.executor.run(program).streams
    with nsteer.steer(case.module, **case.hooks) as steering:
        streams = stream(case.executor, program, 4)
    real = program.arrays["attention_mask"].astype(bool)
    for row, whole in enumerate(true):
        np.testing.assert_array_equal(streams[row][real[row]], whole[0])
    touched = len(PROMPTS) if op == "add" else real.sum()
    assert {receipt["touched"] for receipt in steering.receipts.values()} == {touched}


def test_a_run_of_a_plan_and_hooks_write_the_same(executor_of, tmp_path):
    """From the store that the plan filled: labels alone decide which layer gets which vector."""
    method = {"source": "comprehension", "samples": 3, "neutral_samples": 3, "pooling": "mean", "unit_norm": False}
    blocks = {
        "add": {"op": "add", "scale": "reference_norm", "layers": [3, 1], "strengths": [0.4], "norm_skip": 0},
        "affine": {"op": "affine", "scale": "stream_norm", "layers": [4, 2], "strengths": [0.3]},
        "moved": {"op": "add", "scale": "raw", "layers": [4, 1], "strengths": [6.0], "vectors": {"layer": 2}},
    }
    prompts = {"one": "the old house was", "two": "tom ran"}
    steer = [
        {"name": name, "prompts": prompts, "generate": {"max_new_tokens": 8}, "controls": [], **block}
        for name, block in blocks.items()
    ]
    plan = {"name": "p", "models": ["zoo/llama"], "texts": "zoo", "emotions": ["happy", "sad"], "threads": 1}
    plan |= {"methods": {"read": method}, "steer": steer, "store": "p.zarr"}
    (tmp_path / "p.yaml").write_text(json.dumps(plan))
    assert not run_plan(tmp_path / "p.yaml").failures

    results, executor = nsteer.open("p.zarr"), executor_of("llama")
    vector = results.sel(model="zoo/llama", method="read", emotion="happy")
    neutral = results["activations", "zoo/llama"].nsteer.sel(model="zoo/llama", method="read", emotion="neutral")
    neutral = neutral.mean("sample").load()
    more = {"add": {"norm": neutral.token_norm}, "affine": {"mean": neutral.pooled}, "moved": {"vector_layer": 2}}
    for name, block in blocks.items():
        how = {key: block[key] for key in ("op", "scale", "layers")} | more[name]
        for prompt, text in prompts.items():
            ids = executor.tokenizer(text, return_tensors="pt")["input_ids"]
            with nsteer.steer(plain(executor.name), vector, strength=block["strengths"][0], **how), torch.no_grad():
                new = plain(executor.name).generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=executor.pad)
            continuation = executor.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
            where = {
                "op": name,
                "emotion": "happy",
                "prompt": prompt,
                "control": "none",
                "strength": block["strengths"][0],
            }
            kept = results["generations"].text.nsteer.sel(**where).values.ravel().tolist()
            assert [stored_text for stored_text in kept if stored_text] == [continuation]


# ---- rows, nesting, leaving --------------------------------------------------------------------------------------


def test_a_batch_gives_what_its_rows_give_alone(executor_of):
    case = Case(executor_of("gpt2"), "add", "unit")
    together = case.by_hooks()
    for row, tokens in enumerate(PROMPTS):
        vector = labelled(case.vectors[row], LAYERS)
        given = {**case.hooks, "vector": vector, "strength": case.strengths[row]}
        with nsteer.steer(case.module, **given), torch.no_grad():
            ids = torch.tensor([tokens])
            new = case.module.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        np.testing.assert_array_equal(new[0, len(tokens) :].numpy(), together[row])


def test_rows_of_one_prompt_share_its_vector(executor_of):
    """Beams and samples: `generate` repeats every row; the first beam of a greedy search over one beam is greedy."""
    case = Case(executor_of("llama"), "add", "unit")
    twice = case.by_hooks(num_return_sequences=2, do_sample=True, top_k=1)
    np.testing.assert_array_equal(twice, np.repeat(case.written(), 2, 0))


def test_contexts_nest_the_outer_first(executor_of):
    executor = executor_of("llama")
    program = Case(executor, "add", "unit").program(reads=(ReadSite(4, what="tokens"),))
    first, second = drawn(5, executor.anatomy.d_model), drawn(6, executor.anatomy.d_model)
    add = {"layers": [2], "op": "add", "scale": "unit", "strength": 50.0}
    out = {"layers": [2], "op": "project_out", "strength": 1.0}

    def after(*edits) -> np.ndarray:
        from contextlib import ExitStack

        with ExitStack() as stack:
            for vector, how in edits:
                stack.enter_context(nsteer.steer(plain(executor.name), torch.from_numpy(vector), **how))
            return stream(executor, program, 2)

    unit = first / np.linalg.norm(first)
    real = program.arrays["attention_mask"].astype(bool)
    bare = after()
    assert np.abs(after((first, add), (first, out))[real] @ unit).max() < 1e-3 < np.abs(bare[real] @ unit).max()
    np.testing.assert_allclose((after((first, out), (first, add))[real] @ unit), 50.0, rtol=1e-4)
    both = after((first, add), (second, add)) - bare
    np.testing.assert_allclose(
        both[real], np.tile(50 * (unit + second / np.linalg.norm(second)), (real.sum(), 1)), atol=1e-3
    )
    assert (both[~real] == 0).all()


def test_hooks_are_gone_after_the_block_and_after_an_exception(executor_of):
    case = Case(executor_of("gpt2"), "add", "unit")
    before, plain = hooks_of(case.module), continued(case.executor, case.program())
    case.by_hooks()
    assert hooks_of(case.module) == before
    with pytest.raises(RuntimeError, match="mine"), nsteer.steer(case.module, **case.hooks):
        assert hooks_of(case.module) == before + 4 + len(LAYERS)  # around the model, and around its decoder
        raise RuntimeError("mine")
    with pytest.raises(SteerError), nsteer.steer(case.module, **{**case.hooks, "layers": [1, 0]}):
        pass
    assert hooks_of(case.module) == before
    np.testing.assert_array_equal(continued(case.executor, case.program()), plain)


def test_gradients_flow_through_an_edit(executor_of):
    executor = executor_of("llama")
    vector = torch.from_numpy(drawn(3, executor.anatomy.d_model))
    embedded = plain(executor.name).get_input_embeddings()(torch.tensor([[5, 9, 7]])).detach().requires_grad_()
    with nsteer.steer(plain(executor.name), vector, layers=[1], strength=0.2):
        plain(executor.name)(inputs_embeds=embedded).logits[0, -1, 3].backward()
    assert torch.isfinite(embedded.grad).all() and embedded.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["bloom", "gptj"])
def test_blocks_that_return_tuples(family, words):
    import tinies

    model, vector = tinies.model(family).eval(), torch.ones(32)
    seen = {}
    block = model.transformer.h[2]
    ids = torch.tensor([[5, 9, 7, 3]])

    def last() -> torch.Tensor:
        handle = block.register_forward_hook(lambda m, i, o: seen.update(h=o[0]))
        with torch.no_grad():
            model(ids)
        handle.remove()
        return seen["h"]

    plain = last()
    with nsteer.steer(model, vector, layers=[2], strength=1.0, scale="raw"):
        torch.testing.assert_close(last(), plain + 1)


# ---- caches, chunks, beams ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
@pytest.mark.parametrize("cache", [{"use_cache": False}, {"cache_implementation": "static"}], ids=["none", "static"])
def test_equal_tokens_whatever_the_cache(executor_of, cache, positions):
    """Of rows of unequal length, live, at layers [4, 1]; each position is counted once."""
    case = Case(executor_of("llama"), "add", "stream_norm", positions, skip=1)
    np.testing.assert_array_equal(case.by_hooks(**cache), case.written())
    for layer, receipt in case.steering.receipts.items():
        touched, relative, _, _ = case.receipts[:, sorted(LAYERS).index(layer)].sum(0)
        assert receipt["touched"] == touched
        np.testing.assert_allclose(receipt["relative_change"], relative / touched, rtol=1e-3)


def test_no_cache_by_the_models_own_configuration(executor_of, monkeypatch):
    case = Case(executor_of("gpt2"), "add", "stream_norm", "generated")
    true = case.written()
    monkeypatch.setattr(case.module.generation_config, "use_cache", False)
    np.testing.assert_array_equal(case.by_hooks(), true)


def test_an_assistant_changes_nothing(executor_of):
    """Its candidates come several at once, behind the prompt in the first pass; those refused are read again."""
    case = Case(executor_of("llama"), "add", "unit", "generated")
    for row, tokens in enumerate(PROMPTS):
        given = {**case.hooks, "vector": labelled(case.vectors[row], LAYERS), "strength": case.strengths[row]}
        continuations = []
        for more in ({}, {"prompt_lookup_num_tokens": 3}):
            with nsteer.steer(case.module, **given), torch.no_grad():
                ids = torch.tensor([tokens + tokens])
                continuations.append(
                    case.module.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **more)
                )
        assert torch.equal(*continuations)


def test_a_prompt_in_several_passes_is_refused_or_edited_alike(executor_of):
    case = Case(executor_of("llama"), "add", "unit")
    np.testing.assert_array_equal(case.by_hooks(prefill_chunk_size=2), case.written())
    for scale, positions in (("stream_norm", "all"), ("unit", "generated"), ("unit", "last"), ("unit", "prompt")):
        case = Case(executor_of("llama"), "add", scale, positions)
        with pytest.raises(SteerError, match="2 positions after 2 that the model has read"):
            case.by_hooks(prefill_chunk_size=2)
        assert "generate" not in vars(case.module)


def test_beams_of_a_prompt_share_its_edit(executor_of):
    """Against beams over rows of one prompt, one row at a time."""
    case = Case(executor_of("llama"), "add", "stream_norm", skip=1)
    together = case.by_hooks(num_beams=3)
    for row, tokens in enumerate(PROMPTS):
        given = {**case.hooks, "vector": labelled(case.vectors[row], LAYERS), "strength": case.strengths[row]}
        with nsteer.steer(case.module, **given), torch.no_grad():
            how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "num_beams": 3}
            new = case.module.generate(torch.tensor([tokens]), **how)
        np.testing.assert_array_equal(new[0, len(tokens) :].numpy(), together[row])


def test_multimodal_gemma_3(words):
    """Its outer model makes the attention masks of its decoder; the text alone is the oracle's."""
    import transformers

    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    text = dict(small, num_hidden_layers=6, vocab_size=len(words), sliding_window=16, max_position_embeddings=128)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(image_size=28, patch_size=14)
    ids = dict(image_token_index=5, boi_token_index=6, eoi_token_index=7, mm_tokens_per_image=4)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Gemma3ForConditionalGeneration(config).eval()
        for p in model.parameters():
            p.data += 0.2 * torch.randn_like(p) if p.ndim > 1 else 0
    vector = torch.from_numpy(drawn(1, 32))
    blocks = model.get_submodule("model.language_model.layers")

    def push(module, given, output):
        return output + 90 * vector / vector.norm() if output.shape[1] == 1 else output

    rows = [(50, 51, 52, 53, 54, 55, 56), (60, 61, 62)]
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([rows[0], (0,) * 4 + rows[1]])
    mask = torch.tensor([[1] * 7, [0] * 4 + [1] * 3])
    with nsteer.steer(model, vector, [5, 2], strength=90.0, scale="unit", positions="generated"), torch.no_grad():
        continuations = model.generate(ids, attention_mask=mask, **how)[:, 7:]
    for row, tokens in enumerate(rows):
        handles = [blocks[layer].register_forward_hook(push) for layer in (5, 2)]
        with torch.no_grad():
            true = model.generate(torch.tensor([tokens]), **how)[0, len(tokens) :]
            for handle in handles:
                handle.remove()
            assert not torch.equal(true, model.generate(torch.tensor([tokens]), **how)[0, len(tokens) :])
        assert torch.equal(continuations[row], true)


def test_a_stream_that_overflows_is_an_error(executor_of):
    module = plain("gpt2")
    loud = nsteer.steer(module, FIVE, strength=1e38, scale="stream_norm")
    with pytest.raises(EditError, match="the edited stream is not finite"), torch.no_grad(), loud:
        module(torch.ones(3, 4, dtype=torch.long))


def test_one_row_of_which_nothing_moves_is_an_error(executor_of):
    vectors = labelled(drawn(1, 2, 1, WIDTH), [2], row=range(2))
    lost = nsteer.steer(plain("gpt2"), vectors, strength=[0.5, 1e-30])
    with pytest.raises(EditError, match=r"layer 2, row 1: the edit changed nothing"), torch.no_grad(), lost:
        plain("gpt2")(torch.ones(2, 4, dtype=torch.long))


def test_a_stream_of_another_layout_is_refused():
    import tinies

    model = tinies.model("llama").eval()
    model.model.layers[2].register_forward_hook(lambda m, a, out: out.transpose(0, 1))
    turned = nsteer.steer(model, torch.ones(32), [2], strength=1.0)
    with pytest.raises(AnatomyError, match=r"layer 2 gives \(4, 3, 32\), not \[row, position, d_model\]"), turned:
        model(torch.ones(3, 4, dtype=torch.long))


# ---- what is refused ---------------------------------------------------------------------------------------------

WIDTH = 96
FIVE = labelled(drawn(1, 2, WIDTH), [5, 2])


@pytest.mark.parametrize(
    ("vector", "how", "words"),
    [
        (np.ones(WIDTH), {}, "name those to be steered"),
        (np.ones(WIDTH), {"layers": 6}, "layer 6 of a model with 6 layers"),
        (np.ones(WIDTH), {"layers": "x"}, "layers: expected an index (5, -1)"),
        (np.ones(WIDTH - 1), {"layers": 1}, "width 95 for a model with d_model 96"),
        (np.ones((2, 3, WIDTH)), {"layers": 1}, "expected [d_model], or [row, d_model]"),
        (np.zeros(WIDTH), {"layers": 1}, "the vector is 0 at layer 1"),
        (FIVE * np.nan, {}, "the vector has missing values (NaN) or infinite ones at layer"),
        (FIVE, {"layers": [2, 3]}, "layer 3: the vector has layers 5, 2"),
        (FIVE, {"vector_layer": 3, "layers": [2]}, "layer 3: the vector has layers 5, 2"),
        (FIVE.rename(layer="block"), {"layers": [2]}, None),
        (FIVE.expand_dims(a=2, b=2), {}, "at most one dim of rows"),
        (FIVE.drop_vars("layer"), {}, "dim 'layer' has no labels"),
        (FIVE, {"op": "ad"}, "found 'ad' (did you mean 'add'?)"),
        (
            FIVE,
            {"scale": "norm"},
            "scale: expected one of 'raw', 'unit', 'stream_norm', 'reference_norm', found 'norm'",
        ),
        (
            FIVE,
            {"positions": "last token"},
            "positions: expected one of 'all', 'prompt', 'generated', 'last', found 'last token'",
        ),
        (FIVE, {"op": "set_mean"}, "mean: 'set_mean' needs it"),
        (FIVE, {"mean": np.ones(WIDTH)}, "mean: 'add' has no use for it"),
        (FIVE, {"scale": "reference_norm"}, "norm: 'reference_norm' needs it"),
        (FIVE, {"strength": [1.0, np.nan]}, "strength: expected a number, found nan"),
        (FIVE, {"strength": "much"}, "str is no number"),
        (np.ones((2, WIDTH)), {"layers": 1, "strength": [1.0, 2.0, 3.0]}, "expected one each, or one a row"),
    ],
)
def test_what_does_not_fit_is_said(executor_of, vector, how, words):
    module, before = plain("gpt2"), hooks_of(plain("gpt2"))
    if words is None:  # any dim that is not (layer, d_model) counts rows; without layers they must be named
        with nsteer.steer(module, vector, strength=1.0, **how):
            assert hooks_of(plain("gpt2")) == before + 4 + 1
        return
    with pytest.raises(SteerError) as error, nsteer.steer(module, vector, **{"strength": 1.0, **how}):
        pass
    assert words in str(error.value)
    assert hooks_of(plain("gpt2")) == before


REFUSED = [
    {"op": "ad", "scale": "norm"},
    {"op": "project_out", "scale": "unit"},
    {"op": "set_mean", "scale": "reference_norm"},
    {"op": "rotate", "scale": "stream_norm"},
    {"scale": "raw", "norm_skip": 1},
    {"norm_skip": -1},
    {"norm_skip": 1.5},
    {"scale": "unit", "norm_skip": True},
    {"positions": "first"},
    {"positions": []},
    {"positions": [1, "x"]},
    {"positions": {"from": 3, "to": 2}},
    {"positions": {}},
    {"layers": "x"},
    {"layers": 1.5},
]


@pytest.mark.parametrize("how", REFUSED, ids=repr)
def test_what_a_plan_refuses_is_refused_in_its_words(how, tmp_path):
    block = {"prompts": ["a"], "strengths": [1.0], "generate": {"max_new_tokens": 4}, "controls": [], **how}
    plan = {"name": "p", "models": ["zoo/gpt2"], "texts": "zoo", "methods": {"read": "anthropic2026"}, "steer": block}
    with pytest.raises(PlanError) as refused:
        nsteer.load({**plan, "emotions": ["happy", "sad"], "store": str(tmp_path / "s.zarr")})
    told = [problem for problem in refused.value.problems if problem.path.startswith("steer")]
    plans = [str(replace(problem, path=problem.path.removeprefix("steer."), file="", line=0)) for problem in told]
    with pytest.raises(SteerError) as error, nsteer.steer(plain("gpt2"), FIVE, strength=1.0, **how):
        pass
    assert sorted(str(error.value).splitlines()) == sorted(plans) != []


@pytest.mark.parametrize("positions", [1, -2, [0, -1], {"from": 1, "to": 4}, {"from": -2}, {"ids": [7, 30]}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_by_number_are_those_of_a_plan(executor_of, side, positions):
    case = Case(executor_of("llama"), "add", "stream_norm", positions, skip=1)
    program = case.program(side, reads=(ReadSite(4, what="tokens"),))
    true = case.executor.run(program)
    with nsteer.steer(case.module, **case.hooks) as steering:
        streams = stream(case.executor, program, 4)
    real = program.arrays["attention_mask"].astype(bool)
    for row, whole in enumerate(true.streams):
        np.testing.assert_array_equal(streams[row][real[row]], whole[0])
    touched = true.receipts[:, sorted(LAYERS).index(4), 0].sum()
    assert steering.receipts[4]["touched"] == touched > 0


@pytest.mark.parametrize(
    ("positions", "words"),
    [({"text": "a"}, "a batch has none"), ({"generated": {"to": 2}}, "a call does not count them")],
)
def test_positions_that_no_call_can_tell_are_refused(positions, words):
    with pytest.raises(SteerError, match=words), nsteer.steer(plain("gpt2"), FIVE, strength=1.0, positions=positions):
        pass


def test_holes_of_a_labelled_vector_are_left_out_unless_named(executor_of):
    module, vector = plain("gpt2"), FIVE.reindex(layer=[5, 3, 2])
    with nsteer.steer(module, vector, strength=1.0) as steering:
        assert set(steering.edits) == {5, 2}
    with pytest.raises(SteerError, match="missing values"), nsteer.steer(module, vector, [3, 2], strength=1.0):
        pass
    with nsteer.steer(module, vector.sel({"layer": 2}), strength=1.0) as steering:  # one layer knows its own
        assert set(steering.edits) == {2}


def test_a_batch_of_other_rows_is_refused(executor_of):
    module = plain("gpt2")
    two = nsteer.steer(module, np.ones((2, WIDTH)), 1, strength=1.0)
    with pytest.raises(SteerError, match="a batch of 3 rows, steered by 2"), torch.no_grad(), two:
        module(torch.ones(3, 4, dtype=torch.long))


def test_an_edit_that_did_nothing_is_an_error(executor_of):
    module = plain("gpt2")
    later = nsteer.steer(module, FIVE, strength=1.0, positions="generated")
    with pytest.raises(EditError, match="the edit touched no position"), torch.no_grad(), later:
        module(torch.ones(3, 4, dtype=torch.long))
    with nsteer.steer(module, FIVE, strength=0.0), torch.no_grad():  # asked for
        module(torch.ones(3, 4, dtype=torch.long))
    with nsteer.steer(module, FIVE, strength=1.0):  # the model did not run
        pass


def test_no_model_no_steering():
    with (
        pytest.raises(SteerError, match="Linear is no causal language model"),
        nsteer.steer(torch.nn.Linear(2, 2), FIVE, strength=1.0),
    ):
        pass
