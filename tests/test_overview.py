"""What `nsteer report` says first: what was asked, did it work, against which control; of any study."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import textstore
import xarray as xr
from rich.console import Console

import nsteer
from nsteer import runner
from nsteer.cli import main
from nsteer.plan import check
from nsteer.report import overview, reporting
from nsteer.report.overview import judging, printing
from nsteer.report.overview.said import card_said


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Eight prompts: at 0.2 every steered text is judged to be the emotion, no random one; at 0.05 none."""
    return textstore.make(tmp_path_factory.mktemp("first") / "s.zarr", models=1, prompts=8, ops={"add": (0.2, 0.05)})


@pytest.fixture(scope="module")
def store_overview(store):
    return overview.overview_of(reporting.evidence(nsteer.open(store.path)), "s.zarr")


def printed(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(printing, "console", lambda: Console(width=80))
    with pytest.raises(SystemExit) as ended:
        main(["report", *words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_it_says_what_was_asked_and_whether_it_worked_against_which_control(store_overview):
    (asked,) = store_overview.asked
    assert "made/m0 steered to happy, sad, angry" in asked and "0.05, 0.2, on 8 prompts" in asked
    assert "controls: unsteered, random" in asked
    (answer,) = store_overview.answers
    assert answer.verdict == "yes" and answer.control == "random rotation"
    assert "+0.60 more" in answer.text and "n = 8 prompts" in answer.text and "p = 0.0078" in answer.text


def test_doses_are_those_that_were_planted(store_overview):
    at = {(dose.concept, dose.strength): dose for dose in store_overview.doses}
    assert set(at) == {(c, s) for c in ("", "happy", "sad", "angry") for s in (0.05, 0.2)}
    assert at["", 0.2].moved == {"none": (24, 24), "random": (0, 24)} and at["", 0.2].n == 24
    assert at["sad", 0.2].moved == {"none": (8, 8), "random": (0, 8)}
    assert at["sad", 0.05].moved == {"none": (0, 8), "random": (0, 8)}
    assert at["sad", 0.2].ratio == pytest.approx(30) and at["sad", 0.05].ratio == pytest.approx(1)
    assert at["sad", 0.2].repetitive == pytest.approx(1 / 8), "prompt 0 loops"
    assert at["", 0.2].changed == 1.0


def test_pairs_are_of_the_strength_that_is_usable_and_each_of_another_concept(store_overview, store):
    assert [pair.labels["strength"] for pair in store_overview.pairs] == ["0.05"] * 3, "at 0.2 all texts explode"
    assert {pair.labels["emotion"] for pair in store_overview.pairs} == {"happy", "sad", "angry"}
    opened = nsteer.open(store.path)
    for pair in store_overview.pairs:
        emotion = pair.labels["emotion"]
        part = opened["generations"].text.sel(emotion=emotion, strength=0.05, control="none").squeeze()
        plain = opened["unsteered"].text.squeeze()
        place = part.values.tolist().index(pair.text)
        assert plain.values.tolist()[place] == pair.unsteered and pair.prompt == "once"
        assert (pair.said, pair.said_unsteered) == ("neutral", "neutral")


def test_without_a_judge_nothing_is_claimed(tmp_path):
    textstore.make(tmp_path / "s.zarr", models=1, without=("judged", "judged_unsteered"))
    bare_overview = overview.overview_of(reporting.evidence(nsteer.open(tmp_path / "s.zarr")), "s.zarr")
    assert [answer.verdict for answer in bare_overview.answers] == ["undetermined"]
    assert all(not dose.moved for dose in bare_overview.doses) and bare_overview.pairs


def test_few_prompts_are_said_to_be_too_few(tmp_path):
    textstore.make(tmp_path / "s.zarr", models=1, prompts=3)
    (answer,) = overview.overview_of(reporting.evidence(nsteer.open(tmp_path / "s.zarr"))).answers
    assert answer.verdict == "not distinguished from its controls" and "n = 3 prompts, too few to decide" in answer.text


def test_the_first_screen_fits_eighty_columns_and_leaves_the_paper_out(store, capsys, monkeypatch):
    text = printed(capsys, monkeypatch, str(store.path))
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) < 70
    assert "Did it work?" in text and "yes: made/m0" in text and "24/24" in text
    assert "can not be compared" not in text and "claims" not in nsteer.open(store.path)


def test_the_claims_follow_where_they_are_asked_for(store, capsys, monkeypatch, tmp_path):
    page = tmp_path / "page.html"
    printed(capsys, monkeypatch, str(store.path), "-o", str(page))
    text = page.read_text(encoding="utf-8")
    assert 'id="summary"' in text and "<svg" in text and 'id="claims"' not in text
    asked = printed(capsys, monkeypatch, str(store.path), "--claims", "-o", str(page))
    assert "Did it work?" in asked and "rows can not be compared" in asked
    assert 'id="claims"' in page.read_text(encoding="utf-8") and "claims" in nsteer.open(store.path)
    assert json.loads(printed(capsys, monkeypatch, str(store.path), "--json"))


def test_the_paper_s_own_plans_are_known():
    both = {"a": {"preset": "jeong2026-generation"}, "b": {"preset": "jeong2026-comprehension"}}
    for name, protocols, theirs in (("jeong2026-zoo", {}, True), ("honesty", {}, False), ("mine", both, True)):
        assert overview.of_the_paper(SimpleNamespace(plan={"name": name}, protocols=protocols)) is theirs


# ---- the judge's card -----------------------------------------------------------------------------------------


def scores(*said: tuple[str, list[str]]) -> xr.DataArray:
    """Scores of passages: of each concept, the classes that win its samples ("" for a sample that is not there)."""
    classes, width = ["joy", "grief", "rage"], max(len(won) for _, won in said)
    values = np.full((len(said), width, len(classes)), np.nan)
    for i, (_, won) in enumerate(said):
        for j, winner in enumerate(won):
            if winner:
                values[i, j] = [0.8 if c == winner else 0.1 for c in classes]
    coords = {"emotion": [name for name, _ in said], "sample": list(range(width)), "class": classes}
    return xr.DataArray(values, coords, ("emotion", "sample", "class"))


def test_a_card_counts_what_a_judge_says_of_passages_of_known_concepts():
    score = scores(("happy", ["joy", "joy", "grief"]), ("sad", ["grief", "", ""]), ("calm", ["joy", "joy", "joy"]))
    card = judging.card("j", score, {"happy": "joy", "sad": "grief", "calm": None})
    assert card.counts == ((2, 1, 0), (0, 1, 0), (3, 0, 0))
    assert (card.k, card.n) == (3, 4) and card.accuracy == 0.75
    assert card.low == pytest.approx(0.3006, abs=1e-3) and card.high == pytest.approx(0.9544, abs=1e-3)
    assert card.silent == ("rage",) and card.unmatched == ("calm",)
    said = card_said(card)
    assert "Of 4 passages" in said and "0.75" in said and "happy as grief (1)" in said
    assert "Classes that it gives to none: rage." in said and "No class stands for: calm." in said


def test_no_card_where_no_class_can_be_matched():
    assert judging.card("j", scores(("happy", ["joy"])), {"happy": None}) is None
    assert judging.card("j", scores(("happy", [""])), {"happy": "joy"}) is None


def test_the_judge_of_a_run_has_a_card_of_the_text_set_s_own_passages(quickstart):
    """The toy judge was trained on the world that these passages tell of: it must know them, and the card says so."""
    evidence = reporting.evidence(nsteer.open(quickstart[0] / "store/quickstart.zarr"))
    (card,) = overview.overview_of(evidence, texts=0).cards
    kept = nsteer.open(quickstart[0] / "store/quickstart.zarr")["judge_passages"].score.isel(judge=0)
    assert card.rows == (*[e for e in kept.emotion.values.tolist() if e != "neutral"], "neutral")
    there = kept.notnull().all("class").values
    assert card.n == there.sum() == 252 and card.accuracy > 0.9
    best = kept["class"].values[kept.fillna(-1).argmax("class").values]
    own = np.array(card.rows)[:, None] == best
    assert card.k == int(own[there].sum())


def test_a_score_that_is_not_above_its_least_is_of_no_class():
    score = scores(("happy", ["joy", "joy"]), ("sad", ["grief", ""]))
    card = judging.card("j", score, {"happy": "joy", "sad": "grief"}, threshold=0.9)
    assert (card.k, card.n) == (0, 3) and set(card.silent) == {"joy", "grief", "rage"}


# ---- conditions written by hand -------------------------------------------------------------------------------


def test_edits_moved_as_many_texts_as_the_judge_s_scores_say(tmp_path, capsys, monkeypatch):
    """Of a class and of a set, towards it and away from it (a strength below 0), text by text against the unedited."""
    prompts = {
        "a": "tom walked to the",
        "b": "the rain fell on",
        "c": "hugo sobbed in the station . then hugo",
        "d": "a",
    }
    edit = {"op": "add", "direction": "d", "layers": [3, 2], "scale": "stream_norm", "strength": [-0.4, 0.2, 0.4]}
    targets = {"push": ({"happy"}, set()), "pull": (set(), {"sad", "angry"})}
    plan = {
        "name": "by-hand",
        "models": ["zoo/llama"],
        "texts": "zoo",
        "prompts": prompts,
        "directions": {"d": {"random": 0}},
        "edits": {"push": [edit], "pull": [{**edit, "strength": 0.3}]},
        "reads": {"end": {"layers": [3, 2], "pooling": "last"}},
        "generate": {"max_new_tokens": 8},
        "judge": {"classifier": "zoo/judge", "map": {"push": "happy", "pull": {"falls": ["sad", "angry"]}}},
        "threads": 1,
        "store": str(tmp_path / "s.zarr"),
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    assert not runner.run(check.load(tmp_path / "plan.yaml")).failures
    opened = nsteer.open(tmp_path / "s.zarr")
    score = opened["judged_edited"].score.sel({"model": "zoo/llama", "judge": "judge", "seed": 0}).load()
    doses = {(d.concept, d.strength): d for d in overview.overview_of(reporting.evidence(opened)).doses}
    assert set(doses) == {("push", -0.4), ("push", 0.2), ("push", 0.4), ("pull", 0.3)}
    for (name, strength), dose in doses.items():
        up, down = targets[name]
        moved = known = 0
        for prompt in prompts:
            edited, base = (
                {c: float(score.sel({"edit": e, "strength": s, "prompt": prompt, "class": c})) for c in up | down}
                for e, s in ((name, strength), ("none", 0.0))
            )
            rise = sum(edited[c] - base[c] for c in up) - sum(edited[c] - base[c] for c in down)
            known += not np.isnan(rise)
            moved += rise * np.sign(strength) > 0
        assert dose.moved == {"none": (moved, known)} and dose.n == len(prompts)
    assert len({dose.moved["none"] for dose in doses.values()}) > 1, "the numbers differ, so that they can be wrong"
    text = printed(capsys, monkeypatch, str(tmp_path / "s.zarr"))
    recorded = f"Recorded of zoo/llama: end (pooled streams) on {len(prompts)} prompts, 2 layers."
    assert recorded in " ".join(text.split())
    for (name, strength), dose in doses.items():
        row = next(line for line in text.splitlines() if name in line and f" {strength:g} " in line)
        assert f"{dose.moved['none'][0]}/{dose.moved['none'][1]}" in row


def test_layers_that_were_not_read_count_for_nothing(tmp_path):
    """Two of five layers, not in order: chance, and how many were read, are of those."""
    plan = {
        "name": "two",
        "models": ["zoo/llama"],
        "texts": "zoo",
        "emotions": ["happy", "sad", "angry"],
        "methods": {"reading": {"source": "comprehension", "samples": "all", "pooling": "mean", "baseline": "rest"}},
        "layers": [4, 2],
        "threads": 1,
        "store": str(tmp_path / "s.zarr"),
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    assert not runner.run(check.load(tmp_path / "plan.yaml")).failures
    seen = overview.overview_of(reporting.evidence(nsteer.open(tmp_path / "s.zarr")))
    assert "read at 2 layers of zoo/llama" in seen.asked[0]
    (curve,) = seen.layers
    assert (
        curve.best in (2, 4)
        and curve.chance == pytest.approx(1 / 3)
        and [np.isnan(a) for a in curve.accuracy] == [layer not in (2, 4) for layer in curve.layers]
    )
    assert curve.low > 1 / 3 and curve.answer("emotion").verdict == "yes", "the toy was trained to tell them apart"
