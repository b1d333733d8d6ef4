"""Rows and a model for tests, and what it means that two readouts agree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice

import numpy as np
import torch
from scipy import stats

from nsteer.models.facts import facts
from nsteer.plan.schema import Model
from nsteer.program.form import Row, RowEdit, size


def spread(models: Sequence, values: Sequence) -> list[tuple]:
    """Pairs of a model and a value, in turn: each model is in one at least, and each value."""
    count = max(len(models), len(values))
    return list(zip(islice(cycle(models), count), islice(cycle(values), count), strict=True))


def rows(executor, count=5, *, edits=1, longest=14, new=12, seed=0):
    """Rows of random tokens and unlike lengths, with pooling weights, edits and numbers for sampling."""
    random = np.random.default_rng(seed)
    batch = []
    for i in range(count):
        n = 3 + (i * 5) % (longest - 2)
        ends = (*executor.eos, executor.pad)
        ids = [int(t) for t in random.integers(0, executor.anatomy.vocab, n)]
        tokens = tuple((t + 1) % executor.anatomy.vocab if t in ends else t for t in ids)
        weights = random.random(n)
        edit = RowEdit(
            random.standard_normal(executor.anatomy.d_model),
            0.3 * (i + 1),
            random.random(n) < 0.7,
            i % 3 != 2,
            np.full(n, 1 / n),
        )
        batch.append(Row(i, tokens, {"text": weights / weights.sum()}, (edit,) * edits, random.random(new)))
    return batch


def assert_equal(actual, expected, relative=1e-5):
    """Two Readouts agree: numbers within `relative` of the largest, tokens exactly."""
    for name, value in vars(expected).items():
        other = getattr(actual, name)
        if value is None:
            assert other is None, name
        elif name in ("tokens", "top_tokens"):
            assert np.array_equal(other, value) if name == "top_tokens" else other == value, name
        elif name == "streams":
            for a, b in zip(other, value, strict=True):
                np.testing.assert_allclose(a, b, atol=relative * np.abs(b).max(), rtol=0)
        else:
            largest = np.nanmax(np.abs(value))
            np.testing.assert_allclose(other, value, atol=relative * largest, rtol=0, err_msg=name)


def padding_share(program):
    """Share of the positions that a program puts through the model, those to be generated counted, that are padding."""
    mask = program.arrays["attention_mask"]
    return float(mask.size - mask.sum()) / size(program)


def found_too_often(hits: int, n: int, rate: float = 0.05) -> bool:
    """Whether `hits` findings among n independent samples without anything to find are more than a true rate of at most
    `rate` gives: more than come once in a thousand, by the exact binomial distribution (n = 4000: more than 244)."""
    return hits > stats.binom.ppf(0.999, n, rate)


@cache
def zoo_llama():
    """zoo/llama without nsteer, in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = facts(Model(id="zoo/llama")).name_or_path
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(name)
