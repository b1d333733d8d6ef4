"""A program that does not fit in memory is run in halves: nothing is lost, and what comes back is the same."""

from __future__ import annotations

import numpy as np
import pytest
import test_runner
import tinies
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from test_runner import STEER, records, results, run, write

from nsteer.errors import ExecutionError, OutOfMemoryError
from nsteer.executors import each
from nsteer.executors.fake import Fake
from nsteer.program.form import (
    Decoding,
    EditSite,
    Form,
    ReadSite,
    Row,
    RowEdit,
    assemble,
    halves,
    lens,
    of_rows,
    programs,
    size,
)
from nsteer.runner.rows import ALONE, Splitting
from nsteer.system.machine import out_of_memory

judge = test_runner.judge
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB"
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
MPS = "MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1 GB, max allowed: 9.07 GB)."


def shortage(kind: str) -> Exception:
    import torch

    kinds = {"cuda": torch.OutOfMemoryError(CUDA), "cpu": RuntimeError(CPU), "mps": RuntimeError(MPS)}
    return kinds.get(kind) or MemoryError()


# ---- parts of a program -----------------------------------------------------------------------------------------

FORMS = {
    "reads": Form(reads=(ReadSite(2), ReadSite(5, "norm", "norm"))),
    "edits": Form(reads=(ReadSite(5),), edits=(EditSite(2, "add", True), EditSite(5, "clamp"))),
    "draws": Form(edits=(EditSite(5, "add"),), decoding=Decoding(4, (2,), 0, sample=True)),
    "score": Form(score=True),
}


def row(i: int, length: int, form: Form) -> Row:
    random = np.random.default_rng(i)
    vectors = [np.full(3, i % 2, np.float32), np.arange(3, dtype=np.float32)]  # some shared, some not
    weights = {name: random.random(length).astype(np.float32) for name in ("text", "norm", "score")}
    edits = tuple(
        RowEdit(vectors[(i + e) % 2], i + e, random.random(length) < 0.5, bool(i % 2), weights["norm"])
        for e in range(len(form.edits))
    )
    return Row(("row", i), tuple(random.integers(3, 50, length).tolist()), weights, edits, random.random(4))


@given(st.sampled_from(sorted(FORMS)), st.lists(st.integers(1, 9), min_size=2, max_size=9), st.data())
def test_a_part_of_a_program_is_the_program_of_those_rows(name, lengths, data):
    form = FORMS[name]
    side = "left" if form.decoding else data.draw(st.sampled_from(["left", "right"]))
    rows = [row(i, length, form) for i, length in enumerate(lengths)]
    start = data.draw(st.integers(0, len(rows) - 1))
    stop = data.draw(st.integers(start + 1, len(rows)))
    subset, true = of_rows(assemble(form, rows, side), slice(start, stop)), assemble(form, rows[start:stop], side)
    assert subset.keys == true.keys and set(subset.arrays) == set(true.arrays)
    for key in set(true.arrays) - {"vectors", "which"}:
        assert subset.arrays[key].dtype == true.arrays[key].dtype
        np.testing.assert_array_equal(subset.arrays[key], true.arrays[key], err_msg=key)
    if form.edits:
        vectors = [program.arrays["vectors"][program.arrays["which"]] for program in (subset, true)]
        np.testing.assert_array_equal(*vectors)
        assert len(subset.arrays["vectors"]) == len(true.arrays["vectors"]), "vectors that nobody needs are left out"


def test_halves_hold_every_row_once_in_order():
    program = assemble(FORMS["reads"], [row(i, 3 + i % 4, FORMS["reads"]) for i in range(7)])
    first, second = halves(program)
    assert (first.rows, second.rows) == (4, 3) and first.keys + second.keys == program.keys
    several = lens(3, np.arange(20.0).reshape(5, 4))
    first, second = halves(several)
    assert first.keys == (0, 1, 2) and second.keys == (3, 4)
    np.testing.assert_array_equal(second.arrays["vectors"], several.arrays["vectors"][3:])


@pytest.mark.parametrize("kind", ["cuda", "cpu", "mps", "python"])
def test_a_lack_of_memory_is_known_by_its_words(kind):
    assert out_of_memory(shortage(kind))


def test_what_torch_says_here_when_memory_runs_out_is_known():
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_a_lack_of_memory(error):
    assert not out_of_memory(error)


# ---- splitting --------------------------------------------------------------------------------------------------


class Small(Fake):
    """Holds programs of at most `max_size` padded tokens, and fails on the rows called `bad`."""

    def __init__(self, max_size: int = 10**9, bad: tuple = ()):
        super().__init__(n_layers=6, d_model=3)
        self.max_size, self.bad, self.tried = max_size, bad, []

    def run(self, program):
        self.tried.append(program.rows)
        if size(program) > self.max_size:
            raise OutOfMemoryError("too big")
        if any(key in self.bad for key in program.keys):
            raise ExecutionError(f"bad among {program.rows}")
        return super().run(program)


def put(executor, lengths, rows: int = 8):
    """(what came back by key, errors by key, what was said) of rows of these lengths."""
    form, said = FORMS["reads"], []
    batches = programs(form, [row(i, n, form) for i, n in enumerate(lengths)], budget=10**6, max_rows=rows)
    readouts, failed = {}, {}
    for program, back in Splitting(said.append).map(executor, batches):
        for i, key in enumerate(program.keys):
            if isinstance(back, ExecutionError):
                failed[key] = back
            else:
                readouts[key] = back.row(i)
    return readouts, failed, said


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(12, 60))
def test_whatever_fits_row_by_row_comes_back_whole(lengths, max_size):
    readouts, failed, said = put(Small(max_size), lengths)
    whole, _, _ = put(Small(), lengths)
    assert not failed and set(readouts) == set(whole)
    for key, readout in whole.items():
        for name in readout:
            np.testing.assert_array_equal(readouts[key][name], readout[name])
    assert bool(said) == any(
        size(program) > max_size
        for program in programs(
            FORMS["reads"], [row(i, n, FORMS["reads"]) for i, n in enumerate(lengths)], budget=10**6, max_rows=8
        )
    )


def test_what_was_too_big_once_is_cut_before_it_is_tried_again():
    executor = Small(max_size=4 * 5)
    readouts, failed, said = put(executor, [5] * 32, rows=16)
    assert len(readouts) == 32 and not failed
    assert executor.tried == [16, 8, 4, 4, 4, 4] + [4] * 4, "the second program of 16 is not tried whole"
    assert said == [
        "out of memory with 16 rows: halved to 8 rows",
        "out of memory with 8 rows: halved to 4 rows",
    ]


def test_one_row_that_does_not_fit_fails_alone_and_says_what_to_lower():
    readouts, failed, _ = put(Small(max_size=9), [4, 12, 3, 5])
    assert set(failed) == {("row", 1)} and len(readouts) == 3
    assert isinstance(failed["row", 1], OutOfMemoryError) and "one row of 12 tokens" in str(failed["row", 1])
    assert "generate.max_new_tokens" in str(failed["row", 1])


@given(st.sets(st.integers(0, 15), max_size=2))
def test_a_bad_row_fails_alone(bad):
    readouts, failed, _ = put(Small(bad=tuple(("row", i) for i in bad)), [3, 4, 5, 6] * 4)
    assert set(failed) == {("row", i) for i in bad} and len(readouts) == 16 - len(bad)
    assert all(str(error) == "bad among 1" for error in failed.values())


def test_a_program_that_fails_with_every_row_is_not_tried_with_each():
    executor = Small(bad=tuple(("row", i) for i in range(64)))
    readouts, failed, _ = put(executor, [4] * 64, rows=32)
    assert not readouts and len(failed) == 64
    assert executor.tried.count(1) <= ALONE + 1 and len(executor.tried) < 16


def test_each_gives_an_error_without_its_frames():
    [(_, error)] = each(Small(bad=(("row", 0),)).run, [assemble(FORMS["reads"], [row(0, 3, FORMS["reads"])])])
    assert error.__traceback__ is None


# ---- a run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """Makes every model refuse forwards of more than some rows; how often it did."""
    from nsteer.executors.local import Local

    counted = {"refused": 0, "largest": 0}

    def limit(max_rows: int, kind: str = "cuda", longest: int = 10**9) -> dict[str, int]:
        first = Local.__init__

        def initialize(self, *arguments, **named):
            first(self, *arguments, **named)

            def refuse(module, given):
                rows, width = given[0].shape
                if rows > max_rows or width > longest:
                    counted["refused"] += 1
                    raise shortage(kind)
                counted["largest"] = max(counted["largest"], rows)

            self.module.get_input_embeddings().register_forward_pre_hook(refuse)

        monkeypatch.setattr(Local, "__init__", initialize)
        return counted

    return limit


WIDE = [
    {**STEER[0], "project": True, "strengths": [0.4], "controls": ["zero"], "generate": {"max_new_tokens": 3}},
    {**STEER[1], "generate": {**STEER[1]["generate"], "max_new_tokens": 3}},
]
MEASURE = {"perplexity": True, "lens": 3, "anisotropy": True}


@pytest.fixture(scope="module")
def whole(folder, judge, tmp_path_factory):
    """A store filled without a limit."""
    place = tmp_path_factory.mktemp("whole")
    changes = {"steer": WIDE, "measure": MEASURE, "judge": {"classifier": str(judge), "device": "cpu"}}
    summary = run(write(place, folder("llama"), **changes))
    assert not summary.failures
    return place, changes


def same(first, second) -> None:
    """Two stores hold the same cells; numbers are equal to the rounding that other batches bring."""
    left, right = ({key: cell.fingerprint for key, cell in records(path).items()} for path in (first, second))
    drop = {"runs", "failures"}
    assert {k: v for k, v in left.items() if k[0] not in drop} == {k: v for k, v in right.items() if k[0] not in drop}
    for group in {key[0] for key in left} - drop:
        a, b = (results(path, group).drop_vars("cell") for path in (first, second))
        for name in a.data_vars:
            if a[name].dtype.kind in "OTUib":
                assert a[name].equals(b[name]), (group, name)
            elif a[name].size:
                scale = float(np.nanmax(np.abs(np.r_[a[name].values.ravel(), 0.0])))
                xr.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize(("max_rows", "kind"), [(3, "cuda"), (1, "cpu")])
def test_a_run_that_is_short_of_memory_gives_the_same_store(
    whole, folder, short, tmp_path, monkeypatch, max_rows, kind
):
    from nsteer.executors.classifier import Classifier

    counted, batch = short(max_rows, kind), Classifier._batch
    monkeypatch.setattr(Classifier, "_batch", lambda self, texts: None if len(texts) > 5 else batch(self, texts))
    place, changes = whole
    summary = run(write(tmp_path, folder("llama"), **changes))
    assert not summary.failures and counted["refused"] and counted["largest"] <= max_rows
    same(tmp_path / "plan.zarr", place / "plan.zarr")
    said = "\n".join(summary.warnings)
    assert f"halved to {max_rows} row" in said and "the judge is out of memory" in said


def test_a_limit_is_met_once_not_for_every_program(folder, short, tmp_path):
    """Nine conditions of the same form: the first teaches, the others are cut."""
    counted = short(4)
    steer = [{**STEER[0], "strengths": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "controls": []}]
    summary = run(write(tmp_path, folder("llama"), steer=steer, batch={"rows": 8}))
    assert not summary.failures and summary.done["steering"] == 12
    steering = [text for text in summary.warnings if "halved" in text]
    assert counted["refused"] <= len(steering) + 2


def test_a_text_that_never_fits_fails_its_cell_and_no_other(folder, short, tmp_path):
    """The longest passage does not fit even alone: its chunk of samples fails, and the vectors that need it wait."""
    words = tinies.tokenizer(bos=True)
    texts = {e: [len(words(t)["input_ids"]) for t in group] for e, group in test_runner.TEXTS["passages"].items()}
    longest = max(max(group) for group in texts.values())
    assert [e for e, group in texts.items() if max(group) == longest] == ["fear"]
    short(10**9, longest=longest - 1)
    plan = write(tmp_path, folder("llama"), methods={"read": test_runner.METHODS["read"]}, steer=None)
    summary = run(plan)
    failures = {(failure.stage, failure.cell[2], failure.kind) for failure in summary.failures}
    assert failures == {("activations", "fear", "transient"), ("vectors", "fear", "waiting")}
    assert "Lower generate.max_new_tokens" in summary.failures[0].reason
    store = test_runner.Store(tmp_path / "plan.zarr")
    assert {key[2] for key in store.committed("vectors/tiny")} == {"joy", "rage"}


def test_memory_that_comes_back_is_used_by_a_plain_run(folder, short, tmp_path, monkeypatch):
    from nsteer.executors.local import Local

    first = Local.__init__
    short(0)
    plan = write(tmp_path, folder("llama"), methods={"read": test_runner.METHODS["read"]}, steer=None)
    summary = run(plan)
    assert summary.failures and {failure.kind for failure in summary.failures} <= {"transient", "waiting"}
    monkeypatch.setattr(Local, "__init__", first)
    summary = run(plan)
    assert not summary.failures and not summary.failed_before and summary.done["vectors"] == 3
    data = results(tmp_path / "plan.zarr", "failures")
    assert data.resolved.values.all() and (data.attempts.values == 1).all()
