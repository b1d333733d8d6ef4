"""Conversations: rendered as transformers renders them, begun answers gone on with, turns and answers pooled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planside import model_folder, problems

import nsteer
from nsteer import zoo
from nsteer.models import templates
from nsteer.plan.prompts import counted, encode, located, weights
from nsteer.plan.schema import Pooling, Span

SYSTEM = {"role": "system", "content": "be kind ."}
ASKED = {"role": "user", "content": "tom walked to the market"}
BEGUN = {"role": "assistant", "content": "he was glad and"}
SAID = [SYSTEM, ASKED, BEGUN, {"role": "user", "content": "and then ?"}]
CONVERSATIONS = [[ASKED], [SYSTEM, ASKED], SAID, [ASKED, BEGUN], [*SAID, {"role": "assistant", "content": "he sat ."}]]
THINKING = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is false %}<none>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(zoo.path("llama")))


def rendered(tokenizer, turns, **more) -> str:
    """By transformers."""
    begun = turns[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=not begun, continue_final_message=begun, **more
    )


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=lambda turns: "-".join(t["role"] for t in turns))
def test_conversations_are_rendered_as_transformers_renders_them(tokenizer, turns):
    prompt = encode(tokenizer, turns, "always")
    assert prompt.text == rendered(tokenizer, turns)
    assert prompt.tokens == tuple(tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
    assert prompt.tokens.count(tokenizer.bos_token_id) == 1 == prompt.bos


def test_a_begun_answer_ends_where_it_ends_even_where_the_template_says_it_again(tokenizer):
    """The end that a template writes behind a turn may hold the answer's own words."""
    template = templates.Template("{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} [end of a]{% endfor %}")
    assert templates.render(template, [ASKED, {"role": "assistant", "content": "a"}]).endswith("[assistant] a")


def test_arguments_reach_the_template(tokenizer):
    template = templates.Template(THINKING, (("bos_token", "<s>"),))
    assert templates.render(template, [ASKED]).endswith("<assistant>")
    assert templates.render(template, [ASKED], None, {"enable_thinking": False}).endswith("<assistant><none>")


def by_hand(tokenizer, before: str, inside: str, tokens) -> np.ndarray:
    """The positions of `inside` where `before` stands before it: by counting the tokens of both."""
    first, both = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, before + inside))
    assert list(tokens[: len(both)]) == both and both[: len(first)] == first
    mask = np.zeros(len(tokens), bool)
    mask[len(first) : len(both)] = True
    return mask


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


BEFORE = {
    0: "<|begin_of_text|>" + header("system"),
    1: "<|begin_of_text|>" + header("system") + "be kind .<|eot_id|>" + header("user"),
}
BEFORE[2] = BEFORE[1] + ASKED["content"] + "<|eot_id|>" + header("assistant")
BEFORE[3] = BEFORE[2] + BEGUN["content"] + "<|eot_id|>" + header("user")
SPANS = {
    "{turn: 0}": [0],
    "{turn: -1}": [3],
    "{turn: user}": [1, 3],
    "{turn: system}": [0],
    "{turn: assistant}": [2],
    "{turn: 7}": [],
}


@pytest.mark.parametrize("over", SPANS)
def test_turns_are_the_tokens_that_counting_by_hand_finds(tokenizer, over):
    from ruamel.yaml import YAML

    prompt = located(tokenizer, encode(tokenizer, SAID, "always"), SAID, "always")
    truth = np.zeros(len(prompt.tokens), bool)
    for i in SPANS[over]:
        truth |= by_hand(tokenizer, BEFORE[i], SAID[i]["content"], prompt.tokens)
    spec = Pooling(kind="mean", over=Span(**YAML(typ="safe").load(over)))
    assert counted(spec, prompt, len(prompt.tokens)).tolist() == truth.tolist()


def test_answers_spans_and_last_tokens(tokenizer):
    turns = [ASKED, BEGUN]
    prompt = located(tokenizer, encode(tokenizer, turns, "always"), turns, "always")
    total, new = len(prompt.tokens), 3
    before = prompt.text[: prompt.text.index(BEGUN["content"])]
    answer = np.append(by_hand(tokenizer, before, BEGUN["content"], prompt.tokens), [True] * new)
    mean_weights = weights(Pooling(kind="mean", over="answer"), prompt, total + new)
    assert np.allclose(mean_weights, answer / answer.sum())
    last = weights(Pooling(kind="mean_last", k=2, over="answer"), prompt, total)
    assert np.flatnonzero(last).tolist() == [total - 2, total - 1]
    start = prompt.text.index(" market")
    market = by_hand(tokenizer, prompt.text[:start], " market", prompt.tokens)
    assert np.flatnonzero(weights(Pooling(kind="last", over=Span(text="market")), prompt, total)).tolist() == [
        int(np.flatnonzero(market)[-1])
    ]
    assert not weights(Pooling(kind="mean", over=Span(text="nowhere")), prompt, total).any()


def truths(tokenizer, conversations, positions, layers) -> np.ndarray:
    """[text, layer, d_model]: means over the positions, by plain hooks, one text at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(zoo.path("llama")), dtype=torch.float32).eval()
    kept: dict[int, torch.Tensor] = {}
    for layer in layers:
        model.model.layers[layer].register_forward_hook(
            lambda _, __, out, layer=layer: kept.__setitem__(layer, out[0] if isinstance(out, tuple) else out)
        )
    means = []
    for turns in conversations:
        ids = tokenizer(rendered(tokenizer, turns), add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            model(ids)
        at = positions(turns, ids[0].tolist())
        means.append([kept[layer].reshape(-1, kept[layer].shape[-1])[at].mean(0).numpy() for layer in layers])
    return np.array(means)


ROWS = [
    {"q": "tom walked to the market", "yes": "he told the truth .", "no": "he told a lie and sat down ."},
    {"q": "anna sat", "yes": "she said so .", "no": "she hid it ."},
    {"q": "paul ran home and the rain fell on him", "yes": "it was me .", "no": "it was not me ."},
]


def test_a_study_over_conversations_gives_the_numbers_of_plain_hooks(tokenizer, tmp_path):
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    asked = '[{role: user, content: "{q}"}, {role: assistant, content: "%s"}]'
    Path("talk.yaml").write_text(
        f"""
name: talk
models: [zoo/llama]
chat: always
prompts: {{file: a.jsonl, text: {asked % "{yes}"}}}
reads: {{answer: {{pooling: {{kind: mean, over: answer}}, layers: [4, 2]}}}}
directions:
  honest:
    contrast:
      file: a.jsonl
      chat: always
      positive: {asked % "{yes}"}
      negative: {asked % "{no}"}
      pooling: {{kind: mean, over: answer}}
store: talk.zarr
threads: 1
"""
    )
    assert not nsteer.run(nsteer.load("talk.yaml")).failures
    results = nsteer.open("talk.zarr")
    talks = {
        side: [[{"role": "user", "content": r["q"]}, {"role": "assistant", "content": r[side]}] for r in ROWS]
        for side in ("yes", "no")
    }

    def answers(turns, ids):
        text = rendered(tokenizer, turns)
        before = text[: text.rindex(turns[-1]["content"])]
        return np.flatnonzero(by_hand(tokenizer, before, turns[-1]["content"], ids))

    both = {side: truths(tokenizer, some, answers, [4, 2]) for side, some in talks.items()}
    streams = results.sel("reads", "stream", model="zoo/llama", read="answer", edit="none", layer=[4, 2])
    streams = streams.squeeze("strength", drop=True) if "strength" in streams.dims else streams
    np.testing.assert_allclose(streams.sel(prompt=["1", "2", "3"]).values, both["yes"], rtol=2e-5, atol=2e-4)
    vector = results.sel(model="zoo/llama", method="contrast", concept="honest", layer=[4, 2]).values
    np.testing.assert_allclose(vector, both["yes"].mean(0) - both["no"].mean(0), rtol=1e-4, atol=1e-3)


def test_a_pooling_that_finds_nothing_is_a_missing_value_of_a_read_and_refused_of_a_contrast(tmp_path):
    Path("p.yaml").write_text(
        "name: p\nmodels: [zoo/llama]\nprompts: {a: tom walked home, b: anna sat}\nthreads: 1\nstore: p.zarr\n"
        "reads: {home: {pooling: {kind: mean, over: {text: home}}, layers: [2]}}\n"
        "directions: {d: {contrast: {positive: [tom ran home], negative: [anna sat], pooling: {kind: last, over: "
        "{text: home}}}}}\n"
    )
    done = nsteer.run(nsteer.load("p.yaml"))
    assert [failure.stage for failure in done.failures] == ["directions"]
    assert "negative[0], 'anna sat', has none of the positions" in done.failures[0].reason
    assert any("home: 1 prompts have none of its positions, 'b' first" in said for said in done.warnings)
    streams = (
        nsteer.open("p.zarr").sel("reads", "stream", model="zoo/llama", read="home", edit="none", layer=2).squeeze()
    )
    assert np.isfinite(streams.sel(prompt="a")).all() and np.isnan(streams.sel(prompt="b")).all()


TOLD = [
    [{"role": "system", "content": "you are {emotion} ."}, ASKED],
    [
        {"role": "user", "content": "tell of a {emotion} {{house}}"},
        {"role": "assistant", "content": "the {emotion} and"},
    ],
]


def test_templates_are_conversations_whose_turns_are_filled_in(tokenizer, tmp_path):
    method = {"source": "generation", "chat": "always", "samples": 2, "neutral_samples": 0, "baseline": "grand_mean"}
    method |= {"templates": TOLD, "pooling": {"kind": "mean", "over": "answer"}, "generate": {"max_new_tokens": 4}}
    plan = {"name": "t", "models": ["zoo/llama"], "texts": "zoo", "emotions": ["happy", "sad"], "store": "t.zarr"}
    Path("t.yaml").write_text(json.dumps({**plan, "methods": {"made": method}}))
    assert not nsteer.run(nsteer.load("t.yaml")).failures
    samples = nsteer.open("t.zarr")["samples", "zoo/llama"].load()
    for emotion in ("happy", "sad"):
        for k, turns in enumerate(TOLD):
            sample = samples.sel({"model": "zoo/llama", "method": "made", "emotion": emotion, "sample": k})
            said = [{**t, "content": t["content"].replace("{emotion}", emotion)} for t in turns]
            said = [{**t, "content": t["content"].replace("{{house}}", "{house}")} for t in said]
            assert sample.prompt.item() == rendered(tokenizer, said)


HEAD = "name: s\nmodels: [zoo/llama]\nstore: s.zarr\n"
TALK = "[[{role: user, content: one}], [{role: system, content: two}, {role: user, content: three}]]"
WRONG = {
    f"prompts: {TALK}\nreads: {{r: {{pooling: last}}}}": "expected a chat template, which has turns, found a "
    "conversation of 1 turn, with chat: never (chat: always)",
    "prompts: [[{role: user}]]\nreads: {r: {pooling: last}}": "expected turns, {role: system | user | assistant, "
    "content: text} each, found a turn of ['role']",
    "prompts: [[{role: bot, content: a}]]\nreads: {r: {pooling: last}}": "one of system, user, assistant",
    "prompts: [a]\nreads: {r: {pooling: {kind: mean_last}}}": "pooling.k: expected how many positions count",
    "prompts: [a]\nreads: {r: {pooling: {kind: last, over: {}}}}": "expected exactly one of `text` and `turn`",
    "texts: zoo\nmethods: {m: {source: generation, chat: always, templates: [[{role: user, content: hello}]]}}": ""
    "methods.m.templates[0]: expected a template that holds {emotion}, found 'user: hello'",
    "texts: zoo\nmethods: {m: {source: generation, templates: [[{role: user, content: '{emotion} {mood}'}]]}}": ""
    "expected no placeholder but {emotion} and {topic}, found {mood}",
    "texts: zoo\nmethods: {m: {source: generation, chat: never, templates: [[{role: user, content: '{emotion}'}]]}}": ""
    "a conversation of 1 turn, with chat: never",
    "prompts: [a]\nchat_arguments: {messages: 1}\nreads: {r: {pooling: last}}": "chat_arguments.messages: expected a",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_conversation_or_no_pooling_is_said_by_check(wrong):
    messages = list(map(str, problems(f"{HEAD}{wrong}\n")))
    assert any(WRONG[wrong] in line for line in messages), messages


def test_a_template_that_refuses_one_of_the_kinds_of_conversations_is_a_problem(tmp_path):
    folder = model_folder(tmp_path / "m", chat=True)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    plan = f"name: s\nmodels: [./m]\nstore: s.zarr\nchat: always\nprompts: {TALK}\nreads: {{r: {{pooling: last}}}}\n"
    (message,) = map(str, problems(plan))
    assert "no system turn" in message and "prompts" in message
