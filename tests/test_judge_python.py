"""The judge that is a function of the user's own: never imported by a plan alone, and part of what it judged."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner
from planside import PLAN, STEER

import nsteer
from nsteer import cli
from nsteer.errors import ExecutionError, ModelError, PlanError
from nsteer.plan import check, reader
from nsteer.runner import confirm, judging
from nsteer.stages import judges
from nsteer.stages.judges import Asked, Tools

CODE = """\
import pathlib
pathlib.Path(__file__).with_name("ran").write_text("it ran")
class Kept: pass
def length(texts): return [len(one) for one in texts]
def pair(texts): return [[len(one), 1] for one in texts]
def wrong(texts): return [1, 2, 3]
def broken(texts): raise KeyError("no such word")
"""


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "mine.py").write_text(CODE)

    def study_of(function: str, classes: str = "[long]", **more: str):
        fields = "".join(f", {name}: {value}" for name, value in more.items())
        text = f"{PLAN}{STEER}\njudge: {{python: {{function: '{function}', classes: {classes}{fields}}}}}\n"
        (tmp_path / "p.yaml").write_text(text)
        return check.study(reader.read(tmp_path / "p.yaml"))

    study_of.folder = tmp_path
    return study_of


def loaded(study, trusted: bool = True):
    spec = study.plan.judge
    about = judges.known(spec, study)
    return judges.load(spec, about, Tools(print, trusted, np.zeros, list, list)), about


def test_a_plan_alone_runs_no_code(plan):
    study = plan("mine:length")
    with pytest.raises(PlanError, match="read the code, then run with --trust-judge"):
        confirm(study, True, False)
    with pytest.raises(ModelError, match="runs only with --trust-judge"):
        loaded(study, trusted=False)
    assert not (plan.folder / "ran").exists()
    confirm(study, True, True)
    loaded(study)
    assert (plan.folder / "ran").exists()


def test_scores_are_what_the_function_returns(plan):
    reader, about = loaded(plan("mine:length", threshold="3"))
    scores = reader.read([Asked("four"), Asked(""), Asked("sixsix")])["score"]
    np.testing.assert_array_equal(scores, [[4], [np.nan], [6]])
    assert about.threshold == 3
    reader, about = loaded(plan("mine:pair", "[long, one]"))
    np.testing.assert_array_equal(reader.read([Asked("four")])["score"], [[4, 1]])
    assert np.isnan(about.threshold)


@pytest.mark.parametrize(("function", "words"), [("mine:wrong", "shape"), ("mine:broken", "KeyError")])
def test_a_function_that_fails_says_how(plan, function, words):
    with pytest.raises(ExecutionError, match=words):
        loaded(plan(function))[0].read([Asked("four")])


def test_its_code_is_its_identity(plan):
    study = plan("mine:length")
    before = judges.known(study.plan.judge, study)
    (plan.folder / "mine.py").write_text(CODE.replace("len(one) for", "2 * len(one) for"))
    after = judges.known(study.plan.judge, study)
    assert before.identity != after.identity and str(plan.folder) not in str(after.identity) + str(after.said)
    with pytest.raises(ModelError, match="changed since it was checked"):
        judges.load(study.plan.judge, before, Tools(print, True, np.zeros, list, list))


@pytest.mark.parametrize(
    ("function", "phrase"),
    [("other:length", "no module 'other'"), ("mine:lenght", "does not define"), ("mine.length", "'mine.length'")],
)
def test_a_function_that_is_not_there(plan, function, phrase):
    with pytest.raises(PlanError) as caught:
        plan(function)
    (problem,) = caught.value.problems
    assert problem.path == "judge.python.function" and phrase in problem.found
    assert not (plan.folder / "ran").exists()


def test_texts_that_are_known_are_told_where_the_memory_of_others_is_full(plan, monkeypatch):
    """Of one question, some known and some new: what is known is taken before what is kept makes room."""
    monkeypatch.setattr(judging.Scored, "MAX_TEXTS", 1)
    reader, about = loaded(plan("mine:length"))
    turn = judging.Turn(None, "judge", None, about, reader)
    judging.read(turn, [Asked("a"), Asked("bb")])
    readings = judging.read(turn, [Asked("bb"), Asked("cccc"), Asked("a"), Asked("cccc")])
    assert readings["score"].tolist() == [[2], [4], [1], [4]]


def test_a_text_that_steering_left_as_it_was_has_the_score_that_it_had(tmp_path):
    """A judge that says another thing of a text each time, as rounding does in another batch, over two runs."""
    (tmp_path / "mine.py").write_text(
        "import random\ndef noisy(texts): return [len(t) + random.random() for t in texts]"
    )
    text = """
name: noisy
models: [zoo/llama]
directions: {up: {random: 1}}
steer:
  vectors: {directions: [up]}
  layers: [3, 1]
  strengths: [0.01]
  prompts: {a: tom walked to, b: she saw the plain, c: the}
  generate: {max_new_tokens: 6}
judge: {python: {function: "mine:noisy", classes: [long]}}
store: noisy.zarr
"""
    (tmp_path / "p.yaml").write_text(text)
    for setting in ("threads=1", "steer.strengths=[0.01, 0.02, 4]"):
        words = ["run", "p.yaml", "--trust-judge", "--quiet", "--set", setting]
        done = CliRunner().invoke(cli.main, words, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    results = nsteer.open("noisy.zarr")
    texts, plain = results["generations"].text, results["unsteered"].text
    same = (texts == plain).load()
    moved = results["judged"].score.sel({"class": "long"}) - results["judged_unsteered"].score.sel({"class": "long"})
    assert (same.sel(strength=[0.01, 0.02]).any("prompt")).all() and not same.all()
    assert (moved.where(same, 0) == 0).all() and (abs(moved.where(~same, 1)) > 0).all()
