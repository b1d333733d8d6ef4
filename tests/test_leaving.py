"""Rows that have ended leave their batch: nothing changes but the work, compared with the oracle and against
staying."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import oracle
import pytest
import tinies
import torch
from oracle import Push
from test_no_cache import without_cache
from test_oracle import NEW, agrees, close, direction, form_of, gates, greedy, paces, parts, row_edit, texts
from transformers import Cache, DynamicCache

from nsteer.errors import OutOfMemoryError
from nsteer.executors import leaving
from nsteer.executors.local import Local
from nsteer.executors.rehearse import Rehearse
from nsteer.program.form import Decoding, Form, Program, Readouts, ReadSite, Row, assemble

LENGTHS = (6, 11, 3, 8, 17, 5, 9, 4)
SAMPLING = (1.6, 0, 1.0)
READS = tuple(ReadSite(layer, "none", "decoded") for layer in (1, 3))
EDITS = {"gates": gates, "paces": paces, "none": lambda executor, i: []}
CASES = [("llama", kind, sampling) for kind in EDITS for sampling in (None, SAMPLING)]
CASES += [("gpt2", "gates", None), ("gpt2", "none", SAMPLING), ("gemma", "paces", SAMPLING), ("gemma", "none", None)]
CASES += [("qwen", "paces", None), ("mistral", "gates", SAMPLING)]
"""Every kind of edit in greedy and in sampled texts of one model; every model, and of each kind more than one."""


def run(executor: Local, program: Program, leave: bool = True) -> tuple[Readouts, list[int]]:
    """Its readouts, and how many rows went through the model at every step."""
    sizes: list[int] = []
    embedding = executor.module.get_input_embeddings()
    handle = embedding.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    before, executor.stays = executor.stays, "" if leave else "a test"
    try:
        return executor.run(program), sizes
    finally:
        handle.remove()
        executor.stays = before


def alone(executor: Local, row: Row, edits: list[Push], sampling, eos=()) -> oracle.Continuation:
    module, blocks = parts(executor)
    return oracle.generate(module, blocks, row.tokens, edits, new=NEW, eos=eos, sampling=sampling, uniform=row.uniform)


def unequal(free: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Ids that end the rows after very unlike numbers of tokens: the set of three that gives the most lengths."""
    random, best = np.random.default_rng(0), ((), 0)
    ids = sorted({token for tokens in free for token in tokens})
    for _ in range(500):
        eos = tuple(int(token) for token in random.choice(ids, 3, replace=False))
        ends = [next((i for i, token in enumerate(tokens) if token in eos), NEW) for tokens in free]
        score = len(set(ends)) + (min(ends) == 0) + (max(ends) == NEW)
        best = max(best, (eos, score), key=lambda pair: pair[1])
    return best[0]


def ragged(executor: Local, kind: str, sampling, **more) -> tuple[Program, list[Row], list[oracle.Continuation]]:
    """A program whose rows end at unlike steps, its rows, and what each of them gives alone."""
    edits = [EDITS[kind](executor, i) for i in range(len(LENGTHS))]
    rows = [
        Row(i, t, edits=tuple(row_edit(e, t) for e in edits[i]), uniform=np.random.default_rng(i).random(NEW))
        for i, t in enumerate(texts(executor, LENGTHS))
    ]
    eos = unequal([alone(executor, row, edits[row.key], sampling).tokens for row in rows])
    truths = [alone(executor, row, edits[row.key], sampling, eos) for row in rows]
    draws = {} if sampling is None else dict(zip(("temperature", "top_k", "top_p"), sampling, strict=True))
    how = greedy(executor, eos=eos, sample=sampling is not None, **draws)
    form = dataclasses.replace(form_of(edits[0], decoding=how), **more)
    return assemble(form, rows), rows, truths


def steps_of(lengths: list[int]) -> list[int]:
    """How many rows should go through the model at every step, when rows end after so many tokens."""
    sizes, here, read = [], list(lengths), 0
    for step in range(max(lengths)):
        if read >= max(1, leaving.WORTH * len(here)):  # those whose end was read in the step before
            here = [n for n in here if n >= step]
        sizes.append(len(here))
        read = sum(n <= step for n in here)
    return sizes


def same(readouts: Readouts, other: Readouts) -> None:
    """Ids are equal, numbers are those of another batch size, and missing values are in the same places."""
    assert readouts.tokens == other.tokens
    for name, value in vars(readouts).items():
        if isinstance(value, np.ndarray) and name != "top_tokens":
            np.testing.assert_allclose(value, getattr(other, name), rtol=1e-4, atol=1e-4, err_msg=name)
    if readouts.top_tokens is not None:
        assert ((readouts.top_tokens == -1) == (other.top_tokens == -1)).all()


@pytest.mark.parametrize(
    ("name", "kind", "sampling"), CASES, ids=lambda value: {None: "greedy", SAMPLING: "sampled"}.get(value, value)
)
def test_every_row_gives_what_it_gives_alone(zoo_model, name, kind, sampling):
    executor = zoo_model(name)
    module, blocks = parts(executor)
    program, rows, truths = ragged(executor, kind, sampling, reads=READS, top=executor.anatomy.vocab)
    lengths = [len(truth.tokens) for truth in truths]
    assert len(set(lengths)) >= 3 and min(lengths) <= NEW // 2, f"these ends are too much alike: {lengths}"
    readouts, sizes = run(executor, program)
    assert sizes == steps_of(lengths) and sizes[-1] < len(rows)
    for i, truth in enumerate(truths):
        agrees(readouts.row(i), truth)
        after = readouts.top_logprobs[i, len(truth.tokens) :]
        assert np.isnan(after).all() and (readouts.top_tokens[i, len(truth.tokens) :] == -1).all()
        edits = EDITS[kind](executor, i)
        given = rows[i].tokens
        streams = oracle.forward(module, blocks, given + truth.tokens[:-1], edits, len(given)).streams
        for place, layer in enumerate((1, 3)):
            close(readouts.prompt_end[i, place], streams[layer][len(given) - 1])
            if len(truth.tokens) > 1:
                close(readouts.written[i, place], streams[layer][len(given) :].mean(0))
            else:
                assert np.isnan(readouts.written[i, place]).all()
    staying, all_of_them = run(executor, program, leave=False)
    assert set(all_of_them) == {len(rows)}
    same(readouts, staying)


@pytest.mark.parametrize("family", tinies.ALL)
def test_every_family_gives_the_same_whether_rows_leave_or_stay(tiny, family):
    """Sliding windows shorter than the texts, softcaps, blocks that return tuples, models without position ids."""
    executor = tiny(family)
    assert executor.stays == "" and executor.describe()["settings"]["rows_leave"] is True
    vector = direction(executor.anatomy.d_model, 1)
    edits = [Push(1, "add", 4 * vector, 1.0, live=True), Push(3, "rotate", vector, 30.0, first=3)]
    rows = [
        Row(i, t, edits=tuple(row_edit(e, t) for e in edits), uniform=np.random.default_rng(i).random(NEW))
        for i, t in enumerate(texts(executor, LENGTHS))
    ]
    ends = tuple(range(8, executor.anatomy.vocab, 4))
    form = form_of(edits, decoding=greedy(executor, eos=ends, sample=True, temperature=2.0), reads=READS, top=5)
    program = assemble(form, rows)
    readouts, sizes = run(executor, program)
    assert len(set(map(len, readouts.tokens))) >= 3 and sizes[-1] < len(rows)
    same(readouts, run(executor, program, leave=False)[0])


# ---- who ends when -----------------------------------------------------------------------------------------------


@cache
def pool(executor: Local) -> tuple[Form, dict[int, list[Row]]]:
    """Many rows, each of which ends at one token in four, by the number of tokens that they write."""
    push = Push(1, "add", direction(executor.anatomy.d_model, 1), 1.0)
    how = greedy(executor, eos=range(8, executor.anatomy.vocab, 4), sample=True, temperature=3.0)
    form = form_of([push], decoding=how, top=3)
    rows = [
        Row(i, t, edits=(row_edit(push, t),), uniform=np.random.default_rng(i).random(NEW))
        for i, t in enumerate(texts(executor, [3 + i % 8 for i in range(128)]))
    ]
    by_length: dict[int, list[Row]] = {}
    for row, tokens in zip(rows, run(executor, assemble(form, rows), leave=False)[0].tokens, strict=True):
        by_length.setdefault(len(tokens), []).append(row)
    return form, by_length


def lines(executor: Local, lengths: list[int]) -> Program:
    """Rows that end after so many tokens."""
    form, by_length = pool(executor)
    left = {n: list(rows) for n, rows in by_length.items()}
    return assemble(form, [left[n].pop() for n in lengths])


@pytest.mark.parametrize(
    "lengths, sizes",
    [
        ([1, 1, NEW, 1, 1], [5, 5, 1, 1, 1, 1, 1]),  # all but one at once; their ends are read in one step more
        ([3, 3, 3], [3, 3, 3]),
        ([1, 1], [2]),
        ([NEW] * 4, [4] * NEW),
        ([2], [1, 1]),
        ([NEW - 1, NEW, NEW - 1], [3] * NEW),  # nothing comes after the step that reads their ends
        ([2, 4, NEW, 5, 2], [5, 5, 5, 3, 3, 2, 1]),
    ],
)
def test_who_ends_when(tiny, lengths, sizes):
    executor = tiny("llama")
    program = lines(executor, lengths)
    readouts, counted = run(executor, program)
    staying, _ = run(executor, program, leave=False)
    assert [len(tokens) for tokens in staying.tokens] == lengths, "the rows must end where this test says"
    assert counted == sizes == steps_of(lengths)
    same(readouts, staying)


def test_a_few_rows_of_many_do_not_make_a_batch_smaller(tiny):
    executor = tiny("gpt2")
    prompts = texts(executor, [5 + i % 7 for i in range(24)])
    form = Form(decoding=Decoding(NEW, (), executor.pad), top=1)
    free = run(executor, assemble(form, [Row(i, t) for i, t in enumerate(prompts)]))[0].tokens
    for eos in {tokens[0] for tokens in free}:
        ending = dataclasses.replace(form, decoding=Decoding(NEW, (eos,), executor.pad))
        readouts, sizes = run(executor, assemble(ending, [Row(i, t) for i, t in enumerate(prompts)]))
        assert sizes == steps_of([len(tokens) for tokens in readouts.tokens])
        if sum(len(tokens) == 1 for tokens in readouts.tokens) < 3:
            assert sizes[2] == 24, "fewer than an eighth had ended"


# ---- where rows can not leave ------------------------------------------------------------------------------------


def local(module, **more) -> Local:
    return Local(module, tokenizer=tinies.tokenizer(), device="cpu", **more)


@pytest.fixture
def ending(tiny) -> Program:
    """Rows that end at unlike steps, in any executor of the model."""
    return lines(tiny("llama"), [1, NEW, 3, 1])


def test_a_cache_that_can_not_drop_rows_keeps_them_and_says_so(monkeypatch, tiny, ending):
    program, usual = ending, tiny("llama").run(ending).tokens
    monkeypatch.delattr(Cache, "batch_select_indices")
    module = tinies.model("llama")
    executor = local(module)
    settings = executor.describe()["settings"]
    assert settings["rows_leave"] is False and "batch_select_indices" in settings["rows_stay_because"]
    sizes: list[int] = []
    module.get_input_embeddings().register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert executor.run(program).tokens == usual
    assert set(sizes) == {4}


def test_no_cache_at_all():
    """A model whose code keeps none: what its configuration says of it is not followed."""
    executor = local(without_cache(tinies.model("llama")))
    assert "it keeps no KV cache" in executor.batching.stepless
    rows = [Row(i, t) for i, t in enumerate(texts(executor))]
    program = assemble(Form(decoding=greedy(executor)), rows)
    assert executor.run(program).tokens == local(tinies.model("llama")).run(program).tokens


@pytest.mark.parametrize("wrong", ["row", "nothing"])
def test_a_cache_that_keeps_the_wrong_rows_is_found_out(monkeypatch, wrong):
    if wrong == "row":
        right = DynamicCache.batch_select_indices
        monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, stay: right(self, 0 * stay))
    else:
        monkeypatch.setattr(DynamicCache, "batch_select_indices", lambda self, stay: None)
    assert local(tinies.model("llama")).stays


def test_a_mask_that_stays_behind_is_found_out(monkeypatch):
    monkeypatch.setattr(leaving, "_of_rows", lambda value, stay, rows: value[:1] if torch.is_tensor(value) else value)
    assert local(tinies.model("llama")).stays == "the logits of a row change when another leaves"


def test_what_was_not_asked_for_and_what_a_server_does(tiny, ending):
    assert local(tinies.model("llama"), leave=False).describe()["settings"]["rows_leave"] is False
    there = Rehearse(tinies.model("llama"), tokenizer=tinies.tokenizer(), device="cpu")
    assert there.describe()["settings"]["rows_leave"] is False
    same(there.run(ending), tiny("llama").run(ending))


def test_memory_that_runs_out_where_rows_leave_is_a_lack_of_memory(monkeypatch, tiny, ending):
    executor, program = tiny("llama"), ending

    def full(self, stay):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(DynamicCache, "batch_select_indices", full)
    with pytest.raises(OutOfMemoryError):
        executor.run(program)
    monkeypatch.undo()
    assert executor.run(program).tokens
