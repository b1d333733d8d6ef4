"""Turns a document into a plan that can run, or into every problem it has, each located.

Problems of form (pydantic: `form`, `wording`) and of meaning (the other modules, each named after its section of plans)
come together: what fails by form is left out, and the rest is still checked for meaning. A check is a function of the
`Checker` (`base`) that adds problems to it. Imports neither torch nor xarray.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel

from nsteer.errors import PlanError, Problem, StoreError, printable
from nsteer.models.facts import Facts
from nsteer.plan import mappings, named, reader
from nsteer.plan.check import (
    borrowing,
    directions,
    edits,
    given,
    judges,
    methods,
    models,
    reads,
    rows,
    settings,
    steering,
    texts,
    tuning,
)
from nsteer.plan.check.base import Checker
from nsteer.plan.check.form import STAND_IN, expand_presets, plan_of
from nsteer.plan.check.implied import (
    also_rests_on,
    conditions,
    continuing,
    counts_for,
    derived_for,
    directions_of,
    formula_of,
    labels_of,
    labels_under,
    layer_sets,
    named_by,
    neutral_count,
    rated_emotions,
    reads_instruction,
    rests_on,
    sample_count,
    stands_for,
    steered_directions,
    steering_vectors,
    strengths_of,
    swept,
    vectors_for,
)
from nsteer.plan.check.tuning import HELD, budget, tuned
from nsteer.plan.layers import resolve
from nsteer.plan.reader import Document, Path, kind
from nsteer.plan.schema import Plan, Stored
from nsteer.plan.texts import TextSet
from nsteer.science import axis
from nsteer.system import markup

__all__ = [
    "HELD",
    "STAND_IN",
    "Study",
    "also_rests_on",
    "budget",
    "code_of_judges",
    "code_of_models",
    "conditions",
    "continuing",
    "counts_for",
    "derived_for",
    "directions_of",
    "expand_presets",
    "formula_of",
    "labels_of",
    "labels_under",
    "layer_sets",
    "load",
    "named_by",
    "neutral_count",
    "rated_emotions",
    "reads_instruction",
    "rests_on",
    "sample_count",
    "stands_for",
    "steered_directions",
    "steering_vectors",
    "strengths_of",
    "study",
    "swept",
    "tuned",
    "vectors_for",
]


@dataclass(frozen=True, repr=False)
class Study:
    """A plan that passed every check, with what the checks found out on the way.

    moment : the clock of chat templates that write the date: when the plan was checked, or its `chat_date`
    only : of the steering grid these cells alone (keys of `cells.steering`); all of them when None
    notes : what ends no plan and whoever runs it should know, each located
    named : files and datasets: path of the plan -> the dataset whose texts stand there
    beside : columns of the files and datasets of prompts: name of a coordinate -> label of the prompt -> value
    beside_passages : the same of the texts: name -> emotion -> a value a passage
    lent : vectors of other stores that were read: what a fingerprint is of is what is computed with
    """

    plan: Plan
    document: Document
    texts: TextSet | None
    facts: tuple[Facts, ...]
    only: frozenset[tuple] | None = None
    notes: tuple[Problem, ...] = ()
    moment: datetime = field(default_factory=datetime.now)
    named: dict[Path, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)
    beside: dict[str, dict[str, str]] = field(default_factory=dict, repr=False, compare=False)
    beside_passages: dict[str, dict[str, list[str]]] = field(default_factory=dict, repr=False, compare=False)
    lent: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    def told(self) -> list[tuple[str, str]]:
        """What it is, in a few rows: its models, and every field that its plan gives."""
        of_models = [f"{fact.label} ({fact.n_layers} layers of width {fact.d_model})" for fact in self.facts]
        given = {name: value for name, value in self.document.data.items() if name not in ("name", "models")}
        rows = [("models", ", ".join(of_models)), *((name, _short(value)) for name, value in given.items())]
        return rows + [("note", str(note)) for note in self.notes]

    def __repr__(self) -> str:
        rows = [f"  {name}: {said}" for name, said in self.told()]
        return printable("\n".join([f"nsteer study {self.plan.name}", *rows]))

    def _repr_html_(self) -> str:
        return markup.table(f"nsteer study {self.plan.name}", self.told())

    def borrowed(self, facts: Facts, spec: Stored) -> Any:
        """A vector of a store, read once: see `borrowing.borrowed`."""
        key = (facts.label, spec.model_dump_json())
        if key not in self.lent:
            self.lent[key] = borrowing.borrowed(facts.label, spec)
        return self.lent[key]

    def as_json(self, section: BaseModel, *path: str | int) -> dict[str, Any]:
        """A section of the plan as JSON data, with the datasets of its texts in place of what came of them.

        path : where the section stands in the plan
        """
        data = section.model_dump(mode="json")
        for place, dataset in self.named.items():
            if place[: len(path)] == path:
                data = reader._put(data, place[len(path) :], dataset)
        return data

    def layers(self, spec: Any, facts: Facts) -> tuple[int, ...]:
        """The block indices of a layer specification in one of the study's models."""
        return resolve(spec, facts.n_layers)


def _short(value: Any, deep: int = 0) -> str:
    """A field of a plan in a line: what a list holds and a mapping names, a few of each."""
    if isinstance(value, dict) and value and deep < 2:
        listed = [f"{name}: {_short(item, deep + 1)}" if deep == 0 else str(name) for name, item in value.items()]
    elif isinstance(value, list) and value:
        listed = [_short(item, deep + 1) for item in value]
    else:
        return value if isinstance(value, str) and len(value) <= 60 else kind(value)
    more = f", … ({len(listed)})" if len(listed) > 6 else ""
    return ", ".join(listed[:6]) + more if deep == 0 else f"[{', '.join(listed[:6])}{more}]"


def load(
    plan: str | FilePath | Mapping[str, Any],
    settings: Iterable[str] = (),
    *,
    allow_outside: bool = False,
    host: str | None = None,
) -> Study:
    """The study that a plan describes, with `--set` overrides. Raises PlanError with every problem found.

    plan : the file of a plan, or the name of one that comes with nsteer (`quickstart`); or the plan itself, its fields
        as a mapping, checked by the same rules. Files that a mapping names are sought from where one stands
    allow_outside : whether the plan may name texts, vectors and plans outside its folder and the one where one stands
    host : the NDIF server, whatever the plan says; without it a plan may name none but that of NDIF_HOST or of
        nnsight's configuration
    """
    if isinstance(plan, Mapping):
        document = mappings.document(plan, allow_outside)
    else:
        document = reader.read(named.find(plan)[0], allow_outside, strict=False)
    document = reader.override(document, settings, strict=False)
    if host:
        document = reader.at_host(document, host)
    return study(document)


def study(document: Document) -> Study:
    """The study that a document describes. Raises PlanError with every problem found."""
    if not isinstance(document.data, dict):
        here = document.problem((), kind(document.data), "a mapping of plan fields")
        raise PlanError([here, *document.problems])
    check = Checker(document)
    with axis.named(_axis(document.data)):
        plan = plan_of(check)
        if plan is not None:
            plan = _meaning(check, _named_axis(plan))
    if check.problems:
        raise PlanError(check.problems)
    assert plan is not None
    moment = datetime.now() if plan.chat_date is None else datetime.fromisoformat(plan.chat_date)
    return Study(
        plan,
        document,
        check.texts,
        tuple(check.facts),
        notes=tuple(check.notes),
        moment=moment,
        named=check.named,
        beside=check.beside,
        beside_passages=check.beside_passages,
    )


def _axis(data: Mapping[str, Any]) -> str:
    """What a plan, as it is written, calls the axis of what vectors stand for.

    `concept` where it says `concepts`, and where directions are all that it has, unless its store has emotions already:
    honest against dishonest answers is no emotion. `emotion` where it says `emotions` anywhere, has methods, or borrows
    the vector of an emotion.
    """
    if data.get("concepts") is not None:
        return axis.CONCEPT
    directions, steer = data.get("directions"), data.get("steer")
    if data.get("emotions") is not None or data.get("methods") or not isinstance(directions, Mapping) or not directions:
        return axis.EMOTION
    stores = [spec.get("store") for spec in directions.values() if isinstance(spec, Mapping)]
    grids = [
        entry.get("vectors") for entry in (steer if isinstance(steer, list) else [steer]) if isinstance(entry, Mapping)
    ]
    said = [(store, "emotion") for store in stores] + [(vectors, "emotions") for vectors in grids]
    spoken = any(isinstance(given, Mapping) and given.get(name) is not None for given, name in said)
    return axis.EMOTION if spoken else _axis_of_store(data.get("store")) or axis.CONCEPT


def _axis_of_store(store: Any) -> str:
    """What a store on this machine calls the axis; "" for one that is not there, or can not be read: a run says so."""
    if not isinstance(store, str | os.PathLike) or not FilePath(store).is_dir():
        return ""
    from nsteer.store import Store  # here: few plans ask, and checking the others stays light

    with contextlib.suppress(StoreError):
        return Store(store).published_axis()
    return ""


def _named_axis(plan: Plan) -> Plan:
    """The plan, which says that it has no concepts of a text set where its axis is named so without its word."""
    return plan.model_copy(update={"concepts": []}) if axis.current() != plan.axis else plan


def _meaning(check: Checker, plan: Plan) -> Plan:
    """Checks that need more than one field, a file, or a model's config, in the order of their problems.

    The plan comes back with what its text set decides.
    """
    texts.text_set(check, plan)
    plan = rows.all_datasets(check, texts.own_emotions(check, plan))
    plan = methods.without_neutral(plan, check.texts)
    emotions = texts.emotions(check, plan)
    texts.ratings(check, plan, emotions)
    models.configs(check, plan)
    models.all_layers(check, plan)
    methods.all_methods(check, plan, emotions)
    methods.swap(check, plan, emotions)
    steering.all_entries(check, plan, emotions)
    reads.something_to_do(check, plan)
    settings.chat_date(check, plan)
    settings.chat_arguments(check, plan)
    settings.remote(check, plan)
    settings.vllm(check, plan)
    reads.all_reads(check, plan)
    sound = directions.all_directions(check, plan)
    edits.all_edits(check, plan, sound)
    borrowing.all_borrowed(check, plan, sound)
    judges.all_judges(check, plan)
    tuning.search(check, plan)
    settings.store(check, plan)
    given.all_given(check, plan, emotions)
    return plan


def code_of_judges(study: Study) -> list[Problem]:
    """A problem for every judge that is Python code: whoever runs the plan must say so too."""
    hint = "read the code, then run with --trust-judge"
    return [
        study.document.problem(
            ("judge",) if spec is study.plan.judge else ("judges", name),
            f"the function {spec.python.function!r}",
            "it confirmed by who runs the plan",
            hint,
        )
        for name, spec in study.plan.all_judges().items()
        if spec.python is not None
    ]


def code_of_models(study: Study) -> list[Problem]:
    """A problem for every model that may bring Python code of its own: whoever runs the plan must say so too."""
    hint = "read the code, then run with --trust-remote-code"
    return [
        study.document.problem(("models", i, "trust_remote_code"), "true", "it confirmed by who runs the plan", hint)
        for i, spec in enumerate(study.plan.models)
        if spec.trust_remote_code
    ]
