"""The claims table: planted studies are read as planted, missing values said by name, every row followed."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import xarray as xr
from planted import put

import nsteer.store.results
from nsteer.report import claims
from nsteer.report.claims import AGREES, DIFFERS, INCONCLUSIVE, OPEN, Rules
from nsteer.store import Store, Variable, slug

EMOTIONS = ["happy", "sad", "calm", "angry", "hostile", "loving"]
MODELS = {
    "zoo/llama": ("llama", 24, 1.0e6),
    "zoo/qwen": ("qwen3", 32, 1.2e6),
    "zoo/gpt2": ("gpt2", 40, 30e6),
    "zoo/gemma": ("gemma2", 24, 5e6),
}
DEPTHS = np.arange(8) / 8
APART = 1.4 - 4 * (DEPTHS - 0.5) ** 2
QUICK = Rules(shuffles=19)
CONDITION = ("model", "op", "layer_set", "method", "emotion", "strength", "control")
AXES = {"op": ["add"], "layer_set": ["all"], "method": ["generation"], "emotion": ["happy", "calm", "hostile"]}
AXES |= {"strength": [-0.1, 0.05, 0.1], "control": ["none", "random"]}
PROMPTS = {"prompt": [f"{kind}-{k}" for kind in ("sad", "neutral-hostile", "calm") for k in (1, 2, 3, 4)], "seed": [0]}
TARGETS = {"sad": {"emotion": "happy", "sign": 1}, "neutral-hostile": {"emotion": "hostile", "sign": 1}}
TARGETS |= {"calm": {"emotion": "calm", "sign": -1}}
CLASSES = ["happy", "calm", "hostile", "neutral"]


def activations(rng, width: int, better: float) -> np.ndarray:
    """[method, emotion, sample, layer, d_model]; generation is `better` times as far apart as comprehension."""
    axes = np.linalg.qr(rng.normal(size=(width, 7)))[0].T
    out = rng.normal(size=(2, 7, 6, 8, width)) * 0.08
    for method, scale in enumerate((better, 1.0)):
        for layer in range(8):
            out[method, :6, :, layer] += axes[6] + scale * APART[layer] * 0.6 * axes[:6, None]
    return out[None]


def derived(store: Store, model: str, rng, better: float = 1.6, missing: bool = False) -> None:
    """What a model's own groups hold."""
    _, width, _ = MODELS[model]
    emotions, methods = [*EMOTIONS, "neutral"], ["generation", "comprehension"]
    coords = {"model": [model], "method": methods, "emotion": emotions, "sample": range(6)}
    dims = ("model", "method", "emotion", "sample")
    texts = np.array([[[[f"{m} {e} {k}" for k in range(6)] for e in emotions] for m in methods]], object)
    chat = np.ones(texts.shape, bool)
    put(store, f"samples/{slug(model)}", coords, {"text": (dims, "string", texts), "chat": (dims, "bool", chat)})
    depth = {"depth": (Variable(("layer",), "float64", "depth"), DEPTHS)}
    wide = {**coords, "layer": range(8), "d_model": range(width)}
    values = activations(rng, width, better)
    if missing:
        values[0, 0, 1, 1:] = values[0, 0, 2, 3] = np.nan
    norm = np.linalg.norm(values, axis=-1)
    variables = {
        "pooled": ((*dims, "layer", "d_model"), "float32", values),
        "token_norm": ((*dims, "layer"), "float32", norm),
    }
    put(store, f"activations/{slug(model)}", wide, variables, auxiliary=depth)
    means = np.nanmean(values[:, :, :6], axis=3)
    means[:, 0] -= means[:, 0].mean(1, keepdims=True)
    about = {"product": "vectors", "methods": json.dumps({m: {"source": m} for m in methods})}
    own = {"model": [model], "method": methods, "emotion": EMOTIONS, "layer": range(8), "d_model": range(width)}
    put(store, f"vectors/{slug(model)}", own, {"vector": (tuple(own), "float32", means)}, about, depth)


def measured(store: Store, model: str, rng) -> None:
    """Anisotropy (no BOS to leave out: a missing value) and lens of a model."""
    width = MODELS[model][1]
    depth = {"depth": (Variable(("layer",), "float64", "depth"), DEPTHS)}
    coords = {
        "model": [model],
        "bos": ["with", "without"],
        "sentence": range(10),
        "layer": range(8),
        "d_model": range(width),
    }
    pooled = rng.normal(size=(1, 2, 10, 8, width)) + 1
    pooled[:, 0] = np.nan
    put(store, f"anisotropy/{slug(model)}", coords, {"pooled": (tuple(coords), "float32", pooled)}, auxiliary=depth)
    coords = {"model": [model], "method": ["generation"], "emotion": EMOTIONS, "layer": range(8), "rank": range(3)}
    token = np.full((1, 1, 6, 8, 3), " word", object)
    if "qwen" in model:
        token[0, 0, 1, 4:, 0] = "寻找"
    put(store, f"lens/{slug(model)}", coords, {"token": (tuple(coords), "string", token)}, auxiliary=depth)


def steered(store: Store, models: list[str], unsteered: bool = True) -> None:
    """Continuations: 0.05 is coherent; 0.1 loops in llama, is noise in gpt2, Chinese in qwen; random does nothing."""
    coords = {"model": models, **AXES, **PROMPTS}
    shape = tuple(map(len, coords.values()))
    text, ids = np.full(shape, " a calm day", object), np.tile(np.arange(30), (*shape, 1))
    perplexity = np.full(shape, 4.0)
    for i, model in enumerate(models):
        top = (i, 0, 0, 0, slice(None), 2, 0)
        if "llama" in model:
            ids[top] = 7
        if "gpt2" in model:
            perplexity[top] = 900.0
        if "qwen" in model:
            text[top] = " a 寻找 day"
            text[(*top, slice(0, 3))] = " a 寻找 calm day"
    tokens = {**coords, "token": range(30)}
    dims = tuple(coords)
    put(store, "generations", tokens, {"text": (dims, "string", text), "token_id": ((*dims, "token"), "int32", ids)})
    put(store, "outcomes", coords, {"perplexity": (dims, "float32", perplexity)})
    plain = {"model": models, "op": ["add"], **PROMPTS}
    small = (len(models), 1, 12, 1)
    put(
        store,
        "unsteered",
        {**plain, "token": range(30)},
        {
            "text": (tuple(plain), "string", np.full(small, " a day", object)),
            "token_id": ((*plain, "token"), "int32", np.tile(np.arange(30), (*small, 1))),
        },
    )
    if not unsteered:
        return
    put(store, "outcomes_unsteered", plain, {"perplexity": (tuple(plain), "float32", np.full(small, 3.0))})


def judged(store: Store, models: list[str]) -> None:
    """Steered to an emotion its class rises, steered away it falls; a random direction changes nothing."""
    coords = {"model": models, **AXES, **PROMPTS, "class": CLASSES}
    p = np.full(tuple(map(len, coords.values())), 0.25)
    for e, emotion in enumerate(AXES["emotion"]):
        c = CLASSES.index(emotion)
        p[:, :, :, :, e, 1:, 0, :, :, c] = 0.7 + 0.02 * np.arange(12)[:, None] / 12
        p[:, :, :, :, e, 0, 0, :, :, c] = 0.1
    p[:, :, :, :, :, :, 0] += 0.01 * np.arange(12)[:, None, None] / 12  # prompts differ a little
    p[0, 0, 0, 0, 0, 2, 0, 0, 0] = np.nan  # an empty continuation
    by = {"judge": ["j"]}
    put(store, "judged", {**coords, **by}, {"score": ((*coords, "judge"), "float32", p[..., None])})
    plain = {"model": models, "op": ["add"], **PROMPTS, "class": CLASSES}
    q = np.full((len(models), 1, 12, 1, 4), 0.25)
    put(store, "judged_unsteered", {**plain, **by}, {"score": ((*plain, "judge"), "float32", q[..., None])})


def projected(store: Store, models: list[str]) -> None:
    """Half of what is injected arrives on the target; a random direction gives nothing."""
    coords = {
        "model": models,
        **AXES,
        **PROMPTS,
        "where": ["prompt_end", "written"],
        "layer": range(8),
        "target": EMOTIONS,
    }
    values = np.zeros(tuple(map(len, coords.values())))
    for e, emotion in enumerate(AXES["emotion"]):
        for s, strength in enumerate(AXES["strength"]):
            values[:, :, :, :, e, s, 0, ..., EMOTIONS.index(emotion)] = 0.5 * strength * 80
    put(store, "projections", coords, {"projection": (tuple(coords), "float32", values + 3.0)})
    plain = {"model": models, "op": ["add"], "method": ["generation"], **PROMPTS}
    plain |= {"where": ["prompt_end", "written"], "layer": range(8), "target": EMOTIONS}
    threes = np.full(tuple(map(len, plain.values())), 3.0)
    put(store, "projections_unsteered", plain, {"projection": (tuple(plain), "float32", threes)})
    axes = {"model": models, **AXES, **PROMPTS, "layer": range(8)}
    injected = np.broadcast_to(np.abs(AXES["strength"])[:, None, None, None, None] * 10, tuple(map(len, axes.values())))
    put(store, "steering", axes, {"injected": (tuple(axes), "float32", injected)})


def facts(store: Store, models: list[str]) -> None:
    kind, _, size = zip(*(MODELS[m] for m in models), strict=True)
    put(
        store,
        "models",
        {"model": models},
        {
            "model_type": (("model",), "string", np.array(kind, object)),
            "parameters": (("model",), "int64", np.array(size, int)),
            "n_layers": (("model",), "int64", np.full(len(models), 8)),
        },
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A whole planted study of four models."""
    store, rng = Store(tmp_path_factory.mktemp("claims") / "s.zarr"), np.random.default_rng(0)
    facts(store, list(MODELS))
    for model in MODELS:
        derived(store, model, rng)
        measured(store, model, rng)
    steered(store, list(MODELS))
    judged(store, list(MODELS))
    projected(store, list(MODELS))
    return nsteer.store.results.open(store.path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Everything of one model."""
    store, rng = Store(tmp_path_factory.mktemp("small") / "s.zarr"), np.random.default_rng(0)
    facts(store, ["zoo/llama"])
    derived(store, "zoo/llama", rng)
    measured(store, "zoo/llama", rng)
    for put_group in (steered, judged, projected):
        put_group(store, ["zoo/llama"])
    return nsteer.store.results.open(store.path)


@pytest.fixture(scope="module")
def findings(study):
    return claims.claims(study, QUICK, TARGETS)


def rows(findings, claim: str, what: str, scope: str = ""):
    table = claims.table(findings)
    return table[
        (table.claim == claim)
        & table.what.str.contains(what, regex=False)
        & table.scope.str.contains(scope, regex=False)
    ]


def only(findings, claim: str, what: str, scope: str = ""):
    chosen = rows(findings, claim, what, scope)
    assert len(chosen) == 1, chosen
    return chosen.iloc[0]


def test_every_claim_has_rows_and_every_row_a_verdict(findings):
    assert set(findings.claim.values) == {"1", "2", "3", "4", "5", "6", "effects", "audit", "rsa", "geometry"}
    assert set(findings.verdict.values) <= {AGREES, DIFFERS, INCONCLUSIVE, OPEN}
    table = claims.table(findings)
    assert (table.why[table.verdict.isin([OPEN, INCONCLUSIVE])] != "").all()
    assert (table.paper != "").all() and (table.scope != "").all()


def test_generation_was_planted_to_separate_better(findings):
    assert (rows(findings, "1", "separates emotions better", "zoo/").verdict == AGREES).all()
    u = only(findings, "1", "Mann-Whitney")
    assert u.p == pytest.approx(2 / 70) and "n 4 and 4, means" in u.control and u.high < 0
    d = only(findings, "1", "Cohen's d")
    assert d.verdict == OPEN and "would need an SD of" in d.why and d.value < -2
    assert only(findings, "1", "models in which").ours == "4 of 4"
    paired = only(findings, "1", "paired")
    assert paired.verdict == INCONCLUSIVE and paired.p == 0.125, "four pairs can not give less"


def test_beside_every_cosine_stand_accuracy_reliability_words_and_the_papers_metric(findings):
    for control in rows(findings, "1", "separates emotions better", "zoo/").control:
        for method in ("generation", "comprehension"):
            assert re.search(
                rf"{method}: held-out accuracy 1.00 \(chance 0.17, bag of words [01].\d\d\), reliability 0.9\d, "
                r"the paper's metric 0.\d+ \(noise moves it\)",
                control,
            ), control


def test_the_planted_middle_layer_is_found_and_its_u(findings):
    depths = rows(findings, "2", "depth at which emotions are separated best", "generation")
    assert len(depths) == 4 and (depths.value == 0.5).all() and set(depths.verdict) <= {AGREES, INCONCLUSIVE}
    assert (depths.p_adjusted <= 0.05).any() and depths.why.str.contains("to agree it takes 0.005").any()
    assert (depths.low < 0.5).all() and (depths.high > 0.5).all()
    assert (rows(findings, "2", "a U over depth", "generation").verdict == AGREES).all()
    assert (rows(findings, "2", "held-out accuracy is highest").verdict == INCONCLUSIVE).all(), (
        "all is told apart everywhere"
    )


def test_the_trap_is_named_and_refused(findings):
    trap = rows(findings, "2", "vectors as stored")
    assert len(trap) == 4 and trap.scope.str.endswith("generation").all()
    assert trap.why.str.contains("-1/(n-1) = -0.2000", regex=False).all() and (trap.verdict == OPEN).all()


def test_scenarios_are_counted_with_their_sign_and_a_random_direction_beside_them(findings):
    row = only(findings, "4", "steering moves", "zoo/llama, add, all, generation, strength 0.1")
    assert (row.ours, row.n) == ("11 of 11 (1.00)", 11)  # 12 scenarios, one empty
    assert "random rotation 0 of 12" in row.control and "likeliest class 11 of 11" in row.control
    assert row.verdict == INCONCLUSIVE and row.low < 0.8, "11 of 11 may be 0.74"
    weak = only(findings, "4", "steering moves", "zoo/qwen, add, all, generation, strength 0.05")
    assert weak.n == 8  # -0.05 is not on the grid
    every = only(findings, "4", "steering moves", "4 models, add, all, generation, strength 0.1")
    assert every.n == 12 and every.value == 1.0, "prompts are the units: the models share them"


def test_effects_are_paired_with_the_controls_and_tested_over_prompts(findings):
    row = only(findings, "effects", "vector minus controls", "zoo/gemma")
    assert row.n == 12 and row.ours.endswith(f"p = {2 / 2**12:.3g} (over prompts)")
    assert row.verdict == INCONCLUSIVE and math.isnan(row.p), "one random direction tells nothing of others"
    assert "no test" in row.why and "p is 0.5 at least" in row.why and "199 draws" in row.why
    assert "0 of 1 random direction does as much, p = 0.5" in row.control
    assert "strengths taken: 0.05, 0.1" in row.control and "wrong way in 0 of 12" in row.control
    selective = only(findings, "effects", "strongest rival", "zoo/gemma")
    assert selective.verdict == AGREES and selective.value == pytest.approx(0.45, abs=0.02)
    llama = only(findings, "effects", "vector minus controls", "zoo/llama")
    assert llama.control.endswith("strengths taken: 0.05"), "at 0.1 llama only loops"


def test_regimes_are_told_apart(findings):
    share = {m: only(findings, "5", "largest strength", m) for m in MODELS}
    assert share["zoo/llama"].ours.startswith("surgical 0, repetitive 36, explosive 0 of 36")
    assert share["zoo/gpt2"].ours.startswith(
        "surgical 0, repetitive 0, explosive 36 of 36; median perplexity ratio 300"
    )
    assert (
        share["zoo/gemma"].ours.startswith("surgical 36")
        and "unsteered repetitive 0 of 12" in share["zoo/gemma"].control
    )
    assert only(findings, "5", "rarest of the three").value == 1.0
    assert "needs two models of one family" in only(findings, "5", "architecture").why


def test_turning_points_of_the_store(study):
    points = claims.turning_points(study, QUICK).sel({"control": "none", "op": "add", "emotion": "happy"}).squeeze()
    assert points.collapse.sel(model="zoo/llama") == 0.1 and points.sweet_spot.sel(model="zoo/llama") == 0.05
    assert math.isnan(points.collapse.sel(model="zoo/qwen")) and points.flip.sel(model="zoo/qwen") == 0.05


def test_the_second_language_is_found_in_qwen_and_not_elsewhere(findings):
    away = rows(findings, "6", "letters in another script")
    assert len(away) == 4 and set(away.verdict[away.scope.str.contains("qwen")]) == {AGREES}
    assert away.why[~away.scope.str.contains("qwen")].str.contains("no width").all(), "nothing was seen: no evidence"
    qwen = only(findings, "6", "letters in another script", "qwen")
    assert 0.2 < qwen.value < 2 / 6 and "寻找 (calm, Han, 12)" in qwen.ours
    lens = only(findings, "6", "logit lens", "qwen")
    assert lens.ours == "1 of 6: 寻找 (sad, Han)"
    assert only(findings, "6", "logit lens", "llama").value == 0


def test_the_delta_is_set_over_what_was_injected_and_beside_a_random_direction(findings):
    row = only(findings, "4", "transport ratio", "zoo/gemma")
    assert row.value == pytest.approx(0.5) and row.ours == "+4 raw, +0.5 over injected"
    assert row.control == "random rotation +0 raw, +0 over injected" and "as recorded" in row.assumed


def test_a_hole_in_anisotropy_is_said_by_name(findings):
    with_bos = rows(findings, "3", "bos with", "zoo/llama").iloc[0]
    assert "no streams for bos 'with' (a tokenizer without BOS, or a missing value)" in with_bos.why
    without = rows(findings, "3", "bos without", "zoo/llama").iloc[0]
    assert without.n == 10 and without.value == pytest.approx(0.5, abs=0.15)


def test_every_row_can_be_followed_to_what_it_came_from(study, findings):
    for row in findings.row.values.tolist():
        parts = claims.follow(study, findings, row)
        if not math.isnan(float(findings.value[row])):
            assert parts, findings.what.values[row]
    first = int(np.flatnonzero(findings.scope.values == "zoo/llama")[0])
    (group, labels), *_ = claims.inputs(findings, first)
    assert group == "activations/zoo--llama" and labels["method"] == ["generation", "comprehension"]


def test_the_same_seed_gives_the_same_digits(small):
    first, again = (claims.claims(small, QUICK, TARGETS) for _ in range(2))
    xr.testing.assert_identical(first, again)
    assert "tests:" in first.attrs["multiplicity"]


def test_an_empty_store_gives_rows_that_say_what_is_missing(tmp_path):
    store = Store(tmp_path / "s.zarr")
    facts(store, ["zoo/llama"])
    table = claims.table(claims.claims(nsteer.store.results.open(store.path), QUICK))
    assert (
        set(table.claim) == {"1", "2", "3", "4", "5", "6", "audit", "rsa", "geometry"} and (table.verdict == OPEN).all()
    )
    said = " ".join(table.why)
    for missing in ("no activations", "anisotropy/<model>", "judged", "generations", "lens/<model>", "projections"):
        assert missing in said


def test_one_method_alone_is_said_by_name_and_the_rest_goes_on(tmp_path):
    store, rng = Store(tmp_path / "s.zarr"), np.random.default_rng(0)
    facts(store, ["zoo/llama"])
    derived(store, "zoo/llama", rng)
    results = nsteer.store.results.open(store.path)
    findings = claims.claims(results, Rules(methods=("generation", "reading"), shuffles=9))
    assert "have no method of source comprehension" in rows(findings, "1", "separates", "zoo/llama").iloc[0].why
    assert only(findings, "2", "depth at which emotions", "generation").value == 0.5


def test_thin_emotions_and_nan_activations_are_said_by_name(tmp_path):
    store = Store(tmp_path / "s.zarr")
    facts(store, ["zoo/llama"])
    derived(store, "zoo/llama", np.random.default_rng(0), missing=True)
    findings = claims.claims(nsteer.store.results.open(store.path), QUICK)
    row = only(findings, "2", "depth at which emotions", "generation")
    assert row.value == 0.5
    assert "fewer than two texts: sad 1; texts whose activations are NaN: sad 5, calm 1" in row.control
    assert "fewer than" not in only(findings, "2", "depth at which emotions", "comprehension").control


def test_vectors_of_noise_have_no_cosine_and_are_not_better_separated(tmp_path, monkeypatch):
    """The paper's metric is lower where there is nothing but noise: that is no finding."""
    monkeypatch.setitem(globals(), "activations", noisy_generation)
    store = Store(tmp_path / "s.zarr")
    facts(store, ["zoo/llama"])
    derived(store, "zoo/llama", np.random.default_rng(5))
    findings = claims.claims(nsteer.store.results.open(store.path), QUICK)
    row = only(findings, "1", "separates emotions better", "zoo/llama")
    assert row.verdict == INCONCLUSIVE and "noise, and no cosine" in row.why and row.ours.startswith("none and 0.")
    assert not [text for text in claims.table(findings).ours if "nan" in text]
    assert not set(claims.table(findings).verdict[claims.table(findings).scope.str.contains("generation")]) & {
        AGREES,
        DIFFERS,
    }


def noisy_generation(rng, width: int, better: float) -> np.ndarray:
    """As `activations`, but generation is noise."""
    out = planted_activations(rng, width, better)
    out[0, 0] = rng.normal(size=out[0, 0].shape)
    return out


planted_activations = activations


def test_without_perplexity_only_loops_can_be_told(tmp_path):
    store, models = Store(tmp_path / "s.zarr"), ["zoo/llama"]
    facts(store, models)
    steered(store, models, unsteered=False)
    findings = claims.claims(nsteer.store.results.open(store.path), QUICK)
    row = only(findings, "5", "largest strength")
    assert row.verdict == OPEN and "lacks perplexity in outcomes_unsteered" in row.why and row.ours == "repetitive 100%"


def test_neither_torch_nor_a_model_is_loaded(small):
    code = f"""
import sys, nsteer.store.results
from nsteer.report import claims
claims.claims(nsteer.store.results.open({str(small.path)!r}), claims.Rules(shuffles=3))
assert not {{'torch', 'transformers', 'nnsight'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_an_op_without_unsteered_twins_says_so_and_the_others_are_as_they_were(findings, tmp_path, monkeypatch):
    """An entry without the control `zero` beside one with it: groups of unsteered texts know the second op alone."""
    known = findings
    monkeypatch.setitem(AXES, "op", ["add", "held"])
    models, store = ["zoo/llama", "zoo/gemma"], Store(tmp_path / "s.zarr")
    facts(store, models)
    steered(store, models)
    judged(store, models)
    projected(store, models)
    opened = nsteer.store.results.open(store.path)
    findings = claims.claims(opened, QUICK, TARGETS)
    held = rows(findings, "6", "letters in another script", "held")
    assert len(held) == len(models) and held.value.isna().all()
    assert held.why.str.contains("control zero", regex=False).all()
    for claim, what in (("6", "letters in another script"), ("4", "transport ratio")):
        for model in models:
            old, new = (only(version, claim, what, f"{model}, add") for version in (known, findings))
            assert old.value == new.value and not math.isnan(new.value)
    assert rows(findings, "4", "transport ratio", "held").value.isna().all()
