"""Poolings: which positions stand for a text, counted among its real tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsteer.plan.schema import Pooling
from nsteer.program.pooling import MIDDLE_NEEDS_MORE_THAN, POOLINGS, weights


def positions(*arguments, **named) -> list[int]:
    return np.flatnonzero(weights(*arguments, **named)).tolist()


@pytest.mark.parametrize(
    ("arguments", "named", "expected"),
    [
        (("last", 7, 7), {}, [6]),
        (("last", 3, 7), {}, [6]),
        (("mean", 7, 7), {}, list(range(7))),
        (("mean", 7, 7), {"bos": 1}, [1, 2, 3, 4, 5, 6]),
        (("mean", 3, 7), {}, [3, 4, 5, 6]),
        (("mean", 3, 7), {"over": "all"}, list(range(7))),
        (("mean", 3, 7), {"over": "all", "bos": 1}, [1, 2, 3, 4, 5, 6]),
        (("mean", 7, 7), {"over": "generated"}, []),
        (("mean", 1, 1), {"bos": 1}, [0]),  # a text of BOS alone keeps it
        (("mean_from", 3, 7), {"k": 2}, [5, 6]),
        (("mean_from", 3, 7), {"k": 2, "over": "all"}, [2, 3, 4, 5, 6]),
        (("mean_from", 3, 7), {"k": 2, "over": "all", "bos": 1}, [3, 4, 5, 6]),
        (("mean_from", 3, 7), {"k": 4}, []),
        (("mid_generation", 5, 16), {}, [10]),  # 5 + 11 // 2
        (("mid_generation", 5, 17), {}, [11]),
        (("mid_generation", 5, 15), {}, [4]),  # 10 tokens: the last of the prompt
        (("mid_generation", 5, 5), {}, [4]),
    ],
)
def test_the_positions_that_count(arguments, named, expected):
    assert positions(*arguments, **named) == expected


@given(
    st.sampled_from(sorted(POOLINGS)),
    st.integers(1, 40),
    st.integers(0, 40),
    st.integers(0, 50),
    st.sampled_from(["auto", "all", "generated"]),
    st.integers(0, 1),
)
def test_weights_sum_to_one_or_are_a_hole(kind, prompt, written, k, over, bos):
    row_weights = weights(kind, prompt, prompt + written, k=k, over=over, bos=bos)
    assert row_weights.shape == (prompt + written,) and row_weights.dtype == np.float32 and (row_weights >= 0).all()
    assert row_weights.sum() == pytest.approx(1, abs=1e-6) or not row_weights.any()
    assert len(set(row_weights[row_weights > 0].tolist())) <= 1, "every position that counts, counts the same"
    if kind in ("last", "mid_generation") or (kind == "mean" and over != "generated"):
        assert row_weights.any()


@given(st.integers(1, 30), st.integers(0, 30))
def test_the_middle_of_what_was_written_is_inside_it(prompt, written):
    (middle,) = positions("mid_generation", prompt, prompt + written)
    assert (prompt <= middle < prompt + written) == (written > MIDDLE_NEEDS_MORE_THAN)


def test_every_pooling_of_the_plan_is_here():
    import typing

    assert set(typing.get_args(Pooling.model_fields["kind"].annotation)) == set(POOLINGS)
