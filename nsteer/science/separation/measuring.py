"""How well a model tells emotions apart, layer by layer, with intervals over samples and nulls of shuffled labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from nsteer.science import axis, crossed, heldout, metrics, statistics
from nsteer.science.presets import NEUTRAL
from nsteer.science.separation.slices import (
    CORE,
    PINNED,
    about_of,
    assemble,
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


@axis.of_arrays
def measure(
    activations: xr.DataArray,
    *,
    baseline: str | Mapping[str, str] = "neutral_mean",
    variance: float | Mapping[str, float | None] | None = None,
    text: xr.DataArray | None = None,
    groups: Mapping[str, str] | None = None,
    opposites: Sequence[tuple[str, str]] = OPPOSITES,
    folds: xr.DataArray | None = None,
    units: crossed.Units | Mapping[str, crossed.Units] = "folds",
    embeddings: xr.DataArray | None = None,
    splits: int = 20,
    shuffles: int = 200,
    seed: int = 0,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """Every measure of separation at every layer, with intervals over samples and nulls of shuffled labels.

    activations : (…, emotion, sample, layer, d_model); emotion `neutral` holds the baseline's samples
    baseline, variance : as in the plan's `baseline` and `project_out.variance`, or one for each label of `method`
    text : (…, emotion, sample): copies of a text are left out of everything that counts samples
    groups : emotion -> positive | negative | other (a text set's `emotions`), for the valence poles
    folds : (…, emotion, sample), of `folds_of`: held out together, never multiplied; sample numbers when None
    units : what is independent, for intervals: "folds" (texts written to templates that the emotions share), or each of
    the "samples" (passages); or one for each label of `method`
    embeddings : (…, emotion, sample, d_model), of the group `embeddings`: the accuracy that no block is needed for
    Returns variables over (…, layer), some without layer: see MEANING. Depends on `seed`.
    Raises ValueError for an unknown baseline.
    """
    labels = [str(e) for e in activations.emotion.values.tolist()]
    emotions = emotions_of(activations, neutral)
    poles = [(groups or {}).get(e, "other") for e in emotions]
    known_pairs = [(a, b) for a, b in opposites if a in emotions and b in emotions]
    ends = [(emotions.index(a), emotions.index(b)) for a, b in known_pairs]
    together = Together(activations, folds, labels, neutral)
    null_accuracy: dict[tuple, list[np.ndarray]] = {}
    held: dict[tuple, list[tuple[np.ndarray, np.ndarray]]] = {}

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule, share = knob_of(baseline, at), knob_of(variance, at)
        if rule not in metrics.BASELINES:
            raise ValueError(f"baseline {rule!r} is not one of {', '.join(metrics.BASELINES)}")
        values, there, neutrals = prepared(array, labels, neutral, rule, share)
        base = neutral_mean(neutrals)
        vectors = metrics.contrast(metrics.means(values, there.astype(float)), base, rule)
        cosine = metrics.cosines(vectors)
        fold, neutral_fold = together.at(at)
        same = rule == "grand_mean"  # pinned, with noise or without
        without = crossed.crossed(values, neutrals, "none" if same else rule, fold, neutral_fold, knob_of(units, at))
        reliability, rdm = split_half(values, there, neutrals, rule, splits, seed)
        predicted = metrics.held_out(values, there, base, rule, fold)
        hit = metrics.accuracy(predicted)
        orders = _shuffled(there.tobytes(), there.shape, shuffles, seed)
        null = heldout.null_accuracy(values, there, base, rule, fold, orders)
        key = tuple(value for dim, value in at.items() if dim != "layer")
        null_accuracy.setdefault(key, []).append(null)
        held.setdefault(key, []).append(
            (predicted, heldout.inner_accuracy(values, there, base, rule, heldout.outer_folds(fold)))
        )
        apart = float(metrics.pole_separation(cosine, poles))
        counts = there.sum(-1)
        variables = {
            PINNED: ((), float(metrics.pair_mean(cosine))),
            "cv_cosine": ((), np.nan if same else without.cosine),
            "cv_cosine_low": ((), -np.inf if same else without.low),
            "cv_cosine_high": ((), np.inf if same else without.high),
            "cv_length": ((), np.nan if same else without.length),
            "cv_length_p": ((), np.nan if same else without.length_p),
            "cv_influence": (("unit",), padded(without.influence, array.shape[0] * array.shape[1])),
            "cv_df": ((), without.df),
            "n_units": ((), without.n),
            "pinned": ((), same or metrics.sums_to_zero(vectors)),
            "accuracy": ((), hit),
            "accuracy_hit": (("unit",), padded(_hits(predicted, fold), array.shape[0] * array.shape[1])),
            "chance": ((), _chance(int((counts > 0).sum()))),
            "accuracy_p": ((), statistics.against(hit, null).p),
            "reliability": ((), reliability),
            "rdm": (("emotion", "emotion_2"), 1 - cosine),
            "rdm_reliability": ((), rdm),
            "pole_separation": ((), apart),
            "pole_p": ((), _pole_null(cosine, poles, apart, shuffles, seed)),
            "opposite_cosine": (("pair",), np.array([cosine[a, b] for a, b in ends])),
            "n_emotions": ((), int((counts > 0).sum())),
            "n_samples": ((), int(counts.sum())),
            "n_least": ((), int(counts.min()) if len(counts) else 0),
            "n_each": (("emotion",), counts),
        }
        return variables

    extra = {"pair": ("pair", [f"{a}-{b}" for a, b in known_pairs]), "emotion": np.array(emotions, object)}
    extra["emotion_2"] = extra["emotion"]
    measures = assemble(activations, CORE, of_slice, extra, text)
    measures = _also_near(measures)
    lead = [dim for dim in leading(activations, CORE) if dim != "layer"]
    if "layer" in measures.dims:
        if shuffles:
            measures["accuracy_p_any"] = _over_layers(measures, lead, null_accuracy)
        measures = _chosen(measures, lead, held, together)
    if text is not None:
        measures["lexical"] = _lexical(text.sel({"emotion": emotions}), measures, lead, together)
    if embeddings is not None:
        bags = embeddings.sel({"emotion": labels, "sample": activations["sample"].values})
        if text is not None:
            bags = bags.where(first_of_each(text).reindex_like(bags.emotion, fill_value=False))
        measures["embedding"] = _by_embeddings(bags, measures, lead, together, labels, neutral, baseline)
    measures.attrs = {"level": statistics.LEVEL, "seed": seed, "splits": splits, "shuffles": shuffles}
    return measures


@axis.of_arrays
def accuracies(
    activations: xr.DataArray,
    *,
    baseline: str | Mapping[str, str] = "neutral_mean",
    variance: float | Mapping[str, float | None] | None = None,
    text: xr.DataArray | None = None,
    folds: xr.DataArray | None = None,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """What `measure` tells of held-out accuracy, without intervals and nulls; arguments as there."""
    labels = [str(e) for e in activations.emotion.values.tolist()]
    together = Together(activations, folds, labels, neutral)
    held: dict[tuple, list[tuple[np.ndarray, np.ndarray]]] = {}

    def of_slice(array: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule = knob_of(baseline, at)
        values, there, neutrals = prepared(array, labels, neutral, rule, knob_of(variance, at))
        base, (fold, _) = neutral_mean(neutrals), together.at(at)
        predicted = metrics.held_out(values, there, base, rule, fold)
        key = tuple(value for dim, value in at.items() if dim != "layer")
        held.setdefault(key, []).append(
            (predicted, heldout.inner_accuracy(values, there, base, rule, heldout.outer_folds(fold)))
        )
        known = there.any(-1).sum()
        return {
            "accuracy": ((), metrics.accuracy(predicted)),
            "chance": ((), _chance(int(known))),
            "n_emotions": ((), int(known)),
            "n_samples": ((), int(there.sum())),
        }

    measures = assemble(activations, CORE, of_slice, text=text)
    lead = [dim for dim in leading(activations, CORE) if dim != "layer"]
    return _chosen(measures, lead, held, together) if "layer" in measures.dims else measures


def _chance(emotions: int) -> float:
    """The chance level of so many; NaN where there is none, as at layers that were not read."""
    return 1 / emotions if emotions else np.nan


@lru_cache(maxsize=8)
def _shuffled(there: bytes, shape: tuple[int, int], n: int, seed: int) -> np.ndarray:
    """Shuffled labels of the samples that are there: the same at every layer, so drawn once."""
    return heldout.permuted(np.frombuffer(there, bool).reshape(shape), n, np.random.default_rng(seed + 2))


class Together:
    """The fold of every sample of a slice: (labels of the slice) -> [emotion, sample], and of the neutral ones."""

    def __init__(self, activations: xr.DataArray, folds: xr.DataArray | None, labels: Sequence[str], neutral: str):
        self.folds, self.numbers = folds, activations["sample"].values
        self.rows = [e for e in labels if e != neutral]
        self.shape, self.neutral = (len(self.rows), len(self.numbers)), neutral
        self._at: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}

    def at(self, labels: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        dims = () if self.folds is None else self.folds.dims
        own = {d: v for d, v in labels.items() if d in dims}
        if (key := tuple(own.values())) not in self._at:  # the same at every layer
            self._at[key] = self._folds_at(own)
        return self._at[key]

    def _folds_at(self, labels: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        if self.folds is None:
            return np.broadcast_to(np.arange(self.shape[1]), self.shape), np.arange(self.shape[1])
        chosen = self.folds.sel(labels)
        chosen = chosen.transpose("emotion", "sample").sel({"sample": self.numbers})
        known = self.neutral in chosen.emotion.values.tolist()
        neutrals = chosen.sel({"emotion": self.neutral}).values if known else np.arange(self.shape[1])
        return chosen.sel({"emotion": self.rows}).values, neutrals


def padded(values: np.ndarray, size: int) -> np.ndarray:
    """[unit] with NaN up to a size."""
    return np.concatenate([values, np.full(max(size - len(values), 0), np.nan)])


def _hits(predicted: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Deviations [fold] of held-out accuracy by the fold, scaled so that their squares add up to its variance."""
    right = (predicted == np.arange(len(predicted))[:, None]).astype(float)
    known = predicted >= 0
    if not known.any():
        return np.zeros(0)
    off = np.where(known, right - right[known].mean(), 0.0)
    sums = np.array([off[fold == k].sum() for k in np.unique(fold[known])])
    n = len(sums)
    return sums * np.sqrt(n / max(n - 1, 1)) / known.sum()


def _chosen(measures: xr.Dataset, lead: Sequence[str], held: Mapping[tuple, list], together: Together) -> xr.Dataset:
    """The held-out accuracy at a layer chosen inside the folds, over the dims but layer."""
    shape = [measures.sizes[dim] for dim in lead]
    share, count = np.full(shape, np.nan), np.zeros(shape, int)
    for at in np.ndindex(*shape):
        labels = {dim: measures[dim].values.tolist()[i] for dim, i in zip(lead, at, strict=True)}
        fold = heldout.outer_folds(together.at(labels)[0])
        pairs = held[tuple(labels.values())]
        predicted = heldout.predicted_at_chosen(
            np.stack([whole for whole, _ in pairs]), np.stack([inner for _, inner in pairs]), fold
        )
        share[at], count[at] = metrics.accuracy(predicted), int((predicted >= 0).sum())
    variables = {"accuracy_chosen": share, "accuracy_chosen_n": count}
    return measures.assign({name: (tuple(lead), values, about_of(name)) for name, values in variables.items()})


def _lexical(text: xr.DataArray, measures: xr.Dataset, lead: Sequence[str], together: Together) -> xr.DataArray:
    """Held-out accuracy of a bag of words, over the dims but layer; copies left out."""
    first = first_of_each(text)
    shape = [measures.sizes[dim] for dim in lead]
    out = np.full(shape, np.nan)
    for at in np.ndindex(*shape):
        labels = {dim: measures[dim].values.tolist()[i] for dim, i in zip(lead, at, strict=True)}
        own = {dim: label for dim, label in labels.items() if dim in text.dims}
        texts, there = (data.sel(own).transpose("emotion", "sample").values for data in (text, first))
        out[at] = metrics.accuracy(heldout.by_words(texts, there, together.at(labels)[0]))
    return xr.DataArray(out, dims=tuple(lead), attrs=about_of("lexical"))


def _by_embeddings(
    bags: xr.DataArray,
    measures: xr.Dataset,
    lead: Sequence[str],
    together: Together,
    labels: Sequence[str],
    neutral: str,
    baseline: str | Mapping[str, str],
) -> xr.DataArray:
    """Held-out accuracy of bags of token embeddings, over the dims but layer."""
    shape = [measures.sizes[dim] for dim in lead]
    out = np.full(shape, np.nan)
    for at in np.ndindex(*shape):
        where = {dim: measures[dim].values.tolist()[i] for dim, i in zip(lead, at, strict=True)}
        bag = bags.sel({dim: label for dim, label in where.items() if dim in bags.dims})
        rule = knob_of(baseline, where)
        array = bag.transpose(*CORE).values.astype(float)
        values, there, neutrals = prepared(array, labels, neutral, rule, None)
        predicted = metrics.held_out(values, there, neutral_mean(neutrals), rule, together.at(where)[0])
        out[at] = metrics.accuracy(predicted)
    return xr.DataArray(out, dims=tuple(lead), attrs=about_of("embedding"))


def _pole_null(cosine: np.ndarray, poles: Sequence[str], observed: float, n: int, seed: int) -> float:
    """P(pole separation this high) when the groups are permuted among the emotions.

    All permutations where there are at most EXACT of them: few distinct ones drawn at random would not hold the level.
    """
    if np.isnan(observed) or not n:
        return float("nan")
    permuted, every = _permuted_poles(tuple(poles), n, seed)
    null = metrics.pole_separation(cosine, permuted)
    return float((null >= observed - 1e-12).mean()) if every else statistics.against(observed, null).p


@lru_cache(maxsize=8)
def _permuted_poles(poles: tuple[str, ...], n: int, seed: int) -> tuple[np.ndarray, bool]:
    """Permuted groups, [permutation, emotion], and whether those are all permutations: the same at every layer."""
    group = np.array(poles, object)
    positive, negative = (int((group == pole).sum()) for pole in ("positive", "negative"))
    if math.comb(len(group), positive) * math.comb(len(group) - positive, negative) <= EXACT:
        return _all_labellings(len(group), positive, negative), True
    rng = np.random.default_rng(seed + 3)
    return group[np.array([rng.permutation(len(group)) for _ in range(n)])], False


def _all_labellings(n: int, positive: int, negative: int) -> np.ndarray:
    """Every way to call `positive` and `negative` of n emotions so: [permutation, n]."""
    out = []
    for first in itertools.combinations(range(n), positive):
        rest = [i for i in range(n) if i not in first]
        for second in itertools.combinations(rest, negative):
            row = np.full(n, "other", object)
            row[list(first)], row[list(second)] = "positive", "negative"
            out.append(row)
    return np.array(out)


def _also_near(measures: xr.Dataset) -> xr.Dataset:
    """Marks as pinned also what lies at -1/(n-1) at every layer, as when the grand mean was over the neutral too."""
    wall = -1.0 / (measures.n_emotions - 1).where(measures.n_emotions > 2)
    near = (abs(measures[PINNED] - wall) < NEAR * abs(wall)) | measures[PINNED].isnull()
    all_near = (
        (near & measures[PINNED].notnull().any("layer")).all("layer") if "layer" in measures.dims else near & False
    )
    measures["pinned"] = (measures.pinned | all_near).transpose(*measures[PINNED].dims).assign_attrs(about_of("pinned"))
    return measures


def _over_layers(measures: xr.Dataset, lead: Sequence[str], null: Mapping[tuple, list[np.ndarray]]) -> xr.DataArray:
    """p of the best layer's accuracy against the best of each shuffle (max-statistic; Westfall & Young 1993)."""
    best = measures.accuracy.max("layer", skipna=True)
    out = best.copy(data=np.full(best.shape, np.nan))
    for at in np.ndindex(best.shape):
        where = dict(zip(best.dims, at, strict=True))
        key = tuple(measures[dim].values.tolist()[where[dim]] for dim in lead)
        drawn = np.stack(null[key])  # [layer, shuffle]
        if not np.isnan(drawn).all():
            highest = np.nanmax(np.where(np.isnan(drawn).all(0), -1.0, drawn), axis=0)
            out.values[at] = statistics.against(float(best.values[at]), highest).p
    return out.assign_attrs(about_of("accuracy_p_any"))
