"""The stages of a run, in order: the one place that says what each fills, wants, costs and puts through a model.

A run takes a model's stages one after another; they meet only in the store. Sizing, garbage collection, tasks for
workers, the limits of batches, previews and the run itself are loops over STAGES. What a stage does is in
`nsteer.runner`, under its name in `runner.stages.RUN`: apart, because it needs torch and xarray and this does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from nsteer.program.form import Form
from nsteer.stages import cells, counting, forms
from nsteer.stages.job import Job
from nsteer.stages.products import path


def _nothing(job: Job, ends: forms.Ends) -> Iterable[Form]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One stage.

    cells : the cells that a model's job wants of it, each with its fingerprint; none where the plan asks for none
    groups : in which a cell is kept; it is done when it is in all of them, and fails under the last
    beside : groups of the same keys, in which cells may lack
    rows, tokens : what a cell puts through a model; of tokens, those to be generated too
    forms : of the programs that carry it out
    version : of its algorithm: raised when the same knobs come to give other numbers
    needs_model : whether its cells are computed by the current model
    per_model : whether it belongs to a model's turn; else it comes once, after the last model
    reads : the stage whose continuations it is about
    after : stages on whose cells, of any key, its own rest, beside those of their own keys
    together : whether its cells of a model are done in one go, for one may rest on another
    copied : whether cells of equal fingerprint are computed once, and copied
    """

    name: str
    cells: Callable[[Job], cells.Cells[Any]]
    groups: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    rows: Callable[[Job, Any], int] = counting.none
    tokens: Callable[[Job, Any], int] = counting.none
    forms: Callable[[Job, forms.Ends], Iterable[Form]] = _nothing
    needs_model: bool = True
    per_model: bool = True
    reads: str = ""
    after: tuple[str, ...] = ()
    together: bool = False
    copied: bool = False

    @property
    def products(self) -> tuple[str, ...]:
        """The kinds of groups in which its cells are kept: its own name where none are named."""
        return self.groups or (self.name,)

    def paths(self, job: Job) -> tuple[str, ...]:
        """Where its cells of a model are kept: done in all, recorded in the last."""
        return tuple(path(group, job.label) for group in self.products)

    def all_paths(self, job: Job) -> tuple[str, ...]:
        """The same, and the groups beside them."""
        return (*self.paths(job), *(path(group, job.label) for group in self.beside))


_VECTORS = ("vectors", "directions")
_EDITS = (*_VECTORS, "calibration_edits")
_TEXTS: Any = {"rows": counting.text_rows, "tokens": counting.text_tokens}
_SEARCH: Any = {"rows": counting.search_rows, "tokens": counting.search_tokens}
_WEIGHED: Any = {"rows": counting.weighed_rows, "tokens": counting.weighed_tokens}
_JUDGED: Any = {"rows": counting.text_rows, "needs_model": False, "per_model": False}
_DIRECTIONS: Any = {"rows": counting.direction_rows, "tokens": counting.direction_tokens}
_RESPONSES: Any = {"rows": counting.response_rows, "tokens": counting.response_tokens}
_SAMPLES: Any = {"rows": counting.sample_rows, "tokens": counting.sample_tokens}
_WRITTEN: Any = {"rows": counting.written_rows, "tokens": counting.written_tokens}
_READS: Any = {"rows": counting.read_rows, "tokens": counting.read_tokens}

STAGES = (
    Stage("samples", cells.samples, forms=forms.of_samples, copied=True, **_WRITTEN),
    Stage("activations", cells.activations, forms=forms.of_activations, copied=True, **_SAMPLES),
    Stage("embeddings", cells.embeddings, forms=forms.of_embeddings, copied=True, **_SAMPLES),
    Stage(
        "swapped",
        cells.swapped,
        rows=counting.swapped_rows,
        tokens=counting.swapped_tokens,
        forms=forms.of_swapped,
        after=("samples",),
    ),
    Stage("vectors", cells.derived, needs_model=False, after=("activations",)),
    Stage("responses", cells.responses, forms=forms.of_responses, **_RESPONSES),
    Stage("responses_judged", cells.responses_judged, rows=counting.response_rows),
    Stage(
        "directions",
        cells.directions,
        groups=("vectors",),
        forms=forms.of_directions,
        after=("vectors", "responses", "responses_judged"),
        together=True,
        **_DIRECTIONS,
    ),
    Stage("calibration", cells.calibration, forms=forms.of_calibration, after=_VECTORS, **_SEARCH),
    Stage(
        "unsteered",
        cells.unsteered,
        beside=("projections_unsteered",),
        forms=forms.of_unsteered,
        after=_VECTORS,
        **_TEXTS,
    ),
    Stage("prompted", cells.prompted, forms=forms.of_prompted, **_TEXTS),
    Stage(
        "steering",
        cells.steering,
        groups=("steering", "generations"),
        beside=("steering_also", "projections"),
        forms=forms.of_steering,
        after=(*_VECTORS, "calibration"),
        **_TEXTS,
    ),
    Stage("outcomes", cells.steered_outcomes, reads="steering", forms=forms.of_outcomes, **_TEXTS),
    Stage("outcomes_unsteered", cells.unsteered_outcomes, reads="unsteered", forms=forms.of_outcomes, **_TEXTS),
    Stage("outcomes_prompted", cells.prompted_outcomes, reads="prompted", forms=forms.of_outcomes, **_TEXTS),
    Stage("capability_unsteered", cells.capability_unsteered, forms=forms.of_capability_unsteered, **_WEIGHED),
    Stage(
        "capability",
        cells.capability,
        forms=forms.of_capability,
        after=(*_VECTORS, "calibration"),
        **_WEIGHED,
    ),
    Stage("lens", cells.lens, rows=counting.lens_rows, forms=forms.of_lens, after=_VECTORS),
    Stage("anisotropy", cells.anisotropy, rows=counting.sentence_rows, forms=forms.of_anisotropy),
    Stage("calibration_edits", cells.calibration_edits, forms=forms.of_calibration_edits, after=_VECTORS, **_SEARCH),
    Stage("reads", cells.pooled_reads, beside=("read_receipts",), forms=forms.of_reads, after=_EDITS, **_READS),
    Stage("streams", cells.whole_reads, beside=("stream_receipts",), forms=forms.of_reads, after=_EDITS, **_READS),
    Stage(
        "edited",
        cells.edited,
        after=_EDITS,
        beside=("edited_receipts", "projections_edited"),
        forms=forms.of_edited,
        **_TEXTS,
    ),
    Stage("outcomes_edited", cells.edited_outcomes, reads="edited", forms=forms.of_outcomes, **_TEXTS),
    Stage("capability_edited", cells.capability_edited, forms=forms.of_capability_edited, after=_EDITS, **_WEIGHED),
    Stage("judged", cells.steered_judged, reads="steering", **_JUDGED),
    Stage("judged_unsteered", cells.unsteered_judged, reads="unsteered", **_JUDGED),
    Stage("judged_prompted", cells.prompted_judged, reads="prompted", **_JUDGED),
    Stage("judged_edited", cells.edited_judged, reads="edited", **_JUDGED),
)

BY_NAME = {stage.name: stage for stage in STAGES}


def forms_of(job: Job, ends: forms.Ends) -> Iterable[tuple[str, Form]]:
    """(stage, form) of every program that a model's stages run, in order."""
    return [(stage.name, form) for stage in STAGES for form in stage.forms(job, ends)]
