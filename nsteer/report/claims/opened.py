"""Turns a store into the groups that claims read: opened once, conditions by hand as a steer entry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import xarray as xr

from nsteer.science.axis import inward
from nsteer.store.results import Results

NAN = float("nan")
ROW = ("prompt", "seed")
UNSTEERED = "unsteered"
"""The group of unsteered continuations, and how the names of those that measure them end."""


class OpenedGroups(Mapping):
    """The groups of a store as they were at the first look: each is opened once.

    A group of unsteered continuations also has every label of the group that it stands beside, the fill where nothing
    is: a steer entry need not have the control `zero`, and another one may.
    """

    def __init__(self, results: Results | ByHand):
        self.models, self.axis = results.models, results.axis
        self._results, self._paths = results, list(results)
        self._open: dict[str, xr.Dataset] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, path: object) -> bool:
        return path in self._paths

    def __getitem__(self, path: str) -> xr.Dataset:
        if path not in self._open:
            group = inward(self._results[path])
            beside = "generations" if path == UNSTEERED else path.removesuffix(f"_{UNSTEERED}")
            self._open[path] = group if beside == path or beside not in self else _spread(group, self[beside])
        return self._open[path]


def _spread(unsteered: xr.Dataset, beside: xr.Dataset) -> xr.Dataset:
    """Unsteered continuations under their own labels and those of what they stand beside."""
    own = {dim: known.tolist() for dim, known in unsteered.indexes.items()}
    more = {
        d: [label for label in beside.indexes[d].tolist() if label not in known]
        for d, known in own.items()
        if d in beside.indexes
    }
    if not any(more.values()):
        return unsteered
    fill = {"O": "", "T": "", "i": -1, "b": False}
    fillers = {name: fill.get(column.dtype.kind, NAN) for name, column in unsteered.data_vars.items()}
    return unsteered.load().reindex({d: [*own[d], *labels] for d, labels in more.items() if labels}, fill_value=fillers)


BY_HAND = {
    "edited": "generations",
    "edited_receipts": "steering",
    "outcomes_edited": "outcomes",
    "judged_edited": "judged",
    "capability_edited": "capability",
}
"""Group of the conditions of `edits` -> the group of steered texts that holds the same of those."""


KEPT = ("runs", "models", "judges", "capability_unsteered")
"""Groups that are the same for both."""


class ByHand(Mapping):
    """The conditions of `edits` as if a steer entry of the name `edits` had made them: each an `emotion`, which is what
    the judge's classes go by; what no condition has is the unsteered one."""

    def __init__(self, held: OpenedGroups):
        self.models: list[str] = held.models
        self.axis: str = held.axis
        self._groups: dict[str, xr.Dataset] = {}
        self._groups |= {path: held[path] for path in KEPT if path in held}
        for path, steered in BY_HAND.items():
            if path in held:
                self._take(held[path], steered)
        if "edits" in held:
            self._groups["ops"] = held["edits"].isel({"edit": [0]}).rename(edit="op").assign_coords(op=["edits"])

    def _take(self, data: xr.Dataset, steered: str) -> None:
        labels = data.edit.values.tolist()
        if set(labels) <= {"none"}:
            return
        conditions = data.sel({"edit": [label for label in labels if label != "none"]}).rename(edit="emotion")
        conditions = conditions.expand_dims({"op": ["edits"], "layer_set": [""], "method": [""], "control": ["none"]})
        dims = ("model", "op", "layer_set", "method", "emotion", "strength", "control", *ROW)
        self._groups[steered] = conditions.transpose(*(dim for dim in dims if dim in conditions.dims), ...)
        if ROW[0] in conditions.dims and "none" in labels and 0.0 in data.strength.values:
            unsteered = data.sel({"edit": "none", "strength": 0.0}, drop=True).expand_dims({"op": ["edits"]})
            name = UNSTEERED if steered == "generations" else f"{steered}_{UNSTEERED}"
            self._groups[name] = unsteered.transpose("model", "op", *ROW, ...)

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, path: str) -> xr.Dataset:
        return self._groups[path]
