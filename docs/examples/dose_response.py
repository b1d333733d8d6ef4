"""Does more steering give more of the emotion, and does a random direction do the same? With xarray alone.

    python dose_response.py store/quickstart.zarr

For each strength: the judge's probability of the emotion steered to, how much that is above the same prompt unsteered,
and how often that emotion is the likeliest; beside the same three for a random direction of equal norm. The judge's
classes must bear the emotions' names, as those of `zoo/judge` do.
"""

import sys

import numpy as np
import pandas as pd
import xarray as xr

CELL = ("model", "op", "layer_set", "method", "emotion", "prompt", "seed")


def table(store: str) -> pd.DataFrame:
    """A row for each strength; columns (figure, control)."""
    p = xr.open_zarr(f"{store}/judged", chunks=None).score.sel({"judge": "judge"}).load()
    plain = xr.open_zarr(f"{store}/judged_unsteered", chunks=None).score.sel({"judge": "judge"}).load()
    target = p.sel({"class": p.emotion}).drop_vars("class")
    before = plain.sel({"class": p.emotion}).drop_vars("class")
    there = target.notnull()
    named = p["class"].isel({"class": p.fillna(-1).argmax("class")})  # idxmax can not take labels that are text
    likeliest = (named == p.emotion).where(there)
    rise = target - before
    figures = {
        "P(target)": target.mean(CELL),
        "rise": rise.mean(CELL),
        "s.e. of rise": rise.std(CELL, ddof=1) / np.sqrt(there.sum(CELL)),
        "likeliest": likeliest.mean(CELL),
        "n": there.sum(CELL).astype(float),
    }
    found = xr.Dataset(figures).to_array("figure").transpose("strength", "figure", "control")
    return found.stack(column=("figure", "control")).to_pandas()


if __name__ == "__main__":
    print(table(*(sys.argv[1:] or ["store/quickstart.zarr"])).round(3).to_string())
