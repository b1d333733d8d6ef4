"""One model of a study, with all that its facts decide worked out once: layers, layer sets, the cells it wants."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from nsteer.models.facts import Facts, label_of
from nsteer.plan.check import Study, continuing, layer_sets
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Continuing, Model, Plan, Steer
from nsteer.stages.keys import Read
from nsteer.stages.products import path

if TYPE_CHECKING:
    from nsteer.store import Store

T = TypeVar("T")

IN_A_CHUNK = {"reads": 128, "streams": 8, "edited": 128}
"""Kinds of groups that are kept in chunks of the plan's own prompts -> prompts in one cell.

Of whole streams a cell of 8 prompts of 512 positions, at one layer of width 4,096, takes 64 MiB.
"""

Chunks = dict[int, dict[str, Any]]
"""Number of a chunk -> its prompts, by label."""


def nowhere(path: str, dim: str) -> Sequence[str]:
    """The labels in no store."""
    return ()


@dataclass(frozen=True)
class Job:
    """What a study asks of one model.

    labels : (path of a group, dim) -> what its store has published there
    draw : which shuffle of labels methods and contrasts have, from 1; 0 where they are as the plan says
    """

    study: Study
    facts: Facts
    labels: Callable[[str, str], Sequence[str]] = field(default=nowhere, compare=False, repr=False)
    draw: int = 0
    _prompt_chunks: dict[str, Chunks] = field(default_factory=dict, compare=False, repr=False)
    _known: dict[Callable[..., Any], Any] = field(default_factory=dict, compare=False, repr=False)
    _shuffled: dict[int, Job] = field(default_factory=dict, compare=False, repr=False)

    @property
    def plan(self) -> Plan:
        return self.study.plan

    @property
    def label(self) -> str:
        """The model's label on the axis `model`."""
        return self.facts.label

    @cached_property
    def model(self) -> Model:
        """The plan's entry for the model."""
        return next(model for model in self.plan.models if label_of(model) == self.label)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers at which streams are read and vectors made."""
        return self.resolve(self.plan.layers)

    def resolve(self, layers: Any) -> tuple[int, ...]:
        """What a plan says of layers, as 0-based block indices of this model."""
        return resolve(layers, self.facts.n_layers)

    def layer_sets(self, entry: Steer) -> dict[str, tuple[int, ...]]:
        """The layer sets of a steer entry, by their label on the axis `layer_set`."""
        return layer_sets(entry.layers, self.facts.n_layers)

    @cached_property
    def continuing(self) -> Continuing:
        """The plan's own prompts, and how they are continued under `edits`."""
        return continuing(self.plan)

    @cached_property
    def steer_entries(self) -> dict[str, Steer]:
        """The plan's steer entries, by their label on the axis `op`."""
        return {entry.label: entry for entry in self.plan.steer}

    def texts_of(self, key: Any) -> Continuing:
        """The prompts that a cell's texts continue, and how."""
        if hasattr(key, "op"):
            return self.steer_entries[key.op]
        return self.some(self.prompts_of(key)) if hasattr(key, "prompt_chunk") else self.continuing

    def some(self, prompts: Mapping[str, Any]) -> Continuing:
        """Some of the plan's own prompts, and how they are continued."""
        return self.continuing.model_copy(update={"prompts": prompts})

    def prompts_of(self, key: Any) -> dict[str, Any]:
        """Those of the plan's own prompts that a cell is about, by label."""
        return self.prompt_chunks(self.kept_in(key.read) if isinstance(key, Read) else "edited")[key.prompt_chunk]

    def kept_in(self, read: str) -> str:
        """The kind of group that a read of the plan is kept in: `streams` where every position is."""
        return "streams" if self.plan.reads[read].pooling is None else "reads"

    def prompt_chunks(self, product: str) -> Chunks:
        """The plan's own prompts as a kind of group has them.

        A prompt is where the store has it; those that the store lacks come behind, in the plan's order.
        """
        if product not in self._prompt_chunks:
            place = {label: i for i, label in enumerate(self.labels(path(product, self.label), "prompt"))}
            by_chunk: Chunks = {}
            for label, prompt in prompt_set(self.continuing.prompts, self.study.texts).items():
                by_chunk.setdefault(place.setdefault(label, len(place)) // IN_A_CHUNK[product], {})[label] = prompt
            self._prompt_chunks[product] = dict(sorted(by_chunk.items()))
        return self._prompt_chunks[product]

    def wanted(self, of: Callable[[Job], T]) -> T:
        """What a function of the job gives, such as those of `cells`: worked out once."""
        if of not in self._known:
            self._known[of] = of(self)
        return self._known[of]

    def shuffled(self, draw: int) -> Job:
        """The same job with labels of methods and sides of contrasts shuffled, for the first, second, … time."""
        if draw not in self._shuffled:
            methods = {
                name: method.model_copy(update={"labels": "shuffled"}) for name, method in self.plan.methods.items()
            }
            study = replace(self.study, plan=self.plan.model_copy(update={"methods": methods}))
            self._shuffled[draw] = Job(study, self.facts, self.labels, draw)
        return self._shuffled[draw]


def jobs(study: Study, store: Store | None = None) -> list[Job]:
    """The jobs of a study's models, in the plan's order; `store`: where their cells are, or are to be."""
    return [Job(study, facts, nowhere if store is None else store.labels) for facts in study.facts]
