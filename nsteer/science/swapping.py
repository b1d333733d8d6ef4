"""Turns texts that were read behind other emotions' instructions into what their vectors follow: text or instruction.

A text of emotion b behind the instruction of emotion a is set beside vectors that saw neither that text's fold nor
that instruction's. If it lies nearest to b, the vectors follow the text; if nearest to a, the instruction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import metrics, statistics
from nsteer.science.presets import NEUTRAL
from nsteer.science.separation.texts import first_of_each

MEANING = {
    "text": "share of texts nearest to their own emotion's vector, behind other instructions",
    "instruction": "share of texts nearest to the vector of the emotion that the instruction asks for",
    "follows": "of the texts nearest to either more often than to the other, the share nearest to their own",
    "n": "texts read so, each once however many instructions it stood behind",
    "n_either": "texts nearest to either more often than to the other",
    "chance": "1 / emotions",
}
ENDS = {
    f"{name}_{end}": f"{end} end of the interval of `{name}` (Wilson over texts)"
    for name in ("text", "instruction", "follows")
    for end in ("low", "high")
}


def nearest(
    values: np.ndarray,
    there: np.ndarray,
    neutral: np.ndarray,
    rule: str,
    folds: np.ndarray,
    read: np.ndarray,
    asked: np.ndarray,
) -> np.ndarray:
    """Which emotion's vector each text behind another instruction is nearest to: [emotion, sample, swap], -1 missing.

    values, there, neutral, rule, folds : samples as they were written, as in `metrics.held_out`; read [emotion, sample,
    swap, d] : texts behind other instructions; asked [emotion, sample, swap] : the emotion that the instruction is of
    """
    out = np.full(asked.shape, -1)
    by_fold: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for e, k, i in zip(*np.nonzero((asked >= 0) & ~np.isnan(read).any(-1) & there[..., None]), strict=True):
        left_out = (int(folds[e, k]), int(folds[asked[e, k, i], k]))
        if left_out not in by_fold:
            kept = there & ~np.isin(folds, left_out)
            averages = metrics.means(values, kept.astype(float))
            base = metrics.nan_mean(averages, 0) if rule == "grand_mean" else np.zeros(values.shape[-1])
            vectors = metrics.unit(metrics.contrast(averages, neutral, rule))
            by_fold[left_out] = vectors, neutral if rule == "neutral_mean" else base
        vectors, base = by_fold[left_out]
        likeness = vectors @ (read[e, k, i] - base)
        if not np.isnan(likeness).all():
            out[e, k, i] = int(np.nanargmax(likeness))
    return out


def followed(predicted: np.ndarray, asked: np.ndarray) -> dict[str, Any]:
    """What texts follow, by the variables of MEANING and `p`: predicted, asked as in `nearest`. Texts are the units."""
    known = predicted >= 0
    count = known.sum(-1)
    own = ((predicted == np.arange(len(predicted))[:, None, None]) & known).sum(-1)
    other = ((predicted == asked) & known).sum(-1)
    n = int((count > 0).sum())
    share = {
        name: float(np.divide(hits, count, where=count > 0, out=np.zeros(count.shape)).sum())
        for name, hits in (("text", own), ("instruction", other))
    }
    first, either = int((own > other).sum()), int((own != other).sum())
    variables: dict[str, Any] = {"n": n, "n_either": either, "chance": 1 / max(len(predicted), 1)}
    for name, k, of in (
        ("text", share["text"], n),
        ("instruction", share["instruction"], n),
        ("follows", first, either),
    ):
        edges = statistics.wilson(k, of) if of else None
        variables[name] = k / of if of else np.nan
        variables[f"{name}_low"], variables[f"{name}_high"] = (edges.low, edges.high) if edges else (np.nan, np.nan)
    return {**variables, "p": statistics.binomial_p(first, either, 0.5) if either else np.nan}


def measure(
    swapped: xr.Dataset,
    activations: xr.DataArray,
    text: xr.DataArray,
    folds: xr.DataArray,
    baseline: str,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """What the vectors of one method of one model follow, over `layer`: the variables of MEANING, their ends, and `p`.

    swapped : `asked`, `pooled` over (emotion, sample, swap[, layer, d_model]); activations : (emotion, sample, layer,
    d_model), those of `neutral` among them; text, folds : (emotion, sample). Copies of a text count once.
    """
    labels = [str(e) for e in activations.emotion.values.tolist()]
    emotions = [e for e in labels if e != neutral]
    numbers = activations["sample"].values
    first = first_of_each(text).reindex({"sample": numbers}, fill_value=False)
    own = activations.where(first.reindex({"emotion": labels}, fill_value=False))
    fold = folds.sel({"emotion": emotions, "sample": numbers}).transpose("emotion", "sample").values
    named = swapped.asked.sel({"emotion": emotions}).reindex({"sample": numbers}, fill_value="")
    place = {e: i for i, e in enumerate(emotions)}
    asked = np.vectorize(lambda label: place.get(str(label), -1), otypes=[int])(
        named.transpose("emotion", "sample", "swap").values
    )
    rows = []
    for layer in activations.layer.values.tolist():
        array = own.sel({"layer": layer}).transpose("emotion", "sample", "d_model").values.astype(float)
        read = swapped.pooled.sel({"layer": layer, "emotion": emotions}).reindex({"sample": numbers})
        again = read.transpose("emotion", "sample", "swap", "d_model").values.astype(float)
        values = array[[labels.index(e) for e in emotions]]
        neutrals = array[labels.index(neutral)] if neutral in labels else np.full(array.shape[1:], np.nan)
        there = ~np.isnan(values).any(-1)
        rows.append(
            followed(nearest(values, there, metrics.nan_mean(neutrals, 0), baseline, fold, again, asked), asked)
        )
    variables = {name: (("layer",), np.array([row[name] for row in rows])) for name in rows[0]}
    measures = xr.Dataset(variables, coords={"layer": activations.layer.values})
    for name, meaning in {**MEANING, **ENDS, "p": "of `follows` being one half (exact binomial test)"}.items():
        measures[name].attrs = {"long_name": meaning, "units": "1"}
    return measures.assign_attrs(level=statistics.LEVEL, baseline=baseline)
