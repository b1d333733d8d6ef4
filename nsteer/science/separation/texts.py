"""Copies of a text count once; texts of one instruction are held out together."""

from __future__ import annotations

import numpy as np
import xarray as xr

from nsteer.science import axis


@axis.of_arrays
def first_of_each(text: xr.DataArray) -> xr.DataArray:
    """True for the first sample of each distinct text: (…, emotion, sample) text -> bool. Empty text is NaN.

    Greedy decoding with templates in turn writes the same text again (about 5 of 10 distinct under Jeong's protocol):
    a copy is no further evidence, and one left in while its other copy is held out gives the answer away.
    """
    lead = [dim for dim in text.dims if dim != "sample"]
    ordered = text.transpose(*lead, "sample")
    values = ordered.values
    out = np.zeros(values.shape, bool)
    for at in np.ndindex(values.shape[:-1]):
        seen: set[str] = set()
        for k, words in enumerate(map(str, values[at])):
            out[(*at, k)] = bool(words) and words not in seen
            seen.add(words)
    return ordered.copy(data=out).rename("first")


@axis.of_arrays
def distinct_texts(text: xr.DataArray) -> xr.Dataset:
    """How many distinct texts stand behind each emotion: `n_texts`, `n_distinct` over (…, emotion)."""
    counts = xr.Dataset({"n_texts": (text != "").sum("sample"), "n_distinct": first_of_each(text).sum("sample")})
    counts.n_texts.attrs["long_name"] = "texts that are there"
    counts.n_distinct.attrs["long_name"] = "distinct texts among them"
    return counts


@axis.of_arrays
def folds_of(instruction: xr.DataArray) -> xr.DataArray:
    """The fold of every sample: the first sample number of its emotion with the same instruction (…, emotion, sample).

    Sample k of every emotion is asked for by the same template and topic, so a fold is one (template, topic) of all
    emotions. Passages that are read differ, and each number is a fold.
    """
    lead = [dim for dim in instruction.dims if dim != "sample"]
    ordered = instruction.transpose(*lead, "sample")
    numbers = ordered["sample"].values.tolist()
    out = np.zeros(ordered.shape, int)
    for at in np.ndindex(ordered.shape[:-1]):
        first: dict[str, int] = {}
        for k, text in enumerate(map(str, ordered.values[at])):
            out[(*at, k)] = first.setdefault(text, numbers[k]) if text else numbers[k]
    return ordered.copy(data=out).rename("fold")
