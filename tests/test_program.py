"""Rows become programs: every row once, within the budget, with nothing in the padding."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import padding_share

from nsteer.errors import ProgramError
from nsteer.program.form import (
    OVERHEAD,
    STEPS,
    Decoding,
    EditSite,
    Form,
    ReadSite,
    Row,
    RowEdit,
    assemble,
    cuts,
    programs,
)

READ = Form(reads=(ReadSite(1), ReadSite(1, "norm", "norm"), ReadSite(2)))
WRITE = Form(decoding=Decoding(5, (2,), 9, sample=True))
EDIT = Form(edits=(EditSite(1, "add"), EditSite(2, "clamp")), decoding=Decoding(5, (2,), 9))


def vector(i: int) -> np.ndarray:
    return np.arange(3, dtype=np.float32) + i


def row(key, n: int, shared=0) -> Row:
    """A row whose every array is told by its key and position."""
    tokens = tuple(10 * n + p for p in range(n))
    weights = {"text": np.arange(1, n + 1) / (n * (n + 1) / 2), "norm": np.full(n, 1 / n)}
    edits = tuple(
        RowEdit(vector(shared if e else key), key + e, np.arange(n) % 2 == e, bool(e), np.full(n, 1 / n))
        for e in (0, 1)
    )
    return Row(key, tokens, weights, edits, np.full(5, key / 1000))


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths, st.integers(1, 400), st.integers(1, 9), st.sampled_from(["left", "right"]))
@settings(max_examples=60, deadline=None)
def test_every_row_comes_back_once_with_what_belongs_to_it(sizes, budget, max_rows, side):
    rows = {key: row(key, n) for key, n in enumerate(sizes)}
    seen = []
    for program in programs(READ, rows.values(), budget=budget, max_rows=max_rows, side=side):
        mask = program.arrays["attention_mask"].astype(bool)
        assert program.rows == len(program.keys) <= max_rows
        assert program.rows == 1 or mask.size <= budget
        for i, key in enumerate(program.keys):
            seen.append(key)
            real = mask[i]
            n = len(rows[key].tokens)
            assert real.sum() == n
            assert (real[-n:] if side == "left" else real[:n]).all()
            assert program.arrays["input_ids"][i][real].tolist() == list(rows[key].tokens)
            assert program.arrays["position_ids"][i][real].tolist() == list(range(n))
            for name in ("text", "norm"):
                row_weights = program.arrays[f"weights.{name}"][i]
                np.testing.assert_array_equal(row_weights[real], rows[key].weights[name].astype(np.float32))
                assert (row_weights[~real] == 0).all()
        assert (program.arrays["position_ids"] >= 0).all()
        assert (program.arrays["position_ids"] < mask.shape[1]).all()
    assert sorted(seen) == sorted(rows)


@given(lengths, st.integers(1, 400), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_new_tokens_count_and_the_longest_go_first(sizes, budget, max_rows):
    batches = list(programs(WRITE, [row(key, n) for key, n in enumerate(sizes)], budget=budget, max_rows=max_rows))
    widths = [program.arrays["input_ids"].shape[1] for program in batches]
    assert widths == sorted(widths, reverse=True)
    for program, width in zip(batches, widths, strict=True):
        assert program.rows == 1 or program.rows * (width + 5) <= budget
        assert (program.arrays["input_ids"][program.arrays["attention_mask"] == 0] == 9).all()
        np.testing.assert_array_equal(program.arrays["uniform"][:, 0], [key / 1000 for key in program.keys])
    for before, after in pairwise(batches):  # no two batches would cost less as one
        width, rows = before.arrays["input_ids"].shape[1] + 5, before.rows + after.rows
        full = rows > max_rows or rows * width > budget
        apart = before.rows * width + after.rows * (after.arrays["input_ids"].shape[1] + 5)
        assert full or rows * width >= apart + OVERHEAD * (1 + 5 / STEPS)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 200), st.integers(1, 9), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_no_other_cut_costs_less(sizes, budget, max_rows, overhead):
    """Against every cut there is."""
    sizes = sorted(sizes, reverse=True)

    def cost(batches):
        for batch in batches:
            if len(batch) > max_rows or (len(batch) > 1 and len(batch) * batch[0] > budget):
                return float("inf")
        return sum(len(batch) * batch[0] + overhead for batch in batches)

    def every(left):
        if not left:
            yield []
        for n in range(1, len(left) + 1):
            for rest in every(left[n:]):
                yield [left[:n], *rest]

    batches = [sizes[cut] for cut in cuts(sizes, budget=budget, max_rows=max_rows, overhead=overhead)]
    assert [size for batch in batches for size in batch] == sizes
    assert cost(batches) == min(map(cost, every(sizes)))


@given(lengths)
@settings(max_examples=40, deadline=None)
def test_edits_follow_their_rows_and_each_vector_is_kept_once(sizes):
    rows = {key: row(key, n, shared=77) for key, n in enumerate(sizes)}
    program = assemble(EDIT, list(rows.values()))
    arrays, mask = program.arrays, program.arrays["attention_mask"].astype(bool)
    assert len(arrays["vectors"]) == len(rows) + 1 == len(np.unique(arrays["vectors"], axis=0))
    for i, key in enumerate(program.keys):
        for e in (0, 1):
            edit = rows[key].edits[e]
            np.testing.assert_array_equal(arrays["vectors"][arrays["which"][e, i]], edit.vector)
            assert arrays["amount"][e, i] == edit.amount and arrays["generated"][e, i] == edit.generated
            assert arrays["prompt"][e, i][mask[i]].tolist() == edit.prompt.tolist()
            assert not arrays["prompt"][e, i][~mask[i]].any() and not arrays["norm"][e, i][~mask[i]].any()
            assert arrays["norm"][e, i].sum() == pytest.approx(1, abs=1e-5)


def test_one_row_longer_than_the_budget_travels_alone():
    batches = list(programs(READ, [row(0, 3), row(1, 50), row(2, 3)], budget=10, max_rows=8))
    assert [program.keys for program in batches] == [(1,), (0, 2)]


def test_rows_are_drawn_once_and_nothing_gives_nothing():
    assert list(programs(READ, iter([]), budget=10, max_rows=8)) == []
    assert [p.keys for p in programs(READ, iter([row(0, 3), row(1, 3)]), budget=100, max_rows=8)] == [(0, 1)]


def test_generation_padded_on_the_right_is_refused():
    with pytest.raises(ProgramError, match="on the left"):
        assemble(WRITE, [row(0, 3), row(1, 5)], "right")


def test_the_share_of_padding():
    assert padding_share(assemble(READ, [row(0, 2), row(1, 4)])) == pytest.approx(0.25)
    assert padding_share(assemble(WRITE, [row(0, 2), row(1, 4)])) == pytest.approx(2 / 18)


def test_less_than_a_tenth_of_a_capture_of_many_lengths_is_padding():
    """256 texts of 16 to 96 tokens, the default limits; one batch after another up to the limits would waste 21 %."""
    lengths = np.random.default_rng(0).integers(16, 97, 256)
    batches = list(programs(READ, [row(key, n) for key, n in enumerate(lengths)], budget=8192, max_rows=128))
    padded = sum(program.arrays["attention_mask"].size for program in batches)
    assert 1 - lengths.sum() / padded < 0.1 and len(batches) < 12
