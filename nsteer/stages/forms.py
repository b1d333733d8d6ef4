"""Turns parts of a plan into the forms of the programs that carry them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nsteer.models.facts import Facts
from nsteer.plan import positions
from nsteer.plan.check import Study, layer_sets
from nsteer.plan.layers import resolve
from nsteer.plan.schema import Also, Calibrated, Edit, Generate, Steer
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, place
from nsteer.program.ops import UNSCALED

Flat = list[tuple[int, Edit, int]]

OWN = -1
"""The number of a steer block's own op beside the places of the others in its `also`."""


def decoding(generate: Generate, eos: tuple[int, ...], pad: int) -> Decoding:
    """A plan's decoding with a model's own ids for end of text and padding."""
    g = generate
    return Decoding(g.max_new_tokens, eos, pad, g.sample, g.temperature, g.top_k, g.top_p)


def capture(layers: Iterable[int]) -> Form:
    """Pooled streams and their mean norms at every layer."""
    return Form(reads=tuple(ReadSite(layer, *what) for layer in layers for what in (("text",), ("norm", "norm"))))


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


def record(study: Study, facts: Facts, names: Sequence[str], flat: Flat) -> Form:
    """The reads called `names`, under the edits of a condition. Pooled ones use the weights `read_<number>`."""
    kept = []
    for number, name in enumerate(names):
        read = study.plan.reads[name]
        what = (f"read_{number}", "pooled") if read.pooling is not None else ("none", "tokens")
        kept += [ReadSite(layer, *what, read.site) for layer in resolve(read.layers, facts.n_layers)]
    return Form(reads=tuple(sorted(dict.fromkeys(kept), key=place)), edits=sites(flat))


def score() -> Form:
    """The log-probability of each row's own continuation."""
    return Form(score=True)


def all_of(study: Study, facts: Facts, eos: tuple[int, ...], pad: int) -> Iterator[tuple[str, Form]]:
    """(stage, form) of every program that a model's stages run, in order."""
    plan = study.plan
    for method in plan.methods.values():
        if method.source == "generation":
            yield "samples", Form(decoding=decoding(method.generate, eos, pad))
    if plan.methods:
        yield "activations", capture(resolve(plan.layers, facts.n_layers))
    for block in plan.steer:
        how = decoding(block.generate, eos, pad)
        projected = resolve(plan.layers, facts.n_layers)
        yield "unsteered", plain(block, projected, how)
        for layers in layer_sets(block.layers, facts.n_layers).values():
            if isinstance(block.strengths, Calibrated):
                yield "calibration", calibrate(block, layers, facts.n_layers)
            yield "steering", steer(block, layers, projected, how, facts.n_layers)
    if plan.measure is not None and plan.measure.perplexity and plan.steer:
        yield "outcomes", score()
    if plan.measure is not None and plan.measure.lens and plan.methods:
        yield "lens", Form(promote=plan.measure.lens)
    if plan.measure is not None and plan.measure.anisotropy:
        yield "anisotropy", Form(reads=tuple(ReadSite(layer) for layer in range(facts.n_layers)))
    for edits in ([], *plan.edits.values()):
        flat = flatten(edits, facts.n_layers)
        if plan.reads:
            yield "reads", record(study, facts, list(plan.reads), flat)
        if plan.generate is not None:
            yield "edited", Form(edits=sites(flat), decoding=decoding(plan.generate, eos, pad))
