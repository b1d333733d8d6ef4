"""The groups of what a model or a judge measures: projections, perplexities, the logit lens, anisotropy, classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.models.facts import Facts
from nsteer.plan import capability
from nsteer.plan.check import Study, labels_under
from nsteer.stages import cells
from nsteer.stages.arrays.base import (
    CONDITION,
    ROW,
    SITE,
    attributes,
    dataset,
    depths,
    number,
    text,
    union,
    vector_axes,
)
from nsteer.stages.arrays.recorded import edited_axes
from nsteer.stages.arrays.steering import prompted_axes, steering_axes
from nsteer.stages.job import IN_A_CHUNK
from nsteer.stages.judges import BESIDE, Known
from nsteer.stages.keys import Edited, EditSearch, OfModel, Prompted, Sentences, Unsteered, Vector
from nsteer.store import Group, Variable, slug


def measured_groups(study: Study) -> list[Group]:
    """The groups of what `measure:` and `steer: {project: true}` ask for."""
    plan, groups = study.plan, []
    zero = any("zero" in entry.controls for entry in plan.steer)
    edits = plan.generate is not None
    if any(entry.project for entry in plan.steer):
        groups += [projections_group("projections", study)]
        groups += [projections_group("projections_unsteered", study)] * zero
    if edits and plan.project:
        groups.append(projections_group("projections_edited", study))
    if plan.measure is None:
        return groups
    if plan.measure.perplexity:
        asked = any("prompted" in entry.controls for entry in plan.steer)
        paths = ["outcomes"] * bool(plan.steer) + ["outcomes_unsteered"] * zero + ["outcomes_prompted"] * asked
        groups += [outcomes_group(path, study) for path in [*paths, *["outcomes_edited"] * edits]]
    if plan.measure.capability:
        cells_of = {"capability": plan.steer, "capability_unsteered": True, "capability_edited": plan.edits}
        groups += [capability_group(path, study) for path, some in cells_of.items() if some]
    for facts in study.facts:
        if plan.measure.lens and (plan.methods or plan.directions):
            groups.append(lens_group(study, facts))
        if plan.measure.anisotropy and study.texts is not None and study.texts.neutral_sentences:
            groups.append(anisotropy_group(study, facts))
    return groups


def _of_texts(path: str, study: Study) -> tuple[tuple[str, ...], dict[str, list], dict[str, Any]]:
    """Of what is said of texts, steered ones, unsteered, or under `edits`: the dims of its cells, the axes of the
    texts, and how a group has cells that are chunks."""
    if path.endswith("_edited"):
        return Edited._fields, edited_axes(study), {"chunks": {"prompt": IN_A_CHUNK["edited"]}, "ordered_as": "edited"}
    if path.endswith("_prompted"):
        return Prompted._fields, prompted_axes(study), {}
    cell, axes = Unsteered._fields if path.endswith("_unsteered") else CONDITION, steering_axes(study)
    return cell, {dim: axes[dim] for dim in (*cell, *ROW)}, {}


WHERE = ("prompt_end", "written")
"""Where a projection is taken: at the prompt's last token; as a mean over the generated tokens fed back."""


def projections_group(path: str, study: Study) -> Group:
    """Projections of the streams on the vectors (at length 1) of every emotion, the `target`.

    "projections": steered, on the vectors of the cell's own method; "projections_unsteered": on those of each method;
    "projections_edited": under the conditions of `edits`, on every vector of the plan.
    """
    cell, axes, kept = _of_texts(path, study)
    middle = ROW if path == "projections" else ("method", *ROW)
    entries = [entry for entry in study.plan.steer if entry.project]
    methods = union([cells.steered_methods(study.plan, entry) for entry in entries])
    if path == "projections_edited":
        methods = vector_axes(study.plan)["method"]
    known = {"method": methods, **axes}
    coords: dict[str, Sequence] = {
        **{dim: known[dim] for dim in (*(dim for dim in axes if dim not in ROW), *middle)},
        "where": list(WHERE),
        "layer": list(range(max(facts.n_layers for facts in study.facts))),
        "target": union([labels_under(study.plan, method) for method in methods]),
    }
    variables = {
        "projection": number(tuple(coords), "projection of the stream on the target's unit vector", compress=True)
    }
    return Group(path, coords, variables, cell, attrs=attributes(path, site=SITE), **kept)


def outcomes_group(path: str, study: Study) -> Group:
    """What is measured of the continuations in `generations` ("outcomes"), `unsteered` ("outcomes_unsteered") or
    `prompted` ("outcomes_prompted"), or `edited` ("outcomes_edited")."""
    cell, axes, kept = _of_texts(path, study)
    dims = tuple(axes)
    variables = {
        "log_probability": number(dims, "log P of the continuation under the unsteered model", "nats"),
        "perplexity": number(dims, "perplexity of the continuation under the unsteered model"),
    }
    return Group(path, axes, variables, cell, attrs=attributes(path), **kept)


PASSAGE, CHOICE = ("passage",), ("item", "choice")


def capability_group(path: str, study: Study) -> Group:
    """What a model says of the capability passages and questions: under steering ("capability"), under the conditions
    of `edits` ("capability_edited"), and without any edit ("capability_unsteered")."""
    given = capability.shipped()
    cell, axes = {
        "capability": (CONDITION, steering_axes),
        "capability_edited": (EditSearch._fields, edited_axes),
        "capability_unsteered": (OfModel._fields, lambda study: {"model": [facts.label for facts in study.facts]}),
    }[path]
    coords: dict[str, Sequence] = {name: axes(study)[name] for name in cell}
    coords |= {"passage": list(given.passages), "item": list(given.items), "choice": given.choices}
    variables = {
        "nll": number((*cell, *PASSAGE), "-log P of the passage after its opening, mean over its tokens", "nats"),
        "log_likelihood": number((*cell, *CHOICE), "log P of the answer after the question", "nats"),
    }
    if path != "capability_unsteered":
        meaning = "KL(steered ‖ unsteered) of the next-token distributions, mean over the passage's tokens"
        variables["kl"] = number((*cell, *PASSAGE), meaning, "nats")
    beside = {
        "passage_text": (
            text(PASSAGE, "opening and what is scored"),
            [" ".join(passage) for passage in given.passages.values()],
        ),
        "question": (text(("item",), "question"), [question for question, _ in given.items.values()]),
        "answer": (text(CHOICE, "answer"), [list(answers.values()) for _, answers in given.items.values()]),
    }
    return Group(path, coords, variables, cell, {}, beside, attributes(path))


def capability_data(scored: Mapping[tuple[str, str], float], kl: Mapping[str, float] | None) -> xr.Dataset:
    """A cell of `capability`, or of its unsteered continuation.

    scored : (label, choice) -> log P: of a passage (choice "") the mean over its tokens, of an answer the sum
    kl : passage -> KL against the unsteered
    """
    given = capability.shipped()
    items = [[scored[label, choice] for choice in given.choices] for label in given.items]
    values: dict[str, tuple[tuple[str, ...], Any]] = {
        "nll": (PASSAGE, np.array([-scored[label, ""] for label in given.passages], np.float32)),
        "log_likelihood": (CHOICE, np.array(items, np.float32)),
    }
    if kl is not None:
        values["kl"] = (PASSAGE, np.array([kl[label] for label in given.passages], np.float32))
    labels = {"passage": list(given.passages), "item": list(given.items), "choice": given.choices}
    return dataset(labels, values)


def lens_group(study: Study, facts: Facts) -> Group:
    """The tokens that each vector promotes most through the unembedding."""
    assert study.plan.measure is not None
    layers, depth = depths(facts)
    cell = Vector._fields
    dims = (*cell, "layer", "rank")
    variables = {
        "token": text(dims, "token, most promoted first"),
        "token_id": Variable(dims, "int32", "its id"),
        "logit": number(dims, "unembedding · vector"),
    }
    coords: dict[str, Sequence] = {
        "model": [facts.label],
        **vector_axes(study.plan),
        "layer": layers,
        "rank": list(range(study.plan.measure.lens)),
    }
    return Group(f"lens/{slug(facts.label)}", coords, variables, cell, {}, depth, attributes("lens", site=SITE))


def anisotropy_group(study: Study, facts: Facts) -> Group:
    """Last-token streams of neutral sentences, with BOS and without."""
    assert study.texts is not None
    layers, depth = depths(facts)
    coords: dict[str, Sequence] = {
        "model": [facts.label],
        "bos": ["with", "without"],
        "sentence": list(range(len(study.texts.neutral_sentences))),
        "layer": layers,
        "d_model": list(range(facts.d_model)),
    }
    variables = {"pooled": number(tuple(coords), f"last-token {SITE}")}
    path = f"anisotropy/{slug(facts.label)}"
    return Group(path, coords, variables, Sentences._fields, {}, depth, attributes("anisotropy", site=SITE))


def judged_group(path: str, study: Study, of: Mapping[str, Known], reads: str) -> Group:
    """Scores of judges' classes: of `generations` ("judged"), `unsteered` ("judged_unsteered"), `prompted`
    ("judged_prompted") or `edited` ("judged_edited").

    of : what is known of each, by label, in the plan's order; reads : the one whose cells are to come
    Judges share the group: each has a label on the axis `judge`, and its own of the classes; the rest is missing.
    """
    read, axes, kept = _of_texts(path, study)
    own: dict[str, Sequence] = {"judge": list(of), "class": union([about.classes for about in of.values()])}
    dims = (*(dim for dim in axes if dim not in ROW), "judge", *ROW, "class")
    variables = {"score": number(dims, "score of the class under the judge, as `unit` says")}
    variables |= {what: number(dims, BESIDE[what]) for what in of[reads].beside}
    auxiliary = {
        "unit": (text(("judge",), "what the scores of the judge are"), [about.unit for about in of.values()]),
        "threshold": (
            Variable(("judge",), "float64", "a text is of a class whose score is above; NaN: of the likeliest class"),
            [about.threshold for about in of.values()],
        ),
    }
    coords = {dim: {**axes, **own}[dim] for dim in dims}
    return Group(path, coords, variables, (*read, "judge"), auxiliary=auxiliary, attrs=attributes(path), **kept)


def replies_group(page: str) -> Group:
    """A page of replies of a judge's server, by what was asked."""
    variables = {"replies": text(("page",), "hash of the request: what was replied, as JSON")}
    return Group("replies", {"page": [page]}, variables, ("page",), attrs=attributes("replies"))


def judge_passages_group(name: str, labels: Sequence[str], samples: int, classes: Sequence[str]) -> Group:
    """What a judge says of the text set's own passages, whose emotion is known: how well it tells them apart."""
    dims = ("judge", "emotion", "sample", "class")
    coords: dict[str, Sequence] = {
        "judge": [name],
        "emotion": list(labels),
        "sample": list(range(samples)),
        "class": list(classes),
    }
    variables = {"score": number(dims, "score of the class under the judge; NaN where there is no passage")}
    return Group("judge_passages", coords, variables, ("judge", "emotion"), attrs=attributes("judge_passages"))


def judges_group(names: Sequence[str]) -> Group:
    """Who judged: kind, settings, identity and the map from emotions to classes, as JSON."""
    variables = {"settings": text(("judge",), "the judge of the plan and its identity, as JSON")}
    return Group("judges", {"judge": list(names)}, variables, ("judge",), attrs=attributes("judges"))
