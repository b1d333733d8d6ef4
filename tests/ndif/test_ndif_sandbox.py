"""Untrusted keys: blocks run in a process without weights, every value they read is a copy that is written back."""

from __future__ import annotations

import numpy as np
import pytest
from kit import assert_equal, rows

from nsteer.program.form import Decoding, EditSite, Form, ReadSite, assemble, lens, programs

pytestmark = pytest.mark.slow


def test_equal(open_remote, open_local, tinies):
    """One family: a job takes a new process with torch, some ten seconds."""
    here, there = open_local(tinies["gemma2"]), open_remote(tinies["gemma2"], deadline=500)
    submit = there.wire.submit  # a server without keys trusts everyone who does not ask otherwise
    there.wire.submit = lambda blob, envelope, *rest: submit(blob, envelope | {"trusted": False}, *rest)
    reads = tuple(ReadSite(layer, "text", what) for layer in range(4) for what in ("pooled", "norm"))
    capture = list(programs(Form(reads=reads), rows(here, 6, edits=0), budget=10_000, max_rows=2))
    decoding = Decoding(12, here.eos, here.pad, sample=True, top_p=0.9)
    edits = (EditSite(1, "add", live=True), EditSite(2, "add"))
    reads = (ReadSite(0, "text", "decoded"), ReadSite(2, "text", "decoded"))
    steer = assemble(Form(reads=reads, edits=edits, decoding=decoding, top=3), rows(here, edits=2))
    for program, readouts in there.map([*capture, steer]):
        assert_equal(readouts, here.run(program))
    vectors = np.random.default_rng(0).standard_normal((7, here.anatomy.d_model))
    readouts, expected = there.run(lens(5, vectors)), here.run(lens(5, vectors))
    np.testing.assert_allclose(readouts.promoted, expected.promoted, rtol=1e-4)
    assert (readouts.promoted_tokens == expected.promoted_tokens).all()
    assert there.jobs == 3  # the captures in one session: their traces must not stop early there
