"""Turns sections of a plan into the forms of the programs that carry them out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from nsteer.plan import editing
from nsteer.plan.check import conditions, swept
from nsteer.plan.layers import resolve
from nsteer.plan.schema import Calibrated, Continuing, Generate, Steer
from nsteer.program.form import SITES, Decoding, EditSite, Form, ReadSite, place
from nsteer.stages.cells import weighs, written
from nsteer.stages.job import Job

Flat = list[tuple[int, Any, int]]
"""Edits at their layers, in forward order: (layer, edit, its number among those that were written)."""

OWN = -1
"""The number of a steer entry's own op beside the places of the others in its `also`."""


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


def unsteered(entry: Steer, projected: Iterable[int], how: Decoding) -> Form:
    """A steer entry without its edits; `projected`: layers whose streams are kept for projections."""
    return Form(reads=_decoded(entry, projected), decoding=how)


def _decoded(continuing: Continuing, layers: Iterable[int]) -> tuple[ReadSite, ...]:
    return tuple(ReadSite(layer, "none", "decoded") for layer in layers) if continuing.project else ()


def steer(entry: Steer, layers: Iterable[int], projected: Iterable[int], how: Decoding, n_layers: int) -> Form:
    """A steer entry at one layer set; `projected`: layers whose streams are kept for projections."""
    return Form(_decoded(entry, projected), sites(together(entry, layers, n_layers)), how)


def calibrate(flat: Flat) -> Form:
    """Edits over a continuation that is there: what they change in the distributions."""
    return Form(edits=sites(flat), against=True)


def weigh(flat: Flat) -> Form:
    """Edits over a text that is there: how probable it is, and what they change in the distributions."""
    return Form(edits=sites(flat), score=True, against=True)


def together(entry: Steer, layers: Iterable[int], n_layers: int) -> Flat:
    """The edits of a steered row; the number of the entry's own is OWN, of the others their place in `also`.

    At one layer and site: those of `also` that come before the entry's own op, it, those that come after it.
    """
    numbered = [(i, further, resolve(further.layers, n_layers)) for i, further in enumerate(entry.also)]
    first = [further for further in numbered if further[1].order == "before"]
    last = [further for further in numbered if further[1].order == "after"]
    return _forward([*first, (OWN, entry, layers), *last])


def condition(job: Job, label: str) -> Flat:
    """The edits of a condition of `edits`."""
    edits = conditions(job.plan)[label]
    return _forward([(i, edit, job.resolve(edit.layers)) for i, edit in enumerate(edits)])


def _forward(edits: Iterable[tuple[int, Any, Iterable[int]]]) -> Flat:
    """(number, edit, layers) in forward order; at one layer and site in the order given."""
    flat = [(layer, edit, number) for number, edit, layers in edits for layer in layers]
    return sorted(flat, key=lambda edit: (edit[0], SITES.index(edit[1].site)))


def sites(flat: Flat) -> tuple[EditSite, ...]:
    return tuple(editing.site(layer, edit) for layer, edit, _ in flat)


def edited(job: Job, flat: Flat, how: Decoding) -> Form:
    """A condition of `edits` while the model writes."""
    return Form(_decoded(job.continuing, job.layers), sites(flat), how)


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


def of_responses(job: Job, ends: Ends) -> Iterator[Form]:
    for contrast in written(job.plan).values():
        if contrast.generate is not None:
            yield Form(decoding=decoding(contrast.generate, ends))


def of_directions(job: Job, ends: Ends) -> Iterator[Form]:
    if any(spec.contrast or spec.mean for spec in job.plan.directions.values()):
        yield sentences(job.facts.n_layers)


def of_unsteered(job: Job, ends: Ends) -> Iterator[Form]:
    for entry in job.plan.steer:
        yield unsteered(entry, job.layers, decoding(entry.generate, ends))


def of_prompted(job: Job, ends: Ends) -> Iterator[Form]:
    for entry in job.plan.steer:
        if "prompted" in entry.controls:
            yield Form(decoding=decoding(entry.generate, ends))


def of_calibration(job: Job, ends: Ends) -> Iterator[Form]:
    for entry in job.plan.steer:
        if isinstance(entry.strengths, Calibrated):
            for layers in job.layer_sets(entry).values():
                yield calibrate(together(entry, layers, job.facts.n_layers))


def of_calibration_edits(job: Job, ends: Ends) -> Iterator[Form]:
    for label, edits in job.plan.edits.items():
        if isinstance(swept(edits), Calibrated):
            yield calibrate(condition(job, label))


def of_capability(job: Job, ends: Ends) -> Iterator[Form]:
    for entry in job.plan.steer if weighs(job.plan) else ():
        for layers in job.layer_sets(entry).values():
            yield weigh(together(entry, layers, job.facts.n_layers))


def of_capability_unsteered(job: Job, ends: Ends) -> Iterator[Form]:
    if weighs(job.plan) and (job.plan.steer or job.plan.edits):
        yield score()


def of_capability_edited(job: Job, ends: Ends) -> Iterator[Form]:
    for label in job.plan.edits if weighs(job.plan) else ():
        yield weigh(condition(job, label))


def of_steering(job: Job, ends: Ends) -> Iterator[Form]:
    for entry in job.plan.steer:
        for layers in job.layer_sets(entry).values():
            yield steer(entry, layers, job.layers, decoding(entry.generate, ends), job.facts.n_layers)


def of_outcomes(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.perplexity and (job.plan.steer or job.plan.generate):
        yield score()


def of_lens(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.lens and (job.plan.methods or job.plan.directions):
        yield Form(promote=job.plan.measure.lens)


def of_anisotropy(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.measure is not None and job.plan.measure.anisotropy:
        yield sentences(job.facts.n_layers)


def of_reads(job: Job, ends: Ends) -> Iterator[Form]:
    for label in conditions(job.plan) if job.plan.reads else ():
        yield record(job, list(job.plan.reads), condition(job, label))


def of_edited(job: Job, ends: Ends) -> Iterator[Form]:
    if job.plan.generate is not None:
        for label in conditions(job.plan):
            yield edited(job, condition(job, label), decoding(job.plan.generate, ends))
