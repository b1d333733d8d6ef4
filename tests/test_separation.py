"""Planted truth: what a synthetic activation set was made to show is found in it, and nothing is found in noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from kit import found_too_often

from nsteer.science import analysis, metrics, separation
from nsteer.science.separation import geometry

EMOTIONS = ["happy", "sad", "calm", "angry", "proud", "guilty"]
GROUPS = {"happy": "positive", "calm": "positive", "proud": "positive"}
GROUPS |= {"sad": "negative", "angry": "negative", "guilty": "negative"}


def labelled(values, labels=None, model="m", method="generation") -> xr.DataArray:
    """[emotion, sample, layer, d_model], the last emotion neutral, as activations."""
    labels = labels or [*EMOTIONS, "neutral"]
    n_layers = values.shape[2]
    coords = {"model": [model], "method": [method], "emotion": labels, "sample": range(values.shape[1])}
    coords |= {"layer": range(n_layers), "d_model": range(values.shape[3])}
    dims = ("model", "method", "emotion", "sample", "layer", "d_model")
    data = xr.DataArray(values[None, None], dims=dims, coords=coords)
    return data.assign_coords(depth=("layer", np.arange(n_layers) / n_layers))


def planted(common, apart, noise=0.02, samples=8, d=40, seed=0, labels=EMOTIONS) -> xr.DataArray:
    """At layer l: neutral + common[l] u + apart[l] t_e + noise, t_e orthonormal and orthogonal to u."""
    rng = np.random.default_rng(seed)
    n, base = len(labels), rng.normal(size=(len(common), d)) * 5
    axes = np.linalg.qr(rng.normal(size=(d, n + 1)))[0].T
    values = rng.normal(size=(n + 1, samples, len(common), d)) * noise + base
    for layer, (c, s) in enumerate(zip(common, apart, strict=True)):
        values[:n, :, layer] += c * axes[n] + s * axes[:n, None]
    return labelled(values, [*labels, "neutral"])


COMMON, APART = [1.0] * 8, [0.3, 0.5, 0.8, 1.1, 1.3, 1.1, 0.7, 0.4]


def expected_cosine(c, s, noise, samples, d):
    """E of the mean pairwise cosine: shared c^2 and the neutral mean's noise, over the whole length."""
    shared = c**2 + d * noise**2 / samples
    return shared / (shared + s**2 + d * noise**2 / samples)


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_layer_separation_and_reliability_are_found(seed):
    noise, samples, d = 0.12, 8, 100
    measures = separation.measure(planted(COMMON, APART, noise, samples, d, seed), groups=GROUPS, seed=seed)
    by_layer = measures.isel(model=0, method=0)
    wanted = [expected_cosine(c, s, noise, samples, d) for c, s in zip(COMMON, APART, strict=True)]
    assert by_layer.mean_pairwise_cosine.values == pytest.approx(wanted, abs=0.06)
    without = np.array([c**2 / (c**2 + s**2) for c, s in zip(COMMON, APART, strict=True)])
    assert (
        by_layer.cv_cosine.values == pytest.approx(without, abs=0.06)
        and (by_layer.cv_cosine > by_layer.cv_cosine_low).all()
    )
    assert ((by_layer.cv_cosine_low <= without) & (without <= by_layer.cv_cosine_high)).mean() > 0.8
    reliability = [s**2 / (s**2 + d * noise**2 / samples) for s in APART]
    assert by_layer.reliability.values == pytest.approx(reliability, abs=0.12)
    best = separation.best_layer(measures)
    assert best.layer.item() == 4 and best.depth.item() == 0.5
    assert separation.best_layer(measures, "reliability").layer.item() in (3, 4, 5)
    assert float(by_layer.accuracy[4]) == 1.0 and float(by_layer.accuracy_p[4]) == pytest.approx(1 / 201)
    assert float(by_layer.accuracy_p_any) == pytest.approx(1 / 201)


def test_the_u_is_placed_with_its_interval():
    turned = separation.u_shape(separation.measure(planted(COMMON, APART), shuffles=0)).isel(model=0, method=0)
    assert turned.layer == 4 and turned.depth == 0.5 and turned.curvature_low > 0
    assert 0.25 <= turned.depth_low < 0.5 < turned.depth_high <= 0.75
    assert turned.vertex_low <= float(turned.vertex) <= turned.vertex_high
    assert float(turned.vertex) == pytest.approx(0.46, abs=0.06)


def test_a_slope_is_no_u():
    slope = separation.measure(planted([1.0] * 8, np.linspace(0.3, 1.5, 8).tolist()), shuffles=0)
    turned = separation.u_shape(slope).isel(model=0, method=0)
    assert turned.layer == 7 and turned.depth_high > 7 / 8, "the lowest is at the end"


def test_poles_and_opposites_are_found():
    rng = np.random.default_rng(0)
    good = rng.normal(size=20)
    values = rng.normal(size=(7, 6, 1, 20)) * 0.3
    for i, emotion in enumerate(EMOTIONS):
        values[i] += good if GROUPS[emotion] == "positive" else -good
    measures = separation.measure(labelled(values), groups=GROUPS, shuffles=99).isel(model=0, method=0, layer=0)
    assert measures.pole_separation > 1.7
    assert measures.pole_p == pytest.approx(0.1, abs=0.06)  # 2 of the 20 ways to deal out three and three
    assert measures.opposite_cosine.sel(pair="happy-sad") < -0.9
    assert measures.pair.values.tolist() == ["happy-sad", "proud-guilty"]


# ---- null data -----------------------------------------------------------------------------------------------


def false_positives(n_layers: int, n: int = 200) -> dict[str, int]:
    """How many of n data sets without any emotion are found significant; the data sets stand along `model`."""
    values = np.random.default_rng(n_layers).normal(size=(n, 7, 4, n_layers, 6))
    datasets = xr.concat([labelled(array, model=f"seed-{i}") for i, array in enumerate(values)], "model")
    measures = separation.measure(datasets, groups=GROUPS, splits=1, shuffles=19).isel(method=0)
    names = ("accuracy_p", "pole_p")
    hits = {name: int((measures[name].isel(layer=0) <= 0.05).sum()) for name in names}
    return hits | {"accuracy_p_any": int((measures.accuracy_p_any <= 0.05).sum())}


@pytest.mark.parametrize("n_layers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_noise_gives_no_finding_at_more_than_the_nominal_rate(n_layers):
    """200 seeds: accuracy at one layer, best over layers, poles: at most 5 %, by the exact binomial bound."""
    hits = false_positives(n_layers)
    assert not any(found_too_often(k, 200) for k in hits.values()), hits


def test_noise_has_no_reliability_and_chance_accuracy():
    noise = np.random.default_rng(5).normal(size=(7, 20, 1, 200))
    measures = separation.measure(labelled(noise), shuffles=5).isel(model=0, method=0, layer=0)
    assert measures.reliability < 0.2 and measures.chance == pytest.approx(1 / 6)
    assert float(measures.accuracy) == pytest.approx(1 / 6, abs=0.1)


# ---- the trap ------------------------------------------------------------------------------------------------


def test_grand_mean_centred_vectors_get_the_warning_and_never_a_best_layer():
    measures = separation.measure(planted(COMMON, APART), baseline="grand_mean", shuffles=0)
    assert bool(measures.pinned.all())
    assert measures.mean_pairwise_cosine.values == pytest.approx(np.full((1, 1, 8), -1 / 5), abs=0.03)
    with pytest.raises(separation.TrapError, match=r"-1/\(n-1\) = -0\.2000 by algebra.*m, generation"):
        separation.best_layer(measures)
    marked = separation.best_layer(measures, trapped="mark")
    assert marked.layer.item() == -1 and math.isnan(marked.value.item())
    turned = separation.u_shape(measures)
    assert turned.layer.item() == -1 and math.isnan(turned.depth_low.item())
    assert separation.best_layer(measures, "accuracy").layer.item() >= 0


def test_the_trap_is_seen_in_vectors_whatever_their_length():
    data = planted(COMMON, APART).isel(model=0, method=0).mean("sample")
    vectors = data.isel(emotion=slice(0, 6))
    centred = vectors - vectors.mean("emotion")
    unit = (centred / np.sqrt((centred**2).sum("d_model"))).astype("float32")
    assert separation.pinned(unit).all() and not separation.pinned(vectors - data.isel(emotion=6)).any()


def test_a_grand_mean_that_counts_the_neutral_too_is_seen_as_well():
    labels = [f"e{i}" for i in range(20)]
    data = planted([0.0] * 4, [1.0] * 4, labels=labels, d=60)
    data = data - data.mean(("emotion", "sample"))  # the author's later code: 21 concepts
    measures = separation.measure(data, baseline="none", shuffles=0)
    assert bool(measures.pinned.all())


def test_a_metric_without_the_trap_beside_it_is_refused():
    measures = separation.measure(planted(COMMON, APART), shuffles=0)
    with pytest.raises(ValueError, match="needs `pinned` beside it"):
        separation.best_layer(measures.drop_vars("pinned"))
    with pytest.raises(ValueError, match="no layer can be chosen by 'chance'"):
        separation.best_layer(measures, "chance")


# ---- NaN and copies ----------------------------------------------------------------------------------------


def test_holes_are_left_out_and_counted():
    data = planted(COMMON, APART)
    whole = separation.measure(data.isel(sample=slice(0, 6)), shuffles=0)
    holed = data.copy()
    holed[{"sample": slice(6, None)}] = np.nan
    measures = separation.measure(holed, shuffles=0)
    assert measures.mean_pairwise_cosine.values == pytest.approx(whole.mean_pairwise_cosine.values)
    assert measures.n_samples.values.max() == 36
    holed[{"emotion": 1}] = np.nan
    measures = separation.measure(holed, shuffles=3).isel(model=0, method=0)
    assert measures.n_emotions.values.tolist() == [5] * 8 and measures.mean_pairwise_cosine.notnull().all()
    assert (
        np.isnan(measures.opposite_cosine.sel(pair="happy-sad")).all() and measures.n_least.values.tolist() == [0] * 8
    )


def test_no_neutral_samples_leave_a_hole_and_no_layer():
    data = planted(COMMON, APART)
    data[{"emotion": 6}] = np.nan
    measures = separation.measure(data, shuffles=2)
    assert measures.mean_pairwise_cosine.isnull().all()
    assert separation.u_shape(measures).layer.item() == -1


def test_copies_of_a_text_count_once():
    data = planted(COMMON, APART, noise=1.0, samples=4)
    doubled = xr.concat([data, data.assign_coords(sample=data.sample + 4)], "sample")
    names = np.array([[f"{e} {k % 4}" for k in range(8)] for e in range(7)], object)
    text = xr.DataArray(names[None, None], dims=doubled.dims[:4], coords={d: doubled[d] for d in doubled.dims[:4]})
    counted = separation.distinct_texts(text)
    assert (counted.n_distinct == 4).all() and (counted.n_texts == 8).all()
    once, fooled = (separation.measure(doubled, text=t, shuffles=0) for t in (text, None))
    plain = separation.measure(data, shuffles=0)
    assert once.accuracy.values == pytest.approx(plain.accuracy.values)
    assert once.n_samples.values.max() == 24
    assert float(fooled.accuracy.mean()) > float(once.accuracy.mean()) + 0.2  # the twin gives it away


# ---- geometry ------------------------------------------------------------------------------------------------


def two_methods(
    shared: float, noise: float, seed: int = 0, n: int = 12, samples: int = 10, d: int = 60
) -> xr.DataArray:
    """Two methods whose emotion means share a part of their geometry (1: all), one layer."""
    rng = np.random.default_rng(seed)
    same, labels = rng.normal(size=(n, 4)) @ rng.normal(size=(4, d)), [*(f"e{i}" for i in range(n)), "neutral"]
    arrays = []
    for name in ("generation", "comprehension"):
        other = rng.normal(size=(n, 4)) @ rng.normal(size=(4, d))
        values = rng.normal(size=(n + 1, samples, 1, d)) * noise
        values[:n, :, 0] += (shared * same + (1 - shared) * other)[:, None]
        arrays.append(labelled(values, labels, method=name))
    return xr.concat(arrays, "method")


def test_rsa_reaches_its_ceiling_when_geometry_is_one_and_is_small_when_it_is_not():
    alike = separation.rsa(separation.rdms(two_methods(1.0, 3.0)), "method").isel(
        method=0, method_2=1, layer=0, model=0
    )
    assert 0.3 < alike.ceiling < 0.98 and alike.p < 0.01
    assert float(alike.share) == pytest.approx(1.0, abs=0.2)
    apart = separation.rsa(separation.rdms(two_methods(0.0, 0.5)), "method").isel(
        method=0, method_2=1, layer=0, model=0
    )
    assert apart.ceiling > 0.9 and abs(float(apart.correlation)) < 0.35


def test_rsa_of_two_unrelated_geometries_is_seldom_significant():
    hits = 0
    for seed in range(60):
        rsa = separation.rsa(separation.rdms(two_methods(0.0, 0.1, seed, n=7, samples=2), splits=1), "method", 99)
        hits += float(rsa.p.isel(method=0, method_2=1).item()) <= 0.05
    assert hits / 60 <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 60)


def test_rdms_of_models_of_unequal_width_stand_side_by_side():
    wide, narrow = planted(COMMON, APART, d=50), planted(COMMON, APART, d=20)
    both = xr.concat([separation.rdms(wide), separation.rdms(narrow).assign_coords(model=["n"])], "model", join="outer")
    rsa = separation.rsa(both.sel(layer=[4]), "model", shuffles=9)
    assert rsa.model_2.values.tolist() == ["m", "n"] and rsa.correlation.notnull().all()


def test_anisotropy_finds_the_planted_cosine_with_and_without_bos():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(1, 2, 20, 3, 100)) * 0.1
    values[:, 0, ..., 0] += 1.0  # with BOS: 1 / (1 + 100 * 0.01) = 0.5; without: 0
    dims = ("model", "bos", "sentence", "layer", "d_model")
    pooled = xr.DataArray(values, dims=dims, coords={"model": ["m"], "bos": ["with", "without"], "layer": [0, 1, 2]})
    estimates = separation.anisotropy(pooled).isel(model=0)
    assert estimates.anisotropy.sel(bos="with").values == pytest.approx([0.5] * 3, abs=0.06)
    assert estimates.anisotropy.sel(bos="without").values == pytest.approx([0.0] * 3, abs=0.03)
    assert (estimates.n == 20).all() and (estimates.low < estimates.anisotropy).all()
    pooled[{"bos": 1}] = np.nan
    assert separation.anisotropy(pooled).anisotropy.sel(bos="without").isnull().all()


def test_components_find_a_planted_axis_that_goes_with_ratings():
    rng = np.random.default_rng(0)
    rating = dict(zip(EMOTIONS, [0.9, -0.8, 0.5, -0.6, 0.7, -0.4], strict=True))
    vectors = (
        np.array([rating[e] * 5 for e in EMOTIONS])[:, None] * rng.normal(size=30) + rng.normal(size=(6, 30)) * 0.1
    )
    vector = xr.DataArray(vectors, dims=("emotion", "d_model"), coords={"emotion": EMOTIONS})
    components = separation.components(vector)
    assert float(components.share[0]) > 0.95
    with_rating = separation.rating_correlation(components.score, {"valence": rating})
    assert abs(float(with_rating.rho.sel(component=0, rating="valence"))) == pytest.approx(1.0)
    order = separation.leaf_order(1 - separation.cosine_similarity(vector))
    signs = [GROUPS[e] for e in order]
    assert signs in (["positive"] * 3 + ["negative"] * 3, ["negative"] * 3 + ["positive"] * 3)


def test_old_names_stay_and_holes_do_not_count():
    vector = xr.DataArray(np.eye(3), dims=("emotion", "d_model"), coords={"emotion": ["a", "b", "c"]})
    assert analysis.mean_pairwise_cosine(vector) == 0
    vector[2] = np.nan
    assert analysis.mean_pairwise_cosine(vector) == 0
    assert analysis.cosine_similarity(vector).sel(emotion="a", emotion_2="a") == 1


def test_rsa_takes_time_for_labels_that_hold_something_alone(monkeypatch):
    """A store may declare a million layers: what it holds is compared, and only that."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(3, 5, 8))
    few = xr.Dataset(
        {
            "rdm": (("layer", "emotion", "emotion_2"), 1 - metrics.cosines(points)),
            "reliability": ("layer", [0.9, 0.8, 0.7]),
        },
        {"layer": [5, 2, 9], "emotion": list("abcde"), "emotion_2": list("abcde")},
    )
    many = few.reindex(layer=[*range(1500), 5000])
    calls, mantel = [], geometry._mantel
    monkeypatch.setattr(geometry, "_mantel", lambda *given: calls.append(1) or mantel(*given))
    monkeypatch.setattr(metrics, "rdm_correlation", None)  # whole matrices are ranked once, empty ones left alone
    rsa, want = separation.rsa(many, "layer", shuffles=9), separation.rsa(few, "layer", shuffles=9)
    assert len(calls) == 6, "three pairs, twice"
    at = {"layer": [5, 2, 9], "layer_2": [5, 2, 9]}
    xr.testing.assert_allclose(rsa.sel(at), want)
    assert rsa.correlation.notnull().sum() == 9 and (rsa.n_emotions > 0).sum() == 9
