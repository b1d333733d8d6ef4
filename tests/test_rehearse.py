"""The rehearsal refuses what a server would refuse, and gives what the local executor gives for the rest."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent / "ndif"))

from kit import assert_equal, rows

from nsteer.errors import ExecutionError
from nsteer.executors import rehearse
from nsteer.executors.answers import unpack
from nsteer.executors.common import tensors
from nsteer.executors.local import Local
from nsteer.executors.payload import compress, pack, pack_alone
from nsteer.executors.rehearse import Rehearse, copied
from nsteer.program import code, kernel
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, assemble

FAMILIES = ("gpt2", "gemma2", "qwen2", "llama", "mistral")


@pytest.fixture(scope="module")
def tinies(tmp_path_factory):
    import tiny

    return tiny.make(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llama(tinies):
    return Rehearse(str(tinies["llama"]), device="cpu", threads=1)


def some_programs(executor):
    reads = tuple(ReadSite(layer, "text", what) for layer in (0, 2, 3) for what in ("pooled", "norm"))
    yield assemble(Form(reads=reads), rows(executor, edits=0))
    texts = [replace(row, weights=row.weights | {"score": row.weights["text"]}) for row in rows(executor, edits=0)]
    yield assemble(Form(reads=(ReadSite(1),), score=True), texts)
    decoding = Decoding(5, executor.eos, executor.pad, sample=True, top_p=0.9)
    edits = (EditSite(1, "add", live=True), EditSite(2, "add"))
    reads = (ReadSite(0, "text", "decoded"), ReadSite(2, "text", "decoded"))
    yield assemble(Form(reads=reads, edits=edits, decoding=decoding, top=3), rows(executor, edits=2))
    edits = (EditSite(1, "add", live=True, site="attn_out"), EditSite(2, "add", site="resid_pre"))
    yield assemble(Form(edits=edits, decoding=decoding, top=3), rows(executor, edits=2))
    reads = tuple(ReadSite(2, "text", "tokens", site) for site in SITES)
    edits = (EditSite(1, "add", site="mlp_out"), EditSite(2, "add", site="resid_pre"))
    yield assemble(Form(reads=reads, edits=edits), rows(executor, edits=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_gives_what_the_model_gives(tinies, family):
    """Of two families also where a server's reads are copies."""
    folder = str(tinies[family])
    local = Local(folder, device="cpu", threads=1)
    truths = [(program, local.run(program)) for program in some_programs(local)]
    for copies in (False, True) if family in ("gpt2", "gemma2") else (False,):
        there = Rehearse(folder, device="cpu", threads=1, copies=copies)
        for program, readouts in truths:
            assert_equal(there.run(program), readouts, relative=0)
        assert 0 < there.payload < 20_000


def test_copied_rewrites_every_read_and_writes_it_back(llama):
    generation = list(some_programs(llama))[2]
    text = llama.code(generation)
    reads = [line for line in text.splitlines() if rehearse.READ.match(line)]
    changed = copied(text)
    assert len(reads) == 5  # the embedding's input, three layers, the head
    assert changed.count(".clone()") == text.count(".clone()") + 5
    for line in reads:
        name, _, value = line.strip().partition(" = ")
        assert f"{value} = {name}" in changed


def test_copied_writes_tuples_back_whole():
    text = "            h = model.h[1].output[0]\n            x = f(h)\n            tracer.stop()\n"
    assert copied(text) == (
        "            whole = model.h[1].output\n            h = whole[0].clone()\n            x = f(h)\n"
        "            model.h[1].output = (h, *whole[1:])\n            tracer.stop()\n"
    )


def test_pooling_is_exact_under_half_precision_autocast(tinies):
    """A bfloat16 model under autocast: our sums stay float32, whatever autocast makes of matmul."""
    there = Rehearse(str(tinies["llama"]), device="cpu", threads=1, dtype="bfloat16", autocast=True)
    program = next(some_programs(there))
    readouts = there.run(program)
    streams = []
    hooks = [
        block.register_forward_hook(lambda m, a, out: streams.append(out.double()))
        for block in there.module.get_submodule(there.anatomy.blocks)
    ]
    data = tensors(program, there.anatomy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        there.module(**data["inputs"])
    for hook in hooks:
        hook.remove()
    weights = data["weights.text"].double()[:, :, None]
    expected = torch.stack([(streams[layer] * weights).sum(1) for layer in (0, 2, 3)], 1).numpy()
    np.testing.assert_allclose(readouts.pooled, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_the_kernel_uses_nothing_that_autocast_makes_half():
    torch.manual_seed(0)
    stream, weights = torch.randn(3, 5, 8), torch.rand(3, 5)
    vector, amount, mask = torch.randn(3, 8), torch.rand(3), torch.ones(3, 5)

    def add(before, vector, amount):
        return (vector * amount[:, None])[:, None, :].expand_as(before)

    def everything():
        edited = stream.clone()
        receipt = kernel.edit(edited, add, vector, amount, mask)
        return kernel.pool(stream, weights), kernel.mean_norm(stream, weights), receipt, edited

    plain = everything()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, everything(), strict=True))


# ---- what a server refuses ----------------------------------------------------------------------------------

BODY = """import torch
{top}

def run(model, data, **where):
    {before}
    with model.trace(data["inputs"], **where) as tracer:
        {inside}
        found = model.model.layers[0].output.sum(-1).cpu().save()
        tracer.stop()
    return {{"found": found{also}}}
"""


def attempt(llama, top="", before="pass", inside="pass", also="", extra=None):
    """Packs and performs a program of these words; gives what comes back."""
    program = next(some_programs(llama))
    data = tensors(program, llama.anatomy) | (extra or {})
    text = BODY.format(top=top, before=before, inside=inside, also=also)
    alone = unpack(rehearse.perform(llama.model, pack_alone(llama.model, text, data)))
    [reply] = unpack(rehearse.perform(llama.model, pack(llama.model, text, [data])))["results"]
    assert alone.keys() <= reply.keys()
    return alone


def test_a_plain_program_passes(llama):
    assert attempt(llama)["found"].shape[0] == 5


@pytest.mark.parametrize("module", ["nsteer", "xarray", "pytest", "zarr"])
def test_an_import_that_the_server_lacks(llama, module):
    with pytest.raises(ModuleNotFoundError, match=module):
        attempt(llama, inside=f"import {module}")
    with pytest.raises(ModuleNotFoundError, match=module):
        attempt(llama, top=f"import {module}", inside=f"{module}.__name__")


def test_an_import_that_the_server_has(llama):
    assert "found" in attempt(llama, inside="import math, numpy, transformers")


def test_an_object_of_ours_that_leaks(llama):
    with pytest.raises(ModuleNotFoundError, match="nsteer"):
        attempt(llama, inside='data["anatomy"]', extra={"anatomy": llama.anatomy})


def test_a_list_that_is_not_saved_does_not_come_back(llama):
    assert "rows" not in attempt(llama, inside="rows = [1]", also=', "rows": rows')
    assert attempt(llama, inside="rows = [1].save()", also=', "rows": rows')["rows"] == [1]
    kept: list = []
    attempt(llama, inside='data["kept"].append(1)', extra={"kept": kept})
    assert kept == []  # the server's list is another one


def test_a_program_that_forgets_to_save_is_named(llama, monkeypatch):
    program = next(some_programs(llama))
    text = llama.code(program).replace("pooled = torch.stack(pooled).detach().cpu().save()", "pooled = pooled[0]")
    monkeypatch.setattr(llama, "code", lambda program: text)
    with pytest.raises(ExecutionError, match="pooled is not saved inside the trace"):
        llama.run(program)


def test_bytecode_is_refused(llama):
    space: dict = {}
    exec("def f(x):\n    return x", space)  # no source to be found: cloudpickle takes its bytecode
    with pytest.raises(TypeError, match="bytecode"):
        attempt(llama, inside='data["f"](1)', extra={"f": space["f"]})


def test_results_are_plain_data(llama):
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        attempt(llama, inside="odd = torch.nn.Linear(1, 1).save()", also=', "odd": odd')


def test_errors_are_ours_and_name_the_program(llama):
    program = next(some_programs(llama))
    program.arrays["weights.text"] = np.ones((1, 99), np.float32)
    name = code.digest(llama.code(program))
    with pytest.raises(ExecutionError, match=f"program {name} would fail on a server: RuntimeError"):
        llama.run(program)


def test_the_process_is_as_it_was(llama):
    before, finders = set(sys.modules), list(sys.meta_path)
    with pytest.raises(ModuleNotFoundError):
        attempt(llama, inside="import xarray")
    assert before <= set(sys.modules)
    assert sys.meta_path == finders


def test_travels_needs_no_weights(tinies):
    from nsteer.executors.ndif import Ndif

    there = Ndif(str(tinies["gpt2"]), host="http://127.0.0.1:9")
    program = next(some_programs(there))
    data = tensors(program, there.anatomy)
    assert 1000 < there.travels(program) < 20_000
    with pytest.raises(ExecutionError, match=r"does not travel: ModuleNotFoundError.*nsteer"):
        rehearse.travels(there.model, there.code(program), [data | {"inputs": there.anatomy}])
    there.close()


def test_compressed_answers_are_smaller():
    assert len(compress(bytes(10_000))) < 100
