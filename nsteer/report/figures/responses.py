"""Draws what steering did against its strength: outcomes, regimes, scripts, receipts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsteer.report.claims.effects import kind_of
from nsteer.report.figures.style import (
    COLOURS,
    FAINT,
    INK,
    MAP,
    along,
    as_figure,
    bar,
    each_model,
    empty,
    figure,
    grid_lines,
    heat,
    labels,
    lay,
    look,
    panels,
    say,
    span,
)
from nsteer.science import outcomes
from nsteer.science.axis import word
from nsteer.science.statistics import wilson

CONTROLS: dict[str, dict[str, Any]] = {
    "none": {"color": COLOURS[0], "marker": "o", "linestyle": "-", "label": "steered"},
    "random": {"color": COLOURS[1], "marker": "s", "linestyle": (0, (4, 1.5)), "mfc": "white", "label": "random"},
}
REGIMES = {"surgical": (COLOURS[5], ""), "repetitive": (COLOURS[4], "///"), "explosive": (COLOURS[1], "xxx")}
UNDETERMINED = "undetermined"
SHADES = {**REGIMES, UNDETERMINED: ("#d9d9dc", "|||")}
RATES = {"success": "moved to\ntarget (share)", "named": "named\ntarget (share)"}


@as_figure
def dose_response(
    success: xr.Dataset | None = None,
    told: xr.Dataset | None = None,
    *,
    unit: str = "",
    by: str | None = "emotion",
    max_columns: int = 6,
) -> Figure:
    """What the judge says, perplexity ratio and regimes by strength, beside the random control; a column an emotion.

    success : from `outcomes.success`, of one model, op, layer set and method: `success` (P(target class) rose) and
    `named` (the likeliest class is the target) over (emotion, strength, control, prompt, seed); Wilson intervals
    told : from `claims.outcomes_of`, likewise: `perplexity_ratio` (median, quartiles) and `regime` (shares; the most
    frequent one shades the column)
    unit : of strength, as in the plan's `scale`. by : the dim that makes columns, after one over all; None for that
    alone; columns beyond `most` are left out, and that is said. What is None or NaN is a row left out, and said.
    """
    rates = [name for name in RATES if success is not None and bool(success[name].notnull().any())]
    ratio = told is not None and bool(told.perplexity_ratio.notnull().any())
    regimes = told is not None and bool((told.regime != "").any())
    rows = [*rates, *["ratio"] * ratio, *["regime"] * regimes]
    notes = [] if rates else [word("no judged continuation here: no judge, or no emotion with a class")]
    notes += [] if ratio else ["no perplexity ratio: the store lacks perplexities"]
    notes += [] if regimes or ratio or not rates else ["no regime can be determined"]
    if not rows:
        return empty("; ".join(notes))
    known = success if success is not None else told
    assert known is not None
    listed = labels(known, by) if by and by in known.dims and known.sizes[by] > 1 else []
    columns = [None, *listed[:max_columns]]
    if len(listed) > max_columns:
        notes.append(f"columns left out: {', '.join(listed[max_columns:])}")
    success, told = (None if cube is None else cube.sortby("strength") for cube in (success, told))
    fig, axes = panels(len(rows) * len(columns), len(columns), sharex=True, sharey="row")
    grid = np.array(axes, object).reshape(len(rows), len(columns))
    counts: list[int] = []
    for j, column in enumerate(columns):
        where = {} if column is None else {by: column}
        subsets = {n: None if d is None else d.sel(where) for n, d in (("success", success), ("told", told))}
        counts += _column(grid[:, j].tolist(), rows, subsets["success"], subsets["told"])
        grid[0, j].set_title("all" if column is None else column)
        grid[-1, j].set_xlabel(f"strength\n({unit})" if unit else "strength")
    for ax, row in zip(grid[:, 0], rows, strict=True):
        ax.set_ylabel({"ratio": "perplexity\nratio", "regime": "regimes\n(share)", **RATES}[row])
    fig.align_ylabels(grid[:, 0].tolist())  # of all axes it would compare every pair at each drawing
    notes.append(f"{span(counts, 'continuations a point')}; bars: Wilson 95 %" if rates else "")
    notes += ["perplexity ratio: median and quartiles"] * ratio + ["shaded: the most frequent regime"] * regimes
    if not any("random" in labels(d, "control") for d in (success, told) if d is not None and "control" in d.dims):
        notes.append("no random control in the store")
    if rates and bool((known.strength < 0).any()):
        notes.append("strength below 0: moved away from the target, named something else")
    lay(fig, axes, ["; ".join(note for note in notes if note)], (1.2, 1.15), (0.15, 0.2), 1.1, 0.3, 0.95)
    return fig


def _column(axes: Sequence[Axes], rows: Sequence[str], success: Any, told: Any) -> list[int]:
    """One column of panels; how many continuations its points stand on."""
    counts: list[int] = []
    shares = _shares(told) if told is not None and bool((told.regime != "").any()) else None
    for ax, row in zip(axes, rows, strict=True):
        if row in RATES:
            counts += _rate(ax, success, row)
        elif row == "ratio":
            _ratio(ax, told)
        elif shares is not None:
            _regimes(ax, *shares)
        if shares is not None:
            _shade(ax, *shares)
        grid_lines(ax)
    data = success if success is not None else told
    strengths = data.strength.values.tolist()
    axes[-1].set_xlim(strengths[0] - _step(strengths), strengths[-1] + _step(strengths))
    _strength_ticks(axes[-1], strengths)
    return counts


def _strength_ticks(ax: Axes, strengths: Sequence[float]) -> None:
    """Ticks at the strengths themselves, those left out that would lie on another's."""
    kept: list[float] = []
    apart = 0.1 * (max(strengths) - min(strengths))
    for strength in sorted(strengths, reverse=True):
        if not kept or kept[-1] - strength > apart:
            kept.append(strength)
    ax.set_xticks(kept, [f"{strength:g}" for strength in kept], rotation=90 if len(kept) > 3 else 0)


def _step(strengths: Sequence[float]) -> float:
    return (strengths[-1] - strengths[0]) * 0.08 if len(strengths) > 1 else 0.5


def controls_of(data: Any) -> list[tuple[str, Any]]:
    """(control, subset) of the controls that are drawn; data without the dim are the steered ones."""
    return [(c or "none", subset) for c, subset in along(data, "control") if (c or "none") in CONTROLS]


def _flat(data: xr.DataArray) -> np.ndarray:
    """Values [strength, continuation]."""
    return data.transpose("strength", ...).values.reshape(data.sizes["strength"], -1)


def _rate(ax: Axes, success: xr.Dataset, name: str) -> list[int]:
    counts: list[int] = []
    for control, subset in controls_of(success):
        hits = _flat(subset[name])
        there = (~np.isnan(hits)).sum(1)
        known = there > 0
        edges = [wilson(int(k), int(n)) for k, n in zip(np.nansum(hits, 1)[known], there[known], strict=True)]
        low, y, high = (np.array([getattr(e, end) for e in edges]) for end in ("low", "estimate", "high"))
        style = {"ms": 3.5, "capsize": 1.5, "elinewidth": 0.8, **CONTROLS[control]}
        bars = np.clip([y - low, high - y], 0, None)
        ax.errorbar(subset.strength.values[known], y, yerr=bars, gid=f"{name} {control}", **style)
        counts += there[known].tolist()
    unsteered = success.get(f"{name}_unsteered")
    if unsteered is not None and bool(unsteered.notnull().any()):
        ax.axhline(float(unsteered.mean()), color=INK, linestyle=":", linewidth=1, label="unsteered")
    ax.set_ylim(-0.05, 1.05)
    return counts


def _ratio(ax: Axes, told: xr.Dataset) -> None:
    for control, subset in controls_of(told):
        ratios = _flat(subset.perplexity_ratio)
        known = ~np.isnan(ratios).all(1)
        if not known.any():
            continue
        x, (low, middle, high) = subset.strength.values[known], np.nanquantile(ratios[known], (0.25, 0.5, 0.75), 1)
        style = dict(CONTROLS[control])
        ax.plot(x, middle, ms=3.5, gid=f"ratio {control}", **style)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.axhline(1.0, color=INK, linestyle=":", linewidth=1)
    limit = told.regime.attrs.get("perplexity_ratio")
    if limit is not None:
        ax.axhline(float(limit), color=FAINT, linestyle="-", linewidth=0.8, label=f"explosive from {float(limit):g}")


def _shares(told: xr.Dataset) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Strengths, the share of each regime (and of what can not be determined) of the steered continuations there, and
    n."""
    subset = dict(controls_of(told)).get("none", told)
    n = (~np.isnan(_flat(subset.repetition))).sum(1)
    named = _flat(subset.regime)
    columns = [(named == name).sum(1) for name in outcomes.REGIMES]
    columns.append(n - sum(columns))
    return subset.strength.values, {k: c / np.maximum(n, 1) for k, c in zip(SHADES, columns, strict=True)}, n


def _regimes(ax: Axes, x: np.ndarray, shares: dict[str, np.ndarray], n: np.ndarray) -> None:
    """Shares of the regimes at each strength, of the steered continuations, stacked."""
    gaps = np.diff(x)
    width = min(0.8 * float(gaps.min()), 0.12 * float(x[-1] - x[0])) if gaps.size else 0.05
    bottom = np.zeros(len(x))
    for name, (colour, hatch) in SHADES.items():
        if shares[name].any():
            style: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}
            ax.bar(x, shares[name], width, bottom, label=name, gid=f"regime {name}", **style)
        bottom += shares[name]
    ax.set_ylim(0, 1.0)


def _shade(ax: Axes, x: np.ndarray, shares: dict[str, np.ndarray], n: np.ndarray) -> None:
    """The most frequent regime of the steered continuations behind each strength; surgical stays white."""
    middles = (x[1:] + x[:-1]) / 2
    pad = _step(x.tolist())
    for i, (left, right) in enumerate(zip([x[0] - pad, *middles], [*middles, x[-1] + pad], strict=True)):
        name = max(shares, key=lambda regime: shares[regime][i])
        if n[i] and name in ("repetitive", "explosive"):
            ax.axvspan(left, right, color=REGIMES[name][0], alpha=0.16, linewidth=0, zorder=-2, gid=f"shade {name}")


@as_figure
def scenarios(change: xr.DataArray, *, unit: str = "", max_prompts: int = 60) -> Figure:
    """Scenario by emotion: mean change of P(target class) over seeds; a panel a strength.

    More than `most` prompts are drawn as means of their kinds (`sad-3` is of kind `sad`); kinds beyond are left out.

    change : `change` of `outcomes.success` (emotion, strength, prompt, seed), of one model, op, layer set, method and
    control. Missing values, and emotions without a class, are hatched.
    """
    mean = change.mean("seed") if "seed" in change.dims else change
    n, notes = change.sizes.get("seed", 1), []
    if mean.sizes["prompt"] > max_prompts:
        kinds = [kind_of(prompt) for prompt in labels(mean, "prompt")]
        counts = [kinds.count(kind) for kind in dict.fromkeys(kinds)]
        n, notes = n * max(counts), [f"a row is the mean of up to {max(counts)} prompts of a kind"]
        mean = mean.assign_coords(prompt=kinds).groupby("prompt").mean()
        mean = mean.sel({"prompt": list(dict.fromkeys(kinds))[:max_prompts]})
        notes += [f"{len(counts) - max_prompts} of {len(counts)} kinds are left out"] * (len(counts) > max_prompts)
    if not bool(mean.notnull().any()):
        return empty(word("no scenarios to draw: nothing is judged here, or no emotion has a class of the judge"))
    emotions = [e for e, subset in along(mean, "emotion") if bool(subset.notnull().any())]
    gone = [e for e in labels(mean, "emotion") if e not in emotions]
    prompts, strengths = labels(mean, "prompt"), sorted(mean.strength.values.tolist())
    width = 0.2 * len(emotions) + 0.35
    fig = figure(width * len(strengths) + 2.6, 0.155 * len(prompts) + 1.6)
    axes = fig.subplots(1, len(strengths), squeeze=False, sharey=True)[0].tolist()
    high = max(float(np.nanmax(np.abs(mean.values))), 1e-9)
    mesh = None
    for ax, strength in zip(axes, strengths, strict=True):
        values = mean.sel({"strength": strength, "emotion": emotions}).transpose("prompt", "emotion").values
        mesh = heat(ax, values, prompts, emotions, -high, high)
        ax.set_title(f"{strength:g}")
        ax.tick_params(labelsize=7)
    bar(fig, mesh, axes, "change of P(target class)")
    axes[0].set_ylabel("scenario")
    above = f"above the panels: strength ({unit})" if unit else "above the panels: strength"
    notes = [f"n = {n} continuation{'s' if n > 1 else ''} a cell; {above}", *notes]
    notes += ["below strength 0 a fall of P counts as positive"] if strengths[0] < 0 else []
    say(fig, [*notes, f"no class of the judge: {', '.join(gone)}" if gone else ""])
    return fig


@as_figure
def confusion(probability: xr.DataArray, unsteered: xr.DataArray | None = None) -> Figure:
    """What the judge calls the continuations: emotion steered to by likeliest class, shares of each row.

    probability : (emotion, …, class), as in `judged`, of one model and control; what else there is, such as strengths
    above zero, is pooled. unsteered : (…, class) of the unsteered ones, drawn as the first row. Classes that are never
    the likeliest are left out, which is said.
    """
    classes = labels(probability, "class")
    rows = [(e, _winners(subset)) for e, subset in along(probability, "emotion")]
    rows = ([("unsteered", _winners(unsteered))] if unsteered is not None else []) + rows
    there = [(name, won) for name, won in rows if len(won)]
    if not there:
        return empty("no confusion to draw: no continuation here is judged")
    used = [k for k in range(len(classes)) if any((won == k).any() for _, won in there)]
    values = np.array([[(won == k).mean() for k in used] for _, won in there])
    columns = [classes[k] for k in used]
    fig = figure(0.34 * len(columns) + 2.4, 0.25 * len(there) + 1.7)
    ax = fig.subplots()
    show = [[f"{x:.0%}".removesuffix("%") if x else "" for x in row] for row in values]
    mesh = heat(ax, values, [f"{name} (n = {len(won)})" for name, won in there], columns, 0.0, 1.0, show)
    ax.set_xlabel("likeliest class (judge)")
    ax.set_ylabel("steered to")
    bar(fig, mesh, [ax], "share of the row")
    gone = [name for name, won in rows if not len(won)]
    notes = ["numbers: per cent of the row"]
    notes += [f"never the likeliest: {len(classes) - len(used)} of {len(classes)} classes"] * (len(used) < len(classes))
    say(fig, [*notes, f"nothing judged: {', '.join(gone)}" if gone else ""])
    return fig


def _winners(probability: xr.DataArray) -> np.ndarray:
    """Position of the likeliest class of every continuation that is judged, flat."""
    winners = outcomes.named_class(probability).values.ravel()
    return winners[winners >= 0]


@as_figure
def script_shares(
    share: xr.DataArray, unsteered: xr.DataArray | None = None, *, unit: str = "", others: int = 4
) -> Figure:
    """Mean share of letters by Unicode script against strength: a panel a model, the unsteered ones at strength 0.

    share : from `outcomes.script_share` (model, …, strength, control, script); what else there is, is averaged
    unsteered : likewise without condition. The most frequent script and `others` more are drawn.
    """
    kept = [s for s in labels(share, "script") if bool((share.sel({"script": s}) > 0).any())][: others + 1]
    subsets = [(m, p) for m, p in each_model(share) if bool(p.notnull().any())]
    if not subsets or not kept:
        return empty("no scripts to draw: no continuation has a letter")
    fig, axes = panels(len(subsets), 5, sharey=True)
    counts: list[int] = []
    for ax, (model, subset) in zip(axes, subsets, strict=True):
        for control, own in controls_of(subset):
            mean = own.mean([d for d in own.dims if d not in ("strength", "script")]).sortby("strength")
            counts += _texts(own)
            for k, script in enumerate(kept):
                style = look(k) if control == "none" else {**look(k), "linestyle": ":", "mfc": "white"}
                label = script if control == "none" else f"{script}, random"
                x, y = mean.strength.values.tolist(), mean.sel({"script": script}).values.tolist()
                if unsteered is not None and script in labels(unsteered, "script"):
                    x, y = _with_zero(x, y, _plain(unsteered, model, script))
                ax.plot(x, y, ms=3.5, label=label, gid=f"{script} {control}", **style)
        ax.set_title(model)
        ax.set_xlabel(f"strength ({unit})" if unit else "strength")
        ax.set_ylim(-0.03, 1.06)
        grid_lines(ax)
    axes[0].set_ylabel("share of letters")
    notes = [span(counts, "texts a point"), "" if unsteered is not None else "no unsteered continuations: nothing at 0"]
    lay(fig, axes, notes, (1.9, 1.6), top=0.3)
    return fig


def _texts(own: xr.DataArray) -> list[int]:
    there = own.isel({"script": 0}).notnull()
    return there.sum([d for d in there.dims if d != "strength"]).values.tolist()


def _plain(unsteered: xr.DataArray, model: str, script: str) -> float:
    own = unsteered.sel({"script": script})
    return float(own.sel({"model": model}).mean() if "model" in own.dims else own.mean())


def _with_zero(x: list[float], y: list[float], at_zero: float) -> tuple[list[float], list[float]]:
    both = sorted([*zip(x, y, strict=True), (0.0, at_zero)])
    return [a for a, _ in both], [b for _, b in both]


@as_figure
def receipts(steering: xr.Dataset) -> Figure:
    """What edits did: relative change of the stream against the length injected, by layer; a panel a model.

    steering : the group `steering`: `relative_change` and `injected` over (model, …, strength, control, layer). A point
    is the mean over all continuations of one strength and layer; lines join the layers of a strength, shallow ones
    small, deep ones large.
    """
    subsets = [(m, p) for m, p in each_model(steering) if bool(p.relative_change.notnull().any())]
    if not subsets or "injected" not in steering:
        return empty("no receipts to draw: no edit is recorded here")
    fig, axes = panels(len(subsets), 5)
    strengths = sorted({float(s) for _, p in subsets for s in p.strength.values.tolist()})
    tints = matplotlib.colormaps[MAP](np.linspace(0.3, 0.9, len(strengths)))  # the darkest would vanish on a dark page
    counts: list[int] = []
    for ax, (model, subset) in zip(axes, subsets, strict=True):
        for control, own in reversed(controls_of(subset)):
            for strength, cube in along(own, "strength"):
                tint = tints[strengths.index(float(strength))]
                counts.append(_receipt(ax, cube, control, tint, f"{float(strength):g}"))
        ax.set(xscale="log", yscale="log", xlabel="injected length (mean ‖Δ‖)")
        ax.set_title(model)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_locator(ticker.NullLocator())
        ax.tick_params(axis="x", rotation=90)
        grid_lines(ax, "both")
    axes[0].set_ylabel("relative change (mean ‖Δ‖/‖h‖)")
    notes = ["colour: strength; filled: steered, hollow: random direction; deeper layers larger"]
    count = span((c for c in counts if c), "continuations a point")
    lay(fig, axes, [count, *notes], (1.9, 1.9), (0.5, 1.0), top=0.3, bottom=0.75)
    return fig


def _receipt(ax: Axes, cube: xr.Dataset, control: str, tint: Any, label: str) -> int:
    """The layers of one strength and control; how many continuations a point stands on."""
    rest = [d for d in cube.relative_change.dims if d != "layer"]
    x, y = (
        cube[name].mean([d for d in cube[name].dims if d != "layer"]).values for name in ("injected", "relative_change")
    )
    known = ~(np.isnan(x) | np.isnan(y))
    style = {"marker": CONTROLS[control]["marker"], "facecolors": ["white" if control == "random" else tint]}
    style |= {"label": label if control == "none" else "_random", "gid": f"{label} {control}", "edgecolors": [tint]}
    ax.plot(x[known], y[known], color=tint, linewidth=0.8, linestyle=CONTROLS[control]["linestyle"])
    ax.scatter(x[known], y[known], s=np.linspace(8, 36, int(known.sum())), zorder=3, **style)
    return int(cube.relative_change.notnull().sum(rest).max())
