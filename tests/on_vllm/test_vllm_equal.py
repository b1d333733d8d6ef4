"""The same programs in this process and in a vLLM engine give the same readouts, for every family that it serves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit import assert_equal, rows

from nsteer.errors import AnatomyError, EngineError, ModelError, OutOfMemoryError
from nsteer.executors.local import Local
from nsteer.executors.vllm import Vllm
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, assemble, lens


@pytest.fixture(scope="module", params=["llama", "qwen", "gemma", "mistral", "smollm2"])
def pair(request, toys):
    """A model here and in an engine; SmolLM2 where NSTEER_SMOLLM2 names a folder of it."""
    if request.param not in toys:
        pytest.skip("NSTEER_SMOLLM2 names no folder of SmolLM2")
    here, there = Local(str(toys[request.param]), device="cpu"), Vllm(str(toys[request.param]))
    yield here, there
    there.close()
    here.close()


def near(executor) -> float:
    """Of its size, how far a number may be off: the toys have few blocks, SmolLM2 has 30, and edits that shatter it."""
    return 1e-5 if executor.anatomy.n_layers < 10 else 1e-3


def scored(row, first=1):
    """A row whose tokens from the `first` on count, and were written later."""
    later = (np.arange(len(row.tokens)) >= first).astype(np.float32)
    return replace(row, weights={**row.weights, "score": later / max(later.sum(), 1), "later": later})


def test_what_an_executor_is(pair):
    here, there = pair
    assert (there.eos, there.pad) == (here.eos, here.pad)
    assert there.anatomy == replace(here.anatomy, scaling=None)  # the toys' paths are those of vLLM
    said = there.describe()
    assert said["parameters"] == here.describe()["parameters"] and said["device"] == "cpu"
    assert 0 <= max(said["settings"]["difference_from_transformers"].values()) < 1e-5
    there.settle()
    assert there.afford(Form(reads=(ReadSite(1),)), 500) >= 500 * there.max_length


@pytest.mark.parametrize("side", ["left", "right"])
def test_capture(pair, side):
    here, there = pair
    layers = range(here.anatomy.n_layers)
    reads = [ReadSite(layer, "text", what) for layer in layers for what in ("pooled", "norm")]
    form = Form(reads=(*reads, ReadSite(layers[-1], "text", "tokens")))
    texts = rows(here, edits=0)
    program = assemble(
        form, [*texts, replace(texts[3], key=9, weights={"text": np.eye(len(texts[3].tokens))[1]})], side
    )
    expected = here.run(program)
    assert_equal(there.run(program), expected, near(here))
    assert not np.allclose(expected.pooled[3], expected.pooled[5])  # the same tokens, read otherwise


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("count", [1, 5])
def test_steered_generation(pair, sample, count):
    here, there = pair
    decoding = Decoding(12, here.eos, here.pad, sample, temperature=0.9, top_k=40, top_p=0.95)
    reads = (ReadSite(0, "text", "decoded"), ReadSite(2, "text", "decoded"))
    form = Form(reads=reads, edits=(EditSite(1, "add", live=True), EditSite(2, "add")), decoding=decoding, top=3)
    program = assemble(form, rows(here, count, edits=2))
    expected = here.run(program)
    assert_equal(there.run(program), expected, near(here))
    plain = here.run(assemble(Form(decoding=decoding), rows(here, count, edits=0)))
    assert all(
        unsteered != other for unsteered, other in zip(plain.tokens, expected.tokens, strict=True)
    )  # strong: every text


def test_every_kind_of_edit_at_once(pair):
    here, there = pair
    sites = (
        EditSite(1, "project_out", gate="projection"),
        EditSite(1, "rotate", paced=True),
        EditSite(2, "affine", live=True, after=True),
    )
    batch = rows(here, edits=3)
    edit = batch[0].edits[0]
    batch = [
        replace(
            row,
            edits=(
                replace(row.edits[0], low=-1.0, high=5.0, gate=edit.vector / np.linalg.norm(edit.vector)),
                replace(row.edits[1], amount=70.0, steps=np.arange(12) % 3 != 1, factor=0.8 ** np.arange(12)),
                replace(row.edits[2], amount=0.5, reference=1.5, after=tuple(range(0, here.anatomy.vocab, 2))),
            ),
        )
        for row in batch
    ]
    program = assemble(Form(edits=sites, decoding=Decoding(12, here.eos, here.pad)), batch)
    assert_equal(there.run(program), here.run(program), near(here))


def test_a_plain_continuation(pair):
    here, there = pair
    program = assemble(Form(decoding=Decoding(12, here.eos, here.pad)), rows(here, edits=0))
    assert there.run(program).tokens == here.run(program).tokens


def test_a_row_that_ends_early(pair):
    """Whatever the first row says second ends texts: its own then, and others where they say it."""
    here, there = pair
    free = here.run(assemble(Form(decoding=Decoding(12, (), here.pad)), rows(here, edits=0)))
    eos = (free.tokens[0][1],)
    for form in (Form(decoding=Decoding(12, eos, here.pad)), Form(decoding=Decoding(12, eos, here.pad), top=2)):
        program = assemble(form, rows(here, edits=0))
        expected = here.run(program)
        assert len(expected.tokens[0]) <= 2
        assert_equal(there.run(program), expected, near(here))


def test_scores(pair):
    here, there = pair
    program = assemble(Form(reads=(ReadSite(1),), score=True), [scored(row) for row in rows(here, edits=0)])
    assert_equal(there.run(program), here.run(program), near(here))


def test_what_steering_changes_of_a_text(pair):
    """Twins are rows of the program here, and requests of their own there."""
    here, there = pair
    texts = [scored(row, 2) for row in rows(here, edits=1)]
    other = [replace(edit, amount=edit.amount * 3) for edit in texts[1].edits]
    texts.append(replace(texts[1], key=9, edits=tuple(other)))
    for _ in range(2):  # nothing of one program is left for the next
        program = assemble(Form(edits=(EditSite(1, "add", live=True),), against=True), texts)
        expected, readouts = here.run(program), there.run(program)
        np.testing.assert_allclose(readouts.against, expected.against[: program.rows], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(readouts.receipts, expected.receipts[: program.rows], rtol=1e-5)
        texts = texts[2:]


def test_logit_lens(pair):
    here, there = pair
    program = lens(5, np.random.default_rng(0).standard_normal((7, here.anatomy.d_model)))
    assert_equal(there.run(program), here.run(program), near(here))


def test_sites_in_a_block_edited_and_read(pair):
    here, there = pair
    reads = tuple(ReadSite(layer, "text", "pooled", site) for layer in (1, 2) for site in SITES)
    edits = (EditSite(1, "add", site="attn_out"), EditSite(2, "add", live=True, site="mlp_out"))
    program = assemble(Form(reads=reads, edits=edits), rows(here, edits=2))
    assert_equal(there.run(program), here.run(program), near(here))


def test_what_does_not_fit_the_engine_is_told(pair):
    _, there = pair
    longest = there.max_length
    program = assemble(Form(decoding=Decoding(longest, there.eos, there.pad)), rows(there, 1, edits=0))
    with pytest.raises(
        EngineError, match=f"3 tokens and {longest} new ones: the engine was made for {longest} positions"
    ):
        there.run(program)


def test_a_program_that_fails_leaves_the_engine_whole(pair, monkeypatch):
    here, there = pair
    program = assemble(Form(decoding=Decoding(4, here.eos, here.pad), top=2), rows(here, edits=0))
    wrong = there.code(program).replace("tokens[:, step] = token", "tokens[:, step] = len(data['nothing'])")
    with monkeypatch.context() as patch, pytest.raises(EngineError, match="nothing"):
        patch.setattr(there, "code", lambda program: wrong)
        there.run(program)
    assert_equal(there.run(program), here.run(program), near(here))


def test_an_engine_that_dies_is_made_anew_and_then_given_up(toys, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    there = Vllm(str(toys["llama"]))
    program = assemble(Form(decoding=Decoding(4, there.eos, there.pad)), rows(there, edits=0))
    expected = there.run(program).tokens

    def die(scheduler, *words, **more):
        raise RuntimeError("the worker is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "schedule", die)
        with pytest.raises(EngineError, match=r"vLLM's engine died: RuntimeError: the worker is gone\. What was commi"):
            there.run(program)
    assert there.run(program).tokens == expected
    monkeypatch.setattr(Scheduler, "schedule", die)
    for _ in range(2):
        with pytest.raises(EngineError, match="vLLM's engine died: RuntimeError"):
            there.run(program)
    with pytest.raises(EngineError, match="died 3 times, the last time of RuntimeError: the worker is gone"):
        there.run(program)
    there.close()


def test_models_that_vllm_does_not_serve_rightly_are_refused(toys):
    from nsteer import zoo

    with pytest.raises(ModelError, match=r"vLLM can not serve .*gpt2'"):
        Vllm(str(toys["gpt2"]))
    with pytest.raises(ModelError, match=r"the stream under vLLM differs by .* Take executor: local") as told:
        Vllm(str(zoo.path("gemma")))
    assert not isinstance(told.value, AnatomyError)  # which lasts: the same store may go on with another executor
    with pytest.raises(ModelError, match="device 'cuda', but the vLLM that is installed runs on 'cpu'"):
        Vllm(str(toys["llama"]), device="cuda")


def test_a_model_that_has_no_room_is_told_so(toys):
    with pytest.raises(OutOfMemoryError, match=r"vLLM has no room for .*: see vllm\.memory, vllm\.max_length"):
        Vllm(str(toys["llama"]), memory=1e-6)


def test_half_precision_is_held_against_transformers_as_half_precision_is(toys):
    there = Vllm(str(toys["llama"]), dtype="bfloat16")
    assert 1e-4 < max(there.describe()["settings"]["difference_from_transformers"].values()) < 0.06
    there.close()


def test_without_a_reference_only_the_stream_is_known(toys):
    there = Vllm(str(toys["llama"]), reference=False)
    assert there.anatomy.attention is None and there.anatomy.mlp is None
    assert "not measured" in there.describe()["settings"]["difference_from_transformers"]
    there.close()
