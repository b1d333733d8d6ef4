"""The vectors that steer: emotions' and formulas', as the store has them, and as shuffled labels would make them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import xarray as xr

from nsteer.errors import ChangedError, InputError
from nsteer.plan import formulas
from nsteer.plan.check import formula_of, rated_emotions, stands_for
from nsteer.plan.schema import Also, Steer
from nsteer.runner import contrasting
from nsteer.runner.deriving import Samples, method_data, named, samples_of
from nsteer.runner.model import ModelRun
from nsteer.science.directions import combine
from nsteer.stages import cells
from nsteer.stages.keys import Vector


def vectors_of(model: ModelRun, method: str) -> xr.DataArray:
    """The vectors of a method at all layers of the current model, (emotion, layer, d_model): those that the store has
    as the plan wants them. Whoever needs certain emotions asks `assured_vectors` for them."""
    facts = model.facts
    path, vectors = model.path("vectors"), dict[str, np.ndarray]()
    for key, number in model.wanted(cells.vectors).items():
        if key.method == method:
            with contextlib.suppress(InputError):
                vectors[key.emotion] = model.kept_input(path, key, number).vector.values
    layers, width = list(range(facts.n_layers)), list(range(facts.d_model))
    values = np.stack(list(vectors.values())) if vectors else np.zeros((0, len(layers), len(width)), np.float32)
    coords = {"emotion": list(vectors), "layer": layers, "d_model": width}
    return xr.DataArray(values, coords, tuple(coords))


def assured_vectors(model: ModelRun, method: str, vectors: xr.DataArray, emotions: Sequence[str]) -> xr.DataArray:
    """The vectors, once it is sure that those of these emotions are among them. Raises InputError, which says why one
    is not."""
    for emotion in emotions:
        if emotion not in vectors.emotion.values:
            key = Vector(model.label, method, emotion)
            model.run.inputs(model.path("vectors"), {key: model.wanted(cells.vectors)[key]})
            raise ChangedError(f"vectors {method} / {emotion} came in while this was computed; run again")
    return vectors


class Sources:
    """What steers in an entry under one method, at every layer of the current model; each is worked out once.

    shuffle : 0 for a label's own vector; k for what the methods that it rests on make of samples whose labels are
    shuffled among those of one number, in the k-th draw of the plan's seed; of a contrast, what it makes of texts whose
    sides are shuffled. A formula is worked out over such vectors
    """

    def __init__(self, model: ModelRun, entry: Steer, method: str):
        self.model, self.facts, self.entry, self.method = model, model.facts, entry, method
        self._of: dict[tuple[str, int], xr.DataArray] = {}
        self._made: dict[tuple[str, int], np.ndarray] = {}
        self._further: dict[str, np.ndarray] = {}
        self._read: dict[str, Samples] = {}

    def of(self, method: str, shuffle: int = 0) -> xr.DataArray:
        """The vectors of a method, (emotion, layer, d_model) over all layers: those of `vectors_of`, or shuffled."""
        if (method, shuffle) not in self._of:
            self._of[method, shuffle] = self._permuted(method, shuffle) if shuffle else vectors_of(self.model, method)
        return self._of[method, shuffle]

    def _permuted(self, method: str, shuffle: int) -> xr.DataArray:
        job, emotions = self.model.job.shuffled(shuffle), self.model.plan.emotion_labels()
        samples = self._read.get(method) or samples_of(self.model, job, method, emotions)
        if samples.nbytes <= contrasting.KEPT:
            self._read[method] = samples
        vectors = method_data(self.model, job, method, emotions, samples)
        return vectors.vector.reindex({"layer": range(self.facts.n_layers)})

    def everywhere(self, label: str, shuffle: int = 0) -> np.ndarray:
        """The vector under a label of the `emotion` axis, [layer, d_model]."""
        if (label, shuffle) not in self._made:
            self._made[label, shuffle] = self._worked_out(label, shuffle)
        return self._made[label, shuffle]

    def _worked_out(self, label: str, shuffle: int) -> np.ndarray:
        text = self.entry.vectors.formulas.get(label)
        return self._formula(text, shuffle) if text is not None else self._emotion(label, shuffle)

    def further(self, also: Also) -> np.ndarray:
        """The vector of an edit of `also`, [layer, d_model]."""
        if also.direction not in self._further:
            text = formula_of(self.model.plan, also)
            self._further[also.direction] = self._emotion(also.direction) if text is None else self._formula(text)
        return self._further[also.direction]

    def _emotion(self, label: str, shuffle: int = 0) -> np.ndarray:
        if shuffle and self.method not in self.model.plan.methods:
            return contrasting.shuffled(self.model, label, shuffle)
        return (
            assured_vectors(self.model, self.method, self.of(self.method, shuffle), [label])
            .sel({"emotion": label})
            .values
        )

    def _formula(self, text: str, shuffle: int = 0) -> np.ndarray:
        def leaf(dotted: tuple[str, ...]) -> np.ndarray:
            kind, *where = stands_for(self.model.plan, dotted, self.method)
            if kind == "direction":
                (name,) = where
                if shuffle:
                    return contrasting.shuffled(self.model, name, shuffle)
                source = self.model.plan.directions[name].source
                return assured_vectors(self.model, source, self.of(source), [name]).sel({"emotion": name}).values
            method, name = where
            rest = rated_emotions(self.model.plan, kind, name)
            return named(
                self.model.study, kind, name, assured_vectors(self.model, method, self.of(method, shuffle), rest)
            )

        return combine(formulas.replaced(formulas.parse(text), leaf)).astype(np.float32)

    def at(self, label: str, layer: int, shuffle: int = 0) -> np.ndarray:
        """The vector under a label at one layer, [d_model]."""
        return self.everywhere(label, shuffle)[layer]

    def there(self, label: str, layers: Sequence[int], shuffle: int = 0) -> bool:
        """Whether the vector under a label is a number at each of these layers."""
        return all(bool(np.isfinite(self.at(label, layer, shuffle)).all()) for layer in layers)
