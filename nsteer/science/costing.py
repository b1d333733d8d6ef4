"""Turns what a model says of the capability passages and questions, steered and unsteered, into what steering costs it.

Passages and items are the units: a difference is taken of each, paired with itself unsteered.
"""

from __future__ import annotations

import xarray as xr

RIGHT = "right"
"""The label of the right answer on the axis `choice`."""


def right(log_likelihood: xr.DataArray) -> xr.DataArray:
    """1 where the right answer is the likeliest of an item, 0 where another is at least as likely; NaN: not there."""
    others = log_likelihood.drop_sel({"choice": RIGHT}).max("choice", skipna=False)
    own = log_likelihood.sel({"choice": RIGHT}, drop=True)
    return xr.where(own.notnull() & others.notnull(), (own > others).astype(float), float("nan"))


def cost(steered: xr.Dataset, unsteered: xr.Dataset) -> xr.Dataset:
    """`nll_rise` (..., passage), in nats a token; `right_change` (..., item), 1 an item won and -1 an item lost.

    steered : `nll`, `log_likelihood` of a group `capability`; unsteered : the same without edits, over `model`
    """
    rise = (steered.nll - unsteered.nll).transpose(*steered.nll.dims)
    told = right(steered.log_likelihood)
    change = (told - right(unsteered.log_likelihood)).transpose(*told.dims)
    return xr.Dataset({"nll_rise": rise, "right_change": change})
