"""Turns continuations into outcomes: repetition, scripts, regimes, success, and how they change with strength.

Texts, token ids, perplexities and class probabilities come in as labelled arrays (groups `generations`, `unsteered`,
`outcomes`, `judged`, `projections` of a store); labelled arrays go out. No model, no tokenizer. An *unsteered
continuation* is the strength-0 continuation of the same model, op, prompt and seed.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
import xarray as xr

from nsteer.science import axis, metrics, statistics
from nsteer.science.targets import Target, targets_of

REGIMES = ("surgical", "repetitive", "explosive")


@dataclass(frozen=True)
class Thresholds:
    """Where regimes and turning points lie. All defaults are ours: the paper's are not public.

    repetition : least repetition score of a *repetitive* continuation
    perplexity_ratio : least perplexity ratio of an *explosive* one
    ngram : length of the token n-grams
    surgical : least share of surgical continuations at a *sweet spot*
    collapse : a strength at which a smaller share is surgical is past the *collapse point*
    flip : least share of continuations whose likeliest class is the target's, at the *flip point*
    """

    repetition: float = 0.5
    perplexity_ratio: float = 10.0
    ngram: int = 4
    surgical: float = 0.8
    collapse: float = 0.5
    flip: float = 0.5


DEFAULTS = Thresholds()


# ---- repetition, perplexity, regime --------------------------------------------------------------------------


@axis.of_arrays
def repetition(token_id: xr.DataArray, ngram: int = Thresholds.ngram) -> xr.DataArray:
    """Repetition score of token ids (…, token), -1 beyond the end -> (…) in [0, 1); NaN for no token at all."""
    ids = token_id.transpose(..., "token")
    flat = ids.values.reshape(-1, ids.sizes["token"])
    score = [metrics.repetition(row[row >= 0].tolist(), ngram) if (row >= 0).any() else np.nan for row in flat]
    empty = ids.isel({"token": 0}, drop=True)
    shares = empty.copy(data=np.array(score, float).reshape(empty.shape)).rename("repetition")
    return shares.assign_attrs(long_name=f"share of repeated token {ngram}-grams, whole or last half", units="1")


@axis.of_arrays
def perplexity_ratio(perplexity: xr.DataArray, unsteered: xr.DataArray) -> xr.DataArray:
    """Perplexity of continuations over that of their unsteered ones, both under the unsteered model."""
    ratio = (perplexity / unsteered.where(unsteered > 0)).transpose(*perplexity.dims).rename("perplexity_ratio")
    return ratio.assign_attrs(long_name="perplexity over that of the unsteered continuation", units="1")


def regime_of(repetition: float, perplexity_ratio: float, thresholds: Thresholds = DEFAULTS) -> str:
    """One of REGIMES, or "" when it can not be determined: no repetition score, or no ratio and no repetition.

    Loops have *low* perplexity, so repetition is asked first; perplexity only tells the rest apart.
    """
    if np.isnan(repetition):
        return ""
    if repetition >= thresholds.repetition:
        return "repetitive"
    if np.isnan(perplexity_ratio):
        return ""
    return "explosive" if perplexity_ratio >= thresholds.perplexity_ratio else "surgical"


@axis.of_arrays
def regime(
    repetition: xr.DataArray,
    perplexity_ratio: xr.DataArray,
    thresholds: Thresholds = DEFAULTS,
) -> xr.DataArray:
    """The regime of every continuation, as text over the dims of `repetition`; "" where it can not be determined."""
    score, ratio = xr.broadcast(repetition, perplexity_ratio)
    pairs = zip(score.values.ravel().tolist(), ratio.values.ravel().tolist(), strict=True)
    named = np.array([regime_of(a, b, thresholds) for a, b in pairs], object).reshape(score.shape)
    return score.copy(data=named).rename("regime").assign_attrs(long_name="regime", **vars(thresholds))


@axis.of_arrays
def regime_counts(regime: xr.DataArray, over: Iterable[str] = ("prompt", "seed")) -> xr.Dataset:
    """Continuations of each regime: `count` (…, regime) and `n`, of those whose regime is determined; their `share`."""
    dims = [dim for dim in over if dim in regime.dims]
    counts = xr.concat([(regime == name).sum(dims) for name in REGIMES], pd.Index(REGIMES, name="regime"))
    counts = counts.transpose(..., "regime")
    n = counts.sum("regime")
    return xr.Dataset({"count": counts, "n": n, "share": counts / n.where(n > 0)})


def words_repeat(text: str) -> bool:
    """Whether any three words in a row, as spaces part them, stand three times or more."""
    words = text.split()
    return max(Counter(zip(words, words[1:], words[2:], strict=False)).values(), default=0) >= 3


def code_regime(texts: Sequence[str]) -> str:
    """One label for all texts of a model, by the rule of the later code of Jeong 2026's author (`jeong2026-code`).

    More than half repeat three words three times: "repetitive"; else more than 30 % have fewer than three words:
    "explosive"; else "surgical". No perplexity. Words are what spaces part: Chinese has none. "" for no text.
    """
    if not texts:
        return ""
    if sum(map(words_repeat, texts)) > len(texts) / 2:
        return "repetitive"
    return "explosive" if sum(len(text.split()) < 3 for text in texts) > 0.3 * len(texts) else "surgical"


def code_regime_apart(texts: Sequence[str], lost: int = 0) -> str:
    """The same with labels of their own where more than 30 % have no word at all: "empty", or "not finite".

    lost : texts beside them that were not written, because the edited stream or a vector was not finite
    An overflow, or an end of text at once, is not an explosion of words. Of the two the more frequent is named; else
    the label is of the texts with words alone.
    """
    written = [text for text in texts if text.strip()]
    empty, every = len(texts) - len(written), len(texts) + lost
    if every and empty + lost > 0.3 * every:
        return "not finite" if lost > empty else "empty"
    return code_regime(written)


# ---- scripts -------------------------------------------------------------------------------------------------

_BY_NAME = {"CJK": "Han", "KANGXI": "Han", "IDEOGRAPHIC": "Han", "FULLWIDTH": "Latin", "ROMAN": "Latin"}
_BY_NAME |= {"HENTAIGANA": "Hiragana"}
_NO_SCRIPT = {"MATHEMATICAL", "MODIFIER", "SUPERSCRIPT", "SUBSCRIPT", "MICRO", "FEMININE", "MASCULINE", "DOUBLE-STRUCK"}


@lru_cache(maxsize=65536)
def script_of(character: str) -> str:
    """The Unicode script of a letter (Latin, Han, Cyrillic, …), "" for what is no letter or belongs to none.

    From the first word of the character's Unicode name, which names the script of all but symbols-as-letters.
    """
    if not unicodedata.category(character).startswith("L"):
        return ""
    name = unicodedata.name(character, "")
    first = name.split(" ")[0].split("-")[0]
    if first == "HALFWIDTH":
        return "Hangul" if "HANGUL" in name else "Katakana"
    return "" if not first or first in _NO_SCRIPT else _BY_NAME.get(first, first.title())


def script_counts(text: str) -> Counter[str]:
    """Letters of a text by Unicode script."""
    if text.isascii():  # most texts: counted without asking for each letter
        letters = sum(map(str.isalpha, text))
        return Counter({"Latin": letters} if letters else {})
    return Counter(script for script in map(script_of, text) if script)


@lru_cache(maxsize=65536)
def _most(token: str) -> str:
    """The script of most letters of a token, "" where it has none."""
    return next((script for script, _ in script_counts(token).most_common(1)), "")


def runs(text: str) -> list[tuple[str, str]]:
    """The text as (script, run): each longest stretch of letters of one script; what is no letter parts them."""
    stretches: list[tuple[str, str]] = []
    before = ""
    for character in text:
        script = script_of(character)
        mark = unicodedata.category(character).startswith("M")
        if script and script == before:
            stretches[-1] = (script, stretches[-1][1] + character)
        elif script:
            stretches.append((script, character))
        elif mark and before:  # a vowel sign belongs to its letter
            stretches[-1] = (before, stretches[-1][1] + character)
            continue  # and what follows goes on with it
        before = script
    return stretches


def changed_runs(text: str, unsteered: str) -> list[tuple[str, str]]:
    """Runs of `text` in scripts of which the unsteered text has no letter: [(script, run)]."""
    home = set(script_counts(unsteered))
    if home.issuperset(script_counts(text)):
        return []
    return [(script, run) for script, run in runs(text) if script not in home]


@axis.of_arrays
def script_share(text: xr.DataArray, scripts: Sequence[str] | None = None) -> xr.DataArray:
    """Share of letters in each script: texts (…) -> (…, script). NaN for a text without letters.

    scripts : the labels; all that occur, most frequent first, when None
    """
    counts = [script_counts(str(cell)) for cell in text.values.ravel().tolist()]
    if scripts is None:
        total: Counter[str] = sum(counts, Counter())
        scripts = [script for script, _ in total.most_common()] or ["Latin"]
    rows = [[count[s] / count.total() if count.total() else np.nan for s in scripts] for count in counts]
    values = np.array(rows, float).reshape(*text.shape, len(scripts))
    coords = {str(n): c for n, c in text.coords.items() if n != "script"}
    shares = xr.DataArray(values, dims=(*text.dims, "script"), coords=coords, name="script_share")
    shares = shares.assign_coords(script=np.array(list(scripts), object))
    return shares.assign_attrs(long_name="share of letters by Unicode script", units="1")


@axis.of_arrays
def changed_table(
    text: xr.DataArray, unsteered: xr.DataArray, by: Sequence[str] = ("model", "emotion")
) -> pd.DataFrame:
    """Runs that changed script, counted: columns `by`, script, token, count; most frequent first.

    text : steered texts, whose dims hold those of `unsteered`. A run of letters stands for the tokens it came from.
    """
    if not text.size:
        return pd.DataFrame(columns=[*by, "script", "token", "count"])
    names = [str(dim) for dim in text.dims]
    labelled = {str(dim): unsteered[dim].values.tolist() for dim in unsteered.dims}
    own = {dim: text[dim].values.tolist() for dim in names}
    others = unsteered.values
    counts: Counter[tuple] = Counter()
    for at in np.ndindex(text.shape):
        labels = {dim: own[dim][i] for dim, i in zip(names, at, strict=True)}
        where = tuple(known.index(labels[dim]) for dim, known in labelled.items() if labels.get(dim) in known)
        if len(where) < len(labelled):
            continue
        other = str(others[where])
        for script, run in changed_runs(str(text.values[at]), other):
            counts[(*(labels[dim] for dim in by), script, run)] += 1
    rows = [(*key, count) for key, count in counts.most_common()]
    return pd.DataFrame(rows, columns=[*by, "script", "token", "count"])


@axis.of_arrays
def promoted(token: xr.DataArray, top: int | None = None) -> pd.DataFrame:
    """Most promoted tokens (group `lens`: model, method, emotion, layer, rank) by script, counted over layers, ranks.

    Columns model, method, emotion, script, token, count. A token of several scripts goes to the one with most letters;
    tokens without letters are left out.
    """
    if top is not None:
        token = token.isel({"rank": slice(0, top)})
    by = [dim for dim in ("model", "method", "emotion") if dim in token.dims]
    ordered = token.transpose(*by, ...)
    counts: Counter[tuple] = Counter()
    for at in np.ndindex(*[ordered.sizes[dim] for dim in by]):
        labels = [ordered[dim].values.tolist()[i] for dim, i in zip(by, at, strict=True)]
        for letters, times in Counter(map(str, ordered.values[at].ravel().tolist())).items():
            if script := _most(letters):
                counts[(*labels, script, letters.strip())] += times
    rows = [(*key, count) for key, count in counts.most_common()]
    return pd.DataFrame(rows, columns=[*by, "script", "token", "count"])


# ---- success -------------------------------------------------------------------------------------------------


def says(score: xr.DataArray) -> xr.DataArray:
    """Whether a judge says of a text that it is of each class: scores (…, class) -> bool, likewise.

    By the judge's own rule, which its scores bring as coordinate `threshold`: a class whose score is above it; where it
    is NaN or absent, the likeliest. False where nothing is known.
    """
    best = score == score.max("class")
    likeliest = best & (best.cumsum("class") == 1)  # the first of several
    if "threshold" not in score.coords:
        return likeliest
    return xr.where(score.threshold.isnull(), likeliest, score > score.threshold)


def named_class(score: xr.DataArray) -> xr.DataArray:
    """Position of the class that a judge gives a text, scores (…, class) -> int; -1 for none, or for several alike."""
    there = says(score)
    kept = score.where(there)
    top = kept == kept.max("class")
    single = top.sum("class") == 1
    return xr.where(single, top.argmax("class"), -1)


def score_of(score: xr.DataArray, target: Target) -> xr.DataArray:
    """The score of a target, (…, class) -> (…): that of its classes that are to rise, less that of those to fall.

    Classes of a side are summed. NaN where one of them is.
    """

    def total(side: tuple[str, ...]) -> xr.DataArray:
        return score.sel({"class": list(side)}).sum("class", skipna=False)

    if not target.falls:
        return total(target.rises)
    return total(target.rises) - total(target.falls) if target.rises else -total(target.falls)


def is_of(score: xr.DataArray, target: Target) -> xr.DataArray:
    """Whether a judge says of a text that it is of a target, (…, class) -> bool: see `says`.

    Of a class that is to rise, where there is any, and of none that is to fall.
    """
    told = says(score)

    def any_of(side: tuple[str, ...]) -> xr.DataArray:
        return told.sel({"class": list(side)}).any("class")

    if not target.falls:
        return any_of(target.rises)
    return any_of(target.rises) & ~any_of(target.falls) if target.rises else ~any_of(target.falls)


def by_target(
    values: xr.DataArray,
    targets: Mapping[str, Target | None],
    of: Callable[[xr.DataArray, Target], xr.DataArray],
) -> xr.DataArray:
    """What `of` says of each emotion's own target: values (…, class), with a dim `emotion` or without -> (emotion, …).

    of : `score_of` or `is_of`, whose truth becomes 1 and 0. NaN where an emotion has no target.
    """
    by_emotion = []
    for emotion, target in targets.items():
        scores = values.sel({"emotion": emotion}, drop=True) if "emotion" in values.dims else values
        if target is None:
            told = xr.full_like(scores.isel({"class": 0}, drop=True), np.nan)
        else:
            told = of(scores, target).astype(values.dtype)
        by_emotion.append(told.drop_vars("class", errors="ignore"))
    return xr.concat(by_emotion, pd.Index(list(targets), name="emotion", dtype=object))


@axis.of_arrays
def success(
    score: xr.DataArray,
    unsteered: xr.DataArray,
    targets: Mapping[str, Target | str | Mapping[str, object] | None] | None = None,
    signs: xr.DataArray | int = 1,
) -> xr.Dataset:
    """Whether each continuation moved to its target against its unsteered continuation.

    score : (…, emotion, …, class), as one judge has it in `judged`; unsteered : (…, class), as in `judged_unsteered`
    targets : emotion -> class, `{rises, falls}` of classes, or None, as in `judge.map` of a plan; an emotion left out
    is its own class. The score of a target is that of the classes that are to rise less that of those to fall
    signs : 1 where the score of the target is to rise, -1 where it is to fall
    Returns over the dims of `score` but class: `target` (its score), `change` (steered minus unsteered), `success` (1
    moved the right way, 0 not, NaN unknown), `named` (1 when the judge says that it is the target, the strict variant:
    of a class that is to rise, of none that is to fall; for sign -1: that it is not; see `says`), `named_unsteered`.
    Emotions without a class and empty continuations are NaN.
    """
    classes = [str(c) for c in score["class"].values.tolist()]
    emotions = [str(e) for e in score.emotion.values.tolist()]
    wanted = targets_of(emotions, classes, targets)
    steered, unsteered = score.load(), unsteered.load()
    own, base = (by_target(values, wanted, score_of) for values in (steered, unsteered))
    change = (own - base) * signs
    outcome = xr.Dataset(
        {
            "change": change,
            "target": own,
            "success": (change > 0).where(change.notnull()).astype(float),
            "named": (by_target(steered, wanted, is_of) == (signs > 0)).where(own.notnull()).astype(float),
            "named_unsteered": (by_target(unsteered, wanted, is_of) == (signs > 0)).where(base.notnull()).astype(float),
        }
    )
    outcome.change.attrs["long_name"] = "score of the target class, steered minus unsteered, times the sign"
    outcome = outcome.drop_vars(["class", "judge", "unit", "threshold"], errors="ignore")
    return outcome.transpose(*[dim for dim in score.dims if dim != "class"])


@axis.of_arrays
def rate(values: xr.DataArray, over: Iterable[str] = ("prompt", "seed"), level: float = statistics.LEVEL) -> xr.Dataset:
    """k of n of zeros and ones, NaN left out, with Wilson's interval: `k`, `n`, `rate`, `low`, `high`."""
    dims = [dim for dim in over if dim in values.dims]
    k, n = values.sum(dims).astype(int), values.notnull().sum(dims)
    both = zip(k.values.ravel().tolist(), n.values.ravel().tolist(), strict=True)
    edges = [statistics.wilson(a, b, level) for a, b in both]
    variables = {"k": k, "n": n}
    for name in ("estimate", "low", "high"):
        filled = np.array([getattr(edge, name) for edge in edges], float).reshape(k.shape)
        variables["rate" if name == "estimate" else name] = k.copy(data=filled)
    return xr.Dataset(variables, attrs={"level": level, "interval": "Wilson"})


# ---- strength ------------------------------------------------------------------------------------------------


@axis.of_arrays
def dose_response(
    change: xr.DataArray,
    over: Sequence[str] = ("prompt", "seed"),
    level: float = statistics.LEVEL,
    n: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """The mean change at each strength with a bootstrap interval over continuations, and its trend.

    change : (…, strength, prompt, seed), as from `success`. Returns `mean`, `low`, `high`, `n` (…, strength) and over
    the rest `trend` (Spearman of mean change with strength) and `trend_p` (two-sided, permutation).
    """
    dims = [dim for dim in over if dim in change.dims]
    lead = [str(dim) for dim in change.dims if dim not in dims and dim != "strength"]
    ordered = change.transpose(*lead, "strength", *dims)
    shape = ordered.shape[: len(lead) + 1]
    flat = ordered.values.reshape(*shape, -1)
    out = {name: np.full(shape, np.nan) for name in ("mean", "low", "high")}
    count = (~np.isnan(flat)).sum(-1)
    for at in np.ndindex(shape):
        interval = statistics.bootstrap(np.mean, flat[at], n=n, level=level, seed=seed)
        out["mean"][at], out["low"][at], out["high"][at] = interval.estimate, interval.low, interval.high
    strengths = change.strength.values.tolist()
    trends = np.array([statistics.spearman(strengths, out["mean"][at])[:2] for at in np.ndindex(shape[:-1])])
    trends = trends.reshape(*shape[:-1], 2)
    template = ordered.isel(dict.fromkeys(dims, 0), drop=True)
    variables = {name: template.copy(data=values) for name, values in out.items()} | {"n": template.copy(data=count)}
    rest = template.isel({"strength": 0}, drop=True)
    variables |= {"trend": rest.copy(data=trends[..., 0]), "trend_p": rest.copy(data=trends[..., 1])}
    return xr.Dataset(variables, attrs={"level": level, "interval": f"bootstrap over {', '.join(dims)}", "seed": seed})


@axis.of_arrays
def turning_points(
    named: xr.DataArray,
    moved: xr.DataArray,
    regime: xr.DataArray,
    thresholds: Thresholds = DEFAULTS,
    over: Sequence[str] = ("prompt", "seed"),
) -> xr.Dataset:
    """Flip point, sweet spot and collapse point over (…), in units of strength; NaN where there is none on the grid.

    named, moved : `named` and `success` from `success` (…, strength, …); regime : text, same dims
    `flip`: least strength at which at least `thresholds.flip` of continuations are named the target. `sweet_spot`: of
    strengths whose surgical share is at least `thresholds.surgical`, the one with the highest success rate (the least
    such). `collapse`: least strength from which on less than `thresholds.collapse` are surgical. Only strengths above
    zero are looked at, and only where something is known.
    """
    surgical = regime_counts(regime, over).share.sel({"regime": "surgical"}, drop=True)
    shares = xr.broadcast(rate(named, over).rate, rate(moved, over).rate, surgical)
    hit, good, clear = (
        share.where(share.strength > 0).sortby("strength").transpose(..., "strength") for share in shares
    )
    strengths = hit.strength.values
    points = {
        "flip": _least(hit >= thresholds.flip, strengths),
        "collapse": _least(clear < thresholds.collapse, strengths),
    }
    usable = good.where(clear >= thresholds.surgical)
    known = usable.notnull().any("strength")
    best = usable.fillna(-1.0).argmax("strength")
    points["sweet_spot"] = xr.where(known, best.copy(data=strengths[best.values]), np.nan)
    points["sweet_spot_rate"] = usable.max("strength")
    kept = {name: value.drop_vars("strength", errors="ignore") for name, value in points.items()}
    return xr.Dataset(kept, attrs={"units": "strength", **vars(thresholds)})


def _least(hit: xr.DataArray, strengths: np.ndarray) -> xr.DataArray:
    """The first strength at which something holds; NaN where it never does."""
    first = hit.argmax("strength")
    return xr.where(hit.any("strength"), first.copy(data=strengths[first.values]), np.nan)


# ---- projections ---------------------------------------------------------------------------------------------


@axis.of_arrays
def on_target(projection: xr.DataArray) -> xr.DataArray:
    """Projections (…, emotion, …, target) on the vector of the emotion steered to: (…, emotion, …)."""
    emotions = [e for e in projection.emotion.values.tolist() if e in projection.target.values.tolist()]
    index = xr.DataArray(emotions, dims="emotion", coords={"emotion": emotions})
    return projection.sel({"emotion": emotions}).sel({"target": index}).drop_vars("target")


@axis.of_arrays
def transport(
    projection: xr.DataArray, unsteered: xr.DataArray, injected: xr.DataArray | None = None, layer: int | None = None
) -> xr.Dataset:
    """The steering delta, raw and over what was injected.

    projection : (…, emotion, control, …, layer, target), as in `projections`; unsteered : likewise without condition
    injected : (…, layer), the L2 length added at each layer; summed over the layers up to the one read
    layer : the layer read; the last that is there when None
    Returns `delta` (change of the projection on the target's unit vector: what Jeong 2026 calls the steering delta),
    `injected`, and `transport` = delta / injected: 1 when all that was put in along the vector arrives, which it does
    nearly by construction, so that the raw delta mostly measures the norm of the stream. The control `random` on the
    same axis is a random direction of the same norm, measured on the same target.
    """
    steered = on_target(projection)
    emotions = steered.emotion.values.tolist()
    unsteered = unsteered.sel({"target": emotions}).rename(target="emotion")
    delta = steered - unsteered
    layers = delta.layer.values.tolist()
    if layer is None:
        there = delta.notnull().any([d for d in delta.dims if d != "layer"]).values
        layer = max((layer for layer, known in zip(layers, there, strict=True) if known), default=layers[-1])
    variables = {"delta": delta.sel({"layer": layer}, drop=True)}
    if injected is not None:
        amount = injected.where(injected.layer <= layer).sum("layer", min_count=1)
        variables["injected"] = amount
        variables["transport"] = variables["delta"] / amount.where(amount > 0)
    return xr.Dataset(variables, attrs={"layer": layer})


@axis.of_arrays
def estimated_injection(token_norm: xr.DataArray, strength: xr.DataArray) -> xr.DataArray:
    """What scale `stream_norm` adds at each layer, estimated: |strength| * mean stream norm of the neutral samples.

    token_norm : (…, emotion, sample, layer), as in `activations`. An estimate: the live norm is that of the steered
    stream, which grows with what was added below.
    """
    norm = token_norm.sel({"emotion": "neutral"}, drop=True).mean("sample")
    return (abs(strength) * norm).rename("injected").assign_attrs(long_name="estimated length added", units="1")
