"""Which emotions lie near each other, and what does steering write? With xarray alone.

    python neighbours.py store/quickstart.zarr zoo/llama generation 3

Prints each emotion with its three nearest (cosine of the vectors at one layer), emotions in the order of the axis along
which they differ most; then the prompts, unsteered and steered at the greatest strength, side by side.
"""

import sys

import numpy as np
import pandas as pd
import xarray as xr


def cosines(store: str, model: str, method: str, layer: int) -> pd.DataFrame:
    """Emotion x emotion cosines, in the order of the first principal axis of the unit vectors."""
    group = model.lower().replace("/", "--")
    vectors = xr.open_zarr(f"{store}/vectors/{group}", chunks=None).vector
    vectors = vectors.sel({"model": model, "method": method, "layer": layer}).load()
    unit = vectors / np.sqrt((vectors**2).sum("d_model"))
    axis = np.linalg.svd((unit - unit.mean("emotion")).transpose("emotion", "d_model").values, full_matrices=False)[0]
    ordered = unit.sel({"emotion": unit.emotion.values[np.argsort(axis[:, 0])]})
    return xr.dot(ordered, ordered.rename(emotion="other"), dim="d_model").to_pandas()


def nearest(found: pd.DataFrame, k: int = 3) -> pd.DataFrame:
    """The k nearest of each emotion, with their cosines."""
    rows = {}
    for emotion in found.index:
        near = found.loc[emotion].drop(emotion).nlargest(k)
        rows[emotion] = [f"{name} {value:+.2f}" for name, value in near.items()]
    return pd.DataFrame.from_dict(rows, orient="index", columns=[f"nearest {i + 1}" for i in range(k)])


def texts(store: str, model: str, method: str) -> pd.DataFrame:
    """Emotion and prompt -> the continuation unsteered, steered and pushed at random, at the greatest strength."""
    steered = xr.open_zarr(f"{store}/generations", chunks=None).text
    where = {"model": model, "op": "add", "layer_set": steered.layer_set.values[0], "seed": steered.seed.values[0]}
    steered = steered.sel({**where, "method": method, "strength": steered.strength.values.max()}).load()
    where.pop("layer_set")
    plain = xr.open_zarr(f"{store}/unsteered", chunks=None).text.sel(where).load()
    rows = [
        {
            "emotion": emotion,
            "prompt": prompt,
            "unsteered": plain.sel({"prompt": prompt}).item().strip(),
            "steered": steered.sel({"emotion": emotion, "prompt": prompt, "control": "none"}).item().strip(),
            "random": steered.sel({"emotion": emotion, "prompt": prompt, "control": "random"}).item().strip(),
        }
        for emotion in steered.emotion.values.tolist()
        for prompt in steered.prompt.values.tolist()
    ]
    return pd.DataFrame(rows).set_index(["emotion", "prompt"])


if __name__ == "__main__":
    store, model, method, layer = sys.argv[1:] or ["store/quickstart.zarr", "zoo/llama", "generation", 3]
    found = cosines(store, model, method, int(layer))
    print(f"{method}, layer {layer}, along the first axis: {', '.join(found.index)}\n")
    print(nearest(found).to_string(), "\n")
    print(texts(store, model, method).map(lambda text: text[:48]).to_string())
