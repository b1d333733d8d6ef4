"""Turns labelled arrays into labelled answers: Dataset -> Dataset, by names alone, without a model."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr


def cosine_similarity(vector: xr.DataArray) -> xr.DataArray:
    """Cosine between the vectors of every two emotions: (..., emotion, d_model) -> (..., emotion, emotion_2)."""
    unit = vector / np.sqrt((vector**2).sum("d_model"))
    other = unit.drop_vars([name for name in unit.coords if name not in unit.dims]).rename(emotion="emotion_2")
    return xr.dot(unit, other, dim="d_model").rename("cosine")


def mean_pairwise_cosine(vector: xr.DataArray) -> xr.DataArray:
    """Mean cosine over all pairs of emotions; lower is better separated (Jeong 2026, the layer sweep).

    Emotions without a vector (NaN) do not count; fewer than two give NaN.
    For vectors minus their grand mean it is near -1/(n-1) by algebra, whatever the model: then it says nothing.
    """
    cosine = cosine_similarity(vector)
    other = cosine.emotion != cosine.emotion_2
    return cosine.where(other).mean(("emotion", "emotion_2")).rename("mean_pairwise_cosine")


def target_rate(probability: xr.DataArray, classes: Mapping[str, str | None] | None = None) -> xr.Dataset:
    """Share of continuations whose likeliest class is that of the emotion steered to.

    probability : (..., emotion, strength, control, prompt, seed, class), as in the group `judged`
    classes : emotion -> class of the judge, None where it has none; an emotion left out is its own class
    Returns `rate`, `hits` and `n` over what is left after emotion, prompt and seed; empty continuations and cells
    not computed do not count. Emotions that are no class of the judge are left out.
    """
    named_class = {e: (classes or {}).get(e, e) for e in probability.emotion.values.tolist()}
    known = [e for e, name in named_class.items() if name in probability["class"].values.tolist()]
    chosen = probability.sel({"emotion": known})
    there = chosen.notnull().all("class")
    best = chosen.fillna(0.0).argmax("class")
    named = (
        xr.DataArray(probability["class"].values, dims="class")
        .isel({"class": best})
        .drop_vars("class", errors="ignore")
    )
    wanted = xr.DataArray([named_class[e] for e in known], dims="emotion", coords={"emotion": chosen.emotion})
    hits = (named == wanted) & there
    over = ("emotion", "prompt", "seed")
    found = xr.Dataset({"hits": hits.sum(over), "n": there.sum(over)})
    return found.assign(rate=(found.hits / found.n.where(found.n > 0)))
