"""The same programs here and on a real server give the same readouts, for every architecture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from kit import assert_equal, rows

from nsteer import zoo
from nsteer.errors import SiteError
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, assemble, lens, programs

FAMILIES = ("gpt2", "bloom", "gemma2", "qwen2", "llama", "mistral")


@pytest.fixture
def both(tinies, open_local, open_remote):
    """Opens a model here and there."""

    def opened(name):
        folder = zoo.path(name.removeprefix("zoo/")) if name.startswith("zoo/") else tinies[name]
        if not (folder / "config.json").exists():
            pytest.skip(f"{name} is not there")
        return open_local(folder), open_remote(folder)

    return opened


@pytest.fixture(params=FAMILIES)
def random_pair(request, both):
    """A random model here and there: for what hangs on the architecture alone."""
    return both(request.param)


@pytest.fixture(params=[*FAMILIES, *(f"zoo/{name}" for name in zoo.FAMILIES)])
def pair(request, both):
    """A model here and there: random architectures, and the five trained ones."""
    return both(request.param)


def only_by_trial(here) -> bool:
    """Whether the sublayers lie deeper than the children of a block, whose names are all that a server has."""
    return any("." in sublayer.path for sublayer in (here.anatomy.attention, here.anatomy.mlp) if sublayer is not None)


def test_anatomy_and_ends_are_found_without_weights(pair):
    here, there = pair
    unproved = {"attention": here.anatomy.attention, "mlp": here.anatomy.mlp, "proved": here.anatomy.proved}
    assert replace(there.anatomy, **unproved) == here.anatomy
    if here.anatomy.proved and not only_by_trial(here):
        assert (there.anatomy.attention, there.anatomy.mlp) == (here.anatomy.attention, here.anatomy.mlp)
    assert not there.anatomy.proved
    assert (there.eos, there.pad) == (here.eos, here.pad)
    assert not there.model.dispatched


def captured_alike(here, there, side):
    layers = range(here.anatomy.n_layers)
    reads = [ReadSite(layer, "text", what) for layer in layers for what in ("pooled", "norm")]
    reads.append(ReadSite(layers[-1], "text", "tokens"))
    form = Form(reads=tuple(sorted(reads, key=lambda site: site.layer)))
    program = assemble(form, rows(here, edits=0), side)
    assert_equal(there.run(program), here.run(program))


def test_capture(pair):
    captured_alike(*pair, "left")


def test_capture_with_padding_on_the_right(random_pair):
    captured_alike(*random_pair, "right")


def steered_alike(here, there, sample):
    decoding = Decoding(12, here.eos, here.pad, sample, temperature=0.9, top_k=40, top_p=0.95)
    reads = (ReadSite(0, "text", "decoded"), ReadSite(2, "text", "decoded"))
    form = Form(reads=reads, edits=(EditSite(1, "add", live=True), EditSite(2, "add")), decoding=decoding, top=3)
    program = assemble(form, rows(here, edits=2))
    expected = here.run(program)
    assert_equal(there.run(program), expected)
    plain = here.run(assemble(Form(decoding=decoding), rows(here, edits=0)))
    assert plain.tokens != expected.tokens  # a steering that does nothing would pass for equal


def test_sampled_steered_generation(pair):
    steered_alike(*pair, sample=True)


def test_greedy_steered_generation(random_pair):
    steered_alike(*random_pair, sample=False)


def test_scores(random_pair):
    here, there = random_pair
    texts = [replace(row, weights=row.weights | {"score": row.weights["text"]}) for row in rows(here, edits=0)]
    program = assemble(Form(reads=(ReadSite(1),), score=True), texts)
    assert_equal(there.run(program), here.run(program))


def test_logit_lens(random_pair):
    here, there = random_pair
    program = lens(5, np.random.default_rng(0).standard_normal((7, here.anatomy.d_model)))
    readouts, expected = there.run(program), here.run(program)
    np.testing.assert_allclose(readouts.promoted, expected.promoted, rtol=1e-4)
    assert (readouts.promoted_tokens == expected.promoted_tokens).all()


def test_edited_forward(random_pair):
    here, there = random_pair
    form = Form(reads=(ReadSite(1), ReadSite(3)), edits=(EditSite(1, "add"), EditSite(2, "add", live=True)))
    program = assemble(form, rows(here, edits=2))
    assert_equal(there.run(program), here.run(program))


def test_sites_in_a_block(pair):
    """They are proved there before the first program that needs them, and refused where they do not add up."""
    here, there = pair
    reads = tuple(ReadSite(layer, "text", "pooled", site) for layer in (1, 2) for site in SITES)
    edits = (EditSite(1, "add", site="attn_out"), EditSite(2, "add", live=True, site="mlp_out"))
    program = assemble(Form(reads=reads, edits=edits), rows(here, edits=2))
    if only_by_trial(here):
        assert here.run(program).pooled is not None
        with pytest.raises(SiteError, match="layer 1: what 'self_attention' and 'mlp' give, which are taken by name"):
            there.run(program)
    else:
        assert_equal(there.run(program), here.run(program))


def test_a_grid_in_one_job_per_batch(open_local, open_remote, tinies):
    here, there = open_local(tinies["llama"]), open_remote(tinies["llama"], together=1)
    form = Form(edits=(EditSite(1, "add", live=True),), decoding=Decoding(8, here.eos, here.pad))
    grid = list(programs(form, rows(here, 40), budget=100_000, max_rows=16))
    pairs = dict(enumerate(there.map(grid)))
    assert there.jobs == len(grid) == 3  # ⌈40 / 16⌉
    assert {program.keys for program, _ in pairs.values()} == {program.keys for program in grid}


def test_small_programs_share_a_job_and_agree(open_local, open_remote, tinies):
    here, there = open_local(tinies["gpt2"]), open_remote(tinies["gpt2"])
    form = Form(reads=tuple(ReadSite(layer) for layer in range(4)))
    small = list(programs(form, rows(here, 12, edits=0), budget=10_000, max_rows=2))
    for program, readouts in there.map(small):
        assert_equal(readouts, here.run(program))
    assert there.jobs == 1
