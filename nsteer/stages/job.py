"""One model of a study, with all that its facts decide worked out once: layers, layer sets, the cells it wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from nsteer.models.facts import Facts, label_of
from nsteer.plan.check import Study, continuing, layer_sets
from nsteer.plan.layers import resolve
from nsteer.plan.schema import Continuing, Model, Plan, Steer

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """What a study asks of one model."""

    study: Study
    facts: Facts
    _known: dict[Callable[..., Any], Any] = field(default_factory=dict, compare=False, repr=False)

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
        return next(one for one in self.plan.models if label_of(one) == self.label)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers at which streams are read and vectors made."""
        return self.resolve(self.plan.layers)

    def resolve(self, layers: Any) -> tuple[int, ...]:
        """What a plan says of layers, as 0-based block indices of this model."""
        return resolve(layers, self.facts.n_layers)

    def layer_sets(self, block: Steer) -> dict[str, tuple[int, ...]]:
        """The layer sets of a steer block, by their label on the axis `layer_set`."""
        return layer_sets(block.layers, self.facts.n_layers)

    @cached_property
    def continuing(self) -> Continuing:
        """The plan's own prompts, and how they are continued under `edits`."""
        return continuing(self.plan)

    @cached_property
    def blocks(self) -> dict[str, Steer]:
        """The plan's steer blocks, by their label on the axis `op`."""
        return {block.label: block for block in self.plan.steer}

    def texts_of(self, key: Any) -> Continuing:
        """The prompts that a cell's texts continue, and how."""
        return self.blocks[key.op] if hasattr(key, "op") else self.continuing

    def wanted(self, of: Callable[[Job], T]) -> T:
        """What a function of the job gives, such as those of `cells`: worked out once."""
        if of not in self._known:
            self._known[of] = of(self)
        return self._known[of]

    @cached_property
    def shuffled(self) -> Job:
        """The same job with the labels of every method shuffled."""
        methods = {name: one.model_copy(update={"labels": "shuffled"}) for name, one in self.plan.methods.items()}
        return Job(replace(self.study, plan=self.plan.model_copy(update={"methods": methods})), self.facts)


def jobs(study: Study) -> list[Job]:
    """The jobs of a study's models, in the plan's order."""
    return [Job(study, facts) for facts in study.facts]
