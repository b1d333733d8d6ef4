"""Turns labelled arrays into labelled answers: Dataset -> Dataset, by names alone, without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping

import xarray as xr

from nsteer.science import axis
from nsteer.science.outcomes import by_target, is_of, score_of
from nsteer.science.separation import cosine_similarity, mean_pairwise_cosine
from nsteer.science.targets import Target, targets_of

__all__ = ["cosine_similarity", "mean_pairwise_cosine", "target_rate"]


@axis.of_arrays
def target_rate(
    score: xr.DataArray, classes: Mapping[str, Target | str | Mapping[str, object] | None] | None = None
) -> xr.Dataset:
    """Share of continuations of which the judge says that they are of the emotion steered to.

    score : (..., emotion, strength, control, prompt, seed, class), as in the group `judged`; of each judge by its own
    rule (`outcomes.is_of`)
    classes : emotion -> class of the judge, or `{rises, falls}` of classes, None where it has none; an emotion left out
    is its own class
    Returns `rate`, `hits` and `n` over what is left after emotion, prompt and seed; empty continuations and cells
    not computed do not count. Emotions that are no class of the judge are left out.
    """
    every = targets_of(score.emotion.values.tolist(), score["class"].values.tolist(), classes)
    known = {emotion: target for emotion, target in every.items() if target is not None}
    if not known:
        own = score.sel({"emotion": []}).isel({"class": 0}, drop=True)
        hits = there = own.notnull()
    else:
        there = by_target(score, known, score_of).notnull()
        hits = by_target(score, known, is_of).astype(bool) & there
    over = ("emotion", "prompt", "seed")
    counts = xr.Dataset({"hits": hits.sum(over), "n": there.sum(over)})
    return _with_rate(counts)


def draws_together(rates: xr.Dataset) -> xr.Dataset:
    """`rates` of `target_rate` with all draws of a random control counted together, as `3 x random`."""
    kinds = [re.sub(r"-\d+$", "", control) for control in rates.control.values.tolist()]
    named = [kind if kinds.count(kind) == 1 else f"{kinds.count(kind)} x {kind}" for kind in kinds]
    counts = rates[["hits", "n"]].assign_coords(control=named).groupby("control").sum()
    return _with_rate(counts.sel({"control": list(dict.fromkeys(named))}))


def _with_rate(counts: xr.Dataset) -> xr.Dataset:
    return counts.assign(rate=counts.hits / counts.n.where(counts.n > 0))
