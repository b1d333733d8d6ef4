"""Outcomes of continuations: the regime detector against hand-labelled texts, scripts, success, turning points."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from ruamel.yaml import YAML

from nsteer.science import metrics, outcomes, targets
from nsteer.science.outcomes import Thresholds
from nsteer.science.targets import Target

LABELLED = YAML(typ="safe").load((Path(__file__).parent / "data" / "regimes.yaml").read_text(encoding="utf-8"))


def pieces(text: str) -> list[str]:
    """About what a subword tokenizer does: Han one by one, letters in fives with the space before them, marks alone."""
    return re.findall(r"\s?[^\W\d_\u4e00-\u9fff]{1,5}|[\u4e00-\u9fff]|\d{1,3}|\s|.", text)


def text_of(example: dict) -> str:
    return example["lead"] + example.get("unit", "") * example.get("times", 0) + example.get("tail", "")


def tokens_of(example: dict) -> list[int]:
    tokens = pieces(text_of(example))
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(tokens))}
    return [ids[piece] for piece in tokens]


def test_the_regime_detector_agrees_with_the_hand():
    assert len(LABELLED) >= 60
    kinds = Counter(example["kind"] for example in LABELLED)
    assert set(kinds) == {"coherent", "loop-en", "loop-zh", "random", "early-eos", "code"} and min(kinds.values()) >= 7
    wrong = [
        (example["kind"], text_of(example)[:40], named)
        for example in LABELLED
        if (named := outcomes.regime_of(metrics.repetition(tokens_of(example)), example["ratio"])) != example["regime"]
    ]
    assert len(wrong) <= 0.05 * len(LABELLED), wrong


def test_space_split_words_would_not_have_seen_the_chinese_loops():
    loops = [example for example in LABELLED if example["kind"] == "loop-zh"]
    assert all(metrics.repetition([hash(w) % 997 for w in text_of(example).split()]) == 0 for example in loops)


def test_loops_have_low_perplexity_so_repetition_is_asked_first():
    assert outcomes.regime_of(0.9, 0.01) == "repetitive" == outcomes.regime_of(0.9, 1000)
    assert outcomes.regime_of(0.9, math.nan) == "repetitive"
    assert outcomes.regime_of(0.1, math.nan) == "" == outcomes.regime_of(math.nan, 1.0)
    assert outcomes.regime_of(0.1, 12.0) == "explosive"
    assert outcomes.regime_of(0.1, 12.0, Thresholds(perplexity_ratio=20)) == "surgical"


def cube(values, **coords) -> xr.DataArray:
    return xr.DataArray(values, dims=tuple(coords), coords=coords)


def test_repetition_of_labelled_tokens_knows_empty_continuations():
    ids = cube([[[1, 1, 1, 1, 1, 1, 1, 1], [-1] * 8]], model=["m"], prompt=["a", "b"], token=range(8))
    repetition = outcomes.repetition(ids)
    assert repetition.dims == ("model", "prompt") and repetition.sel(model="m", prompt="a") == pytest.approx(0.8)
    assert math.isnan(repetition.sel(model="m", prompt="b"))


def test_regime_counts_leave_out_what_can_not_be_told():
    named = cube(np.array([["surgical", "repetitive", "", "surgical"]], object), strength=[0.1], prompt=list("abcd"))
    counts = outcomes.regime_counts(named).sel(strength=0.1)
    assert (
        counts["count"].values.tolist() == [2, 1, 0]
        and counts.n == 3
        and float(counts.share[0]) == pytest.approx(2 / 3)
    )


def test_perplexity_ratio_is_over_the_twin_by_label():
    above = cube([[8.0, 3.0]], strength=[0.1], prompt=["a", "b"])
    below = cube([3.0, 0.0], prompt=["b", "a"])
    assert outcomes.perplexity_ratio(above, below).sel(strength=0.1, prompt="b") == 1.0
    assert math.isnan(outcomes.perplexity_ratio(above, below).sel(strength=0.1, prompt="a"))


# ---- scripts -------------------------------------------------------------------------------------------------

SCRIPTS = {
    "a": "Latin", "É": "Latin", "ß": "Latin", "ｆ": "Latin", "ж": "Cyrillic", "λ": "Greek", "中": "Han", "々": "Han",
    "か": "Hiragana", "カ": "Katakana", "ｶ": "Katakana", "한": "Hangul", "ع": "Arabic", "ש": "Hebrew",
    "क": "Devanagari", "ก": "Thai", "1": "", "!": "", "。": "", " ": "", "😀": "", "µ": "", "𝐀": "",
}  # fmt: skip


@pytest.mark.parametrize(("character", "script"), SCRIPTS.items())
def test_scripts(character, script):
    assert outcomes.script_of(character) == script


def test_scripts_agree_with_the_regex_library_on_letters():
    regex = pytest.importorskip("regex")
    names = [
        "Latin",
        "Han",
        "Hiragana",
        "Katakana",
        "Hangul",
        "Cyrillic",
        "Greek",
        "Arabic",
        "Hebrew",
        "Thai",
        "Devanagari",
    ]
    both = missed = 0
    for character in map(chr, range(0x20, 0x30000, 23)):
        if not unicodedata.name(character, "") or not regex.match(r"\p{L}", character):
            continue  # a letter that this Python does not know yet
        for name in names:
            if regex.match(rf"\p{{Script={name}}}", character):
                both += 1
                missed += outcomes.script_of(character) != name
    assert both > 3_000 and missed / both < 0.01


def test_shares_are_of_letters_and_a_text_without_letters_is_a_hole():
    shares = outcomes.script_share(cube(np.array(["ab中文", "中", "12 !"], object), prompt=["x", "y", "z"]))
    assert shares.sel(prompt="x", script="Han") == 0.5 == shares.sel(prompt="x", script="Latin")
    assert shares.sel(prompt="y", script="Han") == 1.0 and np.isnan(shares.sel(prompt="z")).all()


def test_runs_keep_marks_and_changed_runs_know_the_twin():
    assert outcomes.runs("go 寻找 now 寻") == [("Latin", "go"), ("Han", "寻找"), ("Latin", "now"), ("Han", "寻")]
    assert outcomes.runs("हिन्दी") == [("Devanagari", "हिन्दी")]
    assert outcomes.changed_runs("go 寻找 now", "he went") == [("Han", "寻找")]
    assert outcomes.changed_runs("go 寻找 now", "他 went") == []


def test_the_table_of_changed_runs():
    text = cube(
        np.array([[["寻找 寻找 x", "x"]], [["да x", "x"]]], object),
        emotion=["sad", "calm"],
        strength=[0.1],
        prompt=["a", "b"],
    ).expand_dims(model=["m"])
    unsteered = cube(np.array([["hello", "hi"]], object), model=["m"], prompt=["a", "b"])
    table = outcomes.changed_table(text, unsteered)
    assert table.values.tolist() == [["m", "sad", "Han", "寻找", 2], ["m", "calm", "Cyrillic", "да", 1]]
    assert table.columns.tolist() == ["model", "emotion", "script", "token", "count"]


def test_promoted_tokens_by_script():
    token = cube(np.array([[[" search", "寻", "。"]]], object), emotion=["sad"], layer=[0], rank=[0, 1, 2])
    table = outcomes.promoted(token)
    assert sorted(map(tuple, table.values.tolist())) == [("sad", "Han", "寻", 1), ("sad", "Latin", "search", 1)]


# ---- success -------------------------------------------------------------------------------------------------

SEVEN = ["anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise"]


def test_the_map_allows_no_class_and_says_so():
    given = {"happy": "joy", "calm": None, "angry": "rage"}
    assert targets.targets_of(given, SEVEN, given) == {"happy": Target(("joy",)), "calm": None, "angry": None}
    assert targets.targets_of(["happy"], ["happy", "sad"]) == {"happy": Target(("happy",))}
    assert targets.targets_of(["joy"], SEVEN, {"joy": None}) == {"joy": None}
    assert targets.unmapped(["calm", "happy"], SEVEN, given) == ["calm: no class of the judge stands for it"]
    assert targets.unmapped(["angry"], ["a", "b"], given) == ["angry: its class 'rage' is not among the judge's (a, b)"]


JOYFUL = {"happy": "joy", "afraid": "fear", "calm": None}


def judged():
    classes = ["joy", "fear"]
    steered = np.array(
        [[[[0.9, 0.1], [0.3, 0.7], [np.nan, np.nan]]], [[[0.5, 0.5], [0.1, 0.9], [0.6, 0.4]]], [[[1, 0]] * 3]]
    )
    plain = np.array([[0.5, 0.5], [0.2, 0.8], [0.5, 0.5]])
    axes = {"emotion": ["happy", "afraid", "calm"], "strength": [0.1], "prompt": ["a", "b", "c"], "class": classes}
    return cube(steered, **axes), cube(plain, prompt=["a", "b", "c"], **{"class": classes})


def test_success_is_a_rise_over_the_twin_and_named_is_stricter():
    outcome = outcomes.success(*judged(), JOYFUL).isel(strength=0)
    assert outcome.success.sel(emotion="happy").values.tolist()[:2] == [1, 1]
    assert outcome.named.sel(emotion="happy").values.tolist()[:2] == [1, 0]
    assert outcome.success.sel(emotion="afraid").values.tolist() == [0, 1, 0]
    assert np.isnan(outcome.success.sel(emotion="calm")).all()  # the judge has no class for it
    assert math.isnan(outcome.success.sel(emotion="happy", prompt="c"))  # empty continuation
    assert float(outcome.change.sel(emotion="happy", prompt="a")) == pytest.approx(0.4)


def test_away_from_an_emotion_success_is_a_fall():
    outcome = outcomes.success(*judged(), JOYFUL, signs=-1).isel(strength=0)
    assert outcome.success.sel(emotion="happy").values.tolist()[:2] == [0, 0]
    assert outcome.named.sel(emotion="happy").values.tolist()[:2] == [0, 1]


def test_rates_carry_wilsons_interval():
    rate = outcomes.rate(cube([[1.0] * 37 + [0.0] * 3 + [np.nan]], strength=[0.1], prompt=range(41)))
    assert (rate.k.item(), rate.n.item()) == (37, 40) and round(rate.low.item(), 2) == 0.80


# ---- strength ------------------------------------------------------------------------------------------------

STRENGTHS = [0.01, 0.02, 0.03, 0.05]


def graded(shares, n=20):
    """Ones in these shares of n prompts, a strength each."""
    return cube(
        [[1.0] * round(s * n) + [0.0] * (n - round(s * n)) for s in shares], strength=STRENGTHS, prompt=range(n)
    )


def test_turning_points_of_a_planted_curve():
    named, moved = graded([0.1, 0.45, 0.6, 0.9]), graded([0.5, 0.8, 0.95, 1.0])
    clear = graded([1.0, 0.9, 0.85, 0.2])
    regime = xr.where(clear == 1, "surgical", "repetitive")
    points = outcomes.turning_points(named, moved, regime)
    assert (float(points.flip), float(points.sweet_spot), float(points.collapse)) == (0.03, 0.03, 0.05)
    never = outcomes.turning_points(named * 0, moved, xr.where(clear >= 0, "surgical", ""))
    assert math.isnan(never.flip) and math.isnan(never.collapse) and float(never.sweet_spot) == 0.05


def test_dose_response_finds_a_planted_trend():
    rng = np.random.default_rng(0)
    change = cube(
        np.array(STRENGTHS)[:, None] * 10 + rng.normal(0, 0.05, (4, 30)), strength=STRENGTHS, prompt=range(30)
    )
    response = outcomes.dose_response(change, n=300)
    assert float(response.trend) == 1.0 and float(response.trend_p) == pytest.approx(2 / 24)
    assert ((response.low < response["mean"]) & (response["mean"] < response.high)).all() and (response.n == 30).all()


# ---- projections ---------------------------------------------------------------------------------------------


def test_transport_of_what_was_put_in_is_one_and_of_a_random_direction_near_zero():
    rng = np.random.default_rng(0)
    width, norm, strength = 400, 50.0, 0.1
    plain = rng.normal(size=width)
    plain *= norm / np.linalg.norm(plain)
    vectors = {e: v / np.linalg.norm(v) for e, v in zip(["joy", "fear"], rng.normal(size=(2, width)), strict=True)}
    added = {"none": lambda e: vectors[e], "random": lambda e: (r := rng.normal(size=width)) / np.linalg.norm(r)}
    emotions, controls = ["joy", "fear"], ["none", "random"]
    steered = np.zeros((2, 2, 2, 2))  # emotion, control, layer, target
    for i, e in enumerate(emotions):
        for j, c in enumerate(controls):
            here = plain + strength * norm * added[c](e)
            steered[i, j, 1] = [here @ vectors[t] for t in emotions]
    axes = {"emotion": emotions, "control": controls, "layer": [0, 1], "target": emotions}
    unsteered = cube([[0.0, 0.0], [plain @ vectors[t] for t in emotions]], layer=[0, 1], target=emotions)
    injected = cube([0.0, strength * norm], layer=[0, 1])
    transport = outcomes.transport(cube(steered, **axes), unsteered, injected)
    assert transport.transport.sel(control="none").values == pytest.approx([1.0, 1.0])
    assert np.abs(transport.transport.sel(control="random").values).max() < 0.2
    assert transport.delta.sel(control="none", emotion="joy") == pytest.approx(5.0)


def test_the_estimate_of_what_is_injected():
    norm = cube([[[2.0], [4.0]], [[9.0], [9.0]]], emotion=["neutral", "joy"], sample=[0, 1], layer=[0])
    injection = outcomes.estimated_injection(norm, cube([-0.1], strength=[-0.1]))
    assert injection.values.ravel().tolist() == pytest.approx([0.3])
