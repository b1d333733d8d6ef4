"""The judge that is asked in words, against servers on loopback that answer rightly, slowly, wrongly, or not at all."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from judge_server import Judge as Server
from judge_server import completion
from planside import PLAN, STEER, problems

import nsteer
from nsteer import runner, zoo
from nsteer.errors import ExecutionError, ModelError
from nsteer.executors import completions
from nsteer.executors.completions import Chats, LostError
from nsteer.plan import check
from nsteer.runner.stopping import Interrupted, Stop
from nsteer.stages.judges import llm

TEXT = """\
name: judged
models: [zoo/gpt2]
texts: zoo
emotions: [happy, sad]
methods: {read: jeong2026-comprehension}
steer:
  layers: [4, 2]
  strengths: [0.1]
  prompts: {walk: tom walked to the market and, home: lena came home}
  generate: {max_new_tokens: 4}
store: STORE
"""
RUBRIC = "Rate from 0 to 100 how {concept} this is: {text}"
BODY = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
COSTLY = {"model": "toy", "endpoint": "", "rubric": RUBRIC, "retries": 2, "deadline": 5, "workers": 2}


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(completions, "FIRST_WAIT", 0.01)


def ask(answer, count: int = 1, retries: int = 2, deadline: float = 5.0):
    """What comes of `count` requests to a server that answers so, and the server."""
    with Server(answer) as server:
        chats = Chats(server.base, deadline=deadline, retries=retries, workers=2)
        try:
            bodies = {str(i): {**BODY, "logprobs": True, "n_": i} for i in range(count)}
            return dict(chats.ask(bodies, lambda: None)), server
        finally:
            chats.close()


def test_a_reply_is_read_with_its_likeliest_first_tokens():
    replies, server = ask(lambda body, n: (200, {}, completion("85", {"85": 0.5, "90": 0.25, "Sure": 0.25})))
    assert replies["0"]["text"] == "85" and [token for token, _ in replies["0"]["top"]] == ["85", "90", "Sure"]
    assert server.paths == ["/v1/chat/completions"] and server.keys == [""]


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, "boom"),
        (429, {"Retry-After": "0"}, {"error": "slow down"}),
        (200, {}, "<html>not json"),
        (200, {}, {"choices": []}),
        (200, {}, {"error": "overloaded"}),
        (200, {}, None),
    ],
)
def test_what_may_pass_is_tried_again(fault):
    replies, server = ask(lambda body, n: fault if n < 3 else (200, {}, completion("7")))
    assert replies["0"]["text"] == "7" and len(server.bodies) == 3
    with pytest.raises(LostError, match="gave no answer in 3 tries"):
        ask(lambda body, n: fault)


def test_a_server_says_when_to_ask_again(monkeypatch):
    assert completions.asked_for({"retry-after": "3"}, 1.0) == 3.0
    assert completions.asked_for({"retry-after": "soon"}, 1.0) == 1.0
    assert completions.asked_for({"retry-after": "nan"}, 1.0) == 1.0
    assert completions.asked_for({"retry-after": "1e9"}, 1.0) == completions.LONGEST_WAIT
    assert completions.asked_for({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 1.0) == 0.0


def test_an_answer_that_drips_ends_at_our_deadline():
    with pytest.raises(LostError, match=r"no whole answer within 0\.3 s"):
        ask(lambda body, n: (200, {"X-Drip": "1"}, completion("7")), retries=0, deadline=0.3)


@pytest.mark.parametrize(("status", "words"), [(401, "refuses the API key"), (404, "has no such model"), (302, "302")])
def test_what_will_not_pass_is_said_at_once(status, words):
    with pytest.raises(ModelError, match=words):
        ask(lambda body, n: (status, {"Location": "http://example.com"}, "no"))


def test_a_text_that_is_refused_leaves_the_others():
    replies, server = ask(lambda body, n: (400, {}, "too long") if body["n_"] == 1 else (200, {}, completion("7")), 3)
    assert isinstance(replies["1"], ExecutionError) and "too long" in str(replies["1"])
    assert replies["0"]["text"] == replies["2"]["text"] == "7" and len(server.bodies) == 3


def test_a_server_without_log_probabilities_is_asked_without_them():
    def answer(body, n):
        return (400, {}, "logprobs are not supported") if "logprobs" in body else (200, {}, completion("7"))

    replies, server = ask(answer, 3)
    assert all(text_reply["text"] == "7" for text_reply in replies.values())
    assert sum("logprobs" not in body for body in server.bodies) == 3


# ---- the key -------------------------------------------------------------------------------------------------


def test_the_key_goes_to_loopback_and_to_what_its_user_names_and_into_no_message(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    _, server = ask(lambda body, n: (200, {}, completion("7")))
    assert server.keys == ["Bearer sk-secret"]
    with pytest.raises(ModelError) as caught:
        ask(lambda body, n: (401, {}, "Incorrect API key provided: sk-secret"))
    assert "sk-secret" not in str(caught.value) and "refuses the API key" in str(caught.value)
    with pytest.raises(ValueError, match="the plan alone names"):
        Chats("https://evil.example/v1", deadline=1, retries=0, workers=1)


def test_no_proxy_sees_what_goes_to_loopback(monkeypatch):
    with Server(lambda body, n: (200, {}, completion("0"))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        replies, _ = ask(lambda body, n: (200, {}, completion("7")))
        assert replies["0"]["text"] == "7" and not proxy.bodies


LLM = "{llm: {model: m, rubric: 'rate {text}', %s}}"


@pytest.mark.parametrize(
    ("judge", "where", "phrase"),
    [
        (LLM % "endpoint: https://evil.example/v1", "llm.endpoint", "which the plan alone names"),
        (LLM % "endpoint: http://10.0.0.1/v1", "llm.endpoint", "which the plan alone names"),
        (LLM % "endpoint: ftp://127.0.0.1", "llm.endpoint", "does not start with http"),
        (LLM % "endpoint: http://me:sk-1@127.0.0.1/v1", "llm.endpoint", "a user or a password"),
        (LLM % "options: {api_key: sk-1}", "llm.options.api_key", "'api_key'"),
        (LLM % "options: {messages: []}", "llm.options.messages", "'messages'"),
        (LLM % "coherence: is it", "llm.coherence", "a question without {text}"),
        (LLM % "local: zoo/llama", "llm", "`model` and `local`"),
        ("{llm: {model: m, rubric: rate it}}", "llm.rubric", "a question without {text}"),
        ("{llm: {model: m, rubric: {a: '{text} {concept}'}}}", "llm.rubric.a", "{concept} in the rubric of one class"),
        ("{llm: {rubric: '{text}'}}", "llm", "neither `model` nor `local`"),
    ],
)
def test_a_server_or_rubric_that_can_be_none(judge, where, phrase):
    (problem,) = problems(PLAN + STEER, f"judge={judge}")
    assert problem.path == f"judge.{where}" and phrase in problem.found and "sk-1" not in problem.found


def test_a_server_that_its_user_names_may_be_elsewhere_but_no_key_travels_in_clear(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://10.0.0.1/v1")
    assert not problems(PLAN + STEER, f"judge={LLM % 'endpoint: http://10.0.0.1/v1/'}")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    for judge in (LLM % "endpoint: http://10.0.0.1/v1", LLM % "logprobs: true"):
        (problem,) = problems(PLAN + STEER, f"judge={judge}")
        assert "in clear" in problem.found


# ---- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("85", 85), (" 85.", 85), ("Score: 85/100", 85), ("85 out of 100", 85), ("72.5", 72.5), ("100%", 100)),
        *(("<think>is it 3 or 4?</think> 60", 60), ("0", 0), ("60, as a number", 60)),
        *(("8/10", None), ("between 60 and 80", None), ("-5", None), ("120", None), ("high", None), ("", None)),
    ],
)
def test_one_number_is_an_answer_and_nothing_else(text, number):
    rating = llm.parsed(text)
    assert rating == number if number is not None else math.isnan(rating)


def reply(text: str, **top: float) -> dict:
    told = {name.lstrip("n"): p for name, p in top.items()}
    return {"text": text, "first": next(iter(told), ""), "top": [[token, math.log(p)] for token, p in told.items()]}


def test_a_score_is_the_mean_over_numbers_that_are_tokens():
    score, mass = llm.rated(reply("80", n80=0.6, n90=0.2, Sure=0.2))
    assert score == pytest.approx((80 * 0.6 + 90 * 0.2) / 0.8) and mass == pytest.approx(0.8)


def test_digits_that_begin_a_number_are_no_numbers():
    for answer in (
        reply("85", n8=0.9, n9=0.1),
        reply("7", n7=0.5, n9=0.4),
        reply("80", n80=0.3, Sure=0.7),
        reply("80"),
    ):
        score, mass = llm.rated(answer)
        assert score == float(answer["text"]) and math.isnan(mass)


# ---- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A store of continuations that nobody judged yet."""
    place = tmp_path_factory.mktemp("llm")
    (place / "p.yaml").write_text(TEXT.replace("STORE", str(place / "p.zarr")))
    assert not runner.run(check.load(place / "p.yaml")).failures
    return place / "p.zarr"


@pytest.fixture
def judged(texts, tmp_path):
    """Judges a copy of those texts by a server."""
    shutil.copytree(texts, tmp_path / "p.zarr")
    (tmp_path / "p.yaml").write_text(TEXT.replace("STORE", str(tmp_path / "p.zarr")))

    def judge(base: str, stop: Stop | None = None, **fields) -> runner.Summary:
        spec = {**COSTLY, "endpoint": base, **fields}
        return runner.run(check.load(tmp_path / "p.yaml", [f"judge={json.dumps({'llm': spec})}"]), stop=stop)

    judge.store = tmp_path / "p.zarr"
    return judge


def told(body) -> str:
    return body["messages"][-1]["content"]


def rate(body, n):
    """A number that the question decides."""
    value = 10 + sum(map(ord, told(body))) % 80
    return 200, {}, completion(str(value), {str(value): 0.8, str(value + 2): 0.1, "I": 0.1})


def test_texts_are_rated_for_what_they_were_steered_to(judged):
    with Server(rate) as server:
        summary = judged(server.base, coherence=True)
        assert not summary.failures and summary.done["judged"] == 4
        asked = len(server.bodies)
        assert len({json.dumps(body) for body in server.bodies}) == asked, "nothing is asked twice"
        assert not any(judged(server.base, coherence=True).done.values()) and len(server.bodies) == asked
    results = nsteer.open(judged.store)
    score, texts = results["judged"].score.squeeze(), results["generations"].text.squeeze()
    for emotion in ("happy", "sad"):
        at = {"emotion": emotion, "control": "none", "prompt": "walk"}
        asked = RUBRIC.replace("{concept}", emotion).replace("{text}", texts.sel(at).item())
        value = 10 + sum(map(ord, asked)) % 80
        assert score.sel({**at, "class": emotion}).item() == pytest.approx((value * 0.8 + (value + 2) * 0.1) / 0.9)
    assert results["judged"].mass.max().item() == pytest.approx(0.9)
    assert results["judged"].coherence.notnull().sum() == results["judged"].score.notnull().sum() > 0
    assert results["judged_unsteered"].score.notnull().all()
    assert "sk-" not in str(results["judges"].settings.values) and results["judged"].unit.item() == "0 to 100"


def test_a_server_that_is_killed_and_brought_back_is_asked_nothing_twice(judged):
    first = Server(lambda body, n: rate(body, n) if n <= 5 else (200, {}, None))
    with first:
        summary = judged(first.base)
    (failure,) = summary.failures
    assert failure.kind == "transient" and "gave no answer in 3 tries" in failure.reason
    assert failure.cell == ("judge",) and not summary.done.get("judged")
    with Server(rate) as second:
        assert not judged(second.base).failures
        answered = {told(body) for body in first.bodies[:5]}
        assert not answered & {told(body) for body in second.bodies} and second.bodies


def test_a_run_that_is_stopped_keeps_what_was_answered(judged):
    stop = Stop()

    def answer(body, n):
        if n == 4:
            stop.ask()
        return rate(body, n)

    with Server(answer) as server:
        with pytest.raises(Interrupted):
            judged(server.base, stop)
        before = len(server.bodies)
        assert not judged(server.base).failures
        again = [told(body) for body in server.bodies[before:]]
        twice = {told(body) for body in server.bodies[:before]} & set(again)
        assert again and not twice, "what was under way came back, and was kept"


def test_nonsense_is_a_missing_value_and_nothing_but_nonsense_a_failure(judged):
    def answer(body, n):
        return rate(body, n) if "sad" in told(body)[:40] else (200, {}, completion("no idea"))

    with Server(answer) as server:
        summary = judged(server.base)
        assert {failure.cell[4] for failure in summary.failures if failure.stage == "judged"} <= {"happy"}
        assert all("none of" in failure.reason and "'no idea'" in failure.reason for failure in summary.failures)
        assert any("no single number" in text for text in summary.warnings)
    score = nsteer.open(judged.store)["judged_unsteered"].score
    assert score.sel({"class": "sad"}).notnull().all() and score.sel({"class": "happy"}).isnull().all()


def test_a_model_of_this_machine_answers_too(judged, monkeypatch):
    monkeypatch.setattr(llm, "parsed", lambda text: float(len(text)))
    fields = {"local": "zoo/gpt2", "model": None, "endpoint": None, "max_tokens": 3}
    summary = judged(None, **fields)
    assert not summary.failures and summary.done["judged"] == 4
    score = nsteer.open(judged.store)["judged"].score
    assert np.nanmax(score) > 0


def answers(process: subprocess.Popen, port: int, words: Path) -> None:
    """Waits until a server listens; one that ended instead fails the test with its last words."""
    for _ in range(1200):
        assert process.poll() is None, words.read_text()[-2000:]
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("no server after two minutes")


@pytest.mark.slow
def test_a_real_server_answers_and_words_that_are_no_numbers_are_said(judged, tmp_path):
    """`transformers serve` with a toy, which answers in its own words: a judge's server as users have one."""
    from transformers.utils import import_utils

    if not import_utils.is_serve_available():
        pytest.skip("transformers[serving] is not installed")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    serving = [sys.executable, "-c", code, "serve", "--host", "127.0.0.1", "--port", str(port)]
    words = tmp_path / "serving.txt"
    with words.open("w") as file:
        process = subprocess.Popen(serving, stdout=file, stderr=subprocess.STDOUT)
    try:
        answers(process, port, words)
        base = f"http://127.0.0.1:{port}/v1"
        fields = {"model": str(zoo.path("llama")), "deadline": 120, "workers": 1}
        summary = judged(base, **fields)
        assert summary.failures and all("answers is a single number" in failure.reason for failure in summary.failures)
    finally:
        process.terminate()
        process.wait()
    kept = nsteer.open(judged.store)["replies"].replies.values.tolist()
    assert sum(len(json.loads(page)) for page in kept if page) >= 4
    assert not judged(base, **fields).done.get("judged"), "no server is needed: its replies are there"
