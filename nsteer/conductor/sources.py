"""The vectors that steer: emotions' and formulas', as the store has them, and as shuffled labels would make them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from nsteer import cells, formulas
from nsteer.check import formula_of, stands_for
from nsteer.conductor.deriving import method_data, named
from nsteer.conductor.session import Session
from nsteer.directions import combine
from nsteer.plan import Also, Steer
from nsteer.store import slug


class Sources:
    """What steers in a block under one method, at every layer of the model at hand; each is worked out once.

    `shuffled` in place of a label's own vector: what the methods that it rests on make of samples whose labels are
    shuffled among those of one number, by the plan's seed. A formula is worked out over such vectors.
    """

    def __init__(self, session: Session, block: Steer, method: str):
        assert session.facts is not None
        self.session, self.facts, self.block, self.method = session, session.facts, block, method
        self._of: dict[tuple[str, bool], xr.DataArray] = {}
        self._made: dict[tuple[str, bool], np.ndarray] = {}
        self._further: dict[str, np.ndarray] = {}

    def of(self, method: str, shuffled: bool = False) -> xr.DataArray:
        """The vectors of a method, (emotion, layer, d_model) over all layers; NaN where none was derived."""
        if (method, shuffled) not in self._of:
            self._of[method, shuffled] = self._dealt(method) if shuffled else self._stored(method)
        return self._of[method, shuffled]

    def _stored(self, method: str) -> xr.DataArray:
        group = self.session.store.read(f"vectors/{slug(self.facts.label)}").vector
        return group.sel({"model": self.facts.label, "method": method}).load()

    def _dealt(self, method: str) -> xr.DataArray:
        study = cells.shuffled(self.session.study)
        made = method_data(self.session.store, study, self.facts, method, study.plan.emotion_labels())
        return made.vector.reindex({"layer": range(self.facts.n_layers)})

    def everywhere(self, label: str, shuffled: bool = False) -> np.ndarray:
        """The vector under a label of the `emotion` axis, [layer, d_model]."""
        if (label, shuffled) not in self._made:
            self._made[label, shuffled] = self._worked_out(label, shuffled)
        return self._made[label, shuffled]

    def _worked_out(self, label: str, shuffled: bool) -> np.ndarray:
        text = self.block.vectors.formulas.get(label)
        return self._formula(text, shuffled) if text is not None else self._emotion(label, shuffled)

    def further(self, one: Also) -> np.ndarray:
        """The vector of an edit of `also`, [layer, d_model]."""
        if one.direction not in self._further:
            text = formula_of(self.session.study.plan, one)
            self._further[one.direction] = self._emotion(one.direction) if text is None else self._formula(text)
        return self._further[one.direction]

    def _emotion(self, label: str, shuffled: bool = False) -> np.ndarray:
        return self.of(self.method, shuffled).sel({"emotion": label}).values

    def _formula(self, text: str, shuffled: bool = False) -> np.ndarray:
        def leaf(parts: tuple[str, ...]) -> np.ndarray:
            kind, method, name = stands_for(self.session.study.plan, parts, self.method)
            return named(self.session.study, kind, name, self.of(method, shuffled))

        return combine(formulas.replaced(formulas.parse(text), leaf)).astype(np.float32)

    def at(self, label: str, layer: int, shuffled: bool = False) -> np.ndarray:
        """The vector under a label at one layer, [d_model]."""
        return self.everywhere(label, shuffled)[layer]

    def there(self, label: str, layers: Sequence[int], shuffled: bool = False) -> bool:
        """Whether the vector under a label is a number at each of these layers."""
        return all(bool(np.isfinite(self.at(label, layer, shuffled)).all()) for layer in layers)
