"""Turns pooled activations into how well a model tells emotions apart, layer by layer: Dataset -> Dataset.

Activations have dims (…, emotion, sample, layer, d_model), where … is usually (model, method) and the emotion
`neutral` is the baseline; a sample with NaN is a hole. Everything is computed from samples, so baselines may be
changed afterwards and every figure gets an interval or a null from the samples it rests on. No model is needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer import directions, metrics, statistics
from nsteer.errors import TrapError
from nsteer.presets import NEUTRAL

CORE = ("emotion", "sample", "d_model")
OPPOSITES = (
    ("happy", "sad"),
    ("calm", "anxious"),
    ("loving", "hostile"),
    ("hopeful", "desperate"),
    ("proud", "guilty"),
    ("enthusiastic", "gloomy"),
)
"""Pairs held to be opposite: ours."""

PINNED = "mean_pairwise_cosine"
NEAR = 0.1
"""A mean pairwise cosine within this share of -1/(n-1) at every layer counts as pinned there."""

EXACT = 1000
"""A null of at most so many distinct shuffles is counted out instead of drawn."""

MEANING = {
    "mean_pairwise_cosine": "mean cosine over all pairs of emotion vectors; lower is better separated (Jeong 2026)",
    "cosine_low": "lower edge of its bootstrap interval over samples",
    "cosine_high": "upper edge of its bootstrap interval over samples",
    "resampled_cosine": "mean pairwise cosine of vectors from samples drawn anew",
    "pinned": "whether mean_pairwise_cosine is held at -1/(n-1) by algebra, so that it says nothing",
    "accuracy": "share of held-out samples nearest to their own emotion's vector",
    "chance": "its chance level, 1 / emotions",
    "accuracy_p": "P(accuracy this high | emotion labels shuffled), this layer alone",
    "accuracy_p_any": "P(best accuracy over layers this high | labels shuffled): counts that layers were searched",
    "reliability": "split-half reliability of the vectors' differences among emotions (Spearman-Brown)",
    "rdm_reliability": "split-half reliability of the dissimilarity matrix (Spearman, Spearman-Brown)",
    "pole_separation": "mean cosine within positive and within negative emotions minus that between them",
    "pole_p": "P(pole_separation this high | groups shuffled among emotions)",
    "opposite_cosine": "cosine between the vectors of an opposite pair",
    "n_emotions": "emotions with a vector",
    "n_samples": "samples (distinct texts, where texts are given) behind the vectors",
    "n_each": "samples of each emotion",
    "n_least": "samples of the emotion that has fewest",
}


# ---- distinct texts ------------------------------------------------------------------------------------------


def first_of_each(text: xr.DataArray) -> xr.DataArray:
    """True for the first sample of each distinct text: (…, emotion, sample) text -> bool. Empty text is a hole.

    Greedy decoding with templates in turn writes the same text again (about 5 of 10 distinct under Jeong's protocol):
    a copy is no further evidence, and one left in while its twin is held out gives the answer away.
    """
    lead = [dim for dim in text.dims if dim != "sample"]
    ordered = text.transpose(*lead, "sample")
    values = ordered.values
    out = np.zeros(values.shape, bool)
    for at in np.ndindex(values.shape[:-1]):
        seen: set[str] = set()
        for k, one in enumerate(map(str, values[at])):
            out[(*at, k)] = bool(one) and one not in seen
            seen.add(one)
    return ordered.copy(data=out).rename("first")


def distinct_texts(text: xr.DataArray) -> xr.Dataset:
    """How many distinct texts stand behind each emotion: `n_texts`, `n_distinct` over (…, emotion)."""
    found = xr.Dataset({"n_texts": (text != "").sum("sample"), "n_distinct": first_of_each(text).sum("sample")})
    found.n_texts.attrs["long_name"] = "texts that are there"
    found.n_distinct.attrs["long_name"] = "distinct texts among them"
    return found


# ---- labelled wrappers ---------------------------------------------------------------------------------------


def _lead(data: xr.DataArray, core: Sequence[str]) -> list[str]:
    return [str(dim) for dim in data.dims if dim not in core]


def _blocks(data: xr.DataArray, core: Sequence[str]) -> Iterator[tuple[dict[str, int], np.ndarray]]:
    """Every block over the core dims, with where it stands; read one by one when the whole is large."""
    lead = _lead(data, core)
    if data.nbytes < 2**29:
        data = data.load()
    for at in np.ndindex(*[data.sizes[dim] for dim in lead]):
        where = dict(zip(lead, at, strict=True))
        yield where, np.asarray(data.isel(where).transpose(*core).values, float)


def _coords(data: xr.DataArray, dims: Sequence[str]) -> dict[str, Any]:
    """The labels of dims, and what else lies along them alone (such as depth); text as plain objects."""
    found: dict[str, Any] = {}
    for name, coord in data.coords.items():
        if coord.dims and set(coord.dims) <= set(dims):
            values = coord.values
            found[str(name)] = (coord.dims, values.astype(object) if values.dtype.kind in "TU" else values)
    return found


def _assemble(
    data: xr.DataArray,
    core: Sequence[str],
    compute: Callable[[np.ndarray, dict[str, Any]], Mapping[str, tuple[tuple[str, ...], Any]]],
    extra: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """compute(block, labels) -> {name: (dims, values)} of every block, as one Dataset over the leading dims."""
    lead = _lead(data, core)
    shape = [data.sizes[dim] for dim in lead]
    arrays: dict[str, np.ndarray] = {}
    dims_of: dict[str, tuple[str, ...]] = {}
    for where, block in _blocks(data, core):
        labels = {dim: data[dim].values.tolist()[i] for dim, i in where.items() if dim in data.coords}
        for name, (dims, values) in compute(block, labels).items():
            values = np.asarray(values)
            if name not in arrays:
                blank = 0 if values.dtype.kind in "bi" else np.nan
                arrays[name] = np.full((*shape, *values.shape), blank, values.dtype)
                dims_of[name] = (*lead, *dims)
            arrays[name][tuple(where.values())] = values
    variables = {name: (dims_of[name], values, _about(name)) for name, values in arrays.items()}
    return xr.Dataset(variables, coords={**_coords(data, lead), **(extra or {})})


def _about(name: str) -> dict[str, str]:
    return {"long_name": MEANING[name], "units": "1"} if name in MEANING else {}


def _emotions(data: xr.DataArray, neutral: str) -> list[str]:
    return [str(e) for e in data.emotion.values.tolist() if str(e) != neutral]


def _split(block: np.ndarray, labels: Sequence[str], neutral: str) -> tuple[np.ndarray, np.ndarray]:
    """A block [emotion, sample, d] as the emotions' [emotion, sample, d] and the neutral [sample, d]; holes are NaN."""
    block = np.where(np.isnan(block).any(-1, keepdims=True), np.nan, block)
    rows = [i for i, label in enumerate(labels) if label != neutral]
    at = [i for i, label in enumerate(labels) if label == neutral]
    return block[rows], block[at[0]] if at else np.full(block.shape[1:], np.nan)


def _prepared(
    block: np.ndarray, labels: Sequence[str], neutral: str, baseline: str, variance: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples [emotion, sample, k], which are there [emotion, sample], neutral samples [sample, k], ready to combine.

    Neutral principal components are projected out of the samples (which is the same as out of the vectors) and held
    fixed; then all move to the space that they span.
    """
    values, plain = _split(block, labels, neutral)
    if variance is not None and (~np.isnan(plain).any(-1)).sum() > 1:
        components = directions.principal(plain, variance)
        values, plain = directions.without(values, components), directions.without(plain, components)
    values, plain = metrics.compact(values, plain, centre=baseline != "none")
    return values, ~np.isnan(values).any(-1), plain


def _neutral_mean(plain: np.ndarray) -> np.ndarray:
    return metrics.nan_mean(plain, 0)


# ---- separation ----------------------------------------------------------------------------------------------


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
    emotions = _emotions(activations, neutral)
    poles = [(groups or {}).get(e, "other") for e in emotions]
    known_pairs = [(a, b) for a, b in opposites if a in emotions and b in emotions]
    ends = [(emotions.index(a), emotions.index(b)) for a, b in known_pairs]
    if text is not None:
        activations = activations.where(first_of_each(text).reindex_like(activations.emotion, fill_value=False))
    null_accuracy: dict[tuple, list[np.ndarray]] = {}

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule, share = _of(baseline, at), _of(variance, at)
        if rule not in metrics.BASELINES:
            raise ValueError(f"baseline {rule!r} is not one of {', '.join(metrics.BASELINES)}")
        values, there, plain = _prepared(block, labels, neutral, rule, share)
        base = _neutral_mean(plain)
        vectors = metrics.contrast(metrics.means(values, there.astype(float)), base, rule)
        cosine = metrics.cosines(vectors)
        curve = float(metrics.pair_mean(cosine))
        drawn = _resampled(values, there, plain, rule, resamples, seed)
        low, high = shifted(drawn, curve, level)
        reliability, rdm = _split_half(values, there, plain, rule, splits, seed)
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
    found = _assemble(activations, CORE, one, extra)
    found = _also_near(found)
    lead = [dim for dim in _lead(activations, CORE) if dim != "layer"]
    if "layer" in found.dims and shuffles:
        found["accuracy_p_any"] = _over_layers(found, lead, null_accuracy)
    found.attrs = {"level": level, "seed": seed, "resamples": resamples, "splits": splits, "shuffles": shuffles}
    return found


def _of(given: Any, at: Mapping[str, Any]) -> Any:
    """A knob, or that of the method at hand."""
    return given[at["method"]] if isinstance(given, Mapping) else given


def _resampled(values: np.ndarray, there: np.ndarray, plain: np.ndarray, rule: str, n: int, seed: int) -> np.ndarray:
    """Mean pairwise cosine of n bootstrap draws of all samples, the neutral ones too: [n]."""
    rng = np.random.default_rng(seed)
    out = np.full(n, np.nan)
    weights = metrics.resamples(there, n, rng)
    base = _drawn_neutral(plain, metrics.resamples(~np.isnan(plain).any(-1)[None], n, rng)[:, 0])
    step = max(1, 2**24 // max(values.shape[0] * values.shape[-1], 1))
    for start in range(0, n, step):
        part = slice(start, start + step)
        vectors = metrics.contrast(metrics.means(values, weights[part]), base[part], rule)
        out[part] = metrics.mean_pairwise_cosine(vectors)
    return out


def _drawn_neutral(plain: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return metrics.means(plain[None], weights[:, None])[:, 0]


def shifted(drawn: np.ndarray, estimate: float, level: float) -> tuple[float, float]:
    """Percentile edges moved so that the draws' median is the estimate: resampling doubles noise, which itself moves
    a mean cosine."""
    if np.isnan(drawn).all():
        return float("nan"), float("nan")
    low, middle, high = np.nanquantile(drawn, [(1 - level) / 2, 0.5, (1 + level) / 2])
    return estimate + float(low - middle), estimate + float(high - middle)


def _split_half(
    values: np.ndarray, there: np.ndarray, plain: np.ndarray, rule: str, n: int, seed: int
) -> tuple[float, float]:
    """Reliability of vectors and of their RDM: mean correlation of n random halves, stepped up by Spearman-Brown.

    Neutral samples are halved too, so that halves share no noise.
    """
    rng = np.random.default_rng(seed + 1)
    sides = metrics.halves(there, n, rng)
    bases = metrics.halves(~np.isnan(plain).any(-1)[None], n, rng)
    first, second = (
        metrics.contrast(metrics.means(values, side), _drawn_neutral(plain, base[:, 0]), rule)
        for side, base in zip(sides, bases, strict=True)
    )
    if rule == "neutral_mean" and np.isnan(first).all():  # no two neutral samples: the differences still compare
        first, second = (metrics.means(values, side) for side in sides)
        rdm = float("nan")
    else:
        one, two = 1 - metrics.cosines(first), 1 - metrics.cosines(second)
        rdm = float(metrics.nan_mean(metrics.rdm_correlation(one, two)))
    whole = float(metrics.nan_mean(metrics.vector_correlation(first, second)))
    return float(metrics.spearman_brown(whole)), float(metrics.spearman_brown(rdm))


def _null_accuracy(
    values: np.ndarray, there: np.ndarray, base: np.ndarray, rule: str, folds: Any, n: int, seed: int
) -> np.ndarray:
    """Held-out accuracy of n data sets whose emotion labels are shuffled within each sample number: [n]."""
    rng, out = np.random.default_rng(seed + 2), np.full(n, np.nan)
    fold = None if folds is None else np.asarray(folds)
    for i in range(n):
        drawn = metrics.shuffled(values, there, rng)
        out[i] = metrics.accuracy(metrics.held_out(drawn, there, base, rule, fold))
    return out


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
    found["pinned"] = (found.pinned | all_near).transpose(*found[PINNED].dims).assign_attrs(_about("pinned"))
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
    return out.assign_attrs(_about("accuracy_p_any"))


# ---- the layer -----------------------------------------------------------------------------------------------

BETTER = {
    "mean_pairwise_cosine": "min",
    "accuracy": "max",
    "reliability": "max",
    "rdm_reliability": "max",
    "pole_separation": "max",
}


def best_layer(measured: xr.Dataset, metric: str = PINNED, trapped: str = "raise") -> xr.Dataset:
    """The layer at which a metric of `measure` is best: `layer`, `depth`, `value` over the dims but layer.

    trapped : what to do where mean_pairwise_cosine is pinned at -1/(n-1): "raise" TrapError, or "mark" the place with
    layer -1 and NaN. Nothing there (all NaN) also gives layer -1. Ties go to the shallower layer.
    Raises ValueError for a metric without a better side, TrapError naming the places where it is pinned.
    """
    if metric not in BETTER:
        raise ValueError(f"no layer can be chosen by {metric!r}; known: {', '.join(BETTER)}")
    curve, bad = measured[metric].transpose(..., "layer"), _trapped(measured, metric)
    if trapped == "raise" and bool(bad.any()):
        raise TrapError(trap_message(bad, measured))
    sign = 1.0 if BETTER[metric] == "min" else -1.0
    values = sign * curve.values
    known = ~np.isnan(values).all(-1) & ~bad.transpose(*curve.dims[:-1]).values
    at = np.where(np.isnan(values), np.inf, values).argmin(-1)
    layers = np.where(known, measured.layer.values[at], -1)
    value = np.where(known, np.take_along_axis(curve.values, at[..., None], -1)[..., 0], np.nan)
    dims = curve.dims[:-1]
    found = {"layer": (dims, layers), "value": (dims, value), "trapped": bad}
    if "depth" in measured.coords:
        found["depth"] = (dims, np.where(known, measured.depth.values[at], np.nan))
    coords = {name: coord for name, coord in measured.coords.items() if set(coord.dims) <= set(dims)}
    return xr.Dataset(found, coords=coords, attrs={"metric": metric, "better": BETTER[metric]})


def _trapped(measured: xr.Dataset, metric: str) -> xr.DataArray:
    """Where a metric can not choose a layer: bool over the dims but layer."""
    if metric != PINNED:
        return measured[metric].isnull().all("layer") & False
    if "pinned" not in measured:
        raise ValueError(f"{PINNED} needs `pinned` beside it, from `measure`, before a layer is chosen by it")
    return (measured.pinned & measured[PINNED].notnull()).any("layer")


def trap_message(bad: xr.DataArray, measured: xr.Dataset) -> str:
    """What is wrong with the mean pairwise cosine, and where."""
    places = [_place(bad, at) for at in np.argwhere(bad.values)]
    n = int(measured.n_emotions.max()) if "n_emotions" in measured else 0
    wall = f" = {metrics.pinned_value(n):.4f}" if n > 1 else ""
    return (
        f"the mean pairwise cosine of vectors minus their grand mean is -1/(n-1){wall} by algebra, whatever the "
        f"model: its lowest layer is noise, and no best layer ({'; '.join(places) or 'here'}). Use accuracy, "
        "reliability or pole_separation, or baseline neutral_mean"
    )


def _place(bad: xr.DataArray, at: Any) -> str:
    return ", ".join(str(bad[dim].values.tolist()[i]) for dim, i in zip(bad.dims, at, strict=True) if dim in bad.coords)


def u_shape(measured: xr.Dataset, level: float = statistics.LEVEL) -> xr.Dataset:
    """The U of Jeong 2026: where mean pairwise cosine is lowest over depth, and whether it turns there.

    measured : from `measure`; its `resampled_cosine` (…, layer, resample) gives the intervals over samples
    Returns over the dims but layer: `layer`, `depth` of the argmin with `depth_low`, `depth_high` and `support` (share
    of resamples with the same argmin); `vertex` (depth at which a parabola through all layers turns) with interval;
    `curvature` with interval; `r2`; `rise_before`, `rise_after` (first and last layer above the minimum); `u_shaped`:
    curvature's interval above zero, vertex and argmin inside, both ends above. Trapped places are marked, never placed.
    """
    found = best_layer(measured, PINNED, trapped="mark")
    depth = measured.depth.values if "depth" in measured.coords else measured.layer.values / measured.sizes["layer"]
    curve = measured[PINNED].transpose(..., "layer")
    drawn = measured.resampled_cosine.transpose(..., "layer", "resample")
    names = [
        *("depth_low", "depth_high", "support", "vertex", "vertex_low", "vertex_high", "r2"),
        *("curvature", "curvature_low", "curvature_high", "rise_before", "rise_after"),
    ]
    out = {name: np.full(curve.shape[:-1], np.nan) for name in names}
    shaped = np.zeros(curve.shape[:-1], bool)
    for at in np.ndindex(curve.shape[:-1]):
        if found.layer.values[at] < 0:
            continue
        row = _turn(curve.values[at], drawn.values[at], np.asarray(depth, float), level)
        for name in names:
            out[name][at] = row[name]
        shaped[at] = bool(
            row["curvature_low"] > 0
            and depth.min() < row["vertex"] < depth.max()
            and row["rise_before"] > 0
            and row["rise_after"] > 0
        )
    dims = curve.dims[:-1]
    made: dict[str, Any] = {name: (dims, values) for name, values in out.items()}
    return found.assign({**made, "u_shaped": (dims, shaped)}).assign_attrs(level=level)


def _turn(curve: np.ndarray, drawn: np.ndarray, depth: np.ndarray, level: float) -> dict[str, float]:
    """One curve [layer] and its resamples [layer, resample] as the figures of its U."""
    known = ~np.isnan(curve)
    curve, drawn, depth = curve[known], drawn[known], depth[known]
    edges = [(1 - level) / 2, (1 + level) / 2]
    lowest = int(curve.argmin())
    fit = statistics.parabola(depth, curve, level)
    out = {"vertex": fit.vertex, "curvature": fit.a, "r2": fit.r2}
    out |= {"rise_before": float(curve[0] - curve[lowest]), "rise_after": float(curve[-1] - curve[lowest])}
    use = ~np.isnan(drawn).any(0)
    blank = dict.fromkeys(("depth_low", "depth_high", "support", "vertex_low", "vertex_high"), float("nan"))
    out |= {**blank, "curvature_low": fit.a_low, "curvature_high": fit.a_high}
    if use.sum() > 1:
        lows = drawn[:, use].argmin(0)
        low, high = np.quantile(depth[lows], edges)
        out |= {"depth_low": float(low), "depth_high": float(high), "support": float((lows == lowest).mean())}
        if len(depth) > 2:
            a, b, _ = np.polyfit(depth, drawn[:, use], 2)
            bend = np.quantile(a, edges)
            turns = np.quantile((-b / (2 * a))[a > 0], edges) if (a > 0).any() else (np.nan, np.nan)
            out |= {"curvature_low": float(bend[0]), "curvature_high": float(bend[1])}
            out |= {"vertex_low": float(turns[0]), "vertex_high": float(turns[1])}
    return out


# ---- vectors as they are -------------------------------------------------------------------------------------


def cosine_similarity(vector: xr.DataArray) -> xr.DataArray:
    """Cosine between the vectors of every two emotions: (…, emotion, d_model) -> (…, emotion, emotion_2)."""
    unit = vector / np.sqrt((vector**2).sum("d_model", skipna=False))
    return xr.dot(unit, unit.rename(emotion="emotion_2"), dim="d_model").rename("cosine")


def mean_pairwise_cosine(vector: xr.DataArray) -> xr.DataArray:
    """Mean cosine over all pairs of emotions: (…, emotion, d_model) -> (…). Lower is better separated (Jeong 2026).

    An emotion with NaN (a hole) does not count. For vectors minus their grand mean it is near -1/(n-1) by algebra,
    whatever the model: see `pinned`.
    """
    cosine = cosine_similarity(vector)
    pairs = xr.DataArray(np.tri(vector.sizes["emotion"], k=-1, dtype=bool), dims=("emotion", "emotion_2"))
    return cosine.where(pairs).mean(("emotion", "emotion_2")).rename(PINNED)


def pinned(vector: xr.DataArray) -> xr.DataArray:
    """Whether vectors (…, emotion, d_model) sum to zero at some lengths, so that their mean cosine says nothing."""

    def one(block: np.ndarray) -> bool:
        return metrics.sums_to_zero(block)

    core = ["emotion", "d_model"]
    return xr.apply_ufunc(one, vector, input_core_dims=[core], vectorize=True, output_dtypes=[bool]).rename("pinned")


# ---- representational geometry -------------------------------------------------------------------------------


def rdms(
    activations: xr.DataArray,
    *,
    baseline: str | Mapping[str, str] = "neutral_mean",
    variance: float | Mapping[str, float | None] | None = None,
    text: xr.DataArray | None = None,
    splits: int = 20,
    seed: int = 0,
    neutral: str = NEUTRAL,
) -> xr.Dataset:
    """Dissimilarity matrices from samples: `rdm` = 1 - cosine (…, emotion, emotion_2), and their `reliability` (…).

    Arguments as in `measure`. `reliability` is that of the whole set of samples, by split halves and Spearman-Brown.
    Matrices of models of any width can be set side by side: join them with `xr.concat(..., "model")`.
    """
    labels = [str(e) for e in activations.emotion.values.tolist()]
    if text is not None:
        activations = activations.where(first_of_each(text).reindex_like(activations.emotion, fill_value=False))

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rule = _of(baseline, at)
        values, there, plain = _prepared(block, labels, neutral, rule, _of(variance, at))
        vectors = metrics.contrast(metrics.means(values, there.astype(float)), _neutral_mean(plain), rule)
        _, reliability = _split_half(values, there, plain, rule, splits, seed)
        return {
            "rdm": (("emotion", "emotion_2"), 1 - metrics.cosines(vectors)),
            "reliability": ((), reliability),
        }

    names = np.array(_emotions(activations, neutral), object)
    found = _assemble(activations, CORE, one, {"emotion": names, "emotion_2": names})
    found.rdm.attrs["long_name"] = "1 - cosine between emotion vectors"
    found.reliability.attrs["long_name"] = MEANING["rdm_reliability"]
    return found


def rsa(rdm: xr.Dataset, along: str, shuffles: int = 999, seed: int = 0) -> xr.Dataset:
    """Correlation of dissimilarity matrices between every two labels of a dim, each beside its noise ceiling.

    rdm : from `rdms`: `rdm` (…, along, emotion, emotion_2), `reliability` (…, along)
    along : "method", "model" (so also dtypes: one model label for each), or "layer"
    Returns over (…, along, along_2): `correlation` (Spearman over pairs of emotions that both have), `ceiling`
    = sqrt(reliability_1 * reliability_2), the correlation that two noisy measurements of one geometry would show;
    `share` = correlation / ceiling; `p` of a Mantel test (emotions of one matrix shuffled, greater); `n_emotions`.

    The ceiling supposes that noise is not shared. Layers, and dtypes that read the same texts, share it: there a
    correlation may pass the ceiling.
    """
    labels = rdm[along].values.tolist()
    lead = [str(d) for d in rdm.rdm.dims if d not in (along, "emotion", "emotion_2")]
    values = rdm.rdm.transpose(*lead, along, "emotion", "emotion_2").values
    reliability = rdm.reliability.transpose(*lead, along).values
    shape = (*values.shape[: len(lead)], len(labels), len(labels))
    names = ("correlation", "ceiling", "share", "p")
    out = {name: np.full(shape, np.nan) for name in names}
    count = np.zeros(shape, int)
    for at in np.ndindex(shape):
        *place, i, j = at
        here = tuple(place)
        a, b = values[(*here, i)], values[(*here, j)]
        both = ~(np.isnan(a).all(-1) | np.isnan(b).all(-1))
        count[at] = both.sum()
        if i > j:
            for name in names:
                out[name][at] = out[name][(*here, j, i)]
            continue
        out["ceiling"][at] = np.sqrt(reliability[(*here, i)] * reliability[(*here, j)])
        out["correlation"][at] = metrics.rdm_correlation(a, b)
        if i != j:
            out["p"][at] = _mantel(a[np.ix_(both, both)], b[np.ix_(both, both)], shuffles, seed)
    out["share"] = np.where(np.eye(len(labels), dtype=bool), np.nan, metrics.ratio(out["correlation"], out["ceiling"]))
    dims = (*lead, along, f"{along}_2")
    coords = {**_coords(rdm.rdm, [*lead, along]), f"{along}_2": np.array(labels, rdm[along].dtype)}
    made = {name: (dims, array) for name, array in out.items()}
    return xr.Dataset({**made, "n_emotions": (dims, count)}, coords=coords, attrs={"along": along, "seed": seed})


def _mantel(a: np.ndarray, b: np.ndarray, n: int, seed: int) -> float:
    """P(correlation this high) when the emotions of one matrix are dealt out anew."""
    if len(a) < 4 or not n:
        return float("nan")
    from scipy.stats import rankdata

    row, column = metrics.pairs(len(a))
    ranks = np.zeros_like(b)
    ranks[row, column] = ranks[column, row] = rankdata(b[row, column])
    x, rng = rankdata(a[row, column]), np.random.default_rng(seed)
    x = x - x.mean()
    if math.factorial(len(a)) <= EXACT:
        every = [np.array(order) for order in itertools.permutations(range(len(a)))]
        own = float(x @ ranks[row, column])
        return float(np.mean([float(x @ ranks[order[row], order[column]]) >= own - 1e-9 for order in every]))
    orders = np.array([rng.permutation(len(a)) for _ in range(n)])
    null = ranks[orders[:, row], orders[:, column]] @ x  # the rest of the formula does not change
    return statistics.against(float(x @ ranks[row, column]), null).p


# ---- anisotropy ----------------------------------------------------------------------------------------------


def anisotropy(pooled: xr.DataArray, level: float = statistics.LEVEL) -> xr.Dataset:
    """Mean pairwise cosine of neutral sentences' streams: (…, sentence, d_model) -> `anisotropy`, `low`, `high`, `n`.

    … is usually (model, bos, layer), with `bos` "with" and "without" (Jeong 2026: last token, 20 sentences). The
    interval is a jackknife over sentences. 0: directions fill the space; 1: all streams point one way.
    """

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        mean, low, high, n = metrics.mean_pairwise_interval(block, level)
        return {"anisotropy": ((), mean), "low": ((), low), "high": ((), high), "n": ((), n)}

    found = _assemble(pooled, ("sentence", "d_model"), one)
    found.anisotropy.attrs["long_name"] = "mean pairwise cosine of neutral sentences' last-token streams"
    return found.assign_attrs(level=level)


def at_depths(found: xr.Dataset, depths: Sequence[float] = (0.25, 0.5, 0.75)) -> xr.Dataset:
    """The layers floor(depth * n_layers) of a Dataset with coordinate `depth`, as the plan resolves depths."""
    from nsteer.layers import at_depth

    layers = found.layer.values.tolist()
    n = round(1 / (1 - float(found.depth.max()))) if len(layers) > 1 else len(layers)
    chosen = [at_depth(depth, n) for depth in depths]
    return found.sel({"layer": [layer for layer in dict.fromkeys(chosen) if layer in layers]})


# ---- axes and order ------------------------------------------------------------------------------------------


def components(vector: xr.DataArray, n: int = 2) -> xr.Dataset:
    """PCA of emotion vectors (…, emotion, d_model): `score` (…, emotion, component), `share` of variance of each.

    The mean over emotions is taken away; emotions with NaN do not count. A component's sign is arbitrary: the emotion
    with the largest score is made positive.
    """

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        known = ~np.isnan(block).any(-1)
        score, share = np.full((len(block), n), np.nan), np.full(n, np.nan)
        if known.sum() > 1:
            left, scale, _ = np.linalg.svd(block[known] - block[known].mean(0), full_matrices=False)
            k = min(n, len(scale))
            found = left[:, :k] * scale[:k]
            found *= np.sign(found[np.abs(found).argmax(0), np.arange(k)])
            score[known, :k], share[:k] = found, scale[:k] ** 2 / (scale**2).sum()
        return {"score": (("emotion", "component"), score), "share": (("component",), share)}

    names = vector.emotion.values.astype(object)
    return _assemble(vector, ("emotion", "d_model"), one, {"emotion": names, "component": np.arange(n)})


def rating_correlation(score: xr.DataArray, ratings: Mapping[str, Mapping[str, float]]) -> xr.Dataset:
    """Spearman of component scores (…, emotion, component) with named ratings {name: {emotion: value}}.

    Returns `rho`, `p`, `n` over (…, component, rating). The sign of rho is arbitrary, as a component's is.
    """

    def one(block: np.ndarray, at: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], Any]]:
        rows = [[table.get(str(e), np.nan) for e in score.emotion.values.tolist()] for table in ratings.values()]
        found = [[statistics.spearman(column, row) for row in rows] for column in block.T]
        dims = ("component", "rating")
        return {
            "rho": (dims, np.array([[f[0] for f in line] for line in found])),
            "p": (dims, np.array([[f[1] for f in line] for line in found])),
            "n": (dims, np.array([[f[2] for f in line] for line in found])),
        }

    coords = {"component": score.component.values, "rating": np.array(list(ratings), object)}
    return _assemble(score, ("emotion", "component"), one, coords)


def leaf_order(rdm: xr.DataArray) -> list[str]:
    """Emotions in the order of average-linkage clustering of one RDM (emotion, emotion_2), leaves optimally turned.

    Emotions with NaN are left out.
    """
    return hierarchy(rdm)[0]


def hierarchy(rdm: xr.DataArray) -> tuple[list[str], dict[str, int]]:
    """`leaf_order`, and the side (0 or 1) of the tree's first split on which each emotion lies."""
    from scipy.cluster import hierarchy as trees
    from scipy.spatial.distance import squareform

    values = rdm.transpose("emotion", "emotion_2").values
    known = ~np.isnan(values).all(-1)
    names = [str(e) for e, there in zip(rdm.emotion.values.tolist(), known, strict=True) if there]
    if len(names) < 3:
        return names, {name: min(i, 1) for i, name in enumerate(names)}
    square = np.clip(values[np.ix_(known, known)], 0, None)
    np.fill_diagonal(square, 0.0)
    flat = squareform((square + square.T) / 2, checks=False)
    tree = trees.linkage(flat, "average", optimal_ordering=True)
    sides = trees.fcluster(tree, 2, "maxclust")
    order = [names[i] for i in trees.leaves_list(tree)]
    return order, {name: int(side != sides[0]) for name, side in zip(names, sides, strict=True)}
