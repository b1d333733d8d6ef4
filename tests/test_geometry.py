"""RSA between methods, dtypes, models and layers, and the geometry of the vectors, on planted stores."""

from __future__ import annotations

import numpy as np
import pytest
from planted import put

import nsteer.store.results
from nsteer.report import claims, reporting
from nsteer.report.claims import INCONCLUSIVE, OPEN, Rules
from nsteer.report.claims.rsa import between_layers, between_models
from nsteer.science import presets
from nsteer.store import Store, Variable, slug

RATED = presets.RATINGS["nsteer-20"].scales
EMOTIONS = presets.JEONG_20
LAYERS = [2, 5]
DEPTH = {"depth": (Variable(("layer",), "float64", "depth"), np.array(LAYERS) / 8)}
MODELS = {
    "m-float32": ("x", "float32", "", 24),
    "m-int8": ("x", "float16", "int8", 24),
    "other": ("y", "float32", "", 40),
}
METHODS = ["generation", "comprehension"]
QUICK = Rules(shuffles=9)


def plane(rng, width: int) -> np.ndarray:
    """[emotion, d_model]: valence along one direction, half as much arousal along another."""
    axes = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
    points = np.array([[RATED["valence"][e], 0.6 * RATED["arousal"][e]] for e in EMOTIONS])
    return points @ axes


def planted(store: Store, model: str, common: np.random.Generator, own: np.random.Generator) -> None:
    """Generation holds the plane at both layers; comprehension has the emotions dealt out again for each model."""
    _, _, _, width = MODELS[model]
    held = plane(common, width)
    values = np.zeros((1, 2, 21, 6, 2, width))
    for layer in range(2):
        values[0, 0, :20, :, layer] = held[:, None] * (1, 3)[layer]
        values[0, 1, :20, :, layer] = held[own.permutation(20)][:, None]
    values += own.normal(size=values.shape) * 0.02
    sizes = {"model": [model], "method": METHODS, "emotion": [*EMOTIONS, "neutral"], "sample": range(6)}
    dims = tuple(sizes)
    texts = np.array([[[[f"{m} {e} {k}" for k in range(6)] for e in sizes["emotion"]] for m in METHODS]], object)
    if model == "m-int8":
        texts[0, 0, :, 4:] = "written again"
    put(store, f"samples/{slug(model)}", sizes, {"text": (dims, "string", texts), "chat": (dims, "bool", texts == "")})
    wide = {**sizes, "layer": LAYERS, "d_model": range(width)}
    put(store, f"activations/{slug(model)}", wide, {"pooled": (tuple(wide), "float32", values)}, auxiliary=DEPTH)
    vectors = values[:, :, :20].mean(3) - values[:, :, 20:].mean(3)
    about = {"product": "vectors"}
    labels = {"model": [model], "method": METHODS, "emotion": EMOTIONS, "layer": LAYERS, "d_model": range(width)}
    put(store, f"vectors/{slug(model)}", labels, {"vector": (tuple(labels), "float32", vectors)}, about, DEPTH)


def study(folder, plan: dict, models=MODELS):
    store = Store(folder / "s.zarr")
    about = [MODELS[model] for model in models]
    facts = {
        "identity": (("model",), "string", np.array([description[0] for description in about], object)),
        "dtype": (("model",), "string", np.array([description[1] for description in about], object)),
        "quantization": (("model",), "string", np.array([description[2] for description in about], object)),
        "n_layers": (("model",), "int64", np.full(len(models), 8)),
    }
    put(store, "models", {"model": list(models)}, facts)
    for seed, model in enumerate(models):
        planted(store, model, np.random.default_rng(1), np.random.default_rng(10 + seed))
    store.add_run(plan="", environment={"resolved_plan": plan}, started="", argv=[])
    return nsteer.store.results.open(store.path)


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return study(tmp_path_factory.mktemp("geometry"), {"texts": "nsteer", "ratings": "nsteer-20"})


@pytest.fixture(scope="module")
def table(opened):
    return claims.table(claims.claims(opened, QUICK))


def rows(table, what: str, *scope: str):
    chosen = table[table.what.str.contains(what, regex=False)]
    for part in scope:
        chosen = chosen[chosen.scope.str.contains(part, regex=False)]
    return chosen


def only(table, what: str, *scope: str):
    matches = rows(table, what, *scope)
    assert len(matches) == 1, matches
    return matches.iloc[0]


def test_methods_of_unlike_geometry_are_told_apart_though_their_ceiling_is_high(table):
    row = only(table, "RDM correlation of two methods", "other, generation ~ comprehension, layer 5")
    assert abs(row.value) < 0.25 and row.p > 0.01 and row.n == 20
    assert float(row.control.split("noise ceiling ")[1].split()[0]) > 0.9


def test_two_precisions_of_the_same_weights_are_set_side_by_side(table):
    matches = rows(table, "RDM correlation of float32 and int8")
    assert sorted(matches.scope) == ["m-float32 ~ m-int8, comprehension", "m-float32 ~ m-int8, generation"]
    row = only(table, "float32 and int8", "generation")
    assert row.value > 0.97 and row.p < 0.01 and "the same text in 84 of 126 samples" in row.control
    assert "fp16 and INT8" in row.paper and row.verdict == OPEN


def test_models_are_compared_across_widths_and_the_same_weights_count_once(table):
    row = only(table, "between models", "generation")
    assert row.n == 1 and row.value > 0.97 and "m-float32 ~ other" in row.ours and "in 1 of 1 pairs" in row.control
    assert abs(only(table, "between models", "comprehension").value) < 0.25


def test_layers_are_compared_by_label(opened, table):
    row = only(table, "RDM correlation of layers", "other, generation")
    assert row.ours.startswith("layer 2: ") and row.value > 0.97
    comparison = between_layers(claims.Evidence(opened, QUICK, None), "other")
    assert comparison.layer.values.tolist() == LAYERS == comparison.layer_2.values.tolist()


@pytest.mark.parametrize("scale", ["valence", "arousal"])
def test_the_planted_axes_are_found_where_they_are_and_not_where_they_are_not(table, scale):
    row = only(table, f"with {scale}", "other, generation")
    assert row.value > 0.9 and row.low > 0.7 and row.p < 0.01 and row.n == 20 and row.verdict == "agrees"
    lost = only(table, f"with {scale}", "other, comprehension")
    assert lost.value < 0.5 and lost.verdict == INCONCLUSIVE and "no people were asked" in row.assumed


def test_the_first_split_of_the_tree_is_that_of_the_poles(table):
    row = only(table, "hierarchical order", "other, generation")
    assert row.value > 0.9 and row.p < 0.01 and set(row.ours.split(": ")[1].split()) == set(EMOTIONS)
    assert only(table, "hierarchical order", "other, comprehension").p > 0.01


def test_ratings_may_be_given_in_the_plan_or_not_at_all(tmp_path):
    own = {"valence": {e: -RATED["valence"][e] for e in EMOTIONS[:5]}}
    rated, plain = (
        study(tmp_path / name, {"texts": "nsteer", **ratings}, ["other"])
        for name, ratings in (("a", {"ratings": own}), ("b", {}))
    )
    claim_table = claims.table(claims.claims(rated, QUICK))
    row = only(claim_table, "with valence", "other, generation")
    assert row.n == 5 and row.value > 0.8 and "given in the plan" in row.assumed
    assert rows(claim_table, "with arousal").empty
    without = claims.table(claims.claims(plain, QUICK))
    assert set(rows(without, "of the emotion vectors with").why) == {"the plan names no ratings"}


def test_what_the_report_rests_on_is_kept_as_labelled_arrays(opened):
    reporting.report(opened)
    kept = nsteer.store.results.open(opened.path)["summary/rsa"].isel(report=-1)
    comparison = between_models(claims.Evidence(opened, reporting.rules(opened), None))
    where = {"method": "generation", "model": "m-float32", "model_2": "other"}
    assert float(kept.correlation.sel(where)) == pytest.approx(float(comparison.correlation.sel(where)), abs=1e-6)
    assert float(kept.ceiling.sel(where)) > 0.9
    curve = nsteer.store.results.open(opened.path)["summary/separation/other"].isel(report=-1)
    quiet, loud = curve.accuracy.sel({"method": "generation"}).values
    assert curve.layer.values.tolist() == LAYERS and 0.5 < quiet < loud
    reporting.report(opened)
    assert nsteer.store.results.open(opened.path)["summary/rsa"].sizes["report"] == 1
