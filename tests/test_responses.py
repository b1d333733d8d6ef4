"""Contrasts whose texts the model writes under system prompts, of which a judge keeps some: persona vectors."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import oracle
import pytest
import workers_here
from click.testing import CliRunner
from judge_server import Judge as Server
from judge_server import completion
from test_cluster import same
from test_sources import llama

import nsteer
from nsteer import cluster, runner, zoo
from nsteer.cli import main
from nsteer.errors import PlanError
from nsteer.plan import check
from nsteer.program.randomness import generator, uniforms
from nsteer.report import overview, reporting
from nsteer.runner import runs
from nsteer.runner.shards import Shard
from nsteer.runner.stopping import Interrupted, Stop
from nsteer.science.directions import sides_shuffled
from nsteer.store import Store
from nsteer.upkeep.verify import verify

WORDS = ["grinned", "danced", "whistled", "sunshine", "balloon", "laughter", "bright", "merry", "sunny", "prize"]
TEXT = f"""\
name: persona
models: [zoo/llama]
directions:
  happy:
    contrast:
      preset: persona2025
      positive: [write a story about someone feeling happy ., tell a short story about a person who feels happy .]
      negative: [write a story about someone feeling sad .]
      generate:
        questions: [write a story ., tell a short story about a person ., describe a moment .]
        samples: 4
        max_new_tokens: 14
      filter: {{judge: words, above: null, below: null, coherence: null}}
judges:
  words: {{rule: {{words: {{happy: [{", ".join(WORDS)}]}}}}}}
store: STORE
"""
WRITTEN = {"positive": 24, "negative": 12}


def plan(folder, **changes: str):
    """The plan, with parts of its text replaced, its store in a folder."""
    text = TEXT.replace("STORE", str(folder / "persona.zarr"))
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    file = folder / "persona.yaml"
    file.write_text(text)
    return file


def changed(folder, *settings: str):
    return check.load(plan(folder), settings)


CELL = {"model": "zoo/llama", "method": "contrast", "concept": "happy"}
FILTER = "directions.happy.contrast.filter"


@pytest.fixture(scope="module")
def persona(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persona")
    summary = nsteer.run(nsteer.load(plan(folder)))
    assert not summary.failures and not summary.failed_before
    assert verify(Store(folder / "persona.zarr")).clean
    opened = nsteer.open(folder / "persona.zarr")
    texts, judged = (opened[group, "zoo/llama"].load().squeeze() for group in ("responses", "responses_judged"))
    return folder, summary, texts, judged


def test_answers_are_those_of_each_side_to_the_same_questions(persona):
    _, _, texts, _ = persona
    words = llama()[2]
    for side, count in WRITTEN.items():
        answers = texts.sel(side=side)
        there = answers.isel(response=np.flatnonzero((answers.prompt != "").values))
        assert there.response.values.tolist() == list(range(count))
        assert len(set(zip(there.system.values.tolist(), there.question.values.tolist(), strict=True))) == count // 4
        for k in range(count):
            turns = [
                {"role": "system", "content": str(answers.system.sel(response=k).item())},
                {"role": "user", "content": str(answers.question.sel(response=k).item())},
            ]
            shown = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert answers.prompt.sel(response=k).item() == shown
            assert ("happy" if side == "positive" else "sad") in turns[0]["content"]


def test_an_answer_is_drawn_as_plain_sampling_would_draw_it(persona):
    """By hooks and an inverse CDF of its own, one text at a time: of both sides, and of the last block."""
    _, _, texts, _ = persona
    module, blocks, words = llama()
    for side, k in (("positive", 17), ("negative", 3)):
        answer = texts.sel(side=side, response=k)
        tokens = words(answer.prompt.item(), add_special_tokens=False)["input_ids"]
        draws = uniforms(14, 0, "response", "happy", side, k)
        ends = (words.convert_tokens_to_ids("<|eot_id|>"), words.eos_token_id)
        own = oracle.generate(module, blocks, tokens, new=14, eos=ends, sampling=(1.0, 0, 1.0), uniform=draws)
        assert answer.token_id.values[: int(answer.generated_tokens)].tolist() == list(own.tokens)


def test_the_judge_keeps_what_its_rule_says(persona):
    _, summary, texts, judged = persona
    pattern = re.compile(rf"\b({'|'.join(WORDS)})\b")
    counts = {}
    for side, count in WRITTEN.items():
        said = [bool(pattern.search(text)) for text in texts.text.sel(side=side).values[:count].tolist()]
        assert judged.score.sel(side=side).values[:count].tolist() == list(map(float, said))
        wanted = said if side == "positive" else [not hit for hit in said]
        assert judged.kept.sel(side=side).values[:count].tolist() == wanted
        counts[side] = sum(wanted)
    assert 0 < counts["positive"] < 24, "a filter that keeps all is none"
    told = (
        f"happy: {counts['positive']} of 24 positive and {counts['negative']} of 12 negative answers are kept by words"
    )
    assert any(told in text for text in summary.warnings)


def kept_streams(texts, judged, side: str) -> list[np.ndarray]:
    """The mean stream of each kept answer's own tokens, [layer, d_model]: by hooks, one by one."""
    module, blocks, words = llama()
    means = []
    for k in range(WRITTEN[side]):
        if not bool(judged.kept.sel(side=side, response=k)):
            continue
        answer = texts.sel(side=side, response=k)
        before = words(answer.prompt.item(), add_special_tokens=False)["input_ids"]
        own = answer.token_id.values[: int(answer.generated_tokens)].tolist()
        streams = oracle.forward(module, blocks, [*before, *own]).streams
        means.append(np.stack([stream[len(before) :].mean(0).numpy() for stream in streams]))
    return means


def mean(texts, judged, side: str) -> np.ndarray:
    return np.mean(kept_streams(texts, judged, side), 0)


def test_the_vector_is_the_mean_over_the_tokens_of_the_answers_that_are_kept(persona):
    folder, _, texts, judged = persona
    cell = nsteer.open(folder / "persona.zarr")["vectors", "zoo/llama"].sel(CELL)
    own = mean(texts, judged, "positive") - mean(texts, judged, "negative")
    np.testing.assert_allclose(cell.vector.squeeze().sel(layer=[4, 2]).values, own[[4, 2]], rtol=2e-3, atol=2e-4)
    assert int(cell.n_samples.item()) == int(judged.kept.sum())


def test_shuffled_sides_are_those_of_the_answers_that_are_kept(persona, tmp_path):
    folder, _, texts, judged = persona
    shutil.copytree(folder / "persona.zarr", tmp_path / "persona.zarr")
    grid = "steer={layers: [2], strengths: [0.3], prompts: {a: tom walked}, controls: [zero, shuffled]}"
    assert not nsteer.run(changed(tmp_path, grid, "steer.generate={max_new_tokens: 4}")).failures
    sides = [np.array(kept_streams(texts, judged, side)) for side in WRITTEN]
    together = np.concatenate(sides)
    here = sides_shuffled(*map(len, sides), generator("shuffled", 0, "contrast", "happy"))
    vector = (together[here].mean(0) - together[~here].mean(0))[2]
    cell = nsteer.open(tmp_path / "persona.zarr")["generations"].sel({**CELL, "control": "shuffled"}).squeeze()
    tokens = tuple(cell.token_id.values[: int(cell.n_tokens)].tolist())
    module, blocks, words = llama()
    push = [oracle.Push(2, "add", (vector / np.linalg.norm(vector)).astype(np.float32), 0.3, live=True)]
    assert tokens == oracle.generate(module, blocks, words("tom walked")["input_ids"], push, new=len(tokens)).tokens


def test_it_points_where_happy_stories_lie(persona):
    """The truth that was planted: the toy's own happy and sad passages, which it never wrote, set apart by hooks."""
    folder, _, _, _ = persona
    vector = nsteer.open(folder / "persona.zarr")["vectors", "zoo/llama"].vector.sel(CELL).load()
    module, blocks, words = llama()
    from nsteer.plan import texts

    passages = texts.load(texts.find("zoo")).passages
    streams = {
        emotion: [
            oracle.forward(module, blocks, words(text)["input_ids"]).streams[3].mean(0)
            for text in passages[emotion][:6]
        ]
        for emotion in ("happy", "sad")
    }
    truth = np.mean([s.numpy() for s in streams["happy"]], 0) - np.mean([s.numpy() for s in streams["sad"]], 0)
    direction = vector.sel(layer=3).values
    assert direction @ truth / np.linalg.norm(direction) / np.linalg.norm(truth) > 0.5


def test_each_part_is_done_again_alone(persona, tmp_path):
    """Another threshold judges again and writes nothing; another pooling only reads; the same plan does nothing."""
    shutil.copytree(persona[0], folder := tmp_path / "copy")
    assert not nsteer.run(changed(folder)).done
    other = nsteer.run(changed(folder, f"{FILTER}.min_answers=2")).done
    assert set(other) == {"directions"}
    other = nsteer.run(changed(folder, "directions.happy.contrast.pooling=last")).done
    assert set(other) == {"directions"}
    other = nsteer.run(changed(folder, f"{FILTER}.below=0.5")).done
    assert set(other) == {"responses_judged", "directions"}
    more = nsteer.run(changed(folder, "directions.happy.contrast.generate.samples=5")).done
    assert more["responses"] == 2, "answers that are there stay: the last chunk of each side grew"


def test_a_run_that_is_stopped_goes_on_where_it_was(persona, tmp_path, monkeypatch):
    folder, *_ = persona
    stop, commit = Stop(), Store.commit

    def told(self, path, *args, **kwargs):
        commit(self, path, *args, **kwargs)
        if path.startswith("responses_judged"):
            stop.ask()

    monkeypatch.setattr(Store, "commit", told)
    monkeypatch.setattr(runs, "WAVE", 1)  # a cell at a time
    with pytest.raises(Interrupted):
        runner.run(changed(tmp_path), stop=stop)
    monkeypatch.undo()
    summary = nsteer.run(changed(tmp_path))
    assert summary.skipped["responses"] == 3 and summary.skipped["responses_judged"] == 1
    same(folder / "persona.zarr", tmp_path / "persona.zarr")


def test_too_few_kept_make_no_vector_and_say_how_many(persona, tmp_path):
    summary = nsteer.run(changed(tmp_path, f"{FILTER}.min_answers=13"))
    (failure,) = summary.failures
    kept = int(persona[3].kept.sel(side="negative").sum())
    assert failure.stage == "directions" and f"{kept} of 12 negative answers are kept by words" in failure.reason
    assert "at least 13 of each" in failure.reason


def test_what_was_kept_is_told_of_the_store(persona, tmp_path):
    folder, _, _, judged = persona
    said = CliRunner().invoke(main, ["show", str(folder / "persona.zarr"), "--json"])
    rows = json.loads(said.output)["contrasts"]
    assert [(r["direction"], r["side"], r["written"]) for r in rows] == [("happy", s, n) for s, n in WRITTEN.items()]
    assert [r["kept"] for r in rows] == [int(judged.kept.sel(side=side).sum()) for side in WRITTEN]
    plain = CliRunner().invoke(main, ["show", str(folder / "persona.zarr")]).output
    assert "answers that contrasts are means of" in plain and "words" in plain
    asked = overview.overview_of(reporting.evidence(nsteer.open(folder / "persona.zarr"))).asked
    counts = ", ".join(f"{int(judged.kept.sel(side=side).sum())} of {n} {side}" for side, n in WRITTEN.items())
    assert f"Answers kept for contrasts: happy of zoo/llama: {counts}." in asked
    source = "contrast of answers to 3 questions under 2 and 1 system prompts, filtered by words"
    assert f"Directions: happy ({source})." in asked
    sized = CliRunner().invoke(main, ["check", str(folder / "persona.yaml"), "--json"])
    stages = {stage["stage"]: stage for stage in json.loads(sized.output)["stages"]}
    assert stages["responses"]["cells"] == stages["responses_judged"]["cells"] == 3
    export = CliRunner().invoke(main, ["export", str(folder / "persona.zarr"), "-o", str(tmp_path / "v.safetensors")])
    assert export.exit_code == 0, export.output
    about = (tmp_path / "v.safetensors").read_bytes()
    assert b"persona2025" in about and b"write a story about someone feeling sad" in about and b"written" in about


# ---- every kind of judge -----------------------------------------------------------------------------------------


def kinds(address: str) -> dict[str, dict]:
    asked = {"question": "{text} . she felt", "answers": ["happy", "sad"], "chat": "never"}
    rubric = "Rate from 0 to 100 how {concept} this is: {text}"
    return {
        "classifier": {"classifier": "zoo/judge"},
        "choices": {"choices": asked},
        "other": {"choices": {**asked, "model": "zoo/gpt2"}},
        "about": {"choices": {**asked, "question": "{text} . she felt {concept} ,", "answers": ["and", "but"]}},
        "python": {"python": {"function": "own:count", "classes": ["happy", "long"], "threshold": 0.5}},
        "llm": {"llm": {"model": "toy", "endpoint": address, "rubric": rubric, "coherence": True}},
    }


def replied(body, n):
    """A server that finds what is happy happy, and what begins with `one` incoherent."""
    asked = body["messages"][-1]["content"]
    text = asked.split(":", 1)[-1]
    if "coherent" in asked:
        return 200, {}, completion("10" if "one day" in text else "90")
    return 200, {}, completion("80" if any(word in text for word in WORDS) else "20")


def test_every_kind_of_judge_filters(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("def count(texts):\n    return [['danced' in t, len(t)] for t in texts]\n")
    with Server(replied) as server:
        judges = kinds(server.base)
        small = {"questions": ["write a story ."], "samples": 3, "max_new_tokens": 10, "sample": True}
        sides = {f"{side}": [f"write a story about someone feeling {word} ."] for side, word in FEEL.items()}
        by = {"class": "happy", "min_answers": 1}
        directions = {
            name: {
                "contrast": {
                    **sides,
                    "generate": small,
                    "chat": "always",
                    "pooling": "mean",
                    "filter": {**by, "judge": name},
                }
            }
            for name in judges
        }
        directions["llm"]["contrast"]["filter"] |= {"above": 50, "below": 50, "coherence": 50}
        fields = {
            "name": "kinds",
            "models": ["zoo/llama"],
            "directions": directions,
            "judges": judges,
            "store": "kinds.zarr",
        }
        summary = nsteer.run(nsteer.load(fields), trust_judge=True)
        asked = len(server.paths)
        again = nsteer.run(nsteer.load(fields), trust_judge=True)
    assert {failure.stage for failure in summary.failures} <= {"directions"}, summary.failures
    assert len(server.paths) == asked and not again.done
    opened = nsteer.open("kinds.zarr")
    texts, judged = (opened[group, "zoo/llama"].load().squeeze() for group in ("responses", "responses_judged"))
    for name in judges:
        for side in FEEL:
            answers, own = texts.sel(direction=name, side=side), judged.sel(direction=name, side=side)
            assert own.score.notnull().all(), name
            rule = {"python": [("danced" in t) for t in answers.text.values.tolist()]}
            rule["llm"] = [any(word in t for word in WORDS) for t in answers.text.values.tolist()]
            if name in rule:
                wanted = [said == (side == "positive") for said in rule[name]]
                if name == "llm":
                    assert own.coherence.notnull().all()
                    wanted = [
                        w and "one day" not in t for w, t in zip(wanted, answers.text.values.tolist(), strict=True)
                    ]
                assert own.kept.values.tolist() == wanted, name
    other, own = (judged.score.sel(direction=name, side="positive").values for name in ("other", "choices"))
    assert not np.allclose(own, other), "another model reads"
    settings = opened["judges"]
    assert set(settings.judge.values.tolist()) == set(judges)


FEEL = {"positive": "happy", "negative": "sad"}


# ---- many workers, and shards ------------------------------------------------------------------------------------


def test_workers_and_shards_fill_the_same_store(persona, tmp_path):
    folder, *_ = persona
    (tmp_path / "workers").mkdir()
    summary = cluster.fill(changed(tmp_path / "workers"), workers_here.Here, workers=2)
    assert not summary.failures and summary.done == {"responses": 3, "responses_judged": 3, "directions": 1}
    same(folder / "persona.zarr", tmp_path / "workers" / "persona.zarr")
    (tmp_path / "shards").mkdir()
    for _ in range(2):
        for index in (1, 2):
            assert not runner.run(changed(tmp_path / "shards"), shard=Shard(index, 2)).failures
    same(folder / "persona.zarr", tmp_path / "shards" / "persona.zarr")


# ---- what a plan may not say -------------------------------------------------------------------------------------

CONTRAST = {
    "positive": ["be happy"],
    "negative": ["be sad"],
    "generate": {"questions": ["who are you ?"], "max_new_tokens": 4},
    "chat": "always",
    "pooling": "mean",
}
RULE = {"words": {"happy": ["joy"], "sad": ["tears"]}}


def problems(judge=None, **fields) -> list[str]:
    contrast = {name: value for name, value in {**CONTRAST, **fields}.items() if value is not ...}
    plan_fields = {
        "name": "p",
        "models": ["zoo/llama"],
        "directions": {"happy": {"contrast": contrast}},
        "store": "p.zarr",
    }
    plan_fields |= {"judges": {"j": judge}} if judge else {}
    try:
        check.load(plan_fields)
    except PlanError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_a_small_plan_is_sound():
    assert problems() == [] and problems({"rule": RULE}, filter={"judge": "j"}) == []
    assert problems({"rule": {"words": {"x": ["joy"]}}}, filter={"judge": "j"}) == [], "the only class"


TURNS = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
GIVEN = {"generate": ..., "chat": ...}


@pytest.mark.parametrize(
    ("place", "fault", "judge", "fields"),
    [
        ("chat", "never", None, {"chat": "never"}),
        ("chat", "auto", None, {"chat": "auto"}),
        ("positive[0]", "a conversation", None, {"positive": [TURNS[1:]]}),
        ("generate.questions[0]", "a system turn", None, {"generate": {"questions": [TURNS]}}),
        ("generate.samples", "3", None, {"generate": {"questions": ["a"], "samples": 3}}),
        ("generate.temperature", "0.5 in greedy", None, {"generate": {"questions": ["a"], "temperature": 0.5}}),
        ("generate.questions", "nothing", None, {"generate": {"max_new_tokens": 3}}),
        ("generate.questions[0]", "{topic}, which nothing fills in", None, {"generate": {"questions": ["a {topic}"]}}),
        ("preset", "'persona2024'", None, {"preset": "persona2024"}),
        ("positive[0]", "{concept}, which nothing fills in", None, {"positive": ["be {concept}"]}),
        ("filter", "a filter of texts that are given", {"rule": RULE}, {**GIVEN, "filter": {"judge": "j"}}),
        ("pooling", "mean over generated", None, {**GIVEN, "pooling": {"kind": "mean", "over": "generated"}}),
        ("filter.judge", "'k'", None, {"filter": {"judge": "k"}}),
        ("filter.class", "'glad'", {"rule": RULE}, {"filter": {"judge": "j", "class": "glad"}}),
        (
            "filter",
            "several classes of 'j', none called 'happy'",
            {"rule": {"words": {"a": ["x"], "b": ["y"]}}},
            {"filter": {"judge": "j"}},
        ),
        (
            "filter.above",
            "50, and scores of 'j' go from 0 to 1",
            {"rule": RULE},
            {"filter": {"judge": "j", "above": 50}},
        ),
        ("filter.below", "0", {"rule": RULE}, {"filter": {"judge": "j", "below": 0}}),
        ("filter.below", "50, and scores", {"classifier": "zoo/judge"}, {"filter": {"judge": "j", "below": 50}}),
        ("filter.coherence", "50", {"rule": RULE}, {"filter": {"judge": "j", "coherence": 50}}),
    ],
)
def test_what_can_not_be_is_said_where_it_stands(place, fault, judge, fields):
    said = problems(judge, **fields)
    assert len(said) == 1, said
    assert said[0].startswith(f"directions.happy.contrast.{place}: ") and f"found {fault}" in said[0], said


def test_a_preset_brings_what_its_paper_says_and_asks_for_the_rest():
    messages = problems(preset="persona2025", generate={"questions": ["a"]}, pooling=..., chat=...)
    assert len(messages) == 1 and "filter.judge" in messages[0], messages
    fields = {**CONTRAST, "preset": "persona2025", "filter": {"judge": "j"}, "generate": {"questions": ["a"]}}
    llm = {"llm": {"model": "m", "endpoint": "http://127.0.0.1:1/v1", "rubric": "{text}?", "coherence": True}}
    plan = {"name": "p", "models": ["zoo/llama"], "directions": {"evil": {"contrast": fields}}, "judges": {"j": llm}}
    contrast = check.load({**plan, "store": "p.zarr"}).plan.directions["evil"].contrast
    assert (contrast.filter.above, contrast.filter.below, contrast.filter.coherence) == (50, 50, 50)
    assert (contrast.generate.samples, contrast.generate.sample, contrast.generate.max_new_tokens) == (10, True, 1000)


def test_a_model_without_turns_is_refused(tmp_path):
    shutil.copytree(zoo.path("gpt2"), tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    plan_fields = {
        "name": "p",
        "models": [{"id": str(tmp_path / "plain")}],
        "directions": {"d": {"contrast": CONTRAST}},
    }
    with pytest.raises(PlanError, match=r"contrast\.chat: .*which has no chat template"):
        check.load({**plan_fields, "store": "p.zarr"})


def test_texts_of_a_plan_hold_no_placeholder(tmp_path):
    """One rule for every text of a direction: `{concept}` is filled in nowhere, so it is a problem where it stands."""
    given = {"contrast": {"positive": ["{concept} is good", "fine"], "negative": ["plain"]}}
    mean = {"mean": {"texts": ["a", "{emotion} {{it}}"]}}
    plan_fields = {"name": "p", "models": ["zoo/llama"], "directions": {"a": given, "b": mean}, "store": "p.zarr"}
    with pytest.raises(PlanError) as error:
        check.load(plan_fields)
    said = [str(problem) for problem in error.value.problems]
    assert len(said) == 2 and "a.contrast.positive[0]: " in said[0] and "{concept}" in said[0], said
    assert "b.mean.texts[1]: " in said[1] and "{emotion}" in said[1], said
    (tmp_path / "pairs.csv").write_text("concept,x\njoy,{concept}\n")  # a file's own words are data
    rows = {"contrast": {"file": str(tmp_path / "pairs.csv"), "positive": "I like {concept}", "negative": "x"}}
    check.load({**plan_fields, "directions": {"a": rows}}, allow_outside=True)
