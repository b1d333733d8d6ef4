"""Turns parts of a plan into the forms of the programs that carry them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from nsteer.plan import positions
from nsteer.plan.layers import resolve
from nsteer.plan.schema import Also, Calibrated, Edit, Generate, Steer
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, place
from nsteer.program.ops import UNSCALED
from nsteer.stages.job import Job

Flat = list[tuple[int, Edit, int]]

OWN = -1
"""The number of a steer block's own op beside the places of the others in its `also`."""


def decoding(generate: Generate, ends: Ends) -> Decoding:
    """A plan's decoding with a model's own ids for end of text and padding."""
    g = generate
    return Decoding(g.max_new_tokens, *ends, g.sample, g.temperature, g.top_k, g.top_p)


def capture(layers: Iterable[int]) -> Form:
    """Pooled streams and their mean norms at every layer."""
    return Form(reads=tuple(ReadSite(layer, *what) for layer in layers for what in (("text",), ("norm", "norm"))))


def entering() -> Form:
    """What enters the first block, pooled: token embeddings, and positions where a model adds them there."""
    return Form(reads=(ReadSite(0, site="resid_pre"),))


def plain(block: Steer, projected: Iterable[int], how: Decoding) -> Form:
    """A steer block without its edits; `projected`: layers whose streams are kept for projections."""
    return Form(reads=_decoded(block, projected), decoding=how)


def _decoded(block: Steer, layers: Iterable[int]) -> tuple[ReadSite, ...]:
    return tuple(ReadSite(layer, "none", "decoded") for layer in layers) if block.project else ()


def steer(block: Steer, layers: Iterable[int], projected: Iterable[int], how: Decoding, n_layers: int) -> Form:
    """A steer block at one layer set; `projected`: layers whose streams are kept for projections."""
    edits = tuple(_site(layer, edit) for layer, edit, _ in together(block, layers, n_layers))
    return Form(reads=_decoded(block, projected), edits=edits, decoding=how)


def calibrate(block: Steer, layers: Iterable[int], n_layers: int) -> Form:
    """A steer block at one layer set over a continuation that is there: what its edits change in the distributions."""
    return Form(edits=tuple(_site(layer, edit) for layer, edit, _ in together(block, layers, n_layers)), against=True)


def together(block: Steer, layers: Iterable[int], n_layers: int) -> list[tuple[int, Steer | Also, int]]:
    """The edits of a steered row as (layer, edit, its place in `also` or OWN), in forward order.

    At one layer and site: those of `also` that come before the block's own op, it, those that come after it.
    """
    numbered = list(enumerate(block.also))
    first = [(i, one) for i, one in numbered if one.order == "before"]
    last = [(i, one) for i, one in numbered if one.order == "after"]
    flat: list[tuple[int, Steer | Also, int]] = [
        (layer, one, i) for i, one in first for layer in resolve(one.layers, n_layers)
    ]
    flat += [(layer, block, OWN) for layer in layers]
    flat += [(layer, one, i) for i, one in last for layer in resolve(one.layers, n_layers)]
    return sorted(flat, key=lambda one: (one[0], SITES.index(one[1].site)))


def flatten(edits: Sequence[Edit], n_layers: int) -> Flat:
    """The edits of a condition as (layer, edit, its number in the list), in forward order."""
    flat = [(layer, edit, i) for i, edit in enumerate(edits) for layer in resolve(edit.layers, n_layers)]
    return sorted(flat, key=lambda one: (one[0], SITES.index(one[1].site)))


def sites(flat: Flat) -> tuple[EditSite, ...]:
    return tuple(_site(layer, edit) for layer, edit, _ in flat)


def _site(layer: int, edit: Steer | Edit | Also) -> EditSite:
    when = edit.when
    gated = when is not None and (when.above is not None or when.below is not None)
    return EditSite(
        layer,
        edit.op,
        live=edit.scale == "stream_norm" and edit.op not in UNSCALED,
        paced=edit.schedule is not None or positions.bounded(edit.positions),
        gate=when.of if when is not None and gated else "",
        after=when is not None and when.after is not None,
        site=edit.site,
    )


def record(job: Job, names: Sequence[str], flat: Flat) -> Form:
    """The reads called `names`, under the edits of a condition. Pooled ones use the weights `read_<number>`."""
    kept = []
    for number, name in enumerate(names):
        read = job.plan.reads[name]
        what = (f"read_{number}", "pooled") if read.pooling is not None else ("none", "tokens")
        kept += [ReadSite(layer, *what, read.site) for layer in job.resolve(read.layers)]
    return Form(reads=tuple(sorted(dict.fromkeys(kept), key=place)), edits=sites(flat))


def score() -> Form:
    """The log-probability of each row's own continuation."""
    return Form(score=True)


def sentences(n_layers: int) -> Form:
    """One pooled stream at every layer."""
    return Form(reads=tuple(ReadSite(layer) for layer in range(n_layers)))


# ---- of the stages: every form that a stage puts through a model -----------------------------------------------


class Ends(NamedTuple):
    """A model's own ids for end of text, and for padding."""

    eos: tuple[int, ...]
    pad: int


def of_samples(job: Job, ends: Ends) -> Iterator[Form]:
    for method in job.plan.methods.values():
        if method.source == "generation":
            yield Form(decoding=decoding(method.generate, ends))


def of_activations(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.methods:
        yield capture(job.layers)


def of_embeddings(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.embeddings and job.plan.methods:
        yield entering()


def of_swapped(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.swap:
        yield capture(job.layers)


def of_directions(job: Job, ends: Ends) -> Iterator[Form]:
    if any(spec.contrast or spec.mean for spec in job.plan.directions.values()):
        yield sentences(job.facts.n_layers)


def of_unsteered(job: Job, ends: Ends) -> Iterator[Form]:
    for block in job.plan.steer:
        yield plain(block, job.layers, decoding(block.generate, ends))


def of_prompted(job: Job, ends: Ends) -> Iterator[Form]:
    for block in job.plan.steer:
        if "prompted" in block.controls:
            yield Form(decoding=decoding(block.generate, ends))


def of_calibration(job: Job, ends: Ends) -> Iterator[Form]:
    for block in job.plan.steer:
        if isinstance(block.strengths, Calibrated):
            for layers in job.layer_sets(block).values():
                yield calibrate(block, layers, job.facts.n_layers)


def of_steering(job: Job, ends: Ends) -> Iterator[Form]:
    for block in job.plan.steer:
        for layers in job.layer_sets(block).values():
            yield steer(block, layers, job.layers, decoding(block.generate, ends), job.facts.n_layers)


def of_outcomes(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.perplexity and job.plan.steer:
        yield score()


def of_lens(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.lens and (job.plan.methods or job.plan.directions):
        yield Form(promote=job.plan.measure.lens)


def of_anisotropy(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.anisotropy:
        yield sentences(job.facts.n_layers)


def of_reads(job: Job, ends: Ends) -> Iterator[Form]:
    for edits in ([], *job.plan.edits.values()):
        if job.plan.reads:
            yield record(job, list(job.plan.reads), flatten(edits, job.facts.n_layers))


def of_edited(job: Job, ends: Ends) -> Iterator[Form]:
    for edits in ([], *job.plan.edits.values()):
        if job.plan.generate is not None:
            flat = flatten(edits, job.facts.n_layers)
            yield Form(edits=sites(flat), decoding=decoding(job.plan.generate, ends))
