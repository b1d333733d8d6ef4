"""The embedded models load, speak any text, were trained on what bench/zoo_corpus.py says, and can be made again."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from nsteer import zoo

sys.path.append(str(Path(__file__).parents[1] / "bench"))

import zoo_corpus as corpus

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: transformers.AutoTokenizer.from_pretrained(zoo.path(name)) for name in zoo.FAMILIES}


@pytest.fixture(scope="module")
def models():
    return {name: transformers.AutoModelForCausalLM.from_pretrained(zoo.path(name)) for name in zoo.FAMILIES}


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match="gpt2, gemma, qwen, llama, mistral, judge"):
        zoo.path("bert")


def test_every_family_has_a_shape_of_its_own(models):
    shapes = {(m.config.num_hidden_layers, m.config.hidden_size) for m in models.values()}
    assert len(shapes) == len({type(m) for m in models.values()}) == 5
    assert min(layers for layers, _ in shapes) >= 5


def test_a_generation_ends_by_itself(models, tokenizers):
    for name, model in models.items():
        words = tokenizers[name]
        chat = words.apply_chat_template(
            [{"role": "user", "content": "write a story about an ordinary day ."}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.float().generate(**chat, max_new_tokens=120)[0]
        ends = model.generation_config.eos_token_id
        assert ids[-1] in (ends if isinstance(ends, list) else [ends])
        assert chat["input_ids"].shape[1] + 20 < len(ids) < chat["input_ids"].shape[1] + 120


@pytest.mark.parametrize(
    "text", ["tom walked to the market and", "Hello, World!  two\n\nlines", "写一个故事 🎉 é", " x"]
)
def test_any_text_comes_back(tokenizers, text):
    for words in tokenizers.values():
        batch = words(text)
        assert set(batch) == {"input_ids", "attention_mask"}
        assert words.decode(batch["input_ids"], skip_special_tokens=True) == text
        assert words.unk_token_id is None or words.unk_token_id not in batch["input_ids"]


def test_a_word_of_the_corpus_is_one_token(tokenizers):
    for words in tokenizers.values():
        spaced = [" " + word for word in corpus.vocabulary()]
        ids = words(spaced, add_special_tokens=False)["input_ids"]
        assert not [word for word, split in zip(spaced, ids) if len(split) > 1]


def test_bos_comes_once_where_the_family_has_one(tokenizers):
    for name, words in tokenizers.items():
        turns = [{"role": "user", "content": "write a story about someone feeling sad ."}]
        rendered = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = words(rendered, add_special_tokens=False)["input_ids"]
        plain = words("tom walked")["input_ids"]
        assert words.pad_token_id is not None
        if name in ("gemma", "llama", "mistral"):
            assert ids[0] == plain[0] == words.bos_token_id
            assert ids.count(words.bos_token_id) == plain.count(words.bos_token_id) == 1
        else:
            assert words.bos_token is None


def test_a_prompt_is_the_beginning_of_the_conversation(tokenizers):
    turns = [
        {"role": "user", "content": "tell a story ."},
        {"role": "assistant", "content": "one day tom wept ."},
    ]
    for words in tokenizers.values():
        prompt, whole = (
            words(
                words.apply_chat_template(t, tokenize=False, add_generation_prompt=g),
                add_special_tokens=False,
            )
            for t, g in ((turns[:1], True), (turns, False))
        )
        assert whole["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]


def test_no_passage_names_an_emotion():
    texts = corpus.text_set()
    told = [p for group in texts["passages"].values() for p in group] + texts["neutral_passages"]
    told += list(texts["prompts"]["neutral-24"].values()) + list(texts["prompts"]["scenarios-8"].values())
    named = re.compile(r"\b(" + "|".join(corpus.EMOTIONS) + r")\b")
    assert not [text for text in told if named.search(text)]


def test_no_passage_is_in_the_training_set():
    texts = corpus.text_set()
    told = {p for group in texts["passages"].values() for p in group} | set(texts["neutral_passages"])
    trained = " | ".join(part for doc in corpus.documents(10_000, 0) for part in doc.values())
    assert not [text for text in told if text in trained]


def test_the_shipped_text_set_is_the_corpus_s():
    from nsteer.plan import texts

    shipped, text_set = texts.load(texts.find("zoo")), corpus.text_set()
    assert {key: getattr(shipped, key) for key in text_set} == text_set
    assert tuple(shipped.emotions) == corpus.EMOTIONS
    assert all(len(group) >= 8 for group in shipped.passages.values())


def test_planted_similarity_is_the_overlap_of_the_words_told():
    planted = corpus.planted_similarity()
    np.testing.assert_allclose(planted, planted.T)
    np.testing.assert_allclose(np.diag(planted), 1)
    # An independent road: count the pools of many drawn cues.
    import random

    counts = np.zeros((20, 20))
    for i, emotion in enumerate(corpus.EMOTIONS):
        teller = corpus.Teller(random.Random(i), emotion)
        drawn = [teller.pool() for _ in range(4000)]
        counts[i] = [drawn.count(other) for other in corpus.EMOTIONS]
    unit = counts / np.linalg.norm(counts, axis=1, keepdims=True)
    np.testing.assert_allclose(unit @ unit.T, planted, atol=0.04)


def test_kin_are_more_alike_than_any_others():
    planted, kin, emotions = corpus.planted_similarity(), corpus.kin_pairs(), corpus.EMOTIONS
    pairs = [(a, b) for i, a in enumerate(emotions) for b in emotions[i + 1 :]]
    inside = [planted[emotions.index(a), emotions.index(b)] for a, b in pairs if (a, b) in kin]
    outside = [planted[emotions.index(a), emotions.index(b)] for a, b in pairs if (a, b) not in kin]
    assert min(inside) > max(outside) + 0.1
    assert len({round(value, 3) for value in inside}) >= 5  # graded


def test_pools_are_disjoint_and_nameless():
    seen: dict[str, str] = {}
    for emotion, pool in corpus.TABLES["emotions"].items():
        for word in (w for kind in ("verbs", "nouns", "adjectives") for w in pool[kind]):
            assert seen.setdefault(word, emotion) == emotion
            assert word not in corpus.EMOTIONS


def test_the_same_seed_tells_the_same_stories():
    assert corpus.documents(50, seed=3) == corpus.documents(50, seed=3) != corpus.documents(50, seed=4)


def test_the_zoo_is_small():
    files = [f for name in zoo.names() for f in zoo.path(name).rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 10.5 * 2**20


def test_a_family_can_be_made_again(tmp_path):
    import zoo_train as train

    losses = train.train_family("llama", tmp_path, steps=14, documents=400, report=False)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert model(**words("tom walked", return_tensors="pt")).logits.shape[-1] == len(words)


def test_the_judge_tells_a_plain_case():
    words = transformers.AutoTokenizer.from_pretrained(zoo.path("judge"))
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(zoo.path("judge")).float()
    texts = [
        "tom wept and sobbed . the grave was tearful .",
        "tom shouted . the fists and the rage .",
        "tom carried the bag . the table was flat .",
    ]
    named = judge(**words(texts, return_tensors="pt", padding=True)).logits.argmax(-1).tolist()
    assert [judge.config.id2label[i] for i in named] == ["sad", "angry", "neutral"]
