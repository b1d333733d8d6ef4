"""Figures: what is drawn is the data, missing values are said, and the SVG is fit for a page with a strict policy."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from nsteer.report import figures
from nsteer.report.figures import curves, style
from nsteer.science import outcomes, separation
from nsteer.science.statistics import wilson

EMOTIONS = ["happy", "sad", "calm", "angry"]
GROUPS = {"happy": "positive", "calm": "positive", "sad": "negative", "angry": "negative"}
STRENGTHS = [-0.1, 0.05, 0.2]


def texts_of(figure: Figure) -> str:
    """All text of a figure, notes and legends included."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def said_of(figure: Figure) -> str:
    """The notes under a figure, as one line."""
    return (figure.get_supxlabel() or "").replace("\n", " ")


def lines(ax, label: str) -> list:
    return [line for line in ax.get_lines() if line.get_label() == label]


def by_gid(figure: Figure, gid: str) -> list:
    return list(figure.findobj(lambda a: a.get_gid() == gid))


def measured(model: str, layers: int, seed: int = 0, methods=("made", "read")) -> xr.Dataset:
    """Separation of planted samples: emotions far apart at layer 2 alone."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(1, len(methods), 5, 6, layers, 16)) * 0.3
    x[:, :, :4, :, 2] += 3 * np.eye(16)[:4][:, None]
    x += 1.0
    x[:, :, 4] -= 1.0  # neutral
    data = xr.DataArray(
        x,
        dims=("model", "method", "emotion", "sample", "layer", "d_model"),
        coords={"model": [model], "method": list(methods), "emotion": [*EMOTIONS, "neutral"], "layer": range(layers)},
    ).assign_coords(depth=("layer", np.arange(layers) / layers))
    return separation.measure(data, groups=GROUPS, splits=4, shuffles=5)


@pytest.fixture(scope="module")
def two():
    return [measured("m/a", 5), measured("m/b", 8, 1)]


# ---- curves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["mean_pairwise_cosine", "accuracy", "reliability"])
def test_curves_are_the_data_and_the_ring_is_the_best_layer(two, metric):
    figure = figures.layer_curves(two, metric)
    assert len(figure.axes) == 2, "a panel a method"
    for ax, method in zip(figure.axes, ["made", "read"], strict=True):
        assert ax.get_title(loc="left").startswith(f"{method}\nn = 24 texts a model, 4 emotions")
        for data in two:
            curve = data.isel({"model": 0}).sel({"method": method})
            [line] = lines(ax, str(curve.model.values))
            np.testing.assert_array_equal(line.get_xdata(), curve.depth.values)
            np.testing.assert_array_equal(line.get_ydata(), curve[metric].values)
            ring = next(r for r in ax.get_lines() if r.get_gid() == f"ring {curve.model.values}")
            best = separation.best_layer(curve, metric)
            assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (float(best.depth), float(best.value))
    assert figure.axes[0].get_ylabel() == curves.TITLES[metric] and "relative depth" in figure.axes[1].get_xlabel()
    assert "m/a" in texts_of(figure) and "ring: best layer" in texts_of(figure)


def test_the_band_is_the_interval_and_the_dotted_line_the_level_of_nothing(two):
    figure = figures.layer_curves(two[0], "cv_cosine")
    curve = two[0].sel({"model": "m/a", "method": "made"})
    points = figure.axes[0].collections[0].get_paths()[0].vertices
    assert points[:, 1].min() == pytest.approx(float(curve.cv_cosine_low.min()))
    assert points[:, 1].max() == pytest.approx(float(curve.cv_cosine_high.max()))
    assert lines(figures.layer_curves(two[0]).axes[0], "-1/(n-1) = -0.333")
    chance = lines(figures.layer_curves(two, "accuracy").axes[0], "chance (0.25)")
    assert chance[0].get_ydata()[0] == pytest.approx(0.25)


def test_series_differ_without_colour():
    looks = [style.look(i) for i in range(14)]
    assert len({(x["marker"], str(x["linestyle"])) for x in looks}) == 14
    assert len({x["color"] for x in looks[:7]}) == 7


def test_pinned_places_get_no_ring_and_are_said(two):
    data = two[0].copy()
    data["pinned"] = data.pinned | True
    figure = figures.layer_curves(data)
    assert "pinned near -1/(n-1)" in texts_of(figure)
    assert not [line for line in figure.axes[0].get_lines() if line.get_gid()]


def test_one_model_one_method_holes_and_nothing(two):
    curve = two[0].sel({"model": "m/a", "method": "made"}).copy(deep=True)
    curve.accuracy[1] = np.nan
    figure = figures.layer_curves(curve, "accuracy")
    assert len(figure.axes) == 1 and "1 of 5 layers are not there" in texts_of(figure)
    gone = curve.assign(accuracy=curve.accuracy * np.nan)
    assert "no accuracy to draw" in texts_of(figures.layer_curves(gone, "accuracy"))
    with pytest.raises(KeyError):
        figures.layer_curves(curve, "acuracy")


def test_anisotropy_with_and_without_bos():
    rng = np.random.default_rng(0)
    dims = ("model", "bos", "sentence", "layer", "d_model")
    pooled = xr.DataArray(rng.normal(size=(2, 2, 12, 4, 6)) + 1, dims=dims)
    pooled = pooled.assign_coords(model=["m/a", "m/b"], bos=["with", "without"], layer=range(4))
    pooled[0, 0] = np.nan
    measures = separation.anisotropy(pooled)
    figure = figures.anisotropy(measures)
    assert [ax.get_title(loc="left") for ax in figure.axes] == [
        "with BOS\nn = 12 sentences",
        "without BOS\nn = 12 sentences",
    ]
    assert not lines(figure.axes[0], "m/a") and "m/a: nothing with BOS" in texts_of(figure)
    [line] = lines(figure.axes[1], "m/a")
    np.testing.assert_array_equal(line.get_ydata(), measures.anisotropy.sel(model="m/a", bos="without").values)
    np.testing.assert_array_equal(line.get_xdata(), np.arange(4) / 4)
    assert "no anisotropy" in texts_of(figures.anisotropy(measures.where(False)))


# ---- geometry -------------------------------------------------------------------------------------------------


@pytest.fixture
def vector():
    """happy ~ calm and sad ~ angry, opposite; `gone` is a missing value."""
    x = np.array([[1, 0.2, 0], [-1, 0.2, 0.1], [1, 0.3, 0.1], [-1, 0.1, 0], [np.nan] * 3])
    return xr.DataArray(x, dims=("emotion", "d_model"), coords={"emotion": [*EMOTIONS, "gone"]})


def test_similarity_is_the_cosines_in_leaf_order(vector):
    figure = figures.similarity(vector)
    ax = figure.axes[0]
    order = [tick.get_text() for tick in ax.get_yticklabels()]
    cosine = separation.cosine_similarity(vector)
    assert order == separation.leaf_order(1 - cosine) == [tick.get_text() for tick in ax.get_xticklabels()]
    assert {*order[:2]} in ({"happy", "calm"}, {"sad", "angry"})
    drawn = ax.collections[0].get_array().reshape(4, 4)
    wanted = cosine.sel({"emotion": order, "emotion_2": order}).values
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(drawn[off], wanted[off])
    assert drawn.mask[~off].all() and ax.get_ylim() == (4, 0), "first row on top"
    assert "no vector: gone" in texts_of(figure) and f"{wanted[0, 1]:.2f}" in texts_of(figure)
    assert "0 of 5 emotions" in texts_of(figures.similarity(vector * np.nan))


def test_the_plane_is_the_components_coloured_by_ratings(vector):
    score = separation.components(vector).score
    figure = figures.plane(vector, groups=GROUPS)
    [positive] = by_gid(figure, "positive")
    wanted = score.sel({"emotion": ["happy", "calm"]}).values
    np.testing.assert_allclose(positive.get_offsets(), wanted)
    assert {"happy", "angry", "positive"} <= set(texts_of(figure).split("\n")) and "no vector: gone" in texts_of(figure)
    ratings = {"valence": {"happy": 0.9, "sad": -0.8, "calm": 0.5}, "arousal": dict.fromkeys(EMOTIONS, 0.1)}
    rated = figures.plane(vector, ratings, GROUPS)
    colours = np.concatenate([points.get_array() for points in by_gid(rated, "positive")[:1]])
    np.testing.assert_allclose(colours, [0.9, 0.5])
    assert "no valence (hollow): angry" in texts_of(rated) and "valence: Spearman PC1" in texts_of(rated)
    assert "no plane to draw: 0 of 5 emotions" in texts_of(figures.plane(vector.where(vector.emotion == "sad")))


def planted_rdms(models, n: int = 6) -> xr.Dataset:
    rng = np.random.default_rng(0)
    x = rng.random((len(models), 2, n, n))
    x = (x + x.swapaxes(-1, -2)) / 2
    names = [f"e{i}" for i in range(n)]
    dims = ("model", "method", "emotion", "emotion_2")
    coords = {"model": models, "method": ["made", "read"], "emotion": names, "emotion_2": names}
    return xr.Dataset({"rdm": (dims, x), "reliability": (dims[:2], rng.random((len(models), 2)))}, coords=coords)


def test_rsa_shows_correlations_and_ceilings():
    correlations = separation.rsa(planted_rdms(["m/a", "m/b"]), "method", shuffles=0)
    figure = figures.rsa(correlations)
    panels = [ax for ax in figure.axes if ax.get_title(loc="left")]
    assert [ax.get_title(loc="left") for ax in panels] == ["m/a", "m/b"]
    matrices = correlations.sel({"model": "m/b"})
    r, ceiling = (
        float(matrices[name].sel({"method": "made", "method_2": "read"})) for name in ("correlation", "ceiling")
    )
    assert panels[1].collections[0].get_array().reshape(2, 2)[0, 1] == pytest.approx(r)
    assert f"{r:.2f}\n≤ {ceiling:.2f}" in texts_of(figure) and "n = 6 emotions, 15 pairs" in texts_of(figure)


def test_rsa_of_many_draws_the_ceilings_beside_and_of_one_says_so():
    many = separation.rsa(planted_rdms([f"m/{i}" for i in range(10)]).sel({"method": "made"}), "model", shuffles=0)
    figure = figures.rsa(many)
    assert [ax.get_title(loc="left") for ax in figure.axes[:2]] == ["correlation", "noise ceiling"]
    drawn = figure.axes[1].collections[0].get_array().reshape(10, 10)
    np.testing.assert_allclose(drawn[2, 5], many.ceiling.values[2, 5])
    alone = separation.rsa(planted_rdms(["m/a"]), "model", shuffles=0)
    assert "two with a geometry are needed" in texts_of(figures.rsa(alone))
    unreliable = many.assign(ceiling=many.ceiling * np.nan)
    assert "no ceiling (-): too few samples" in texts_of(figures.rsa(unreliable))


# ---- responses ------------------------------------------------------------------------------------------------


@pytest.fixture
def steered():
    """Success rises with strength when steered, never at random; ratio 1, 2, 50; loops at the greatest strength."""
    dims = ("emotion", "strength", "control", "prompt", "seed")
    coords = {"emotion": ["happy", "sad"], "strength": [0.2, -0.1, 0.05], "control": ["none", "random"]}
    coords |= {"prompt": [f"p{i}" for i in range(5)], "seed": [0]}
    shape = (2, 3, 2, 5, 1)
    success, ratio, loops = np.zeros(shape), np.ones(shape), np.zeros(shape)
    success[:, 0, 0] = 1.0
    success[:, 2, 0, :2] = 1.0
    success[1, 1, 0, 0] = np.nan
    ratio[:, 0, 0], ratio[:, 2, 0] = 50.0, 2.0
    loops[:, 0, 0, :3] = 0.9
    variables = {"success": (dims, success), "named": (dims, success), "change": (dims, success / 2)}
    variables["named_unsteered"] = (("prompt", "seed"), np.array([[1.0], [0], [0], [0], [0]]))
    judged = xr.Dataset(variables, coords=coords)
    told = xr.Dataset({"repetition": (dims, loops), "perplexity_ratio": (dims, ratio)}, coords=coords)
    return judged, told.assign(regime=outcomes.regime(told.repetition, told.perplexity_ratio))


def test_dose_response_is_rates_with_wilson_medians_and_regimes(steered):
    judged, told = steered
    figure = figures.dose_response(judged, told, unit="stream norm")
    top = figure.axes[0]
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == ["all", "happy", "sad"]
    own, random = top.containers[:2]
    np.testing.assert_array_equal(own.lines[0].get_xdata(), sorted(STRENGTHS))
    np.testing.assert_allclose(own.lines[0].get_ydata(), [0.0, 0.4, 1.0])
    np.testing.assert_allclose(random.lines[0].get_ydata(), [0.0, 0.0, 0.0])
    low, high = own.lines[2][0].get_segments()[1][:, 1]
    edges = wilson(4, 10)
    assert (low, high) == pytest.approx((edges.low, edges.high))
    named = figure.axes[3]
    assert [line.get_ydata()[0] for line in lines(named, "unsteered")] == [pytest.approx(0.2)]
    [median] = by_gid(figure, "ratio none")[:1]
    np.testing.assert_allclose(median.get_ydata(), [1.0, 2.0, 50.0])
    assert figure.axes[6].get_yscale() == "log"
    loops, noise = (by_gid(figure, f"regime {name}") for name in ("repetitive", "explosive"))
    heights = lambda bars: [round(b.get_height(), 3) for b in bars[:3]]  # noqa: E731
    assert heights(loops) == [0, 0, 0.6] and heights(noise) == [0, 0, 0.4]
    assert by_gid(figure, "shade repetitive") and not by_gid(figure, "shade explosive")
    said = texts_of(figure)
    assert "n = 4 to 10 continuations a point" in said and "strength\n(stream norm)" in said and "below 0" in said


def test_dose_response_says_what_is_missing(steered):
    judged, told = steered
    assert "no judged continuation" in texts_of(figures.dose_response(None, told))
    assert "the store lacks perplexities" in texts_of(figures.dose_response(judged, None))
    assert "no random control" in texts_of(figures.dose_response(judged.sel({"control": ["none"]}), None))
    assert "no regime can be determined" in texts_of(figures.dose_response(judged, None))
    assert "no judged" in texts_of(figures.dose_response(judged * np.nan, None))
    blind = told.assign(perplexity_ratio=told.perplexity_ratio * np.nan)
    blind = blind.assign(regime=outcomes.regime(blind.repetition, blind.perplexity_ratio))
    figure = figures.dose_response(judged, blind, by=None)
    untold = [round(b.get_height(), 3) for b in by_gid(figure, "regime undetermined")]
    assert untold == [1.0, 1.0, 0.4], "what can not be determined is not called repetitive"
    single_strength = judged.sel({"strength": [0.2]})
    assert len(figures.dose_response(single_strength, None, by=None).axes) == 2
    assert "columns left out: sad" in said_of(figures.dose_response(judged, None, max_columns=1))


def test_scenarios_by_emotion(steered):
    change = steered[0].change.sel({"control": "none"})
    figure = figures.scenarios(change, unit="raw")
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_title(loc="left")}
    assert list(panels) == ["-0.1", "0.05", "0.2"]
    drawn = panels["0.05"].collections[0].get_array().reshape(5, 2)
    np.testing.assert_allclose(drawn, change.sel({"strength": 0.05, "seed": 0}).transpose("prompt", "emotion"))
    assert panels["-0.1"].collections[0].get_array().mask.sum() == 1
    assert all(ax.get_ylim() == (5, 0) for ax in panels.values())
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"p{i}" for i in range(5)]
    assert "nothing is judged" in texts_of(figures.scenarios(change * np.nan))
    half = change.where(change.emotion == "sad")
    assert "no class of the judge: happy" in texts_of(figures.scenarios(half))


def test_many_scenarios_are_means_of_their_kinds():
    prompts = [f"{kind}-{k}" for kind in ("b", "a", "c") for k in range(30)]
    values = np.arange(90.0)[None, None] / 90
    change = xr.DataArray(
        values, dims=("emotion", "strength", "prompt"), coords={"emotion": ["sad"], "strength": [0.1]}
    )
    figure = figures.scenarios(change.assign_coords(prompt=prompts), max_prompts=2)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["b", "a"]
    drawn = figure.axes[0].collections[0].get_array().ravel()
    np.testing.assert_allclose(drawn, [np.arange(30).mean() / 90, np.arange(30, 60).mean() / 90])
    assert "mean of up to 30 prompts" in texts_of(figure) and "1 of 3 kinds are left out" in texts_of(figure)


def test_confusion_counts_the_likeliest():
    classes = ["joy", "fear", "never"]
    p = np.zeros((2, 4, 3))
    p[0, :3, 0] = p[0, 3, 1] = 1.0
    p[1] = np.nan
    probabilities = xr.DataArray(
        p, dims=("emotion", "prompt", "class"), coords={"emotion": ["happy", "sad"], "class": classes}
    )
    plain = xr.DataArray([[0.1, 0.9, 0.0]], dims=("prompt", "class"), coords={"class": classes})
    figure = figures.confusion(probabilities, plain)
    np.testing.assert_allclose(figure.axes[0].collections[0].get_array().reshape(2, 2), [[0, 1], [0.75, 0.25]])
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["unsteered (n = 1)", "happy (n = 4)"]
    said = texts_of(figure)
    assert "nothing judged: sad" in said and "never the likeliest: 1 of 3" in said and "75" in said
    assert "is judged" in texts_of(figures.confusion(probabilities * np.nan))


def test_script_shares_start_from_the_unsteered():
    text = xr.DataArray(
        np.array([[["aaaa", "bb寻找"], ["cc", "dd"]]], object),
        dims=("model", "control", "strength"),
        coords={"model": ["m/q"], "control": ["none", "random"], "strength": [0.1, 0.3]},
    )
    share = outcomes.script_share(text)
    unsteered = outcomes.script_share(text.isel(control=0, strength=0, drop=True), ["Latin", "Han"])
    figure = figures.script_shares(share, unsteered, unit="raw")
    [han] = by_gid(figure, "Han none")
    np.testing.assert_allclose(han.get_xdata(), [0.0, 0.1, 0.3])
    np.testing.assert_allclose(han.get_ydata(), [0.0, 0.0, 0.5])
    assert "n = 1 texts a point" in texts_of(figure)
    assert "no unsteered continuations" in texts_of(figures.script_shares(share))
    assert "no continuation has a letter" in texts_of(figures.script_shares(share * np.nan))


def test_receipts_are_change_against_injection_by_layer():
    dims = ("model", "strength", "control", "prompt", "layer")
    change = np.arange(1, 13, dtype=float).reshape(1, 2, 1, 2, 3)
    data = xr.Dataset(
        {"relative_change": (dims, change), "injected": (dims, change * 10)},
        coords={"model": ["m/a"], "strength": [0.1, 0.2], "control": ["none"], "layer": [2, 5, 7]},
    )
    figure = figures.receipts(data)
    [points] = by_gid(figure, "0.2 none")
    np.testing.assert_allclose(points.get_offsets()[:, 1], change[0, 1, 0].mean(0))
    np.testing.assert_allclose(points.get_offsets()[:, 0], 10 * change[0, 1, 0].mean(0))
    assert "n = 2 continuations a point" in texts_of(figure) and "‖Δ‖" in figure.axes[0].get_xlabel()
    data.relative_change[0, 0] = np.nan
    assert not by_gid(figures.receipts(data), "0.1 none")[0].get_offsets().size
    assert "no receipts" in texts_of(figures.receipts(data * np.nan))


# ---- svg ------------------------------------------------------------------------------------------------------


def test_svg_is_small_text_without_style_ids_unique(two):
    shown = figures.svg(figures.layer_curves(two), "A <title> & more", "Words", "fig-a")
    root = ElementTree.fromstring(shown)
    assert not [e for e in root.iter() if "style" in e.attrib or e.tag in ("style", "metadata")]
    assert (root[0].tag, root[0].text, root[1].text) == ("title", "A <title> & more", "Words")
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids)) and all(identifier.startswith("fig-a-") for identifier in ids)
    used = re.findall(r"#(fig-a-[\w-]+)", shown)
    assert set(used) <= set(ids) and len(shown) < 60_000
    assert "relative depth" in shown and style.INK not in shown and "currentColor" in shown
    assert shown == figures.svg(figures.layer_curves(two), "A <title> & more", "Words", "fig-a"), "the same again"


def test_labels_with_markup_and_mathematics_stay_labels(vector):
    names = ["<script>", "$x$", "a&b", "]]>", "gone"]
    strange = vector.assign_coords(emotion=names)
    shown = figures.svg(figures.similarity(strange), "t", "d", "x") + figures.svg(figures.plane(strange), "t", "d", "y")
    assert "<script>" not in shown and "&lt;script&gt;" in shown and "$x$" in shown


def test_the_readers_settings_stay(two):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figure = figures.layer_curves(two[0])
    figures.svg(figure, "t", "d", "p")
    assert dict(matplotlib.rcParams) == before
    assert to_hex(figure.get_facecolor()) == "#ffffff"
