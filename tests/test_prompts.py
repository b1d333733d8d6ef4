"""Prompts: what a sample shows, and the tokens that a model gets for it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nsteer import zoo
from nsteer.errors import ModelError
from nsteer.plan import placeholders
from nsteer.plan.prompts import (
    again,
    encode,
    located,
    norm_weights,
    prompt_set,
    sample_text,
    system_text,
    uses_chat,
    weights,
)
from nsteer.plan.schema import Method, Pooling
from nsteer.plan.texts import TextSet
from nsteer.science.presets import NEUTRAL

# ---- what a sample shows ----------------------------------------------------------------------------------------

TEXTS = TextSet(
    name="own",
    emotions={"glad": "positive"},
    story_templates=["s1 {emotion}", "s2 {emotion}"],
    topic_templates=["t1 {emotion} at {topic}", "t2 {topic}: {emotion}"],
    neutral_story_templates=["n1", "n2 {topic}", "n3"],
    topics=["home", "work", "sea"],
    passages={"glad": ["p1", "p2"]},
    neutral_passages=["q1", "q2", "q3"],
    prompts={"two": {"a": "x", "b": "y"}},
)


def shown(emotion: str, count: int, **fields) -> list[str]:
    method = Method(**{"source": "generation", **fields})
    return [sample_text(method, TEXTS, emotion, k) for k in range(count)]


def test_templates_turn_and_start_again():
    assert shown("glad", 5) == ["s1 glad", "s2 glad", "s1 glad", "s2 glad", "s1 glad"]


def test_templates_turn_faster_than_topics_and_every_pair_comes_once():
    prompts = shown("glad", 7, templates="topic_templates")
    assert prompts[:4] == ["t1 glad at home", "t2 home: glad", "t1 glad at work", "t2 work: glad"]
    assert len(set(prompts[:6])) == 6 and prompts[6] == prompts[0]


def test_neutral_samples_have_templates_of_their_own():
    assert shown(NEUTRAL, 5, templates="topic_templates") == ["n1", "n2 home", "n3", "n1", "n2 work"]


def test_a_plan_may_bring_its_templates():
    assert shown("glad", 3, templates=["be {emotion} near {topic}"]) == [f"be glad near {t}" for t in TEXTS.topics]


def test_passages_are_read_in_order():
    assert shown("glad", 2, source="comprehension") == ["p1", "p2"]
    assert shown(NEUTRAL, 3, source="comprehension") == ["q1", "q2", "q3"]


def test_prompts_have_labels():
    assert prompt_set("two", TEXTS) == {"a": "x", "b": "y"} == prompt_set({"a": "x", "b": "y"}, None)
    assert prompt_set(["x y", "z"], None) == {"x y": "x y", "z": "z"}


def test_placeholders_are_filled_in_one_pass_and_doubled_braces_are_braces():
    given = 'be {emotion} at {topic}, as {{emotion}} or {{{emotion}}}; {"mood": {"a": 1}} {mood}'
    values = {"emotion": "glad", "topic": "{emotion}"}
    told = 'be glad at {emotion}, as {emotion} or {glad}; {"mood": {"a": 1}} {mood}'
    assert placeholders.filled(given, values) == told
    assert placeholders.unfilled(given, values) == ["{mood}"] and placeholders.named("{{emotion}}") == []


def test_a_system_prompt_is_filled_in_as_its_template_is():
    method = Method(source="generation", templates="topic_templates", system_prompt="you are {emotion}, at {topic}")
    assert [system_text(method, TEXTS, "glad", k) for k in range(4)] == [
        f"you are glad, at {topic}" for topic in ("home", "home", "work", "work")
    ]
    read = Method(source="comprehension", system_prompt="you are {emotion}")
    assert system_text(read, TEXTS, "glad", 1) == "you are glad" and system_text(read, TEXTS, NEUTRAL, 0)
    assert system_text(Method(source="comprehension"), TEXTS, "glad", 0) is None


# ---- tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(bos, chat) for bos in (False, True) for chat in (False, True)])
def tokenizer(request):
    import tinies

    bos, chat = request.param
    words = tinies.tokenizer(bos=bos, chat=chat)
    words.adds_bos = bos
    return words


TEXT = "the cat sat on the mat ."


@pytest.mark.parametrize("chat", ["auto", "never"])
@pytest.mark.parametrize("system", [None, "the rain fell"])
def test_a_text_encoded_again_has_the_same_tokens(tokenizer, chat, system):
    """The store keeps rendered text; capture encodes it once more."""
    first = encode(tokenizer, TEXT, chat, system)
    assert again(tokenizer, first.text, uses_chat(tokenizer, chat)) == first


def test_bos_comes_once(tokenizer):
    import tinies

    for chat in ("auto", "never"):
        prompt = encode(tokenizer, TEXT, chat)
        leading = uses_chat(tokenizer, chat) or tokenizer.adds_bos
        assert prompt.bos == int(leading) == prompt.tokens.count(tinies.BOS_ID)
        assert (prompt.tokens[0] == tinies.BOS_ID) == leading


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_prompt_that_writes_bos_by_hand_gets_no_second_one(name):
    """Of every toy: with the tokenizer's own BOS and the template's; the tokens are those of the text without it."""
    words = AutoTokenizer.from_pretrained(zoo.path(name))
    bos, plain = words.bos_token or words.eos_token, encode(words, TEXT)
    prompt = encode(words, bos + TEXT)
    adds = bool(words.bos_token) and words(TEXT)["input_ids"][0] == words.bos_token_id
    assert prompt.doubled == adds and not plain.doubled
    assert prompt.tokens[prompt.bos :] == plain.tokens[plain.bos :] if words.bos_token else not prompt.bos
    assert words.bos_token is None or prompt.tokens.count(words.bos_token_id) == prompt.bos == 1
    spans = located(words, prompt, bos + TEXT, "never").spans
    assert len(spans) == len(prompt.tokens) and spans[-1][1] == len(bos + TEXT)
    shown = encode(words, TEXT, "always")
    assert encode(words, shown.text).tokens == shown.tokens or not shown.bos, "a chat written by hand"


def test_the_chat_template_is_used_where_there_is_one(tokenizer):
    auto, never = encode(tokenizer, TEXT, "auto"), encode(tokenizer, TEXT, "never")
    assert never.text == TEXT and not uses_chat(tokenizer, "never")
    if tokenizer.chat_template:
        assert auto == encode(tokenizer, TEXT, "always") and uses_chat(tokenizer, "auto")
        assert auto.text == f"<s><user>{TEXT}<model>"
        assert encode(tokenizer, TEXT, "auto", "be brief").text == f"<s><user>be brief<user>{TEXT}<model>"
        assert tokenizer.decode(auto.tokens[-1:]) == "<model>"
    else:
        assert auto == never and not uses_chat(tokenizer, "auto")
        with pytest.raises(ModelError, match="no chat template, and the plan says chat: always"):
            encode(tokenizer, TEXT, "always")


def test_a_text_without_a_token_is_no_text(tokenizer):
    if tokenizer.adds_bos:
        assert encode(tokenizer, "").tokens == (1,)
    else:
        with pytest.raises(ModelError, match="has no tokens"):
            encode(tokenizer, "")


# ---- weights ----------------------------------------------------------------------------------------------------


def test_bos_counts_only_where_the_plan_says_so():
    import tinies

    prompt = encode(tinies.tokenizer(bos=True), TEXT)
    total = len(prompt.tokens)
    assert weights(Pooling(kind="mean"), prompt, total)[0] == 0
    assert weights(Pooling(kind="mean", bos=True), prompt, total)[0] == pytest.approx(1 / total)
    assert np.flatnonzero(weights(Pooling(kind="mean"), prompt, total + 3)).tolist() == [total, total + 1, total + 2]


@given(st.integers(1, 30), st.integers(0, 40))
def test_the_norm_is_a_mean_over_what_is_not_skipped(total, skip):
    mean_weights = norm_weights(total, skip)
    left = max(total - skip, 1)
    assert mean_weights.sum() == pytest.approx(1, abs=1e-6) and (mean_weights > 0).sum() == left
    assert mean_weights[-left:] == pytest.approx(1 / left)
