"""Every kind of row, computed a second time by an independent script from the arrays of a small store."""

from __future__ import annotations

import numpy as np
import pytest
import recompute
import test_claims
from scipy import stats

import nsteer.store.results
from nsteer.report import claims
from nsteer.store import Store, slug

MODELS = list(test_claims.MODELS)[:2]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A store of two models whose judge's scores are noise about a change, and its table."""
    store, rng = Store(tmp_path_factory.mktemp("again") / "s.zarr"), np.random.default_rng(3)
    test_claims.facts(store, MODELS)
    for model in MODELS:
        test_claims.derived(store, model, rng)
    test_claims.steered(store, MODELS)
    test_claims.judged(store, MODELS)
    opened = nsteer.store.results.open(store.path)
    return opened, claims.table(claims.claims(opened, test_claims.QUICK, test_claims.TARGETS))


def row(table, what: str, scope: str):
    (match,) = table[table.what.str.contains(what, regex=False) & (table.scope == scope)].itertuples()
    return match


def samples(opened, model: str, method: str, layer: int):
    pooled = opened[f"activations/{slug(model)}"].pooled.sel({"model": model, "method": method, "layer": layer}).load()
    own = pooled.sel({"emotion": test_claims.EMOTIONS}).transpose("emotion", "sample", "d_model").values.astype(float)
    return own, pooled.sel({"emotion": "neutral"}).transpose("sample", "d_model").values.astype(float)


@pytest.mark.parametrize("model", MODELS)
def test_claim_1_and_its_parts(both, model):
    opened, table = both
    claim = row(table, "separates emotions better", model)
    (a, low_a, high_a), (b, *_) = (
        recompute.jackknife_by_folds(*samples(opened, model, method, 4)) for method in ("generation", "comprehension")
    )
    assert claim.value == pytest.approx(a - b, abs=2e-3), "comprehension's bias of a ratio is of another jackknife"
    assert f"{a:.3f} - " in claim.ours and low_a < a < high_a
    hits = recompute.accuracy(*samples(opened, model, "generation", 4))
    assert f"generation: held-out accuracy {hits:.2f} " in claim.control


def test_claim_2_by_the_papers_fit_of_the_same_curve(both):
    opened, table = both
    curve = [recompute.jackknife_by_folds(*samples(opened, MODELS[0], "generation", k))[0] for k in range(8)]
    claim = row(table, "a U over depth", f"{MODELS[0]}, generation")
    assert claim.value == pytest.approx(np.polyfit(np.arange(8) / 8, curve, 2)[0], rel=1e-3)
    assert row(table, "separated best", f"{MODELS[0]}, generation").value == np.argmin(curve) / 8


def aimed(opened, model: str, control: str, strength: float) -> np.ndarray:
    """P(target) steered minus unsteered of each scenario, by its sign."""
    steered = opened["judged"].score.sel({"model": model, "control": control}).squeeze().load()
    plain = opened["judged_unsteered"].score.sel({"model": model}).squeeze().load()
    changes = []
    for prompt in steered.prompt.values.tolist():
        target = test_claims.TARGETS[prompt.rsplit("-", 1)[0]]
        cell = {"emotion": target["emotion"], "strength": target["sign"] * strength, "prompt": prompt}
        change = steered.sel({**cell, "class": target["emotion"]}) - plain.sel(
            {"prompt": prompt, "class": target["emotion"]}
        )
        changes.append(float(change) * target["sign"])
    return np.array(changes)


def test_claim_4_and_the_paired_effect(both):
    opened, table = both
    model = MODELS[1]
    change, control = (aimed(opened, model, c, 0.1) for c in ("none", "random"))
    claim = row(table, "steering moves", f"{model}, add, all, generation, strength 0.1")
    k, n = int((change > 0).sum()), len(change)
    assert (claim.n, claim.value) == (n, k / n)
    assert (claim.low, claim.high) == pytest.approx(recompute.wilson(k, n))
    effect = row(table, "vector minus controls", f"{model}, add, all, generation")
    differences = change - control
    if "strengths taken: 0.1" in effect.control:
        assert effect.value == pytest.approx(differences.mean())
        assert (effect.low, effect.high) == pytest.approx(recompute.mean_t(differences), rel=1e-6)
    assert effect.ours.endswith(f"p = {recompute.sign_flips(differences):.3g} (over prompts)")
    assert np.isnan(effect.p) and "p is 0.5 at least" in effect.why, "one draw of a control is no test"


def test_every_verdict_follows_from_its_row(both):
    _, table = both
    tested = table[np.isfinite(table.above) | np.isfinite(table.below)]
    assert len(tested) > 10
    known = tested[tested.p.notna()]
    assert known.p_adjusted.values == pytest.approx(stats.false_discovery_control(known.p.values))
    for claim in tested.itertuples():
        assert claim.verdict == recompute.verdict(claim.low, claim.high, claim.above, claim.below, claim.p_adjusted), (
            claim.what
        )
    rest = table.drop(tested.index)
    assert set(rest.verdict) == {"cannot be compared"} and (rest.why != "").all()
