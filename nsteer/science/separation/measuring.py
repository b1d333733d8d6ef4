"""How well a model tells emotions apart, layer by layer, with intervals over samples and nulls of shuffled labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import metrics, statistics
from nsteer.science.presets import NEUTRAL
from nsteer.science.separation import nulls
from nsteer.science.separation.blocks import (
    CORE,
    PINNED,
    about_of,
    assemble,
    drawn_neutral,
    emotions_of,
    knob_of,
    leading,
    neutral_mean,
    prepared,
    split_half,
)
from nsteer.science.separation.texts import first_of_each

OPPOSITES = (
    ("happy", "sad"),
    ("calm", "anxious"),
    ("loving", "hostile"),
    ("hopeful", "desperate"),
    ("proud", "guilty"),
    ("enthusiastic", "gloomy"),
)
"""Pairs held to be opposite: ours."""

NEAR = 0.1
"""A mean pairwise cosine within this share of -1/(n-1) at every layer counts as pinned there."""

EXACT = 1000
"""A null of at most so many distinct shuffles is counted out instead of drawn."""


def measure(
    activations: xr.DataArray,
    *,
    baseline: str | Mapping[str, str] = "neutral_mean",
    variance: float | Mapping[str, float | None] | None = None,
    text: xr.DataArray | None = None,
    groups: Mapping[str, str] | None = None,
    opposites: Sequence[tuple[str, str]] = OPPOSITES,
    folds: Sequence[int] | None = None,
    resamples: int = 200,
    splits: int = 20,
    shuffles: int = 200,
    level: float = statistics.LEVEL,
    seed: int = 0,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """Every measure of separation at every layer, with intervals over samples and nulls of shuffled labels.

    activations : (…, emotion, sample, layer, d_model); emotion `neutral` holds the baseline's samples
    baseline, variance : as in the plan's `baseline` and `project_out.variance`, or one for each label of `method`
    text : (…, emotion, sample): copies of a text are left out of everything that counts samples
    groups : emotion -> positive | negative | other (a text set's `emotions`), for the valence poles
    folds : fold of each sample number for held-out accuracy; each number is its own when None
    Returns variables over (…, layer): see MEANING. Depends on `seed`; the same resamples serve every layer.
    Raises ValueError for an unknown baseline.
    """
    labels = [str(e) for e in activations.emotion.values.tolist()]
    emotions = emotions_of(activations, neutral)
    poles = [(groups or {}).get(e, "other") for e in emotions]
    known_pairs = [(a, b) for a, b in opposites if a in emotions and b in emotions]
    ends = [(emotions.index(a), emotions.index(b)) for a, b in known_pairs]
    if text is not None:
        activations = activations.where(first_of_each(text).reindex_like(activations.emotion, fill_value=False))
    null_accuracy: dict[tuple, list[np.ndarray]] = {}

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule, share = knob_of(baseline, at), knob_of(variance, at)
        if rule not in metrics.BASELINES:
            raise ValueError(f"baseline {rule!r} is not one of {', '.join(metrics.BASELINES)}")
        values, there, plain = prepared(block, labels, neutral, rule, share)
        base = neutral_mean(plain)
        vectors = metrics.contrast(metrics.means(values, there.astype(float)), base, rule)
        cosine = metrics.cosines(vectors)
        curve = float(metrics.pair_mean(cosine))
        drawn = _resampled(values, there, plain, rule, resamples, seed)
        low, high = shifted(drawn, curve, level)
        reliability, rdm = split_half(values, there, plain, rule, splits, seed)
        predicted = metrics.held_out(values, there, base, rule, None if folds is None else np.asarray(folds))
        hit = metrics.accuracy(predicted)
        null = _null_accuracy(values, there, base, rule, folds, shuffles, seed)
        key = tuple(value for dim, value in at.items() if dim != "layer")
        null_accuracy.setdefault(key, []).append(null)
        apart = float(metrics.pole_separation(cosine, poles))
        counts = there.sum(-1)
        return {
            PINNED: ((), curve),
            "cosine_low": ((), low),
            "cosine_high": ((), high),
            "resampled_cosine": (("resample",), drawn),
            "pinned": ((), rule == "grand_mean" or metrics.sums_to_zero(vectors)),
            "accuracy": ((), hit),
            "chance": ((), 1 / max(int((counts > 0).sum()), 1)),
            "accuracy_p": ((), statistics.against(hit, null).p),
            "reliability": ((), reliability),
            "rdm_reliability": ((), rdm),
            "pole_separation": ((), apart),
            "pole_p": ((), _pole_null(cosine, poles, apart, shuffles, seed)),
            "opposite_cosine": (("pair",), np.array([cosine[a, b] for a, b in ends])),
            "n_emotions": ((), int((counts > 0).sum())),
            "n_samples": ((), int(counts.sum())),
            "n_least": ((), int(counts.min()) if len(counts) else 0),
            "n_each": (("emotion",), counts),
        }

    extra = {"pair": ("pair", [f"{a}-{b}" for a, b in known_pairs]), "emotion": np.array(emotions, object)}
    found = assemble(activations, CORE, one, extra)
    found = _also_near(found)
    lead = [dim for dim in leading(activations, CORE) if dim != "layer"]
    if "layer" in found.dims and shuffles:
        found["accuracy_p_any"] = _over_layers(found, lead, null_accuracy)
    found.attrs = {"level": level, "seed": seed, "resamples": resamples, "splits": splits, "shuffles": shuffles}
    return found


def _resampled(values: np.ndarray, there: np.ndarray, plain: np.ndarray, rule: str, n: int, seed: int) -> np.ndarray:
    """Mean pairwise cosine of n bootstrap draws of all samples, the neutral ones too: [n]."""
    rng = np.random.default_rng(seed)
    out = np.full(n, np.nan)
    weights = metrics.resamples(there, n, rng)
    base = drawn_neutral(plain, metrics.resamples(~np.isnan(plain).any(-1)[None], n, rng)[:, 0])
    step = max(1, 2**24 // max(values.shape[0] * values.shape[-1], 1))
    for start in range(0, n, step):
        part = slice(start, start + step)
        vectors = metrics.contrast(metrics.means(values, weights[part]), base[part], rule)
        out[part] = metrics.mean_pairwise_cosine(vectors)
    return out


def shifted(drawn: np.ndarray, estimate: float, level: float) -> tuple[float, float]:
    """Percentile edges moved so that the draws' median is the estimate: resampling doubles noise, which itself moves
    a mean cosine."""
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, middle, high = np.nanquantile(drawn, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return estimate + float(low - middle), estimate + float(high - middle)


def _null_accuracy(
    values: np.ndarray, there: np.ndarray, base: np.ndarray, rule: str, folds: Any, n: int, seed: int
) -> np.ndarray:
    """Held-out accuracy of n data sets whose emotion labels are shuffled within each sample number: [n]."""
    fold = np.arange(there.shape[1]) if folds is None else np.asarray(folds)
    drawn = nulls.orders(there.tobytes(), there.shape, n, seed + 2)
    if there.size <= nulls.MOST:
        return nulls.shuffled_accuracy(values, there, base, rule, fold, drawn)
    numbers = np.arange(there.shape[1])
    return np.array(
        [metrics.accuracy(metrics.held_out(values[one, numbers], there, base, rule, fold)) for one in drawn]
    )


def _pole_null(cosine: np.ndarray, poles: Sequence[str], observed: float, n: int, seed: int) -> float:
    """P(pole separation this high) when the groups are dealt out among the emotions anew.

    All deals where there are at most EXACT of them: few distinct ones drawn at random would not hold the level.
    """
    if np.isnan(observed) or not n:
        return float("nan")
    group = np.asarray(poles, object)
    size = {pole: int((group == pole).sum()) for pole in ("positive", "negative")}
    if math.comb(len(group), size["positive"]) * math.comb(len(group) - size["positive"], size["negative"]) <= EXACT:
        null = metrics.pole_separation(cosine, _deals(len(group), *size.values()))
        return float((null >= observed - 1e-12).mean())
    rng = np.random.default_rng(seed + 3)
    dealt = np.array([rng.permutation(len(group)) for _ in range(n)])
    return statistics.against(observed, metrics.pole_separation(cosine, group[dealt])).p


def _deals(n: int, positive: int, negative: int) -> np.ndarray:
    """Every way to call `positive` and `negative` of n emotions so: [deal, n]."""
    out = []
    for first in itertools.combinations(range(n), positive):
        rest = [i for i in range(n) if i not in first]
        for second in itertools.combinations(rest, negative):
            row = np.full(n, "other", object)
            row[list(first)], row[list(second)] = "positive", "negative"
            out.append(row)
    return np.array(out)


def _also_near(found: xr.Dataset) -> xr.Dataset:
    """Marks as pinned also what lies at -1/(n-1) at every layer, as when the grand mean was over the neutral too."""
    wall = -1.0 / (found.n_emotions - 1).where(found.n_emotions > 2)
    near = (abs(found[PINNED] - wall) < NEAR * abs(wall)) | found[PINNED].isnull()
    all_near = (near & found[PINNED].notnull().any("layer")).all("layer") if "layer" in found.dims else near & False
    found["pinned"] = (found.pinned | all_near).transpose(*found[PINNED].dims).assign_attrs(about_of("pinned"))
    return found


def _over_layers(found: xr.Dataset, lead: Sequence[str], null: Mapping[tuple, list[np.ndarray]]) -> xr.DataArray:
    """p of the best layer's accuracy against the best of each shuffle (max-statistic; Westfall & Young 1993)."""
    best = found.accuracy.max("layer", skipna=True)
    out = best.copy(data=np.full(best.shape, np.nan))
    for at in np.ndindex(best.shape):
        where = dict(zip(best.dims, at, strict=True))
        key = tuple(found[dim].values.tolist()[where[dim]] for dim in lead)
        drawn = np.stack(null[key])  # [layer, shuffle]
        if not np.isnan(drawn).all():
            most = np.nanmax(np.where(np.isnan(drawn).all(0), -1.0, drawn), axis=0)
            out.values[at] = statistics.against(float(best.values[at]), most).p
    return out.assign_attrs(about_of("accuracy_p_any"))
