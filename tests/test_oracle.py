"""The local executor against an oracle of plain torch hooks, one text at a time (tests/oracle.py)."""

from __future__ import annotations

import dataclasses

import numpy as np
import oracle
import pytest
import tinies
import torch
from kit import spread
from oracle import Push
from transformers import WatermarkingConfig

from nsteer.executors.local import Local
from nsteer.plan import editing
from nsteer.plan.prompts import Encoded, norm_weights
from nsteer.plan.schema import Editing, Schedule, When
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, Row, RowEdit, assemble, halves, lens, programs
from nsteer.program.ops import ACTING_AT_ZERO, OPS, UNSCALED
from nsteer.program.pooling import weights

NEW = 7
LENGTHS = (6, 11, 3, 8)
ZOO = ("gpt2", "gemma", "qwen", "llama", "mistral")
MODELS = [*tinies.FAMILIES, "zoo/qwen"]
"""The five families at random, and trained weights once."""


@pytest.fixture(params=MODELS)
def executor(request, tiny, zoo_model) -> Local:
    zoo, _, name = request.param.rpartition("/")
    return zoo_model(name) if zoo else tiny(name)


def parts(executor: Local) -> tuple:
    """(module, blocks): the blocks by the paths of tests/tinies.py or of transformers, not by nsteer's search."""
    path = {"gpt2": "transformer.h", "bloom": "transformer.h", "gptj": "transformer.h"}
    return executor.module, list(
        executor.module.get_submodule(path.get(executor.module.config.model_type, "model.layers"))
    )


def texts(executor: Local, lengths=LENGTHS, seed=0) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    return [tuple(random.integers(8, executor.anatomy.vocab, n).tolist()) for n in lengths]


def direction(d_model: int, seed: int) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(d_model)
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def row_edit(push: Push, tokens) -> RowEdit:
    """The oracle's edit as a row carries it."""
    when = schedule = None
    if push.gate is not None or push.after:
        low, high = (None if np.isinf(edge) else edge for edge in (push.low, push.high))
        when = When(above=low, below=high, after=list(push.after) or None)
    if push.first or push.linear or push.half_life:
        schedule = Schedule(first=push.first, linear=push.linear, half_life=push.half_life)
    edit = Editing(op=push.op, positions=push.positions, norm_skip=push.skip, when=when, schedule=schedule)
    usual = 0.0 if push.mean is None else float(push.mean @ push.vector)
    gate = push.vector if push.gate is None else 3.0 * push.gate  # a gate of any length
    compiled_edit = editing.CompiledEdit(push.vector, push.strength, usual, gate)
    return editing.row_edit(edit, compiled_edit, Encoded("", tuple(tokens), 0), NEW, push.after)


def site_of(push: Push) -> EditSite:
    gate = "" if push.gate is None else "cosine" if push.cosine else "projection"
    paced = bool(push.first or push.linear or push.half_life)
    return EditSite(push.layer, push.op, push.live, paced, gate, bool(push.after))


def form_of(pushes, **more) -> Form:
    return Form(edits=tuple(map(site_of, pushes)), **more)


def run(executor: Local, form: Form, rows: list[Row], side: str = "left") -> list[dict]:
    readouts = executor.run(assemble(form, rows, side))
    return [readouts.row(i) for i in range(len(rows))]


def greedy(executor: Local, new: int = NEW, eos=(), **more) -> Decoding:
    return Decoding(new, tuple(eos), executor.pad, **more)


def whole_logprobs(row: dict) -> np.ndarray:
    """Log-probs [step, vocab] in vocabulary order, from top=vocab."""
    out = np.empty_like(row["top_logprobs"])
    np.put_along_axis(out, row["top_tokens"], row["top_logprobs"], -1)
    return out


def agrees(row: dict, truth: oracle.Continuation) -> None:
    assert row["tokens"] == truth.tokens
    steps = len(truth.tokens)
    np.testing.assert_allclose(whole_logprobs(row)[:steps], truth.logprobs, atol=1e-4, rtol=0)
    if len(truth.receipts):
        np.testing.assert_allclose(row["receipts"], truth.receipts, atol=1e-4, rtol=1e-4)


def close(actual, truth, relative=1e-5) -> None:
    truth = np.asarray(truth)
    np.testing.assert_allclose(actual, truth, rtol=0, atol=relative * np.abs(truth).max())


# ---- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooled_reads_norms_and_streams(executor, side):
    module, blocks = parts(executor)
    specs = {
        "last": dict(kind="last"),
        "mean": dict(kind="mean", over="all"),
        "from": dict(kind="mean_from", k=2, over="generated"),
        "middle": dict(kind="mid_generation"),
    }
    layers = sorted([3, 1])
    sites = [ReadSite(layer, name) for layer in layers for name in specs]
    for layer in layers:
        sites += [ReadSite(layer, "norm", "norm"), ReadSite(layer, "last", "tokens")]
    form = Form(reads=tuple(sorted(sites, key=lambda site: site.layer)))
    rows, prompts = [], []
    for i, tokens in enumerate(texts(executor, (6, 25, 4, 8))):
        prompt = max(1, len(tokens) // (2 if i % 2 else 1))
        pools = {name: weights(prompt=prompt, total=len(tokens), bos=i % 2, **spec) for name, spec in specs.items()}
        rows.append(Row(i, tokens, pools | {"norm": norm_weights(len(tokens), i % 2)}))
        prompts.append(prompt)
    pooled = [(site.layer, site.weights) for site in form.reads if site.what == "pooled"]
    missing = 0
    for i, readout in enumerate(run(executor, form, rows, side)):
        streams = oracle.forward(module, blocks, rows[i].tokens).streams
        for (layer, name), vector in zip(pooled, readout["pooled"], strict=True):
            truth = oracle.pool(streams[layer], prompt=prompts[i], skip=i % 2, **specs[name])
            if np.isnan(truth).any():
                assert (vector == 0).all()
                missing += 1
            else:
                close(vector, truth)
        for place, layer in enumerate(layers):
            close(readout["norms"][place], streams[layer][i % 2 :].norm(dim=1).mean())
            assert readout["streams"][place].shape == streams[layer].shape
            close(readout["streams"][place], streams[layer])
    assert missing, "one text must be too short for `from`"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_read_sees_the_edited_stream_and_later_layers_too(executor, side):
    module, blocks = parts(executor)
    d = executor.anatomy.d_model
    edits = [
        Push(1, "add", 5 * direction(d, 1), 0.7),
        Push(1, "clamp", direction(d, 2), 3.0),
        Push(2, "project_out", direction(d, 3), 1.0, positions="last"),
    ]
    reads = tuple(ReadSite(layer, "text", "tokens") for layer in (0, 1, 3))
    rows = [
        Row(i, t, {"text": np.ones(len(t))}, tuple(row_edit(e, t) for e in edits))
        for i, t in enumerate(texts(executor))
    ]
    for row, readout in zip(rows, run(executor, form_of(edits, reads=reads), rows, side), strict=True):
        truth = oracle.forward(module, blocks, row.tokens, edits)
        plain = oracle.forward(module, blocks, row.tokens)
        for place, layer in enumerate((0, 1, 3)):
            close(readout["streams"][place], truth.streams[layer])
        np.testing.assert_allclose(readout["receipts"], truth.receipts, rtol=1e-4, atol=1e-4)
        assert not np.allclose(readout["streams"][1], plain.streams[1], atol=0.1)


def test_the_score_is_the_log_probability_of_the_text(executor):
    module, blocks = parts(executor)
    edit = Push(1, "add", 4 * direction(executor.anatomy.d_model, 1), 1.0)
    rows = []
    for i, tokens in enumerate(texts(executor)):
        counted = (np.arange(len(tokens)) >= 2).astype(np.float32)
        rows.append(Row(i, tokens, {"score": counted}, (row_edit(edit, tokens),)))
    form = dataclasses.replace(form_of([edit]), score=True)
    for side in ("left", "right"):
        for row, readout in zip(rows, run(executor, form, rows, side), strict=True):
            logprobs = oracle.forward(module, blocks, row.tokens, [edit]).logits.log_softmax(-1)
            truth = sum(float(logprobs[p - 1, row.tokens[p]]) for p in range(2, len(row.tokens)))
            assert readout["score"] == pytest.approx(truth, abs=1e-3)


# ---- generating ------------------------------------------------------------------------------------------


def unlike_edits(executor: Local, i: int) -> list[Push]:
    """Two layers, another vector and strength for every row; row 0 has strength 0."""
    d = executor.anatomy.d_model
    where = ("all", "generated", "prompt", "last")[i % 4]
    return [
        Push(1, "add", direction(d, 10 + i), 0.4 * i, live=True, positions=where, skip=i % 3),
        Push(3, "add", 2.0 * direction(d, 20 + i), 1.5 * i, positions="all"),
    ]


def test_greedy_generation_under_edits(executor):
    module, blocks = parts(executor)
    form = dataclasses.replace(
        form_of(unlike_edits(executor, 0)), decoding=greedy(executor), top=executor.anatomy.vocab
    )
    rows = [
        Row(i, t, edits=tuple(row_edit(e, t) for e in unlike_edits(executor, i))) for i, t in enumerate(texts(executor))
    ]
    changed = 0
    for i, readout in enumerate(run(executor, form, rows)):
        agrees(readout, oracle.generate(module, blocks, rows[i].tokens, unlike_edits(executor, i), new=NEW))
        changed += readout["tokens"] != oracle.generate(module, blocks, rows[i].tokens, new=NEW).tokens
    assert changed >= 1, "edits this strong must change a text, or the test shows nothing"


@pytest.mark.parametrize(
    "executor, sampling",
    spread(MODELS, [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.6), (2.0, 20, 0.8)]),
    indirect=["executor"],
)
def test_sampled_generation_under_edits(executor, sampling):
    module, blocks = parts(executor)
    temperature, top_k, top_p = sampling
    how = greedy(executor, sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
    form = dataclasses.replace(form_of(unlike_edits(executor, 0)), decoding=how, top=executor.anatomy.vocab)
    rows = []
    for i, tokens in enumerate(texts(executor)):
        edits = tuple(row_edit(e, tokens) for e in unlike_edits(executor, i))
        rows.append(Row(i, tokens, edits=edits, uniform=np.random.default_rng(i).random(NEW)))
    for i, readout in enumerate(run(executor, form, rows)):
        truth = oracle.generate(
            module,
            blocks,
            rows[i].tokens,
            unlike_edits(executor, i),
            new=NEW,
            sampling=sampling,
            uniform=rows[i].uniform,
        )
        agrees(readout, truth)


def test_plain_generation_sampled_and_greedy(executor):
    module, blocks = parts(executor)
    for sampling in (None, (1.0, 0, 1.0)):
        how = greedy(executor, sample=sampling is not None)
        rows = [Row(i, t, uniform=np.random.default_rng(i).random(NEW)) for i, t in enumerate(texts(executor))]
        for row, readout in zip(rows, run(executor, Form(decoding=how), rows), strict=True):
            truth = oracle.generate(module, blocks, row.tokens, new=NEW, sampling=sampling, uniform=row.uniform)
            assert readout["tokens"] == truth.tokens


@pytest.mark.parametrize("where", ["some", "all"])
def test_rows_end_at_their_own_end_of_text(executor, where):
    module, blocks = parts(executor)
    prompts = texts(executor)
    edits = unlike_edits(executor, 2)
    free = [oracle.generate(module, blocks, t, edits, new=NEW).tokens for t in prompts]
    shared = [t for tokens in free for t in tokens[:-1] if any(t not in other for other in free)]
    ends = {shared[0]} if where == "some" else {tokens[min(i, 3)] for i, tokens in enumerate(free)}
    form = dataclasses.replace(form_of(edits), decoding=greedy(executor, eos=sorted(ends)), top=executor.anatomy.vocab)
    rows = [Row(i, t, edits=tuple(row_edit(e, t) for e in edits)) for i, t in enumerate(prompts)]
    readouts = run(executor, form, rows)
    for row, readout in zip(rows, readouts, strict=True):
        agrees(readout, oracle.generate(module, blocks, row.tokens, edits, new=NEW, eos=ends))
    lengths = [len(readout["tokens"]) for readout in readouts]
    assert min(lengths) < NEW and (max(lengths) == NEW) == (where == "some")


def test_streams_that_are_read_while_it_writes(executor):
    """At the prompt's end, and on average where generated tokens were fed back; NaN where none was."""
    module, blocks = parts(executor)
    prompts = texts(executor)
    edits = unlike_edits(executor, 2)
    free = [oracle.generate(module, blocks, t, edits, new=NEW).tokens for t in prompts]
    ends = [free[0][0], free[1][3]]  # row 0 ends at its first token
    reads = tuple(ReadSite(layer, "none", "decoded") for layer in (0, 1, 3))
    form = form_of(edits, reads=reads, decoding=greedy(executor, eos=ends))
    rows = [Row(i, t, edits=tuple(row_edit(e, t) for e in edits)) for i, t in enumerate(prompts)]
    for row, readout in zip(rows, run(executor, form, rows), strict=True):
        tokens = oracle.generate(module, blocks, row.tokens, edits, new=NEW, eos=ends).tokens
        assert readout["tokens"] == tokens
        streams = oracle.forward(module, blocks, row.tokens + tokens[:-1], edits, len(row.tokens)).streams
        for place, layer in enumerate((0, 1, 3)):
            close(readout["prompt_end"][place], streams[layer][len(row.tokens) - 1])
            if len(tokens) == 1:
                assert np.isnan(readout["written"][place]).all()
            else:
                close(readout["written"][place], streams[layer][len(row.tokens) :].mean(0))
    assert len(free) and np.isnan(run(executor, form, rows)[0]["written"]).all()


def test_the_lens_is_the_unembedding(executor):
    vectors = np.stack([direction(executor.anatomy.d_model, i) for i in range(3)])
    readouts = executor.run(lens(4, vectors))
    logits = vectors @ executor.module.get_output_embeddings().weight.detach().numpy().T
    for i in range(3):
        order = np.argsort(-logits[i], kind="stable")[:4]
        assert readouts.promoted_tokens[i].tolist() == order.tolist()
        np.testing.assert_allclose(readouts.promoted[i], logits[i][order], atol=1e-5)


# ---- every op, scale and position --------------------------------------------------------------------------

SCALES = ("raw", "unit", "stream_norm", "reference_norm")
COMBINATIONS = [(op, scale) for op in ("add", "clamp", "affine") for scale in SCALES]
COMBINATIONS += [(op, "raw") for op in UNSCALED]
POSITIONS = ("all", "prompt", "generated", "last")


def in_words(block: Editing, vector: np.ndarray, strength: float, reference: float, layer: int, mean) -> Push:
    """What a plan promises of a scale, spelled out."""
    unit = vector / np.linalg.norm(vector)
    if block.op in ("project_out", "set_mean", "rotate"):
        return Push(layer, block.op, unit, strength, positions=block.positions, mean=mean)
    factor = {"raw": np.linalg.norm(vector), "unit": 1.0, "stream_norm": 1.0, "reference_norm": reference}[block.scale]
    live = block.scale == "stream_norm"
    return Push(layer, block.op, unit, float(strength * factor), live, block.positions, block.norm_skip, mean)


@pytest.mark.parametrize("executor, how", spread(MODELS, COMBINATIONS), indirect=["executor"])
def test_every_op_and_scale_at_every_positions(executor, how):
    op, scale = how
    module, blocks = parts(executor)
    strengths = {"add": 0.4, "clamp": 0.8, "project_out": 0.9, "set_mean": 0.9, "affine": 0.8, "rotate": 35.0}
    mean = 3 * direction(executor.anatomy.d_model, 5)
    vector, reference = 2.5 * direction(executor.anatomy.d_model, 4), 6.5
    rows, truths = [], []
    for i, (positions, tokens) in enumerate(zip(POSITIONS, texts(executor), strict=True)):
        block = Editing(op=op, scale=scale, positions=positions, norm_skip=i % 2)
        strength = strengths[op] * (1 if i % 2 or op in ("project_out", "set_mean") else -1)
        compiled_edit = editing.compiled_edit(block, 1, vector, strength, norm=reference, mean=mean)
        edit = editing.row_edit(block, compiled_edit, Encoded("", tokens, 0), NEW)
        rows.append(Row(i, tokens, edits=(edit, edit)))
        truths.append([in_words(block, vector, strength, reference, layer, mean) for layer in (1, 3)])
    live = scale == "stream_norm"
    form = Form(
        edits=tuple(EditSite(layer, op, live) for layer in (1, 3)),
        decoding=greedy(executor),
        top=executor.anatomy.vocab,
    )
    for row, readout, pushes in zip(rows, run(executor, form, rows), truths, strict=True):
        agrees(readout, oracle.generate(module, blocks, row.tokens, pushes, new=NEW))


# ---- conditions and schedules ---------------------------------------------------------------------------------


def gates(executor: Local, i: int) -> list[Push]:
    """Edits that act where a gate opens, half of the time or so, and on one token in two; another for every row."""
    d, vocab = executor.anatomy.d_model, executor.anatomy.vocab
    where = ("all", "generated", "prompt", "all")[i % 4]
    return [
        Push(1, "add", 4 * direction(d, i), 1.0, gate=direction(d, 30 + i), low=0.0, positions=where),
        Push(1, "clamp", direction(d, 40 + i), 3.0, gate=direction(d, 1 + i), low=-2.0, high=0.7, positions=where),
        Push(3, "rotate", direction(d, 50), 60.0, gate=direction(d, 60 + i), high=0.02, cosine=True),
        Push(3, "add", 5 * direction(d, 70), 1.0, after=tuple(range(i, vocab, 2))),
    ]


def paces(executor: Local, i: int) -> list[Push]:
    d = executor.anatomy.d_model
    return [
        Push(1, "add", 5 * direction(d, i), 1.0, positions=("all", "generated")[i % 2], first=1 + i),
        Push(1, "project_out", direction(d, 40 + i), 0.9, linear=2 + i, first=3),
        Push(3, "add", direction(d, 50 + i), 0.8, live=True, half_life=0.5 + i),
        Push(3, "rotate", direction(d, 60), 50.0, linear=3),
    ]


@pytest.mark.parametrize("edits", [gates, paces])
def test_edits_under_conditions_and_schedules(executor, edits):
    module, blocks = parts(executor)
    prompts = texts(executor)
    free = [oracle.generate(module, blocks, t, edits(executor, i), new=NEW) for i, t in enumerate(prompts)]
    ends = [free[1].tokens[3]]  # a row ends before the others
    how = greedy(executor, eos=ends)
    form = dataclasses.replace(form_of(edits(executor, 0)), decoding=how, top=executor.anatomy.vocab)
    if edits is gates:
        plain = [site_of(push) for push in edits(executor, 0)]
        assert [site.gate for site in plain] == ["projection", "projection", "cosine", ""] and plain[3].after
    rows = [Row(i, t, edits=tuple(row_edit(e, t) for e in edits(executor, i))) for i, t in enumerate(prompts)]
    whole = assemble(form, rows)
    truths = [oracle.generate(module, blocks, t, edits(executor, i), new=NEW, eos=ends) for i, t in enumerate(prompts)]
    for program in (whole, *halves(whole)):
        readouts = executor.run(program)
        for place, i in enumerate(program.keys):
            agrees(readouts.row(place), truths[i])
    touched = np.array([continuation.receipts[:, 0] for continuation in free])
    longest = np.array([[len(t) + NEW - 1] for t in prompts])
    limited = (touched < longest).any(0)
    assert limited.all() if edits is gates else limited[:2].all(), "conditions that always hold show nothing"
    assert (touched > 0).any(0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_condition_in_a_forward_that_generates_nothing(tiny, side):
    executor = tiny("llama")
    module, blocks = parts(executor)
    reads = (ReadSite(3, "text", "tokens"),)
    rows = [
        Row(i, t, {"text": np.ones(len(t))}, tuple(row_edit(e, t) for e in gates(executor, i)))
        for i, t in enumerate(texts(executor))
    ]
    form = form_of(gates(executor, 0), reads=reads)
    for row, readout in zip(rows, run(executor, form, rows, side), strict=True):
        truth = oracle.forward(module, blocks, row.tokens, gates(executor, row.key))
        close(readout["streams"][0], truth.streams[3])
        np.testing.assert_allclose(readout["receipts"], truth.receipts, rtol=1e-4, atol=1e-4)


# ---- what must not matter --------------------------------------------------------------------------------


def test_a_row_does_not_depend_on_those_that_ride_along(executor):
    how = greedy(executor, sample=True, eos=())
    form = dataclasses.replace(form_of(unlike_edits(executor, 0)), decoding=how, top=8)
    rows = []
    for i, tokens in enumerate(texts(executor, (6, 11, 3, 19))):
        edits = tuple(row_edit(e, tokens) for e in unlike_edits(executor, i))
        rows.append(Row(i, tokens, edits=edits, uniform=np.random.default_rng(i).random(NEW)))
    alone = {row.key: run(executor, form, [row])[0] for row in rows}
    for max_rows, budget in ((4, 10**6), (2, 10**6), (4, 60)):
        for program in programs(form, rows, budget=budget, max_rows=max_rows):
            readouts = executor.run(program)
            for i, key in enumerate(program.keys):
                assert readouts.row(i)["tokens"] == alone[key]["tokens"]
                np.testing.assert_allclose(readouts.row(i)["top_logprobs"], alone[key]["top_logprobs"], atol=1e-4)
                np.testing.assert_allclose(readouts.row(i)["receipts"], alone[key]["receipts"], rtol=1e-4, atol=1e-4)


def test_a_generation_config_on_the_model_does_not_leak_in():
    """Every field that could change what greedy decoding chooses, or when it ends."""
    family = "llama"
    leaks = dict(
        do_sample=True,
        temperature=0.2,
        top_p=0.5,
        top_k=3,
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=4,
        suppress_tokens=[8, 9],
        begin_suppress_tokens=list(range(100)),
        bad_words_ids=[[n] for n in range(10, 200)],
        forced_eos_token_id=9,
        sequence_bias=[[[300], 50.0]],
        exponential_decay_length_penalty=(1, 2.0),
        renormalize_logits=True,
        guidance_scale=3.0,
        encoder_repetition_penalty=3.0,
        min_p=0.5,
        typical_p=0.5,
        num_beams=2,
        max_time=1e-9,
        max_length=2,
        min_length=40,
        watermarking_config=WatermarkingConfig(bias=20.0),
        stop_strings=["the"],
        prompt_lookup_num_tokens=3,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        use_cache=False,
    )
    plain = Local(tinies.model(family), tokenizer=tinies.tokenizer(), device="cpu")
    rows = [Row(i, t) for i, t in enumerate(texts(plain))]
    end = oracle.generate(*parts(plain), rows[0].tokens, new=2).tokens[-1]
    truths = [oracle.generate(*parts(plain), row.tokens, new=NEW, eos=[end]).tokens for row in rows]
    form = Form(decoding=greedy(plain, eos=[end]))
    assert [readout["tokens"] for readout in run(plain, form, rows)] == truths
    wrong = {}
    for name, value in leaks.items():
        module = tinies.model(family)
        setattr(module.generation_config, name, value)
        if name == "temperature":
            module.generation_config.do_sample = True
        executor = Local(module, tokenizer=tinies.tokenizer(), device="cpu")
        try:
            tokens = [readout["tokens"] for readout in run(executor, form, rows)]
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"[:200]
        else:
            if tokens != truths:
                wrong[name] = tokens
    assert not wrong, wrong


@pytest.mark.parametrize("family", tinies.TUPLES)
def test_a_family_whose_blocks_return_tuples(tiny, family):
    executor = tiny(family)
    assert executor.anatomy.tuple_output
    test_pooled_reads_norms_and_streams(executor, "left")
    test_greedy_generation_under_edits(executor)
    test_sampled_generation_under_edits(executor, (1.0, 0, 0.9))


@pytest.mark.parametrize("family", tinies.OTHERS)
def test_other_families_too(tiny, family):
    executor = tiny(family)
    module = executor.module
    blocks = tinies.blocks(family, module)
    edits = [unlike_edits(executor, i) for i in range(len(LENGTHS))]
    rows = [
        Row(i, t, edits=tuple(row_edit(e, t) for e in edits[i]), uniform=np.random.default_rng(i).random(NEW))
        for i, t in enumerate(texts(executor))
    ]
    form = form_of(edits[0], decoding=greedy(executor, sample=True), top=executor.anatomy.vocab)
    for i, readout in enumerate(run(executor, form, rows)):
        truth = oracle.generate(
            module, blocks, rows[i].tokens, edits[i], new=NEW, sampling=(1.0, 0, 1.0), uniform=rows[i].uniform
        )
        agrees(readout, truth)


def test_one_vector_for_many_rows_travels_once(tiny):
    executor = tiny("llama")
    shared, own = direction(32, 1), direction(32, 2)
    rows = []
    for i, tokens in enumerate(texts(executor)):
        pushes = [Push(1, "add", shared, 2.0), Push(3, "add", own if i == 2 else shared, 1.0)]
        rows.append(Row(i, tokens, edits=tuple(row_edit(e, tokens) for e in pushes)))
    form = Form(edits=(EditSite(1, "add"), EditSite(3, "add")), decoding=greedy(executor), top=executor.anatomy.vocab)
    program = assemble(form, rows)
    assert program.arrays["vectors"].shape == (2, 32)
    for i, row in enumerate(rows):
        pushes = [Push(1, "add", shared, 2.0), Push(3, "add", own if i == 2 else shared, 1.0)]
        agrees(executor.run(program).row(i), oracle.generate(*parts(executor), row.tokens, pushes, new=NEW))


def test_a_model_without_an_end_of_text_runs_to_the_last_token(tiny):
    executor = tiny("llama")
    edit = Push(1, "add", direction(32, 1), 2.0)
    tokens = texts(executor)[0]
    form = form_of([edit], decoding=Decoding(NEW, (), executor.pad))
    readout = run(executor, form, [Row(0, tokens, edits=(row_edit(edit, tokens),))])[0]
    assert len(readout["tokens"]) == NEW and readout["receipts"][0, 0] == len(tokens) + NEW - 1


# ---- padding, rounding -----------------------------------------------------------------------------------


def test_whatever_stands_in_the_padding_does_not_leak():
    """NaN at padded positions of a block's output: attention does not look there, and no readout may."""
    module = tinies.model("llama")
    executor = Local(module, tokenizer=tinies.tokenizer(), device="cpu")
    blocks = tinies.blocks("llama", module)
    prompts = texts(executor)
    pushes = [Push(3, "clamp", direction(32, 2), 2.0, live=True)]
    truths = [oracle.forward(module, blocks, t, pushes) for t in prompts]
    pads = np.array([max(LENGTHS) - n for n in LENGTHS])

    def poison(_, __, output):
        for row, pad in enumerate(pads):
            output[row, :pad] = torch.nan
        return output

    # the last block: below it NaN values would reach other positions through attention's 0 * NaN, in the model itself
    inner = blocks[3].mlp.register_forward_hook(poison)
    rows = [
        Row(i, t, {"text": norm_weights(len(t), 0)}, tuple(row_edit(e, t) for e in pushes))
        for i, t in enumerate(prompts)
    ]
    reads = (ReadSite(3, "text"), ReadSite(3, "text", "norm"), ReadSite(3, "text", "tokens"))
    try:
        readouts = run(executor, form_of(pushes, reads=reads), rows)
    finally:
        inner.remove()
    for readout, truth in zip(readouts, truths, strict=True):
        close(readout["pooled"][0], truth.streams[3].mean(0))
        close(readout["norms"][0], truth.streams[3].norm(dim=1).mean())
        close(readout["streams"][0], truth.streams[3])
        np.testing.assert_allclose(readout["receipts"], truth.receipts, rtol=1e-4)


def test_bfloat16_receipts_tell_what_rounding_left():
    module = tinies.model("llama").to(torch.bfloat16)
    executor = Local(module, tokenizer=tinies.tokenizer(), device="cpu")
    tokens = texts(executor)[1]
    row = {
        strength: Row(0, tokens, edits=(row_edit(Push(2, "add", direction(32, 1), strength, live=True), tokens),))
        for strength in (1e-6, 0.1)
    }
    form = Form(edits=(EditSite(2, "add", live=True),), decoding=greedy(executor))
    lost, kept = (run(executor, form, [row[s]])[0]["receipts"][0] for s in (1e-6, 0.1))
    assert lost[0] == kept[0] == len(tokens) + NEW - 1
    # of what was asked nearly nothing: an element of the stream that is 0 by chance takes any push
    assert lost[1] < 0.01 * 1e-6 * lost[0] and lost[2] == pytest.approx(lost[0], rel=1e-5)
    # the live norm is a mean: single positions are longer or shorter, so 0.1 holds only on average
    assert 0.05 < kept[1] / kept[0] < 0.2 and kept[2] / kept[0] < 0.9999


# ---- planted truth and algebra ---------------------------------------------------------------------------


def test_strength_zero_is_nothing_bit_for_bit(executor):
    """Every op but those that act at strength 0, one after another at each of two layers."""
    where = [(layer, op) for layer in (1, 3) for op in sorted(set(OPS) - set(ACTING_AT_ZERO))]
    form = form_of([Push(layer, op, direction(2, 0), 0.0) for layer, op in where])
    form = dataclasses.replace(form, decoding=greedy(executor), top=executor.anatomy.vocab)
    d = executor.anatomy.d_model
    rows = [
        Row(i, t, edits=tuple(row_edit(Push(layer, op, direction(d, i), 0.0), t) for layer, op in where))
        for i, t in enumerate(texts(executor))
    ]
    plain = run(executor, Form(decoding=greedy(executor), top=executor.anatomy.vocab), rows)
    for readout, truth in zip(run(executor, form, rows), plain, strict=True):
        assert readout["tokens"] == truth["tokens"]
        assert (readout["top_logprobs"] == truth["top_logprobs"]).all()
        assert (readout["receipts"][:, 1] == 0).all() and (readout["receipts"][:, 0] > 0).all()


def streams(executor: Local, pushes, layers=(1, 2, 3), prompts=None) -> list[np.ndarray]:
    """Whole streams [read, position, d_model] of a few texts under edits, by the executor."""
    reads = tuple(ReadSite(layer, "text", "tokens") for layer in layers)
    rows = [
        Row(i, t, {"text": np.ones(len(t))}, tuple(row_edit(e, t) for e in pushes))
        for i, t in enumerate(prompts or texts(executor))
    ]
    return [readout["streams"] for readout in run(executor, form_of(pushes, reads=reads), rows)]


def projections(stream_arrays: list[np.ndarray], vector: np.ndarray, layer: int = 0) -> list[np.ndarray]:
    return [stream[layer] @ vector for stream in stream_arrays]


def test_planted_a_positive_strength_raises_the_projection_by_that_much(executor):
    v = direction(executor.anatomy.d_model, 5)
    plain = projections(streams(executor, []), v)
    for strength in (2.0, -3.0):
        pushed = projections(streams(executor, [Push(1, "add", v, strength)]), v)
        for before, after in zip(plain, pushed, strict=True):
            np.testing.assert_allclose(after - before, strength, atol=1e-4)


def test_planted_clamp_sets_the_projection_and_leaves_the_rest(executor):
    v, other = direction(executor.anatomy.d_model, 5), direction(executor.anatomy.d_model, 6)
    other = other - (other @ v) * v
    plain = streams(executor, [])
    clamped = streams(executor, [Push(1, "clamp", v, -4.0)])
    for before, after in zip(plain, clamped, strict=True):
        np.testing.assert_allclose(after[0] @ v, -4.0, atol=1e-4)
        np.testing.assert_allclose(after[0] @ other, before[0] @ other, atol=1e-4)


@pytest.mark.parametrize("fraction", [1.0, 0.25, 2.0])
def test_planted_project_out_leaves_the_rest_of_the_projection(executor, fraction):
    v = direction(executor.anatomy.d_model, 5)
    plain = projections(streams(executor, []), v)
    edited = projections(streams(executor, [Push(1, "project_out", v, fraction)]), v)
    for before, after in zip(plain, edited, strict=True):
        np.testing.assert_allclose(after, (1 - fraction) * before, atol=1e-4)


def test_there_and_back_again_and_twice_is_once(executor):
    v = direction(executor.anatomy.d_model, 5)
    there, back = Push(1, "add", v, 3.0), Push(1, "add", v, -3.0)
    for before, after in zip(streams(executor, []), streams(executor, [there, back]), strict=True):
        close(after, before)
    once = Push(1, "project_out", v, 1.0)
    for before, after in zip(streams(executor, [once]), streams(executor, [once, once]), strict=True):
        close(after, before)
    for before, after in zip(streams(executor, []), streams(executor, [once]), strict=True):
        assert np.abs(after[1:] - before[1:]).max() > 1e-3, "later layers must feel it"


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_only_touched_positions_of_that_layer_differ(executor, positions):
    push = Push(1, "add", 9 * direction(executor.anatomy.d_model, 5), 1.0, positions=positions)
    for before, after in zip(streams(executor, []), streams(executor, [push]), strict=True):
        moved = (before[0] != after[0]).any(1)
        assert moved.tolist() == [push.touches(p, len(moved)) for p in range(len(moved))]
