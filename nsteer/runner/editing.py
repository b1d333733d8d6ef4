"""The rows of edited cells: the vectors of their edits, what each edit does to a row, and whether it did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import EditError, InputError
from nsteer.plan import editing
from nsteer.plan.check import conditions, labels_under, neutral_count
from nsteer.plan.prompts import Encoded, token_ids
from nsteer.plan.schema import Continuing, Steer
from nsteer.program.form import Row, RowEdit
from nsteer.program.randomness import draw_label, rotated, uniforms
from nsteer.runner.deriving import captured
from nsteer.runner.failing import kind_of
from nsteer.runner.model import ModelRun
from nsteer.runner.sources import Sources, assured_vectors
from nsteer.science.presets import NEUTRAL
from nsteer.stages import cells, forms
from nsteer.stages.keys import Condition, Edited, EditSearch, Read, TextRow, Vector

K = TypeVar("K", Condition, Edited, EditSearch, Read)
ByHand = Edited | EditSearch | Read
"""The key of a cell whose edits are those of a condition written by hand."""


class Maker(Generic[K]):
    """Makes the rows of cells whose edits stand at the same sites, and judges by receipts what the edits came to.

    texts : the prompts that are continued, and how; new : most tokens that are generated
    flat : the edits as (layer, edit, its number among those that were written), in forward order
    strengths : of cells whose label is not their strength
    """

    def __init__(
        self, model: ModelRun, texts: Continuing, new: int, flat: forms.Flat, strengths: Mapping[K, float] | None = None
    ):
        self.model, self.texts, self.new, self.flat = model, texts, new, flat
        self.strengths: Mapping[K, float] = strengths or {}

    def strength(self, key: K, edit: Any) -> float:
        """Of an edit of a cell, in the unit of its scale."""
        raise NotImplementedError

    def at_layer(self, key: K, edit: Any, layer: int) -> editing.CompiledEdit:
        """An edit of a cell at a layer. Raises EditError, InputError."""
        raise NotImplementedError

    def name(self, number: int) -> str:
        """What an edit is called in an error; empty for the one that the cell is labelled by."""
        raise NotImplementedError

    def read(self) -> None:
        """Has in memory all that rows are made of, beside the vectors of their edits. Raises InputError."""

    def compiled_edits(self, key: K) -> list[editing.CompiledEdit]:
        """Every edit of a cell. Raises EditError for a vector that can not be used, InputError for one that is gone."""
        compiled_edits = []
        for layer, edit, number in self.flat:
            with named(self.name(number)):
                compiled_edits.append(self.at_layer(key, edit, layer))
        return compiled_edits

    @cached_property
    def after(self) -> list[tuple[int, ...]]:
        """The ids of the tokens that the condition of each edit names. Raises ModelError."""
        tokenizer = self.model.executor.tokenizer
        return [token_ids(tokenizer, (edit.when and edit.when.after) or ()) for _, edit, _ in self.flat]

    def edits(self, compiled_edits: Sequence[editing.CompiledEdit], prompt: Encoded) -> tuple[RowEdit, ...]:
        """What every edit does to a prompt."""
        each = zip(self.flat, compiled_edits, self.after, strict=True)
        return tuple(
            editing.row_edit(edit, compiled, prompt, self.new, after) for (_, edit, _), compiled, after in each
        )

    def rows(self, key: K, prompts: Mapping[str, Encoded]) -> list[Row]:
        """The rows of one cell: every prompt and seed."""
        rows, compiled_edits = [], self.compiled_edits(key)
        for label, prompt in prompts.items():
            edits = self.edits(compiled_edits, prompt)
            for seed in self.texts.seeds:
                drawn = numbers(self.model, self.texts, label, seed)
                rows.append(Row(TextRow(key, label, seed), prompt.tokens, {}, edits, drawn))
        return rows

    def check(self, key: K, results: Mapping[tuple, Mapping[str, Any]]) -> None:
        """Raises EditError where an edit did not do to every text of a cell what it should have.

        results : of each text, by its prompt and what else tells it apart
        """
        names = [f"prompt {str(prompt)[:40]!r}" for prompt, *_ in results]
        wrote = [len(result.get("tokens", ())) > 1 for result in results.values()]
        for number in dict.fromkeys(number for _, _, number in self.flat):
            places = [i for i, (_, _, other) in enumerate(self.flat) if other == number]
            edit, layers = self.flat[places[0]][1], [self.flat[i][0] for i in places]
            receipts = np.array([result["receipts"][places] for result in results.values()])
            with named(self.name(number)):
                editing.check(edit, [self.strength(key, edit)] * len(names), layers, receipts, names, wrote)


@contextmanager
def named(what: str) -> Iterator[None]:
    """An EditError that says which edit it is of."""
    try:
        yield
    except EditError as error:
        raise EditError(f"{what}: {error}" if what else str(error)) from None


class GridMaker(Maker[Condition]):
    """Of a steer entry at one layer set: one method's vectors, and the edits of its `also`."""

    def __init__(
        self,
        model: ModelRun,
        entry: Steer,
        layers: Sequence[int],
        method: str,
        strengths: Mapping[Condition, float] | None = None,
    ):
        flat = forms.together(entry, layers, model.facts.n_layers)
        super().__init__(model, entry, entry.generate.max_new_tokens, flat, strengths)
        self.entry, self.layers, self.method = entry, layers, method
        self.sources = Sources(model, entry, method)
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

    def vector_layer(self, layer: int) -> int:
        """The layer whose vector is used at `layer`."""
        chosen = self.entry.vectors.layer
        return layer if chosen == "same" else self.model.job.resolve(chosen)[0]

    def vector(self, label: str, layer: int, shuffle: int = 0) -> np.ndarray:
        return self.sources.at(label, self.vector_layer(layer), shuffle)

    def strength(self, key: Condition, edit: Any) -> float:
        return self.strengths.get(key, key.strength) if isinstance(edit, Steer) else edit.strength

    def name(self, number: int) -> str:
        return "" if number == forms.OWN else edit_name(f"also[{number}]", self.entry.also[number])

    def at_layer(self, key: Condition, edit: Any, layer: int) -> editing.CompiledEdit:
        own, along = isinstance(edit, Steer), None
        vector = self.vector(key.emotion, layer) if own else self.sources.further(edit)[layer]
        kind, number = cells.draw_of(key.control)
        if own and kind == "random":
            along = self.rotated(key)[self.vector_layer(layer)]
        elif own and kind == "shuffled":
            along = self.vector(key.emotion, layer, number)
        gate = edit.when.direction if edit.when is not None else None
        return editing.compiled_edit(
            edit,
            layer,
            vector,
            self.strength(key, edit),
            along=along,
            norm=float(self.neutral("token_norm").sel({"layer": layer})) if editing.needs_norm(edit) else None,
            mean=self.neutral("pooled").sel({"layer": layer}).values if editing.needs_mean(edit) else None,
            gate=None if gate is None else self.vector(gate, layer) if own else self.sources.at(gate, layer),
        )

    def rotated(self, key: Condition) -> dict[int, np.ndarray]:
        """The vectors of the steered layers under the random rotation of a control: layer -> [d_model]."""
        which = (key.emotion, key.control)
        if which not in self.turned:
            layers = sorted({self.vector_layer(layer) for layer in self.layers})
            vectors = np.stack([self.sources.at(key.emotion, layer) for layer in layers])
            editing.finite("vector", vectors, layers)
            _, number = cells.draw_of(key.control)
            labels = (key.method, key.emotion, *map(str, draw_label(number)))
            drawn = rotated(vectors, self.model.plan.seed, *labels)
            self.turned[which] = dict(zip(layers, drawn, strict=True))
        return self.turned[which]

    def read(self) -> None:
        if self.entry.project:
            assured_vectors(self.model, self.method, self.vectors, labels_under(self.model.plan, self.method))


class ConditionMaker(Maker[Any]):
    """Of a condition of `edits:`, whose vectors are the plan's directions; its cells are texts, or reads.

    written : its edits, as the plan has them
    """

    def __init__(
        self,
        model: ModelRun,
        label: str,
        texts: Continuing,
        new: int,
        strengths: Mapping[EditSearch, float] | None = None,
    ):
        super().__init__(model, texts, new, forms.condition(model.job, label), strengths)
        self.label, self.written = label, conditions(model.plan)[label]

    def strength(self, key: ByHand, edit: Any) -> float:
        if isinstance(edit.strength, float | int):
            return float(edit.strength)
        return self.strengths.get(EditSearch(key.model, key.edit, key.strength), key.strength)

    def name(self, number: int) -> str:
        return edit_name(f"edits.{self.label}[{number}]", self.written[number])

    def at_layer(self, key: ByHand, edit: Any, layer: int) -> editing.CompiledEdit:
        at = layer if edit.vector_layer == "same" else self.model.job.resolve(edit.vector_layer)[0]
        gate = edit.when.direction if edit.when is not None else None
        return editing.compiled_edit(
            edit,
            layer,
            self.direction(edit.direction, at),
            self.strength(key, edit),
            mean=self.direction(edit.reference, layer) if edit.reference else None,
            gate=self.direction(gate, at) if gate is not None else None,
        )

    def direction(self, name: str, layer: int) -> np.ndarray:
        """A direction of the plan at a layer, as the store has it: [d_model]. Raises InputError."""
        key = Vector(self.model.label, self.model.plan.directions[name].source, name)
        cell = self.model.kept_input(self.model.path("vectors"), key, self.model.wanted(cells.directions)[key])
        return cell.vector.sel({"layer": layer}).values


def edit_name(where: str, edit: Any) -> str:
    """An edit of a list in words."""
    return f"{where} ({edit.op} {edit.direction})"


def usable(maker: Maker[K], stage: str, path: str, key: K, number: int) -> bool:
    """Whether a cell's vectors can be used; it fails where they can not."""
    try:
        maker.compiled_edits(key)
        maker.read()
    except (EditError, InputError) as error:
        maker.model.run.fail(stage, path, key, number, str(error), kind_of(error))
        return False
    return True


def numbers(model: ModelRun, texts: Continuing, *labels: Any) -> np.ndarray | None:
    """A row's numbers for sampling. They depend on prompt and seed alone: an edited row and the unedited one share
    them."""
    if not texts.generate.sample:
        return None
    return uniforms(texts.generate.max_new_tokens, model.plan.seed, *labels)
