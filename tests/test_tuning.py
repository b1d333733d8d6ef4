"""The search of settings: on planted surfaces, and end to end on an embedded model with its judge."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from planside import PLAN, problems
from test_two_plans import lost, replaced

from nsteer import cli, runner
from nsteer.errors import InputError
from nsteer.plan import check
from nsteer.runner import tuning as searching
from nsteer.science.tuning import Score, around, best, propose, score
from nsteer.store import Store
from nsteer.upkeep.repair import repair

# ---- planted surfaces ----------------------------------------------------------------------------------------------


def searched(surface, coarse, cells: int, rounds: int = 6, **more) -> dict:
    """What a search that only asks `propose` has seen after its budget."""
    scores = {setting: surface(*setting) for setting in coarse}
    for _ in range(rounds):
        new = propose(scores, cells - len(scores), **more)
        assert len(set(new)) == len(new) and not set(new) & set(scores)
        scores |= {setting: surface(*setting) for setting in new}
        if not new:
            break
    assert len(scores) <= cells
    return scores


def hill(layer_set: str, strength: float, peak: float = 0.42, wall: float = 5.0) -> Score:
    """Best in layer set `middle` at `peak`; too perplexing from `wall` on."""
    height = {"early": 0.5, "middle": 0.9, "late": 0.2}[layer_set]
    value = height * math.exp(-((math.log(strength / peak) / 0.8) ** 2))
    return Score(value, 1 + strength, strength < wall)


COARSE = [(layer_set, s) for layer_set in ("early", "middle", "late") for s in (0.1, 0.3, 1.0)]


@pytest.mark.parametrize("peak", [0.15, 0.42, 0.7, 1.8, 0.06])
def test_the_planted_best_setting_is_found(peak):
    scores = searched(lambda label, s: hill(label, s, peak), COARSE, cells=30)
    layer_set, strength = best(scores)
    assert layer_set == "middle" and abs(math.log(strength / peak)) < 0.1
    assert scores[layer_set, strength].value > 0.97 * 0.9


def test_a_coarse_grid_alone_would_miss_it():
    assert best({setting: hill(*setting) for setting in COARSE})[1] == 0.3


def test_what_is_too_perplexing_is_not_chosen():
    scores = searched(lambda label, s: hill(label, s, peak=2.0, wall=0.7), COARSE, cells=30)
    assert 0.5 < best(scores)[1] < 0.7


def test_where_everything_is_too_strong_it_goes_down():
    scores = searched(lambda label, s: hill(label, s, peak=0.02, wall=0.03), COARSE, cells=30)
    assert best(scores)[1] < 0.03


def test_the_budget_is_kept_and_a_walk_is_the_same_again():
    assert len(searched(hill, COARSE, cells=11)) == 11
    assert searched(hill, COARSE, cells=10**6) == searched(hill, COARSE, cells=10**6)


def test_nothing_beyond_the_end_of_a_strength_or_below_what_does_nothing():
    assert max(around([0.5, 1.0], 1.0, max_strength=1.0)) < 1.0
    assert around([2.0], 2.0, rest=1.0) == [1.5, 2.828] or min(around([2.0], 2.0, rest=1.0)) > 1.0


def test_of_equals_the_least_strength_and_unknown_scores_are_nothing():
    known, unknown = Score(1.0, 1.0, True), Score(math.nan, 1.0, True)
    assert best({("a", 2.0): known, ("b", 1.0): known, ("c", 0.5): unknown}) == ("b", 1.0)
    assert best({("c", 0.5): unknown}) is None


def test_a_score_is_a_mean_under_a_geometric_mean():
    mean_score = score(np.array([0.0, 1.0]), np.array([1.0, 4.0]), limit=2.0)
    assert (mean_score.value, mean_score.ratio, mean_score.allowed) == (0.5, 2.0, True)
    assert not score(np.array([1.0]), np.array([np.nan]), limit=2.0).allowed, "nothing was written"


# ---- runs ----------------------------------------------------------------------------------------------------------

EMOTIONS = ["happy", "sad", "afraid"]
HELD = {"house": "the girl came to the house", "road": "he stood on the road"}


def plan(folder, name="plan", **changes):
    whole = {
        "name": "small",
        "models": [{"id": "zoo/llama", "label": "m", "device": "cpu"}],
        "texts": "zoo",
        "emotions": EMOTIONS,
        "methods": {"read": {"source": "comprehension", "samples": 3, "pooling": "mean", "baseline": "grand_mean"}},
        "steer": {
            "name": "push",
            "vectors": {"emotions": ["happy", "afraid"]},
            "layers": {"sets": {"late": [4], "two": [3, 1]}},
            "strengths": [0.05, 0.3],
            "prompts": {"walk": "she walked to the river", "door": "the old man opened the door"},
            "generate": {"max_new_tokens": 6},
            **changes.pop("steer", {}),
        },
        "tune": {"cells": 6, "rounds": 2, "held_out": {"prompts": HELD}, **changes.pop("tune", {})},
        "judge": "zoo/judge",
        "measure": {"lens": 0, "anisotropy": False},
        "threads": 1,
        "store": str(folder / f"{name}.zarr"),
        **changes,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(whole))
    return folder / f"{name}.yaml"


def tune(file, *settings):
    return searching.tune(check.load(file, settings))


def read(file, group):
    return Store(file.with_suffix(".zarr")).read(group).load()


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    file = plan(tmp_path_factory.mktemp("filled"))
    return file, tune(file)


def test_a_search_keeps_its_budget_and_chooses_the_best_it_saw(filled):
    file, search = filled
    assert not search.summary.failures and [line["emotion"] for line in search.lines] == ["happy", "afraid"]
    cells = Store(file.with_suffix(".zarr")).committed("generations")
    judged, unsteered = (read(file, name).score.sel({"judge": "judge"}) for name in ("judged", "judged_unsteered"))
    measured, plain = (read(file, name).perplexity for name in ("outcomes", "outcomes_unsteered"))
    prompts = ["walk", "door"]
    for line in search.lines:
        mine = [key for key in cells if key[1] == "push" and key[4] == line["emotion"] and key[6] == "none"]
        assert line["tried"] == len(mine) == 6
        values = {}
        for key in mine:
            at = dict(zip(("model", "op", "layer_set", "method", "emotion", "strength", "control"), key, strict=True))
            at["prompt"] = prompts
            there = judged.sel({**at, "class": line["emotion"], "seed": 0})
            other = plain.sel({"model": "m", "op": "push", "prompt": prompts, "seed": 0})
            ratio = float(np.exp(np.log(measured.sel({**at, "seed": 0}) / other).mean()))
            values[key[2], key[5]] = float(there.mean()) if ratio <= 3.0 else -1.0
        assert values[line["layer_set"], line["strength"]] == max(values.values())
        told = line["scores"]["tuned"]
        assert told["vector"]["value"] == pytest.approx(max(values.values()), rel=1e-5)
        zero = float(unsteered.sel({"model": "m", "op": "push", "prompt": prompts, "class": line["emotion"]}).mean())
        assert told["zero"]["value"] == pytest.approx(zero, rel=1e-5) and told["zero"]["n"] == 2
        assert told["vector"]["value"] > told["random"]["value"]


def test_the_score_held_out_stands_beside_the_one_tuned(filled):
    file, search = filled
    cells = Store(file.with_suffix(".zarr")).committed("generations")
    judged, stored = read(file, "judged").score.sel({"judge": "judge"}), read(file, "tuned")
    for line in search.lines:
        held = [key for key in cells if key[1] == "push.held-out" and key[4] == line["emotion"]]
        assert sorted((key[2], key[5], key[6]) for key in held) == [
            (line["layer_set"], line["strength"], control) for control in ("none", "random")
        ]
        for arm, control in (("vector", "none"), ("random", "random")):
            at = {"op": "push.held-out", "control": control, "prompt": list(HELD), "class": line["emotion"]}
            at |= {name: line[name] for name in ("model", "method", "emotion", "layer_set", "strength")}
            told = line["scores"]["held-out"][arm]
            assert told["value"] == pytest.approx(float(judged.sel(at).mean()), rel=1e-5) and told["n"] == 2
            assert told["low"] <= told["value"] + 1e-9 and told["value"] <= told["high"] + 1e-9
            kept = stored.score.sel({"emotion": line["emotion"], "split": "held-out", "arm": arm}).item()
            assert kept == pytest.approx(told["value"], rel=1e-5)
        best = stored.sel({"emotion": line["emotion"]}).squeeze()
        assert best.layer_set.item() == line["layer_set"] and float(best.best) == pytest.approx(line["strength"])
        assert json.loads(best.settings.item())["objective"] == "score"


def test_a_second_search_does_nothing_and_says_the_same(filled):
    file, search = filled
    again = tune(file)
    assert not again.summary.done and again.lines == search.lines


REPLACED, LOST = "another run with other settings", "a file of it is"


def test_more_budget_goes_on_from_there_and_a_run_counts(filled, tmp_path):
    shutil.copytree(filled[0].with_suffix(".zarr"), tmp_path / "plan.zarr")
    file = plan(tmp_path, tune={"cells": 7})
    assert 1 <= tune(file).summary.done["steering"] <= 2 * (1 + 3)
    other = plan(tmp_path, "other", steer={"vectors": {"emotions": ["happy"]}})
    grid = runner.run(check.load(other, ["steer.controls=[zero]"])).done["steering"]
    assert grid == 4
    search = tune(other)
    assert search.lines == filled[1].lines[:1]
    assert search.summary.done["steering"] == 6 - 4 + 3, "its coarse grid was there"
    assert not runner.run(check.load(other, ["steer.controls=[zero]"])).done, "and is still what the plan wants"


@pytest.mark.parametrize(
    ("path", "doing", "told"),
    [
        ("judged", replaced, REPLACED),
        ("outcomes", lost, LOST),
        ("judged_unsteered", lost, LOST),
        ("outcomes_unsteered", replaced, REPLACED),
    ],
)
def test_a_search_scores_what_it_asked_for_and_nothing_else(path, doing, told, filled, tmp_path, monkeypatch):
    """Another run puts a cell again, or a file of it is lost, between a round and its scores."""
    shutil.copytree(filled[0].with_suffix(".zarr"), tmp_path / "plan.zarr")
    file = plan(tmp_path)
    first, before = searching.read_whole, Store(tmp_path / "plan.zarr").committed("tuned")

    def watched(store, group, wanted):
        if group == path:
            monkeypatch.setattr(searching, "read_whole", first)
            doing(store, group, *next(iter(wanted.items())))
        return first(store, group, wanted)

    monkeypatch.setattr(searching, "read_whole", watched)
    with pytest.raises(InputError, match=told):
        tune(file)
    assert searching.read_whole is first and Store(tmp_path / "plan.zarr").committed("tuned") == before
    repair(Store(tmp_path / "plan.zarr"))
    assert tune(file).lines == filled[1].lines


def test_gc_keeps_what_a_search_walked_through(filled):
    from nsteer.upkeep import gc

    file, _ = filled
    gc_plan = gc.plan(Store(file.with_suffix(".zarr")), [check.load(file)])
    assert [
        cell for cell in gc_plan.cells if cell.group in ("generations", "judged", "ops", "tuned", "unsteered")
    ] == []


def test_the_command_prints_both_scores_and_the_controls(filled):
    words = ["tune", str(filled[0]), "--quiet"]
    done, told = (CliRunner().invoke(cli.main, [*words, *more]) for more in ([], ["--json"]))
    assert done.exit_code == 0, done.output
    assert "held-out" in done.stdout and "random" in done.stdout and "0 cells done" in done.stdout
    assert json.loads(told.stdout)["tuned"][0]["scores"]["held-out"]["zero"]["n"] == 2


def test_no_setting_and_no_class_are_said_so(tmp_path):
    judge = {"classifier": "zoo/judge", "map": {"afraid": None}}
    file = plan(tmp_path, judge=judge, tune={"perplexity_ratio": 0.0001, "cells": 5, "rounds": 1})
    lines = {line["emotion"]: line for line in tune(file).lines}
    assert lines["happy"]["reason"].startswith("no setting has a perplexity ratio of at most 0.0001: the lowest is")
    assert lines["happy"]["tried"] == 5
    assert lines["afraid"]["reason"] == "the judge has no class for this emotion"
    assert (read(file, "tuned").layer_set.values == "").all()


@pytest.mark.slow
def test_targets_of_calibrated_strengths_are_searched_too(tmp_path):
    """By either share of texts: the cells of one objective serve the other."""
    steer = {"strengths": {"kl": [0.2, 1.0], "tokens": 5}, "vectors": {"emotions": ["happy"]}}
    steer["layers"] = {"sets": {"two": [3, 1]}}
    file = plan(tmp_path, steer=steer, tune={"objective": "named", "cells": 3})
    (named,) = tune(file).lines
    file = plan(tmp_path, steer=steer, tune={"objective": "success", "cells": 2})
    (line,) = tune(file).lines
    assert (named["tried"], line["tried"]) == (3, 2)
    assert {value["value"] * value["n"] for value in line["scores"]["tuned"].values()} <= {0, 1, 2}, "shares of texts"
    strengths = read(file, "calibration").found.sel(
        {"emotion": "happy", "control": "none", "layer_set": line["layer_set"]}
    )
    at = {"strength": line["strength"], "model": "m", "method": "read"}
    tuned, held = (float(strengths.sel({**at, "op": op})) for op in ("push", "push.held-out"))
    assert tuned == held > 0, "the strength found is scored on the held-out prompts, not found again"
    assert not tune(file).summary.done


# ---- plans ---------------------------------------------------------------------------------------------------------

STEER = "steer: {strengths: [0.1, 0.2], layers: [1], prompts: {a: one}%s}\njudge: zoo/judge\nmeasure: {}\n"


@pytest.mark.parametrize(
    ("tune", "steer", "fault"),
    [
        ("{held_out: {prompts: {b: two}}}", "", "neither cells nor generations"),
        ("{cells: 1, held_out: {prompts: {b: two}}}", "", "1, with a coarse grid of 2 in zoo/llama"),
        ("{generations: 1, held_out: {prompts: {b: two}}}", "", "1, with a coarse grid of 2 in zoo/llama"),
        ("{cells: 9, held_out: {}}", "", "nothing"),
        ("{cells: 9}", "", "nothing"),
        ("{cells: 9, held_out: {prompts: {b: one}}}", "", "the prompt 'one' with seed 0, which the search sees"),
        ("{cells: 9, held_out: {seeds: [3]}}", "", "seeds in greedy decoding"),
        ("{cells: 9, held_out: {prompts: none}}", "", "'none'"),
        ("{cells: 9, steer: push, held_out: {prompts: {b: two}}}", "", "'push'"),
        ("{cells: 9, held_out: {prompts: {b: two}}}", ", controls: [random]", "an entry without the control `zero`"),
        ("{cells: 9, objective: best, held_out: {prompts: {b: two}}}", "", "'best'"),
    ],
)
def test_mistakes_are_told(tune, steer, fault):
    (mistake,) = problems(f"{PLAN}{STEER % steer}tune: {tune}\n")
    assert mistake.found == fault


def test_a_search_needs_a_judge_and_perplexities():
    text = f"{PLAN}{STEER % ''}tune: {{cells: 9, held_out: {{prompts: {{b: two}}}}}}\n"
    assert problems(text) == []
    assert [mistake.found for mistake in problems(text.replace("judge: zoo/judge\n", ""))] == ["no `judge`"]
    assert [mistake.found for mistake in problems(text.replace("measure: {}\n", ""))] == ["no perplexities"]
    assert [mistake.found for mistake in problems(text.replace("[0.1, 0.2]", "[0, 0.2]"))] == [
        "a strength of 0 or less in its grid"
    ]
