"""Sites in a block: they are what the stream is made of, and edits there are those of plain hooks (tests/oracle.py)."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import oracle
import pytest
import test_oracle as base
import tinies
import torch
from oracle import Push
from test_oracle import close, direction, form_of, greedy, parts, row_edit, run, texts
from test_runner import finished
from test_runner import run as conduct

from nsteer.errors import ProgramError, SiteError
from nsteer.executors import skeleton
from nsteer.executors.common import readouts, tensors
from nsteer.executors.local import Local
from nsteer.executors.ndif import Ndif
from nsteer.plan import reader
from nsteer.program import code
from nsteer.program.anatomy import Anatomy, multiplied, narrowed, prove, unknown
from nsteer.program.form import SITES, EditSite, Form, ReadSite, Row, assemble, halves
from nsteer.program.randomness import unit_vector
from nsteer.program.sublayers import Sublayer, adds_up, factors
from nsteer.store import Store

FAST = ("llama", "gemma")


def slow(names, fast):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=[*slow(tinies.FAMILIES, FAST), *slow(["zoo/gemma", "gptj", "cohere", "bloom"], ("gptj",))])
def model(request, tiny, zoo_model):
    """An executor, its blocks, and the names of what they add to the stream."""
    zoo, _, name = request.param.rpartition("/")
    executor = zoo_model(name) if zoo else tiny(name)
    module, blocks = parts(executor)
    inside = tinies.NORMED if zoo else tinies.INSIDE[name]
    return executor, module, blocks, inside


def layers_of(executor) -> list[int]:
    return [5, 2] if executor.anatomy.n_layers > 5 else [3, 1]


def everywhere(executor, i: int) -> list[Push]:
    """An edit at every site of two layers, in the order of a forward; another for every row."""
    d, (deep, low) = executor.anatomy.d_model, layers_of(executor)
    where = ("all", "generated", "prompt", "last")[i % 4]
    pushes = [
        Push(low, "add", 3 * direction(d, i), 1.0 + i, positions=where, site="resid_pre"),
        Push(low, "add", direction(d, 10 + i), 0.5, live=True, skip=1, site="attn_out"),
        Push(low, "project_out", direction(d, 20), 1.0, site="mlp_out"),
        Push(low, "add", 2 * direction(d, 30 + i), 1.0, site="mlp_out", positions=where),
        Push(deep, "rotate", direction(d, 40), 50.0, site="attn_out"),
        Push(deep, "clamp", direction(d, 50 + i), 2.0, gate=direction(d, 60), low=0.0, site="resid_post"),
    ]
    return pushes


def site_of(push: Push) -> EditSite:
    return replace(base.site_of(push), site=push.site)


def edits_of(executor) -> tuple[EditSite, ...]:
    return tuple(map(site_of, everywhere(executor, 0)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_reads_at_every_site_under_edits_at_every_site(model, side):
    executor, module, blocks, inside = model
    where = [(layer, site) for layer in sorted(layers_of(executor)) for site in SITES]
    reads = [ReadSite(layer, "text", "tokens", site) for layer, site in where]
    pooled = [ReadSite(layer, "text", "pooled", site) for layer, site in where]
    both = tuple(read for pair in zip(reads, pooled, strict=True) for read in pair)
    form = Form(reads=both, edits=edits_of(executor))
    rows = [
        Row(i, t, {"text": np.full(len(t), 1 / len(t))}, tuple(row_edit(e, t) for e in everywhere(executor, i)))
        for i, t in enumerate(texts(executor))
    ]
    for row, arrays in zip(rows, run(executor, form, rows, side), strict=True):
        truth = oracle.forward(module, blocks, row.tokens, everywhere(executor, row.key), inside=inside)
        for k, (layer, site) in enumerate(where):
            wanted = truth.streams[layer] if site == "resid_post" else truth.sites[layer, site]
            close(arrays["streams"][k], wanted, 2e-5)
            close(arrays["pooled"][k], wanted.mean(0), 2e-5)
        np.testing.assert_allclose(arrays["receipts"], truth.receipts, rtol=1e-3, atol=1e-3)


def test_cached_decoding_under_edits_at_every_site(model):
    executor, module, blocks, inside = model
    prompts = texts(executor)
    edits = [everywhere(executor, i) for i in range(len(prompts))]

    def true(i, eos=()):
        return oracle.generate(module, blocks, prompts[i], edits[i], new=base.NEW, eos=eos, inside=inside)

    ends = [true(1).tokens[3]]
    form = Form(edits=edits_of(executor), decoding=greedy(executor, eos=ends), top=executor.anatomy.vocab)
    rows = [Row(i, t, edits=tuple(row_edit(e, t) for e in edits[i])) for i, t in enumerate(prompts)]
    whole = assemble(form, rows)
    truths = [true(i, ends) for i in range(len(prompts))]
    for program in (whole, *halves(whole)):
        readout = executor.run(program)
        for place, i in enumerate(program.keys):
            base.agrees(readout.row(place), truths[i])
    plain = (oracle.generate(module, blocks, t, new=base.NEW, eos=ends).tokens for t in prompts)
    assert any(truth.tokens != tokens for truth, tokens in zip(truths, plain, strict=True))


def test_the_stream_is_the_sum_of_what_is_read(model):
    executor = model[0]
    layers = sorted(layers_of(executor))
    form = Form(reads=tuple(ReadSite(layer, "text", "tokens", site) for layer in layers for site in SITES))
    rows = [Row(i, t, {"text": np.ones(len(t))}) for i, t in enumerate(texts(executor))]
    for arrays in run(executor, form, rows):
        for before, attention, mlp, after in arrays["streams"].reshape(len(layers), 4, *arrays["streams"].shape[1:]):
            close(before + attention + mlp, after)
            assert min(np.abs(attention).max(), np.abs(mlp).max()) > 1e-3 * np.abs(after).max()


@pytest.mark.parametrize("site", SITES)
def test_what_is_added_comes_into_the_stream_unchanged(model, site):
    """Added at the last site of a block, or before it, the vector itself is in the stream after the block's sum."""
    executor = model[0]
    d, layer = executor.anatomy.d_model, layers_of(executor)[0]
    push = Push(layer, "add", 4 * direction(d, 3), 1.0, site=site)
    reads = tuple(ReadSite(layer, "text", "tokens", place) for place in SITES)
    tokens = texts(executor)
    plain = run(executor, Form(reads=reads), [Row(i, t, {"text": np.ones(len(t))}) for i, t in enumerate(tokens)])
    rows = [Row(i, t, {"text": np.ones(len(t))}, (row_edit(push, t),)) for i, t in enumerate(tokens)]
    pushed = run(executor, Form(reads=reads, edits=(site_of(push),)), rows)
    for unsteered, other in zip(plain, pushed, strict=True):
        moved = other["streams"] - unsteered["streams"]
        at = SITES.index(site)
        np.testing.assert_allclose(moved[at], np.broadcast_to(push.vector, moved[at].shape), atol=2e-4)
        assert np.abs(moved[:at]).max(initial=0.0) == 0
        parts = moved[0] + moved[1] + moved[2] + (push.vector if site == "resid_post" else 0)
        np.testing.assert_allclose(moved[3], parts, atol=2e-3)


def test_the_input_of_a_block_is_the_output_of_the_one_before(tiny):
    executor = tiny("qwen")
    reads = (ReadSite(2, "text", "tokens"), ReadSite(3, "text", "tokens", "resid_pre"))
    rows = [Row(i, t, {"text": np.ones(len(t))}) for i, t in enumerate(texts(executor))]
    for arrays in run(executor, Form(reads=reads), rows):
        np.testing.assert_array_equal(*arrays["streams"])


# ---- what is proved, and what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", tinies.ALL)
def test_what_adds_up_is_found_in_every_architecture(name):
    anatomy = prove(tinies.model(name))
    if name in tinies.UNSITED:
        assert (anatomy.attention, anatomy.mlp, anatomy.proved) == (None, None, False)
    else:
        assert (anatomy.attention.path, anatomy.mlp.path) == tinies.INSIDE[name] and anatomy.proved
        factor = tinies.FACTORS.get(name, 1.0)
        assert (anatomy.attention.factor, anatomy.mlp.factor) == (factor, factor)
        assert anatomy.attention.elsewhere == anatomy.mlp.elsewhere == ()


def test_a_block_that_adds_otherwise_than_the_others_has_no_sites():
    """Nor is a module taken whose output is not what is added."""
    model = tinies.model("llama")
    for block in model.model.layers:
        block.mlp.register_forward_hook(lambda m, a, out: out * 1.0)
    assert prove(model).mlp == Sublayer("mlp")
    last = model.model.layers[3]
    plain = last.forward

    def twice(hidden_states, **more):
        return plain(hidden_states, **more) + 0.5 * hidden_states

    last.forward = twice
    assert prove(model).mlp is None


@pytest.mark.parametrize("seed", range(20))  # least squares meets its rounding: one draw in some shows it
def test_a_sum_is_only_proved_where_each_part_counts(seed):
    torch.manual_seed(seed)
    x = torch.randn(1, 3, 8)
    a, m = torch.randn_like(x), torch.randn_like(x)
    assert adds_up(x, a, m, x + a + m)
    assert adds_up(x.bfloat16(), a.bfloat16(), m.bfloat16(), x.bfloat16() + a.bfloat16() + m.bfloat16())
    assert not adds_up(x, a, 0 * m, x + a)
    assert not adds_up(x, 0 * a, m, x + m)
    assert not adds_up(x, a, 0.5 * m, x + a + m)
    assert not adds_up(x, a, m, x + a + m + 1e-3)
    assert factors(x, a, 0.5 * m, x + a + m) == pytest.approx((1, 2))
    assert factors(x, a, m, x + 0.22 * a + 0.22 * m) == pytest.approx((0.22, 0.22))
    assert factors(x, a, m, 0.7 * (x + a + m)) == pytest.approx((1, 1))
    for wrong in (x + a, x + m, x - a + m, x + a + m + 1e-3, x + a * m, a + m):
        assert factors(x, a, m, wrong) is None
    assert narrowed(x.bfloat16().float()).dtype == torch.bfloat16 and narrowed(x).dtype == torch.float32


@pytest.mark.parametrize("name", tinies.UNSITED)
def test_a_site_that_is_not_proved_is_refused_by_name(tiny, name):
    executor = tiny(name)
    row = Row(0, (8, 9, 10), {"text": np.ones(3)})
    with pytest.raises(SiteError, match="this model has no attn_out that is known"):
        executor.run(assemble(Form(reads=(ReadSite(1, "text", "pooled", "attn_out"),)), [row]))
    readout = executor.run(assemble(Form(reads=(ReadSite(1, "text", "pooled", "resid_pre"),)), [row]))
    before = oracle.forward(*parts_of(name, executor), row.tokens).streams[0]
    close(readout.pooled[0, 0], before.sum(0))


def parts_of(name, executor):
    return executor.module, tinies.blocks(name, executor.module)


PLAIN = Anatomy("model.layers", "lm_head", "model.embed_tokens", 4, 32, 320, attention=Sublayer("self_attn", True))


def test_sites_stand_in_forward_order_in_the_text():
    known = replace(PLAIN, mlp=Sublayer("mlp"))
    reads = tuple(ReadSite(layer, "text", "pooled", site) for layer in (1, 3) for site in SITES)
    text = code.write(Form(reads=reads), known)
    order = [line.strip() for line in text.splitlines() if line.strip().startswith("h = model")]
    tail = [".input", ".self_attn.output[0]", ".mlp.output", ".output"]
    assert order == [f"h = model.model.layers[{layer}]{end}" for layer in (1, 3) for end in tail]


@pytest.mark.parametrize(
    "form, error, words",
    [
        (Form(reads=(ReadSite(1), ReadSite(1, site="mlp_out"))), ProgramError, "forward order"),
        (Form(edits=(EditSite(1, "add"), EditSite(1, "add", site="resid_pre"))), ProgramError, "forward order"),
        (Form(reads=(ReadSite(1, site="evil()"),)), ProgramError, "none of resid_pre"),
        (Form(reads=(ReadSite(1, site="mlp_out"),)), SiteError, "no mlp_out that is known"),
    ],
)
def test_a_site_that_means_nothing_is_refused(form, error, words):
    with pytest.raises(error, match=words):
        code.write(form, PLAIN)


def test_a_path_of_a_sublayer_that_is_none_is_refused():
    with pytest.raises(ProgramError, match="is not a path"):
        code.write(Form(reads=(ReadSite(1, site="attn_out"),)), replace(PLAIN, attention=Sublayer("x; evil()")))


def test_what_is_not_known_is_said():
    assert unknown(PLAIN, ["resid_pre", "attn_out", "resid_post"]) == ""
    assert "no mlp_out" in unknown(PLAIN, ["mlp_out"])
    assert multiplied(PLAIN, SITES) == ""
    scaled = replace(PLAIN, attention=replace(PLAIN.attention, factor=0.22))
    assert "(attn_out by 0.22)" in multiplied(scaled, SITES) and multiplied(scaled, ["resid_post", "mlp_out"]) == ""
    assert form_of([]).sites == ()


# ---- models without weights ---------------------------------------------------------------------------------------


class Served(Ndif):
    """A model without weights whose programs are run by a local executor, as a server would."""

    def __init__(self, folder, here: Local):
        settings = {"revision": None, "trust_remote_code": False}
        self.model, self.tokenizer = skeleton.build(str(folder), None, None, settings)
        self.anatomy = skeleton.outline(self.model)
        self._proved: set[int] = set()
        self.here, self.ran = here, []

    def _sent(self, programs):
        for program in programs:
            self.ran.append(program)
            text = code.write(program.form, self.anatomy)
            yield program, readouts(program, code.load(text)(self.here.model, tensors(program, self.anatomy)))


@pytest.mark.parametrize("name", ["llama", "gemma", "bloom", "granite"])
def test_without_weights_sites_are_proved_when_a_program_needs_them(tiny, folder, name):
    here, there = tiny(name), Served(folder(name), tiny(name))
    assert not there.anatomy.proved
    rows = [Row(i, t, {"text": np.ones(len(t))}) for i, t in enumerate(texts(here))]
    plain = assemble(Form(reads=(ReadSite(1, site="resid_pre"),)), rows)
    there.run(plain)
    assert len(there.ran) == 1
    form = Form(reads=tuple(ReadSite(layer, site=site) for layer in (1, 3) for site in SITES))
    program = assemble(form, rows)
    if name == "bloom":  # its names say nothing of modules that add the stream themselves
        with pytest.raises(SiteError, match="layer 1: what 'self_attention' and 'mlp' give, which are taken by name"):
            there.run(program)
        return
    np.testing.assert_array_equal(there.run(program).pooled, here.run(program).pooled)
    there.run(program)
    assert [batch.keys for batch in there.ran] == [plain.keys, ("proof",), program.keys, program.keys]
    there.run(assemble(Form(reads=(ReadSite(2, site="mlp_out"),)), rows))
    assert [batch.keys for batch in there.ran][4:] == [("proof",), program.keys]


# ---- from a plan to a store ----------------------------------------------------------------------------------------

PLAN = {
    "name": "sites",
    "texts": "zoo",
    "emotions": ["happy", "sad"],
    "methods": {"read": {"source": "comprehension", "samples": 2, "neutral_samples": 1, "pooling": "mean"}},
    "steer": [
        {
            "name": f"at-{site}",
            "site": site,
            "op": "add",
            "scale": "unit",
            "strengths": [3.0],
            "layers": [3, 1],
            "prompts": {"long": "the cat sat on the warm mat and", "short": "rain fell"},
            "generate": {"max_new_tokens": 5},
        }
        for site in ("attn_out", "resid_post")
    ],
    "prompts": {"long": "the cat sat on the warm mat and", "short": "rain fell", "third": "a happy girl sang"},
    "reads": {
        "added": {"site": "mlp_out", "layers": [3, 1]},
        "into": {"site": "resid_pre", "layers": [3, 1]},
        "out": {"layers": [3, 1], "pooling": "last"},
        "mixed": {"layers": [3, 1], "pooling": "last", "site": "attn_out"},
    },
    "directions": {"d": {"random": 4}},
    "edits": {
        "push": [
            {"op": "add", "direction": "d", "layers": [1], "strength": 2.0, "site": "mlp_out"},
            {"op": "add", "direction": "d", "layers": [1], "strength": 3.0, "site": "resid_pre"},
        ]
    },
    "threads": 1,
}


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("sites"), PLAN, folder("gemma"))


def test_streams_in_the_store_are_those_of_their_sites(stored, tiny):
    store, _ = stored
    executor = tiny("gemma")
    module, blocks = executor.module, tinies.blocks("gemma", executor.module)
    tokenizer = executor.tokenizer
    for edit in ("none", "push"):
        for label, text in PLAN["prompts"].items():
            tokens = tokenizer(text)["input_ids"]
            pushes = []
            if edit == "push":
                vector = unit_vector(executor.anatomy.d_model, 4, "d")
                pushes = [Push(1, "add", vector, 3.0, site="resid_pre"), Push(1, "add", vector, 2.0, site="mlp_out")]
            truth = oracle.forward(module, blocks, tokens, pushes, inside=tinies.NORMED)
            at = {"model": "gemma", "edit": edit, "strength": 2.0 if edit == "push" else 0, "prompt": label}
            streams, reads = (store.read(f"{product}/gemma").stream.sel(at) for product in ("streams", "reads"))
            for layer in (3, 1):
                for name, site in (("added", "mlp_out"), ("into", "resid_pre")):
                    kept = streams.sel({"read": name, "layer": layer}).values[: len(tokens)]
                    close(kept, truth.sites[layer, site], 2e-5)
                close(reads.sel({"read": "out", "layer": layer}).values, truth.streams[layer][-1], 2e-5)
                close(reads.sel({"read": "mixed", "layer": layer}).values, truth.sites[layer, "attn_out"][-1], 2e-5)


def test_sites_are_labels_where_they_vary(stored):
    store, _ = stored
    labels = {
        "steering": ("op", {"at-attn_out": "attn_out", "at-resid_post": "resid_post"}),
        "streams/gemma": ("read", {"added": "mlp_out", "into": "resid_pre"}),
        "reads/gemma": ("read", {"mixed": "attn_out", "out": "resid_post"}),
    }
    for path, (dim, wanted) in labels.items():
        site = store.read(path).site
        assert dict(zip(site[dim].values.tolist(), site.values.tolist(), strict=True)) == wanted
    receipts = store.read("stream_receipts/gemma")
    assert receipts.site.sel({"edit": "push"}).values.tolist() == ["mlp_out", "resid_pre"]
    assert receipts.site.sel({"edit": "none"}).values.tolist() == ["", ""]
    touched = receipts.touched.sel({"edit": "push", "strength": 2.0, "read": "into", "layer": 1, "model": "gemma"})
    assert (touched.sel({"prompt": "short"}).values > 0).all()


def test_steering_at_another_site_gives_other_texts(stored):
    texts = stored[0].read("generations").text.sel({"control": "none", "model": "gemma"}).squeeze()
    at = {op: texts.sel({"op": op}).values.tolist() for op in ("at-attn_out", "at-resid_post")}
    assert at["at-attn_out"] != at["at-resid_post"]


def test_what_is_finished_stays_finished(stored):
    summary = conduct(stored[1])
    assert sum(summary.done.values()) == 0 and not summary.failures


def test_only_other_sites_have_other_fingerprints(stored):
    from nsteer.plan import check
    from nsteer.stages import cells
    from nsteer.stages.job import Job

    def fingerprints(**changes):
        plan = json.loads(stored[1].read_text())
        for path, value in changes.items():
            part, *rest = path.split("__")
            plan[part] = {**plan[part], rest[0]: value} if rest else value
        study = check.study(reader.parse(json.dumps(plan), "p.yaml"))
        return cells.reads(Job(study, study.facts[0])), cells.steering(Job(study, study.facts[0]))

    base, grid = fingerprints()
    changed, _ = fingerprints(reads__out={"layers": [3, 1], "pooling": "last", "site": "resid_pre"})
    assert {(key.read, key.edit) for key in base if base[key] != changed[key]} == {("out", "none"), ("out", "push")}
    numbers = {key.op: value for key, value in grid.items()}
    assert numbers["at-attn_out"] != numbers["at-resid_post"]


def test_a_model_without_the_site_fails_by_name(folder, tmp_path):
    reads = {"plain": {"layers": [3, 1], "pooling": "last"}, "inside": {"layers": [1], "site": "mlp_out"}}
    plan = {"name": "x", "models": [str(folder("opt"))], "store": "x.zarr", "prompts": ["rain fell"], "threads": 1}
    (tmp_path / "x.yaml").write_text(json.dumps({**plan, "reads": reads}))
    summary = conduct(tmp_path / "x.yaml")
    assert [failure.reason for failure in summary.failures] == [unknown(Anatomy("", "", "", 1, 1, 1), ["mlp_out"])]
    assert Store("x.zarr").committed("reads/opt") and not Store("x.zarr").committed("streams/opt")


def test_a_model_that_multiplies_what_it_adds_is_read_before_that_and_says_so(folder, tmp_path):
    plan = {"name": "x", "models": [str(folder("granite"))], "store": "x.zarr", "threads": 1}
    prompts = {"long": "rain fell on the garden wall", "short": "tom read"}
    sites = dict(zip(("before", "attention", "mlp", "after"), SITES, strict=True))
    reads = {name: {"layers": [3, 1], "site": site} for name, site in sites.items()}
    (tmp_path / "x.yaml").write_text(json.dumps({**plan, "prompts": prompts, "reads": reads}))
    summary = conduct(tmp_path / "x.yaml")
    said = "its blocks multiply what they add to the stream (attn_out by 0.5, mlp_out by 0.5)"
    assert not summary.failures and [warning for warning in summary.warnings if said in warning]
    store = Store("x.zarr")
    stream = store.read("streams/granite").stream.sel({"edit": "none", "strength": 0}).squeeze("model")
    parts = {name: stream.sel({"read": name}).values for name in sites}
    np.testing.assert_allclose(
        parts["before"] + 0.5 * (parts["attention"] + parts["mlp"]), parts["after"], atol=1e-5, equal_nan=True
    )
    assert '"site_factors": {"attn_out": 0.5, "mlp_out": 0.5}' in store.read("models").settings.values[0]


HYBRIDS = {
    "qwen3_next": dict(
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=8,
        layer_types=["linear_attention", "full_attention"] * 3,
    ),
    "falcon": dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True, alibi=False),
    "falcon_h1": dict(
        mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_chunk_size=16,
        attention_out_multiplier=0.5,
    ),
}  # fmt: skip
"""Blocks with another mixer each, an MLP's output to which the attention's is added in place, a third summand."""


@pytest.mark.parametrize("kind", HYBRIDS)
def test_sites_of_blocks_of_other_makes(kind):
    """Reads are what plain hooks on the modules see, and those modules are the blocks' own sum."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    sizes = dict(vocab_size=tinies.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)  # fmt: skip
    module = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes | HYBRIDS[kind])).float().eval()
    executor = Local(module, tokenizer=tinies.tokenizer(), device="cpu", threads=1)
    anatomy = executor.anatomy
    assert anatomy.proved
    names = {layer: (anatomy.attention.at(layer)[0], anatomy.mlp.at(layer)[0]) for layer in range(6)}
    if kind == "qwen3_next":
        assert names == {i: (("linear_attn", "self_attn")[i % 2], "mlp") for i in range(6)}
    if kind == "falcon_h1":
        assert (anatomy.attention.factor, anatomy.mlp.factor) == (0.5, 1.0) and names[0] == (
            "self_attn",
            "feed_forward",
        )
    layers, rows = [2, 5], texts(executor)
    form = Form(reads=tuple(ReadSite(layer, "text", "tokens", site) for layer in layers for site in SITES))
    blocks = list(module.get_submodule(anatomy.blocks))
    for row, tokens in zip(
        run(executor, form, [Row(i, t, {"text": np.ones(len(t))}) for i, t in enumerate(rows)]), rows, strict=True
    ):
        seen = seen_by_hooks(module, blocks, tokens, {layer: names[layer] for layer in layers})
        for place, (layer, site) in enumerate((layer, site) for layer in layers for site in SITES):
            if (layer, site) in seen:
                close(row["streams"][place], seen[layer, site][0], 2e-5)


def seen_by_hooks(module, blocks, tokens, names):
    """(layer, site) -> what the modules (attention, MLP) of a block give, of one text."""
    seen, hooks = {}, []
    for layer, pair in names.items():
        for name, site in zip(pair, ("attn_out", "mlp_out"), strict=True):

            def keep(_, __, out, at=(layer, site)):
                seen[at] = (out[0] if isinstance(out, tuple) else out).clone()

            hooks.append(blocks[layer].get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        module(input_ids=torch.tensor([list(tokens)]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen
