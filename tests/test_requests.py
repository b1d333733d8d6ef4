"""Text for vLLM: what it says, that it stands alone, and that a site is the same text as everywhere.

`NSTEER_GOLDEN=write pytest tests/test_requests.py` writes the golden texts again; look at the difference. That they
run, and give what the others give: tests/on_vllm.
"""

from __future__ import annotations

import ast
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nsteer.errors import ExecutionError, ProgramError
from nsteer.executors.vllm import engine, rows
from nsteer.program import code, requests
from nsteer.program.anatomy import Anatomy, Sublayer
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, Row, RowEdit, assemble, lens

GOLDEN = Path(__file__).parent / "golden" / "requests"
LLAMA = Anatomy("model.layers", "lm_head", "model.embed_tokens", 6, 32, 320, attention=Sublayer("self_attn", True))
DECODING = Decoding(24, (2, 5), 0, sample=True, temperature=0.7, top_k=40, top_p=0.9)
READS = tuple(ReadSite(layer, *what) for layer in (2, 5) for what in (("text",), ("norm", "norm")))
FORMS = {
    "capture": Form(reads=READS, score=True),
    "edited": Form(reads=READS, edits=(EditSite(2, "add", site="attn_out"),)),
    "steering": Form(
        reads=(ReadSite(5, "text", "decoded"),),
        edits=(EditSite(2, "add", live=True), EditSite(2, "clamp"), EditSite(5, "project_out")),
        decoding=DECODING,
        top=5,
    ),
    "conditional": Form(
        edits=(EditSite(2, "affine", live=True, paced=True, gate="cosine", after=True), EditSite(5, "rotate")),
        decoding=Decoding(24, (), 0),
    ),
    "calibration": Form(edits=(EditSite(2, "add", live=True),), against=True),
    "unsteered": Form(decoding=Decoding(24, (2,), 0)),
    "lens": Form(promote=5),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_text_is_the_golden_one(form):
    text = requests.write(FORMS[form], LLAMA)
    file = GOLDEN / f"{form}.py.txt"
    if os.environ.get("NSTEER_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_no_golden_text_is_left_over():
    assert {file.name for file in GOLDEN.iterdir()} == {f"{form}.py.txt" for form in FORMS}


@pytest.mark.parametrize("form", FORMS)
def test_a_text_stands_alone(form):
    """It calls what it defines, and uses no name that it does not have; of packages torch, and vLLM in a worker."""
    tree = ast.parse(requests.write(FORMS[form], LLAMA))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    whole = "from vllm.distributed import tensor_model_parallel_all_gather as whole"
    assert imports == ["import torch", *[whole] * (form == "lens")]
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} | {"whole"}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            own = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
            own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            builtin = {"len", "range", "zip", "enumerate", "tuple", "int", "float", "vars"}
            assert used <= own | defined | {"torch"} | builtin, used - own - defined


@pytest.mark.parametrize("form", ["edited", "steering", "conditional", "calibration"])
def test_what_happens_at_a_site_is_the_text_of_every_executor(form):
    step = "step" if FORMS[form].decoding else None
    here, there = (write(FORMS[form], LLAMA) for write in (code.write, requests.write))
    for layer, at in code.places(FORMS[form]):
        for line in code.site_lines(FORMS[form], LLAMA, layer, at, step):
            assert line in here and line in there


def test_a_form_that_no_executor_runs_is_refused_as_everywhere():
    with pytest.raises(ProgramError, match="layer 6 of a model with 6 layers"):
        requests.write(Form(reads=(ReadSite(6),)), LLAMA)


def row(key, n: int, vector: float = 0.0) -> Row:
    tokens = tuple(range(10, 10 + n))
    edit = RowEdit(np.full(32, vector, np.float32), vector, np.arange(n) > 0, True, np.full(n, 1 / n))
    weights = dict.fromkeys(("text", "norm", "score", "later"), np.arange(n) / n)
    return Row(key, tokens, weights, (edit,), np.full(24, key / 10))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_request_is_its_row_without_padding(side):
    form = Form(reads=READS, edits=(EditSite(2, "add"),))
    program = assemble(form, [row(0, 3, 1.0), row(1, 7, 2.0), row(2, 5, 3.0)], side)
    for key, data in enumerate(rows.rows_of_program(program, LLAMA, 4)):
        n = (3, 7, 5)[key]
        assert data["tokens"] == list(range(10, 10 + n)) and data["program"] == 4
        assert data["inputs"]["input_ids"].tolist() == [data["tokens"]]
        assert data["prompt"].shape == (1, 1, n) and not data["prompt"][0, 0, 0]
        assert data["vectors"].tolist() == [[key + 1.0] * 32] and data["which"].tolist() == [[0]]
        torch.testing.assert_close(data["weights.text"], torch.arange(n)[None] / n)


def test_a_row_held_against_its_twin_is_one_request():
    form = Form(edits=(EditSite(2, "add"),), against=True)
    program = assemble(form, [row(0, 3, 1.0), row(1, 3, 2.0), row(2, 5, 3.0)])
    assert program.arrays["input_ids"].shape[0] == 5  # two texts unedited besides
    assert [len(data["tokens"]) for data in rows.rows_of_program(program, LLAMA, 0)] == [3, 3, 5]


def test_a_lens_is_one_request_of_all_its_vectors():
    [data] = rows.rows_of_program(lens(5, np.ones((7, 32))), LLAMA, 0)
    assert data["vectors"].shape == (7, 32)


def test_rows_of_equal_tokens_take_turns_where_a_block_knows_them_by_their_tokens():
    texts = [{"tokens": list(text)} for text in ("ab", "cd", "ab", "ab", "cd")]
    assert rows.turns(texts, apart=True) == [[0, 1], [2, 4], [3]]
    assert rows.turns(texts, apart=False) == [[0, 1, 2, 3, 4]]


def test_what_requests_give_stands_at_the_places_of_the_program():
    form = Form(reads=(ReadSite(2, "text", "tokens"), ReadSite(5, "text", "pooled")))
    program = assemble(form, [row(0, 3), row(1, 5)])
    streams = [torch.full((1, 1, n, 32), float(n)) for n in (3, 5)]
    pooled = [torch.full((1, 1, 32), float(n)) for n in (3, 5)]
    readouts = rows.gathered(program, {"streams": streams, "pooled": pooled}, 32)
    assert [stream.shape for stream in readouts.streams] == [(1, 3, 32), (1, 5, 32)]
    assert [float(s.mean()) for s in readouts.streams] == [3.0, 5.0] and readouts.pooled[:, 0, 0].tolist() == [3.0, 5.0]


def test_a_text_that_ended_early_is_no_result():
    program = assemble(Form(decoding=Decoding(4, (2,), 0)), [row(0, 3), row(1, 5)])
    readouts = rows.gathered(program, {"tokens": [torch.tensor([7, 2]), torch.tensor([7, 8, 9, 4])]}, 32)
    assert readouts.tokens == [(7, 2), (7, 8, 9, 4)]
    with pytest.raises(ExecutionError, match="neither its end of text nor all of its tokens"):
        rows.gathered(program, {"tokens": [torch.tensor([7, 8]), torch.tensor([7, 8, 9, 4])]}, 32)


def test_paths_are_those_of_vllm():
    gpt = replace(LLAMA, blocks="transformer.h", embedding="transformer.wte", scaling=("divide", 8.0), returned=True)
    anatomy = engine.served(gpt, "transformer")
    assert (anatomy.blocks, anatomy.embedding, anatomy.head) == ("model.h", "model.wte", "lm_head")
    assert anatomy.scaling is None and not anatomy.returned
    assert engine.served(LLAMA, "model") == LLAMA
    narrow = engine.served(replace(LLAMA, projection="model.project_out"), "model")
    assert not narrow.projection and "not known under vLLM" in narrow.lens
