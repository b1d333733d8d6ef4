"""The rows of steered cells: their vectors, brought to the units of their edits, and what each edit does to a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import InputError
from nsteer.plan import positions
from nsteer.plan.check import labels_under, neutral_count
from nsteer.plan.prompts import Encoded, norm_weights, token_ids
from nsteer.plan.schema import Also, Edit, Schedule, Steer, When
from nsteer.program.form import Row, RowEdit
from nsteer.program.ops import REFERENCED, UNSCALED, in_unit
from nsteer.program.randomness import rotated, uniforms
from nsteer.runner.deriving import captured
from nsteer.runner.failing import PERMANENT, kind_of
from nsteer.runner.model import ModelRun
from nsteer.runner.sources import Sources, there
from nsteer.science.axis import word
from nsteer.science.presets import NEUTRAL
from nsteer.stages import forms
from nsteer.stages.keys import Condition, TextRow


@dataclass
class RowMaker:
    """Makes the rows of steering cells: one method's vectors, brought to the unit that the block's op expects.

    strengths : of cells whose label is not their strength
    """

    model: ModelRun
    block: Steer
    layers: Sequence[int]
    method: str
    strengths: Mapping[Condition, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sources = Sources(self.model, self.block, self.method)
        self.usual: dict[str, Any] = {}
        self.turned: dict[tuple[str, str], dict[int, np.ndarray]] = {}

    @property
    def vectors(self) -> xr.DataArray:
        """Of the method, (emotion, layer, d_model)."""
        return self.sources.of(self.method)

    def neutral(self, name: str) -> Any:
        """Mean over the neutral samples of their streams' norms, or of their pooled streams: DataArray [layer, ...]."""
        if name not in self.usual:
            self.usual[name] = self._neutral(name)
        return self.usual[name]

    def _neutral(self, name: str) -> Any:
        count = neutral_count(self.model.plan.methods[self.method])
        return captured(self.model, self.method, NEUTRAL, count)[name].mean("sample")

    def source_layer(self, layer: int) -> int:
        """The layer whose vector is used at `layer`."""
        chosen = self.block.vectors.layer
        return layer if chosen == "same" else self.model.job.resolve(chosen)[0]

    def vector(self, label: str, layer: int, shuffled: bool = False) -> np.ndarray:
        return self.sources.at(label, self.source_layer(layer), shuffled)

    def has(self, key: Condition) -> bool:
        layers = [self.source_layer(layer) for layer in self.layers]
        plain = all(self.sources.there(label, layers) for label in self.both(key.emotion))
        return plain and (key.control != "shuffled" or self.sources.there(key.emotion, layers, shuffled=True))

    def has_further(self, one: Also) -> bool:
        """Whether the vectors of an edit of `also`, its gate's among them, are numbers at the layers that it edits."""
        layers = self.model.job.resolve(one.layers)
        gate = one.when.direction if one.when is not None else None
        there = bool(np.isfinite(self.sources.further(one)[list(layers)]).all())
        return there and (gate is None or self.sources.there(gate, layers))

    def both(self, emotion: str) -> tuple[str, str]:
        """The emotions whose vectors steer and gate."""
        when = self.block.when
        return emotion, emotion if when is None or when.direction is None else when.direction

    def scaled(self, key: Condition, layer: int) -> tuple[np.ndarray, float]:
        """The vector and the amount of a cell at a layer; its controls have the vector's own length."""
        strength = self.strengths.get(key, key.strength)
        vector = self.vector(key.emotion, layer)
        length = float(np.linalg.norm(vector))
        unit = vector / max(length, 1e-12)
        if key.control.startswith("random"):
            drawn = self.rotated(key)[self.source_layer(layer)]
            unit = drawn / max(float(np.linalg.norm(drawn)), 1e-12)
        elif key.control == "shuffled":
            null = self.vector(key.emotion, layer, shuffled=True)
            unit = null / max(float(np.linalg.norm(null)), 1e-12)
        return scale(self.block, unit, length, strength, self.norm(self.block, layer))

    def rotated(self, key: Condition) -> dict[int, np.ndarray]:
        """The vectors of the steered layers under the random rotation of a control: layer -> [d_model]."""
        which = (key.emotion, key.control)
        if which not in self.turned:
            layers = sorted({self.source_layer(layer) for layer in self.layers})
            vectors = np.stack([self.sources.at(key.emotion, layer) for layer in layers])
            _, _, number = key.control.partition("-")
            drawn = rotated(vectors, self.model.plan.seed, key.method, key.emotion, *([number] if number else []))
            self.turned[which] = dict(zip(layers, drawn, strict=True))
        return self.turned[which]

    def norm(self, edit: Steer | Also, layer: int) -> float | None:
        """The mean norm of the neutral samples' streams; None where the edit's unit is another one."""
        measured = edit.scale == "reference_norm" and edit.op not in UNSCALED
        return float(self.neutral("token_norm").sel({"layer": layer})) if measured else None

    def along(self, edit: Steer | Also, layer: int, vector: np.ndarray) -> float:
        """The projection of the reference mean on a vector; 0 where the op has none."""
        return float(self.neutral("pooled").sel({"layer": layer}).values @ vector) if edit.op in REFERENCED else 0.0

    def read(self) -> None:
        """Has in memory all that cells' rows are made of, beside its vectors. Raises InputError."""
        if self.block.project:
            there(self.model, self.method, self.vectors, labels_under(self.model.plan, self.method))
        for layer, edit, _ in forms.together(self.block, self.layers, self.model.facts.n_layers):
            self.norm(edit, layer)
            if edit.op in REFERENCED:
                self.neutral("pooled")

    def made(
        self, key: Condition, layer: int, edit: Steer | Also
    ) -> tuple[tuple[np.ndarray, float, float], np.ndarray]:
        """Vector, amount and reference of an edit of a cell at a layer, and its gate."""
        if isinstance(edit, Steer):
            vector, amount = self.scaled(key, layer)
            _, gated_by = self.both(key.emotion)
            gate = self.vector(gated_by, layer)
        else:
            gate = own = self.sources.further(edit)[layer]
            length = float(np.linalg.norm(own))
            unit = own / max(length, 1e-12)
            vector, amount = scale(edit, unit, length, edit.strength, self.norm(edit, layer))
            if edit.when is not None and edit.when.direction is not None:
                gate = self.sources.at(edit.when.direction, layer)
        return (vector, amount, self.along(edit, layer, vector)), gate

    def rows(self, key: Condition, prompts: Mapping[str, Encoded]) -> list[Row]:
        """The rows of one cell: every prompt and seed."""
        flat = forms.together(self.block, self.layers, self.model.facts.n_layers)
        made = [(edit, *self.made(key, layer, edit)) for layer, edit, _ in flat]
        rows, new = [], self.block.generate.max_new_tokens
        for label, prompt in prompts.items():
            edits = tuple(
                conditional(self.model, edit, prompt, row_edit(edit, prompt, *one), gate, new)
                for edit, one, gate in made
            )
            for seed in self.block.seeds:
                drawn = numbers(self.model, self.block, label, seed)
                rows.append(Row(TextRow(key, label, seed), prompt.tokens, {}, edits, drawn))
        return rows


def usable(maker: RowMaker, stage: str, path: str, key: Condition, number: int) -> bool:
    """Whether a cell's vectors can be used; it fails where they can not."""
    try:
        why, kind = unusable(maker, key), PERMANENT
        maker.read()
    except InputError as error:
        why, kind = str(error), kind_of(error)
    if why:
        maker.model.run.fail(stage, path, key, number, why, kind)
    return not why


def unusable(maker: RowMaker, key: Condition) -> str:
    """Why a cell's vectors can not be used; empty where they can."""
    lost = "is not a number at a layer that it edits"
    further = [i for i, one in enumerate(maker.block.also) if not maker.has_further(one)]
    if not maker.has(key):
        return word("the vector of this emotion is not a number at a steered layer")
    return f"the vector of {further_name(maker.block, further[0])} {lost}" if further else ""


def further_name(block: Steer, place: int) -> str:
    """An edit of `also` in words."""
    one = block.also[place]
    return f"also[{place}] ({one.op} {one.direction})"


def numbers(model: ModelRun, block: Steer, *labels: Any) -> np.ndarray | None:
    """A row's numbers for sampling. They depend on prompt and seed alone: a steered row and its twin share them."""
    if not block.generate.sample:
        return None
    return uniforms(block.generate.max_new_tokens, model.plan.seed, *labels)


def scale(
    block: Any, unit: np.ndarray, length: float, strength: float, reference: float | None
) -> tuple[np.ndarray, float]:
    """A direction and a strength in the block's unit, as the vector and amount that its op expects."""
    return in_unit(block.op, block.scale, unit, length, strength, reference)


def row_edit(block: Any, prompt: Encoded, vector: np.ndarray, amount: float, reference: float = 0.0) -> RowEdit:
    """One row's part in an edit: where it acts, and what its live norm is taken over."""
    generated = positions.written(block.positions)
    touched = prompt.mask(block.positions)
    return RowEdit(vector, amount, touched, generated, norm_weights(len(touched), block.norm_skip), reference)


def conditional(
    model: ModelRun, edit: Steer | Edit | Also, prompt: Encoded, made: RowEdit, gate: np.ndarray, new: int
) -> RowEdit:
    """A row's part in an edit, with what decides while the program runs whether and how much it acts.

    new : most tokens that are generated
    """
    after = token_ids(model.executor.tokenizer, edit.when.after) if edit.when and edit.when.after else ()
    if positions.bounded(edit.positions):
        made = replace(made, steps=positions.of_generated(edit.positions, new))
    return under(made, edit.when, edit.schedule, prompt.tokens, after, gate, new)


def under(
    made: RowEdit,
    when: When | None,
    schedule: Schedule | None,
    tokens: Sequence[int],
    after: tuple[int, ...],
    gate: np.ndarray,
    new: int,
) -> RowEdit:
    """`made` under a condition and a schedule over `new` generated tokens; `after`: the ids that `when` names."""
    if when is not None:
        low = -np.inf if when.above is None else when.above
        high = np.inf if when.below is None else when.below
        length = max(float(np.linalg.norm(gate)), 1e-12)
        made = replace(made, gate=gate / length, low=low, high=high, after=after)
    if when is not None and when.after is not None:
        made = replace(made, prompt=made.prompt & np.isin(np.array([-1, *tokens[:-1]]), after))
    if schedule is None:
        return made
    token = np.arange(new)
    factor = np.ones(new)
    if schedule.linear is not None:
        factor = np.maximum(0.0, 1 - token / schedule.linear)
    elif schedule.half_life is not None:
        factor = 0.5 ** (token / schedule.half_life)
    steps = np.full(new, made.generated) if made.steps is None else made.steps
    steps = steps & (token < (new if schedule.first is None else schedule.first))
    return replace(made, steps=steps, factor=factor)
