"""Emotions without a class of the judge, told by classes that rise or fall together: from a map to every place that
says whether a text moved."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import test_claims
import xarray as xr
from planside import PLAN, problems
from test_runner import run

import nsteer
from nsteer.plan.check import load
from nsteer.report import claims, overview, reporting, terminal, texts
from nsteer.runner import tuning
from nsteer.science import analysis, outcomes
from nsteer.science.targets import Target, target_of, targets_of, told_by, unmapped
from nsteer.store import Store

SEVEN = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]
CALM = {"falls": ["anger", "fear"]}


def test_a_target_says_what_is_scored():
    forms = ["joy", {"rises": "joy"}, {"rises": ["joy"], "falls": []}, Target(("joy",))]
    assert [target_of(form) for form in forms] == [Target(("joy",))] * 4
    assert str(target_of("joy")) == "P(joy)" and str(target_of(CALM)) == "-P(anger + fear)"
    both = target_of({"rises": ["joy", "surprise"], "falls": "fear"})
    assert str(both) == "P(joy + surprise) - P(fear)" and both.own is None and target_of("joy").own == "joy"


def test_a_set_with_a_class_that_the_judge_lacks_is_no_target():
    given = {"calm": CALM, "loving": {"rises": ["joy", "love"]}}
    targets = targets_of(given, SEVEN, given)
    assert targets == {"calm": Target(falls=("anger", "fear")), "loving": None}
    (said,) = unmapped(given, SEVEN, given)
    assert said.startswith("loving: its class 'love' is not among the judge's (anger,")
    assert told_by(targets) == ["calm by the rise of -P(anger + fear)"]


# ---- planted truth ------------------------------------------------------------------------------------------------


def planted(n: int = 40, seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Scores of texts of seven classes, steered (to happy and calm, at +-0.1) and unsteered; two texts are empty."""
    rng = np.random.default_rng(seed)
    steered, plain = rng.dirichlet(np.ones(7), (2, 2, n)), rng.dirichlet(np.ones(7), n)
    steered[:, :, 3], steered[1, 0, 5] = np.nan, np.nan
    axes = {"emotion": ["happy", "calm"], "strength": [-0.1, 0.1], "prompt": [f"p{i}" for i in range(n)]}
    whole = xr.DataArray(steered, {**axes, "class": SEVEN}, [*axes, "class"])
    return whole, xr.DataArray(plain, {"prompt": axes["prompt"], "class": SEVEN}, ["prompt", "class"])


@pytest.mark.parametrize("given", [CALM, {"rises": ["joy", "neutral"], "falls": "fear"}])
def test_success_is_that_the_score_of_the_set_rises_text_by_text(given):
    steered, plain = planted()
    signs = xr.where(steered.strength < 0, -1, 1)
    successes = outcomes.success(steered, plain, {"happy": "joy", "calm": given}, signs)
    up, down = (
        [given.get(side)] if isinstance(given.get(side), str) else given.get(side, []) for side in ("rises", "falls")
    )
    for s, strength in enumerate((-0.1, 0.1)):
        sign = 1 if strength > 0 else -1
        for p, prompt in enumerate(steered.prompt.values.tolist()):
            own, unsteered = steered.values[1, s, p], plain.values[p]
            of = [
                sum(scores[SEVEN.index(c)] for c in up) - sum(scores[SEVEN.index(c)] for c in down)
                for scores in (own, unsteered)
            ]
            told = successes.sel(emotion="calm", strength=strength, prompt=prompt)
            if np.isnan(own).any():
                assert all(math.isnan(told[name]) for name in ("change", "target", "success", "named"))
                continue
            assert float(told.target) == pytest.approx(of[0]) and float(told.change) == pytest.approx(
                sign * (of[0] - of[1])
            )
            assert float(told.success) == (sign * (of[0] - of[1]) > 0)
            best = SEVEN[int(own.argmax())]
            is_of = best not in down and (best in up or not up)
            assert float(told.named) == (is_of == (sign > 0))
    alone = outcomes.success(steered.sel(emotion=["happy"]), plain, {"happy": "joy"}, signs)
    xr.testing.assert_identical(successes.sel(emotion=["happy"]), alone)  # an emotion with a class is as it was


def test_the_share_of_texts_of_a_set_counts_those_of_none_that_is_to_fall():
    steered, _ = planted()
    score = steered.sel(strength=[0.1], emotion=["calm"]).expand_dims({"control": ["none"], "seed": [0]})
    rate = analysis.target_rate(score, {"calm": CALM})
    known = steered.values[1, 1][~np.isnan(steered.values[1, 1]).any(-1)]
    best = [SEVEN[i] for i in known.argmax(-1)]
    assert rate.n.item() == len(known) and rate.hits.item() == sum(c not in CALM["falls"] for c in best)


@pytest.mark.parametrize("name", ["score", "success", "named"])
def test_a_search_takes_an_empty_text_for_the_worst_and_a_fall_for_a_gain(name):
    steered, plain = planted()
    mine = steered.sel(strength=0.1, emotion="calm", drop=True)
    objective = tuning.objective(name, mine, plain, target_of(CALM))
    empty = np.isnan(mine.values).any(-1)
    own, unsteered = (-(score.sel({"class": "anger"}) + score.sel({"class": "fear"})).values for score in (mine, plain))
    wanted = {"score": own, "success": own > unsteered, "named": ~np.isin(mine.fillna(0).argmax("class"), (0, 2))}[name]
    assert objective[~empty] == pytest.approx(np.asarray(wanted, float)[~empty])
    assert empty.any() and (objective[empty] <= objective[~empty].min()).all()


# ---- the table, the first screen, the page -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A store whose judge has no class for calm: steering away from it raises hostile and sad, which stand for it."""
    store = Store(tmp_path_factory.mktemp("calm") / "s.zarr")
    models = ["zoo/llama"]
    test_claims.facts(store, models)
    test_claims.steered(store, models)
    test_claims.judged(store, models)
    data = {"classifier": "-", "kind": "classifier", "map": {"calm": {"rises": [], "falls": ["hostile", "neutral"]}}}
    coords = {"judge": ["j"]}
    from nsteer.store import Group, Variable

    store.prepare([Group("judges", coords, {"settings": Variable(("judge",), "string", "settings")}, ("judge",))])
    store.commit("judges", ("j",), xr.Dataset({"settings": ((), json.dumps(data))}), fingerprint=1)
    return nsteer.open(store.path)


def test_the_claims_count_scenarios_whose_target_is_a_set(told):
    rows = claims.claims(told, test_claims.QUICK, test_claims.TARGETS)
    claim = test_claims.only(rows, "4", "steering moves", "zoo/llama, add, all, generation, strength 0.1")
    moved = 0
    score, plain = (told[path].score.sel({"judge": "j"}).squeeze().load() for path in ("judged", "judged_unsteered"))
    for prompt in score.prompt.values.tolist():
        target = test_claims.TARGETS[prompt.rsplit("-", 1)[0]]
        at = {"emotion": target["emotion"], "strength": 0.1 * target["sign"], "control": "none", "prompt": prompt}
        own, unsteered = score.sel(at), plain.sel({"prompt": prompt})
        if target["emotion"] == "calm":
            change = -(own - unsteered).sel({"class": ["hostile", "neutral"]}).sum()
        else:
            change = (own - unsteered).sel({"class": target["emotion"]})
        moved += float(change) * target["sign"] > 0
    assert (claim.n, claim.value) == (11, moved / 11), "one is empty, none is left out for want of a class"
    assert "calm by the rise of -P(hostile + neutral)" in claim.assumed and "no class" not in claim.assumed
    selective = test_claims.only(rows, "effects", "strongest rival", "zoo/llama")
    assert "of 2 emotions" in selective.control, "a set is the rival of no class"


def test_no_flip_point_is_given_where_only_classes_fall(told):
    points = claims.turning_points(told, test_claims.QUICK).sel({"control": "none"})
    assert math.isnan(points.flip.sel({"emotion": "calm"}).item()) and points.flip.sel({"emotion": "happy"}) == 0.05


def test_texts_have_the_score_of_their_set(told):
    evidence = reporting.evidence(told)
    evidence.given = test_claims.TARGETS
    collection = texts.collect(evidence)
    assert collection.targets == {"happy": "P(happy)", "calm": "-P(hostile + neutral)", "hostile": "P(hostile)"}
    calm = collection.codes["emotion"] == collection.axes["emotion"].index("calm")
    own = calm & (collection.codes["control"] == 0) & ~np.isnan(collection.numbers["target"])
    assert own.any() and (collection.numbers["target"][own] <= 0).all()
    signs = np.array([-1 if s.startswith("-") else 1 for s in collection.axes["strength"]])[
        collection.codes["strength"]
    ]
    rise = (collection.numbers["target"] - collection.numbers["before"]) * signs
    assert collection.numbers["change"][own] == pytest.approx(rise[own], abs=1e-6)


# ---- plans --------------------------------------------------------------------------------------------------------

STEER = "steer: {{strengths: [0.1], layers: [1], prompts: {{a: one}}}}\njudge: {{{}, map: {{happy: {}}}}}\n"
RULE = "rule: {words: {anger: [rage], fear: [dread], joy: [sun]}}"
CHOICES = "choices: {question: 'Is {text} calm?', answers: [yes, no]}"
ANY = "choices: {question: 'Is {text} {concept}?', answers: [yes, no]}"


@pytest.mark.parametrize(
    ("judge", "given", "path", "fault"),
    [
        (RULE, "{falls: [anger, feer]}", "judge.map.happy.falls[1]", "'feer'"),
        (RULE, "{rises: jou}", "judge.map.happy.rises", "'jou'"),
        (RULE, "{}", "judge.map.happy", "neither `rises` nor `falls`"),
        (RULE, "{rises: [], falls: []}", "judge.map.happy", "neither `rises` nor `falls`"),
        (RULE, "{falls: [anger, anger]}", "judge.map.happy.falls[1]", "'anger' a second time"),
        (RULE, "{rises: joy, falls: [fear, joy]}", "judge.map.happy.falls[1]", "'joy', which is to rise too"),
        (RULE, "{fall: [anger]}", "judge.map.happy.fall", "the unknown key 'fall'"),
        (RULE, "{falls: 3}", "judge.map.happy.falls", "3"),
        (RULE, "[anger]", "judge.map.happy", "a list of 1"),
        (CHOICES, "{falls: [maybe]}", "judge.map.happy.falls[0]", "'maybe'"),
        ("classifier: zoo/judge", "{falls: [anger]}", "judge.map.happy.falls[0]", "'anger'"),
        (RULE, "{falls: [anger, fear]}", "", ""),
        (RULE, "joy", "", ""),
        (ANY, "{falls: [angry, afraid]}", "", ""),
        ("classifier: zoo/judge", "{falls: [angry, afraid]}", "", ""),
    ],
)
def test_mistakes_in_a_map_are_told_where_they_stand(judge, given, path, fault):
    mistakes = problems(f"{PLAN}{STEER.format(judge, given)}")
    assert [(mistake.path, mistake.found) for mistake in mistakes] == ([(path, fault)] if path else [])


# ---- end to end ---------------------------------------------------------------------------------------------------

PROMPTS = {
    "aggressive-1": "ella shouted in the museum . then ella",
    "aggressive-2": "ben roared in the shop . the fists was loud . then ben",
    "aggressive-3": "tom roared",
    "sad-1": "hugo sobbed in the station . then hugo",
}


@pytest.mark.parametrize("asks", [False, True], ids=["classifier", "choices"])
def test_from_a_plan_to_its_table_on_a_toy(tmp_path, asks, capsys):
    falls = ["angry", "hostile"]
    by = {"choices": {"question": "{text} . it was {concept} :", "answers": ["yes", "no"], "model": "zoo/gpt2"}}
    plan = {
        "name": "calm",
        "models": ["zoo/llama"],
        "texts": "zoo",
        "emotions": ["happy", "calm", "angry"],
        "methods": {"read": {"source": "comprehension", "samples": 3, "pooling": "mean", "chat": "never"}},
        "layers": [3, 2],
        "steer": {
            "vectors": {"emotions": ["happy", "calm"]},
            "layers": [3, 2],
            "scale": "stream_norm",
            "strengths": [0.1, 0.3],
            "prompts": PROMPTS,
            "generate": {"max_new_tokens": 6},
        },
        "judge": {**(by if asks else {"classifier": "zoo/judge"}), "map": {"calm": {"falls": falls}}},
        "measure": {"lens": 0, "anisotropy": False},
        "threads": 1,
        "store": str(tmp_path / "calm.zarr"),
    }
    (tmp_path / "calm.yaml").write_text(json.dumps(plan))
    summary = run(tmp_path / "calm.yaml")
    assert not summary.failures and not [w for w in summary.warnings if "no class" in w], summary
    opened = nsteer.open(tmp_path / "calm.zarr")
    settings = json.loads(str(opened["judges"].settings.values.item()))
    assert settings["map"] == {"calm": {"rises": [], "falls": falls}}
    score = opened["judged"].score.sel({"judge": "judge", "control": "none", "seed": 0}).squeeze(drop=True).load()
    plain = opened["judged_unsteered"].score.sel({"judge": "judge", "seed": 0}).squeeze(drop=True).load()
    assert set(falls) <= set(score["class"].values.tolist())
    asked = score.sel({"emotion": "calm", "class": falls})
    assert bool(asked.notnull().any("prompt").all()), "a judge that is asked is asked about the set"
    change = (asked.sum("class", skipna=False) - plain.sel({"class": falls}).sum("class", skipna=False)).sel(
        strength=0.3
    )
    happy = (score.sel({"emotion": "happy", "class": "happy"}) - plain.sel({"class": "happy"})).sel(strength=0.3)
    each = [float(change.sel(prompt=p)) < 0 for p in PROMPTS if p != "sad-1" and not np.isnan(change.sel(prompt=p))]
    each += [float(happy.sel(prompt="sad-1")) > 0]
    table = claims.table(claims.claims(opened, claims.Rules(shuffles=9)))
    (row,) = table[table.what.str.contains("steering moves") & table.scope.str.contains("strength 0.3")].itertuples()
    assert (row.n, row.value) == (len(each), sum(each) / len(each))
    dose = next(
        d for d in overview.overview_of(reporting.evidence(opened)).doses if (d.concept, d.strength) == ("calm", 0.3)
    )
    known = change.dropna("prompt")
    assert dose.moved["none"] == (int((known < 0).sum()), known.size)
    terminal.outcome(load(tmp_path / "calm.yaml"), terminal.console())
    line = next(line for line in capsys.readouterr().out.splitlines() if "/ none" in line)
    assert line.split()[-1] == str(2 * len(PROMPTS)), "texts steered to calm are counted with the others"
