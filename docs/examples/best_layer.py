"""Which layer separates the emotions best? From the activations of a store, with xarray alone.

    python best_layer.py store/quickstart.zarr zoo/llama

For each method and layer: how often a sample that was left out is nearest (by cosine) to its own emotion's vector, and
the mean pairwise cosine of the vectors, lower being better separated. A text that was written twice counts once.
"""

import sys

import numpy as np
import pandas as pd
import xarray as xr


def read(store: str, model: str) -> xr.DataArray:
    """Pooled activations (method, emotion, sample, layer, d_model); NaN where a text is missing or a copy."""
    group = model.lower().replace("/", "--")
    data = xr.open_zarr(f"{store}/activations/{group}", chunks=None).pooled.sel({"model": model})
    text = xr.open_zarr(f"{store}/samples/{group}", chunks=None).text.sel({"model": model}).load()
    first = xr.apply_ufunc(
        lambda texts: ~pd.Series(texts).duplicated().values & (texts != ""),
        text,
        input_core_dims=[["sample"]],
        output_core_dims=[["sample"]],
        vectorize=True,
    )
    return data.load().where(first)


def unit(data: xr.DataArray) -> xr.DataArray:
    return data / np.sqrt((data**2).sum("d_model"))


def mean_pairwise_cosine(vectors: xr.DataArray) -> xr.DataArray:
    """Mean cosine over all pairs of emotions: (|sum of unit vectors|^2 - n) / (n (n - 1))."""
    n = vectors.sizes["emotion"]
    total = (unit(vectors).sum("emotion") ** 2).sum("d_model")
    return (total - n) / (n * (n - 1))


def held_out(emotions: xr.DataArray, neutral: xr.DataArray) -> xr.DataArray:
    """Share of samples nearest to their own emotion's vector, which was made without any sample of their number."""
    right, asked, base = 0, 0, neutral.mean("sample")
    for number in emotions.sample.values:
        left = emotions.sel({"sample": number})
        there = left.notnull().all("d_model")
        rest = emotions.where(emotions.sample != number).mean("sample")
        near = xr.dot(unit(left - base), unit(rest - base).rename(emotion="guess"), dim="d_model").fillna(-2)
        guess = near.guess.isel({"guess": near.argmax("guess")})  # idxmax can not take labels that are text
        right += ((guess == near.emotion) & there).sum("emotion")
        asked += there.sum("emotion")
    return right / asked


def table(store: str, model: str) -> pd.DataFrame:
    """A row for each method and layer: depth, accuracy, chance, mean pairwise cosine."""
    data = read(store, model)
    rows = []
    for method in data.method.values.tolist():
        one = data.sel({"method": method}).dropna("sample", how="all")
        neutral, emotions = one.sel({"emotion": "neutral"}), one.drop_sel({"emotion": "neutral"})
        accuracy = held_out(emotions, neutral)
        cosine = mean_pairwise_cosine(emotions.mean("sample") - neutral.mean("sample"))
        for layer in one.layer.values.tolist():
            rows.append(
                {
                    "method": method,
                    "layer": layer,
                    "depth": round(float(one.depth.sel({"layer": layer})), 2),
                    "held-out accuracy": float(accuracy.sel({"layer": layer})),
                    "chance": 1 / emotions.sizes["emotion"],
                    "mean pairwise cosine": float(cosine.sel({"layer": layer})),
                }
            )
    return pd.DataFrame(rows).set_index(["method", "layer"])


if __name__ == "__main__":
    found = table(*(sys.argv[1:] or ["store/quickstart.zarr", "zoo/llama"]))
    print(found.round(3).to_string())
    for name, part in found.groupby(level="method"):
        print(f"{name}: best held-out accuracy at layer {part['held-out accuracy'].idxmax()[1]}")
