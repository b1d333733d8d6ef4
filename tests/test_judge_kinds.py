"""Judges of every kind give labelled scores, by what they say they are: rules, and questions with given answers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import workers_here
import xarray as xr
from click.testing import CliRunner
from planside import PLAN, STEER, problems, study
from test_cluster import same
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsteer
from nsteer import cluster, runner, zoo
from nsteer.cli import main
from nsteer.plan import check, rules
from nsteer.plan.schema import Judge
from nsteer.report.claims import Evidence, Rules
from nsteer.runner.model import ModelRun
from nsteer.science import outcomes
from nsteer.stages import judges, sizing
from nsteer.stages.judges import Asked, Tools
from nsteer.store import Store

TEXT = """\
name: judged
models: [zoo/llama]
texts: zoo
emotions: [happy, sad]
methods: {read: jeong2026-comprehension}
steer:
  layers: [4, 2]
  strengths: [0.1]
  prompts: {walk: tom walked to the market and, home: lena came home}
  generate: {max_new_tokens: 4}
judges:
  words: {rule: {words: {happy: [smiled, laughed, won, danced], sad: [wept, cried]}, score: count}}
  zoo: zoo/judge
  broken: {rule: {regex: {happy: '(\\w+\\s*)+!'}}}
  asked: {choices: {question: '{prompt} {text} . she felt', answers: [happy, sad, afraid], chat: never}}
  about:
    choices: {question: '{text} . she felt {concept} ,', answers: {yes: and, no: but}, chat: never}
    map: {sad: gloomy}
store: STORE
"""
QUESTION = "{prompt} {text} . she felt"


def rule(**fields) -> judges.Reader:
    spec = Judge(rule=fields)
    about = judges.known(spec, study(PLAN))
    return judges.load(spec, about, Tools(print, False, np.zeros, list, list))


def scores(reader: judges.Reader, *texts: str) -> list[dict[str, float]]:
    matrix = reader.read([Asked(text) for text in texts])["score"]
    return [dict(zip(reader.classes, row.tolist(), strict=True)) for row in matrix]


def test_a_rule_finds_whole_words_phrases_and_patterns():
    reader = rule(words={"refusal": ["I can not", "sorry"], "joy": ["glad"]}, regex={"joy": [r"ha(ha)+"]})
    rows = scores(reader, "I  can\nnot help", "Sorry!", "gladly", "hahaha", "")
    assert rows[0] == {"refusal": 1, "joy": 0} and rows[1]["refusal"] == 1
    assert rows[2] == {"refusal": 0, "joy": 0} and rows[3]["joy"] == 1
    assert all(np.isnan(score) for score in rows[4].values())
    assert scores(rule(words={"joy": "glad"}, whole_word=False, case=True), "gladly", "Glad") == [
        {"joy": 1},
        {"joy": 0},
    ]


def test_a_rule_counts_and_counts_per_token():
    assert scores(rule(words={"a": ["ha", "ho"]}, score="count"), "ha ho ha , he") == [{"a": 3}]
    assert scores(rule(words={"a": ["ha", "ho"]}, score="per_token"), "ha ho ha , he") == [{"a": pytest.approx(0.6)}]


def test_the_rules_text_is_its_identity():
    plan = study(PLAN)
    said = [{"words": {"a": ["x"]}}, {"words": {"a": ["y"]}}, {"words": {"a": ["x"]}, "case": True}]
    identities = [judges.known(Judge(rule=fields), plan).identity for fields in said]
    assert identities[0] != identities[1] and identities[0] != identities[2]


@pytest.mark.parametrize(
    ("rule", "where", "phrase"),
    [
        ("{}", "judge.rule", "a rule without a class"),
        ("{regex: {a: '(x'}}", "judge.rule.regex.a", "does not compile"),
        (r"{regex: {a: [ok, '(a+)+$']}}", "judge.rule.regex.a[1]", "runs away"),
        ("{regex: {a: '((x{99}){99}){99}'}}", "judge.rule.regex.a", "counted repeats that make 970,299"),
        ("{regex: {a: 'x*'}}", "judge.rule.regex.a", "found in every text"),
        ("{words: {a: [' ']}}", "judge.rule.words.a[0]", "white space alone"),
    ],
)
def test_a_rule_that_can_be_none(rule, where, phrase):
    (problem,) = problems(PLAN + STEER, f"judge={{rule: {rule}}}")
    assert problem.path == where and phrase in problem.found


@pytest.mark.parametrize(
    ("choices", "where", "phrase"),
    [
        ("{question: 'is it?', answers: [yes, no]}", "question", "a question without {text}"),
        ("{question: '{text} {concpt}?', answers: [yes, no]}", "question", "the placeholder {concpt}"),
        ("{question: '{text}', answers: [yes]}", "answers", "one answer"),
        ("{question: '{text}', answers: {a: yes, b: Yes}}", "answers", "'Yes' as an answer of 'a' and of 'b'"),
        ("{question: '{text}', answers: [yes, no], target: yes}", "target", "'yes'"),
        ("{question: '{text} {concept}', answers: [yes, no], target: ja}", "target", "'ja'"),
        ("{question: '{text}', answers: [yes, no], model: zoo/judge}", "model", "'zoo/judge', a classifier"),
        ("{question: '{text}', answers: [yes, no], model: zoo/lama}", "model", "did you mean 'llama'"),
    ],
)
def test_a_question_that_can_be_none(choices, where, phrase):
    (problem,) = problems(PLAN + STEER, f"judge={{choices: {choices}}}")
    assert problem.path == f"judge.choices.{where}" and phrase in problem.found


def test_a_judge_is_of_one_kind_and_all_are_told_at_once():
    both = "{rule: {words: {a: x}}, classifier: zoo/judge}"
    told = problems(
        PLAN + STEER, f"judges={{a: {both}, b: {{}}, c: {{rule: {{words: {{a: x}}}}, device: cpu}}, d: zoo/x}}"
    )
    assert [problem.path for problem in told] == ["judges.a", "judges.b", "judges.c.device", "judges.d"]
    assert "classifier and rule" in told[0].found and told[1].found == "a judge of no kind"
    assert problems(PLAN + STEER, "judge=zoo/judge", "judges={judge: zoo/judge}")[0].path == "judges.judge"
    assert problems(PLAN, "judges={a: zoo/judge}")[0].expected == "a judge only beside `steer` or `generate`"


def test_a_text_is_of_a_class_above_the_least_or_of_the_likeliest():
    coords = {"class": ["a", "b"], "text": range(4), "threshold": np.nan}
    score = xr.DataArray([[0.2, 0.8], [0.0, 0.0], [0.6, 0.7], [np.nan, np.nan]], coords, ("text", "class"))
    assert outcomes.says(score).values.tolist() == [[0, 1], [1, 0], [0, 1], [0, 0]]
    ruled = score.assign_coords(threshold=0.5)
    assert outcomes.says(ruled).values.tolist() == [[0, 1], [0, 0], [1, 1], [0, 0]]
    assert outcomes.named_class(ruled).values.tolist() == [1, -1, 1, -1]
    assert outcomes.named_class(score.assign_coords(threshold=0.0).clip(max=0.6)).values.tolist() == [1, -1, -1, -1]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    place = tmp_path_factory.mktemp("judges")
    (place / "p.yaml").write_text(TEXT.replace("STORE", str(place / "p.zarr")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "flaw", lambda *_: "")  # a pattern that the checks let pass, and that runs away there
        patch.setattr(rules, "SECONDS", 1e-9)
        patch.setattr(rules, "count_matches", run_away)
        return place / "p.yaml", runner.run(check.load(place / "p.yaml"))


_found = rules.count_matches


def run_away(patterns, text, once=False, seconds=rules.SECONDS):
    if patterns[0].pattern.endswith(")+!"):
        raise TimeoutError
    return _found(patterns, text, once)


def opened(file):
    return nsteer.open(file.with_suffix(".zarr"))


def test_a_judge_that_fails_leaves_the_others(judged):
    _, summary = judged
    assert {failure.stage for failure in summary.failures} == {"judged", "judged_unsteered"}
    assert {failure.cell[-1] for failure in summary.failures} == {"broken"} and len(summary.failures) == 5
    assert all(failure.kind == "permanent" and "runs away" in failure.reason for failure in summary.failures)
    assert summary.done["judged"] == 4 * 4 and summary.done["judged_unsteered"] == 4


def test_check_tells_the_texts_that_each_judge_is_still_to_judge(judged):
    left = {
        (size.judge, size.stage): (size.cells, size.done, size.rows, size.tokens)
        for size in sizing.size(check.load(judged[0])).stages
        if size.judge
    }
    assert {judge for judge, _ in left} == {"words", "zoo", "broken", "asked", "about"}
    assert left["words", "judged"] == (4, 4, 0, 0) and left["words", "judged_unsteered"] == (1, 1, 0, 0)
    assert left["broken", "judged"] == (4, 0, 4 * 2, 0) and left["broken", "judged_unsteered"] == (1, 0, 2, 0)
    said = CliRunner().invoke(main, ["check", str(judged[0])]).output
    assert re.search(r"zoo/llama +judged by broken +4 +0 +8 ", said)


def test_every_judge_has_its_classes_and_says_what_its_scores_are(judged):
    judgements = opened(judged[0])["judged"]
    known = {
        name: sorted(
            judgements["class"]
            .values[
                judgements.score.sel({"judge": name}).notnull().any(set(judgements.score.dims) - {"judge", "class"})
            ]
            .tolist()
        )
        for name in ("words", "asked", "about")
    }
    assert known == {"words": ["happy", "sad"], "asked": ["afraid", "happy", "sad"], "about": ["gloomy", "happy"]}
    assert judgements.threshold.sel({"judge": "about"}).item() == 0.5 and np.isnan(
        judgements.threshold.sel({"judge": "asked"}).item()
    )
    assert "answers" in judgements.unit.sel({"judge": "asked"}).item()
    texts = opened(judged[0])["generations"].text.squeeze().sel({"emotion": "happy", "control": "none"})
    score = judgements.score.squeeze().sel({"emotion": "happy", "control": "none", "judge": "words", "class": "happy"})
    for prompt in ("walk", "home"):
        words = texts.sel({"prompt": prompt}).item().split()
        assert score.sel({"prompt": prompt}).item() == sum(
            word in ("smiled", "laughed", "won", "danced") for word in words
        )


def oracle(question: str, answers: list[str]) -> np.ndarray:
    """The probability of each answer by plain transformers, a spelling at a time, each in a forward of its own."""
    model = AutoModelForCausalLM.from_pretrained(zoo.path("llama"), dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(zoo.path("llama"))
    asked, probabilities = words(question)["input_ids"], []
    for answer in answers:
        forms = {f"{space}{form}" for form in (answer, answer.capitalize()) for space in ("", " ")}
        total = 0.0
        for ids in {tuple(words(form, add_special_tokens=False)["input_ids"]) for form in forms}:
            with torch.no_grad():
                logp = model(torch.tensor([[*asked, *ids]])).logits[0].log_softmax(-1)
            total += float(sum(logp[len(asked) - 1 + i, token] for i, token in enumerate(ids)).exp())
        probabilities.append(total)
    return np.array(probabilities)


def text_of(file, product: str, **at) -> str:
    return opened(file)[product].text.sel(at).squeeze().item()


def test_shares_and_mass_are_those_of_the_model(judged):
    file, _ = judged
    judgements, at = opened(file)["judged"], {"emotion": "sad", "control": "none"}
    for label, prompt in {"walk": "tom walked to the market and", "home": "lena came home"}.items():
        text = text_of(file, "generations", **at, prompt=label)
        mass = oracle(f"{prompt} {text} . she felt", ["happy", "sad", "afraid"])
        by_asked = judgements.sel(
            {**at, "prompt": label, "judge": "asked", "class": ["happy", "sad", "afraid"]}
        ).squeeze()
        np.testing.assert_allclose(by_asked.score.values, mass / mass.sum(), rtol=2e-3)
        np.testing.assert_allclose(by_asked.mass.values, [mass.sum()] * 3, rtol=2e-3)
        mass = oracle(f"{text} . she felt gloomy ,", ["and", "but"])
        by_about = judgements.sel({**at, "prompt": label, "judge": "about", "class": "gloomy"}).squeeze()
        assert by_about.score.item() == pytest.approx(mass[0] / mass.sum(), rel=2e-3)


def test_unsteered_texts_are_asked_about_all_that_is_steered_to(judged):
    unsteered = opened(judged[0])["judged_unsteered"].score.sel({"judge": "about"}).squeeze()
    assert unsteered.sel({"class": ["happy", "gloomy"]}).notnull().all()
    steered = opened(judged[0])["judged"].score.sel({"judge": "about", "emotion": "happy"}).squeeze()
    assert steered.sel({"class": "happy"}).notnull().all() and steered.sel({"class": "gloomy"}).isnull().all()


def test_a_changed_question_judges_again_and_alone(judged):
    file, _ = judged
    settings = ["judges.asked.choices.question='{text} . she was'", "judges.broken=null"]
    with pytest.raises(nsteer.errors.PlanError):
        check.load(file, settings)
    lines = [line for line in file.read_text().splitlines(True) if "broken" not in line]
    other = file.with_name("other.yaml")
    other.write_text("".join(lines))
    summary = runner.run(check.load(other, settings[:1]))
    assert {k: n for k, n in summary.done.items() if n} == {"judged": 4, "judged_unsteered": 1}
    assert not summary.failures
    assert not any(runner.run(check.load(other, settings[:1])).done.values())


def test_the_model_that_wrote_reads_before_it_is_let_go(tmp_path, monkeypatch):
    """No second load where texts are written, one where they were there; the scores are the same."""
    loads, load = [], ModelRun.load

    def counted(model):
        loads.append(model.label)
        return load(model)

    monkeypatch.setattr(ModelRun, "load", counted)
    plan = TEXT.replace("[zoo/llama]", "[zoo/llama, zoo/gpt2]").replace("STORE", str(tmp_path / "s.zarr"))
    plan = "\n".join(line for line in plan.splitlines() if not line.startswith(("  words", "  zoo", "  broken")))
    (tmp_path / "p.yaml").write_text(plan)
    done = runner.run(nsteer.load(tmp_path / "p.yaml"))
    assert loads == ["zoo/llama", "zoo/gpt2"] and not done.failures
    assert done.skipped["judged"] == 0 and done.done["judged"] == 2 * 2 * 4  # models, judges, cells
    store = Store(tmp_path / "s.zarr")
    first = nsteer.open(tmp_path / "s.zarr")["judged"].load()
    for group in ("judged", "judged_unsteered"):
        for cell in store.committed(group):
            store.drop(group, cell)
    assert not runner.run(nsteer.load(tmp_path / "p.yaml")).failures
    assert len(loads) > 2
    again = nsteer.open(tmp_path / "s.zarr")["judged"].load()
    xr.testing.assert_allclose(first.score, again.score)


def test_answers_of_several_tokens_count_by_all_of_them(judged, tmp_path):
    file, _ = judged
    lines = [
        line
        for line in file.read_text().splitlines(True)
        if not line.startswith(("  words", "  zoo", "  broken", "  about", "    choices", "    map"))
    ]
    other = file.with_name("longer.yaml")
    other.write_text("".join(lines))
    longer = "judges.asked.choices.answers={up: [very happy], down: [sad and afraid]}"
    assert not runner.run(check.load(other, [longer])).failures
    judgement = (
        opened(file)["judged"].sel({"emotion": "sad", "control": "none", "prompt": "home", "judge": "asked"}).squeeze()
    )
    text = text_of(file, "generations", emotion="sad", control="none", prompt="home")
    up, down = oracle(f"lena came home {text} . she felt", ["very happy", "sad and afraid"])
    assert judgement.score.sel({"class": "up"}).item() == pytest.approx(up / (up + down), rel=2e-3)
    alike = "judges.asked.choices.answers={up: [sad], down: [sad and afraid]}"
    (failure,) = runner.run(check.load(other, [alike])).failures
    assert failure.stage == "judged" and "can not be distinguished" in failure.reason


def test_judges_stand_in_the_order_of_the_plan(judged):
    """`asked` and `about` read first, in the turn of the model that wrote; `broken` gives nothing."""
    file, _ = judged
    opened = nsteer.open(file.with_suffix(".zarr"))
    wanted = list(check.load(file).plan.all_judges())
    assert wanted == ["words", "zoo", "broken", "asked", "about"]
    for group in ("judged", "judged_unsteered", "judges"):
        assert opened[group].judge.values.tolist() == wanted, group
    assert set(Evidence(opened, Rules(), None).judges) == {*wanted} - {"broken"}


# ---- a judge that reads under the model which wrote ---------------------------------------------------------------

READERS = """
judges:
  asked: {choices: {question: '{text} . she felt', answers: [happy, sad], chat: never}}
  again: {choices: {question: '{text} . he felt', answers: [happy, sad], chat: never}}
"""


def by_writers(folder):
    folder.mkdir()
    text = TEXT[: TEXT.index("judges:")].replace("strengths: [0.1]", "strengths: [0.1]\n  controls: [zero]")
    (folder / "plan.yaml").write_text(text + READERS + f"store: {folder / 'plan.zarr'}\n")
    return folder / "plan.yaml"


def test_judges_that_read_under_the_writer_load_it_once(tmp_path, monkeypatch):
    """Where its texts are there already too: all of them in its own turn."""
    plan, loads, load = by_writers(tmp_path / "alone"), list[str](), ModelRun.load
    monkeypatch.setattr(ModelRun, "load", lambda self: (loads.append(self.label), load(self))[1])
    text = plan.read_text()
    plan.write_text(text.replace(READERS, "\n"))
    assert not runner.run(check.load(plan)).failures
    plan.write_text(text)
    loads.clear()
    assert runner.run(check.load(plan)).done["judged"] == 2 * 2 and loads == ["zoo/llama"]
    loads.clear()
    assert not runner.run(check.load(plan)).done and not loads


def test_workers_that_hold_the_writer_judge_by_it(tmp_path):
    plans, started = [by_writers(tmp_path / name) for name in ("alone", "shared")], []

    class Watched(workers_here.Here):
        def start(self, start) -> None:
            started.append(start.model)
            super().start(start)

    assert not runner.run(check.load(plans[0])).failures
    summary = cluster.fill(check.load(plans[1]), Watched, workers=2)
    assert not summary.failures and summary.done["judged"] == 2 * 2 and summary.done["judged_unsteered"] == 2
    assert set(started) == {"zoo/llama"}, "no worker for the judge alone"
    same(*(plan.with_suffix(".zarr") for plan in plans))
    again = cluster.fill(check.load(plans[1]), Watched, workers=2)
    assert not again.done and not again.failed_before
