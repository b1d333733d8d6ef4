"""The rules that the shipped text sets keep: counts, distinctness, placeholders, labels, unnamed emotions."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from ruamel.yaml import YAML

import nsteer.plan.texts
from nsteer.plan import texts
from nsteer.plan.outlines import outline
from nsteer.science.heldout import by_words
from nsteer.science.metrics import accuracy
from nsteer.science.presets import PRESETS

FOLDER = Path(nsteer.plan.texts.__file__).parent
FILES = sorted(FOLDER.glob("*.yaml"))
NAMES = [file.stem for file in FILES]

GROUPS = {
    "positive": ["happy", "calm", "blissful", "hopeful", "enthusiastic", "grateful", "proud", "loving"],
    "negative": [
        "sad",
        "angry",
        "afraid",
        "desperate",
        "hostile",
        "anxious",
        "guilty",
        "gloomy",
        "exasperated",
    ],
    "other": ["nervous", "brooding", "reflective"],
}
TARGETS = {
    "aggressive": ("calm", 1),
    "neutral-hostile": ("hostile", 1),
    "sad": ("happy", 1),
    "neutral-desperate": ("desperate", 1),
    "calm": ("calm", -1),
    "neutral-happy": ("happy", 1),
    "anxious": ("calm", 1),
    "neutral-gloomy": ("gloomy", 1),
}

# The word, its inflections and derivations; the keys are the twenty emotions in their order.
STEMS = {
    "happy": r"(un)?happ(y|i)\w*",
    "sad": r"sad(ly|ness|der|dest|den\w*)?\b",
    "calm": r"(be)?calm\w*",
    "desperate": r"(desperat|despair)\w*",
    "afraid": r"(un)?afraid\b",
    "angry": r"ang(er|ry|ri)\w*",
    "proud": r"(proud|pride)\w*",
    "guilty": r"guilt\w*",
    "nervous": r"(un)?nerv(ous|y|ier|iness|ing|ed)\w*",
    "hopeful": r"hop(e|es|ed|ing|eful\w*|eless\w*)\b",
    "brooding": r"brood\w*",
    "gloomy": r"gloom\w*",
    "reflective": r"(un)?reflect\w*",
    "enthusiastic": r"(un)?enthus\w*",
    "hostile": r"hostil\w*",
    "loving": r"(be|un)?lov(e|es|ed|er|ers|ing|ingly|ely|able|ingness)\b",
    "exasperated": r"exasperat\w*",
    "blissful": r"bliss\w*",
    "anxious": r"anxi\w*",
    "grateful": r"(un|in)?grat(eful|itud|ify|ifi)\w*",
}
# Words so near in meaning that they would name the emotion too; checked in the passages of nsteer.yaml.
SYNONYMS = {
    "happy": r"joy\w*|glad\w*|cheer\w*|delight\w*|elat\w*|pleased|merr\w*|content(ed\w*|ment)?|jubil\w*",
    "sad": r"sorrow\w*|griev\w*|grief|mourn\w*|melanchol\w*|heartbr\w*|miser\w*|unhapp\w*|dejected\w*|woe\w*",
    "calm": r"peace\w*|seren\w*|tranquil\w*|relax\w*|placid\w*|compos(ed|ure)|unruffled|sooth\w*",
    "desperate": r"frantic\w*|hopeless\w*|despond\w*",
    "afraid": r"fear\w*|scar(e|ed|y|ing)|terr(or|if)\w*|fright\w*|panic\w*|dread\w*|horr(or|if)\w*|alarmed",
    "angry": r"fur(y|ious\w*)|rag(e|ed|ing)|mad|madly|irate|wrath\w*|livid|outrage\w*|temper|enrag\w*",
    "proud": r"triumph\w*|dignity|self-esteem",
    "guilty": r"remorse\w*|sham(e|ed|eful\w*)|ashamed|contrit\w*|sorry|regret\w*|blam\w*|culpab\w*",
    "nervous": r"jitter\w*|edgy|on edge|tens(e|ed|ely|ion)|jump(y|iness)|apprehens\w*|uneas\w*|worr\w*",
    "hopeful": r"optimis\w*|expectant\w*|confiden\w*",
    "brooding": r"ruminat\w*|mop(e|ed|ing)|sulk\w*|dwel(l|t|ling)",
    "gloomy": r"glum\w*|dreary|bleak\w*|dismal\w*|melanchol\w*|depress\w*|deject\w*|despond\w*|morose\w*",
    "reflective": r"pensive\w*|contemplat\w*|thoughtful\w*|meditat\w*|ponder\w*|mus(e|ed|ing)|introspect\w*",
    "enthusiastic": r"eager\w*|excit\w*|keen\w*|zeal\w*|passion\w*|ferv\w*|ardent\w*|ardour",
    "hostile": r"antagon\w*|aggress\w*|belliger\w*|unfriend\w*|hat(e|ed|red|eful)|malic\w*|enem(y|ies)",
    "loving": r"affection\w*|tender\w*|ador(e|ed|ing|ation)|fond\w*|devot\w*|cherish\w*|dear\w*|caring",
    "exasperated": r"frustrat\w*|annoy\w*|irritat\w*|fed up|vex\w*|infuriat\w*|impatien\w*",
    "blissful": r"ecsta\w*|raptur\w*|euphor\w*|heaven\w*|joy\w*|elat\w*|paradis\w*",
    "anxious": r"worr(y|ie)\w*|uneas\w*|apprehens\w*|fret\w*|nervous\w*|dread\w*",
    "grateful": r"thank\w*|appreciat\w*|indebted\w*|obliged",
}
EMOTIONS = list(STEMS)
KINDS = list(TARGETS)
CALENDAR = {"monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday", "march", "may"}
KEBAB = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
NUMBERED = re.compile(r"(.+)-[1-5]")


def read(name: str):
    return YAML(typ="safe", pure=True).load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=NAMES)
def data(request):
    """Each shipped text set in turn."""
    return read(request.param)


@pytest.fixture(scope="module")
def main():
    """nsteer.yaml, the set for real models."""
    return read("nsteer")


def strings(value):
    """Every string in a document, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def names_emotion(text: str, *tables: str) -> str | None:
    """The first match of the patterns in `text`, at the start of a word."""
    match = re.search(rf"\b(?:{'|'.join(tables)})(?!\w)", text, re.IGNORECASE)
    return match and match[0]


def stem(emotion: str) -> str:
    return STEMS.get(emotion, rf"{re.escape(emotion)}\w*")


def words(text: str) -> int:
    return len(text.split())


def sentences(text: str) -> int:
    return len([part for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text) if part])


def opening(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[\w'-]+", text.lower())[:3])


def holders(text: str) -> list[str]:
    return re.findall(r"\{(\w*)\}", text)


def every_passage(data) -> list[str]:
    return [*(text for group in data["passages"].values() for text in group), *data["neutral_passages"]]


def distinct(texts) -> bool:
    plain = [re.sub(r"\W+", " ", text.lower()).strip() for text in texts]
    return len(plain) == len(set(plain))


def test_the_stem_table():
    assert "nsteer" in NAMES
    assert len(STEMS) == 20
    assert set(STEMS) == set(SYNONYMS) == {emotion for group in GROUPS.values() for emotion in group}
    caught = [
        "happier",
        "happiness",
        "Sadly",
        "saddened",
        "calmly",
        "despairing",
        "angrily",
        "pride",
        "unloved",
    ]
    assert [word for word in caught if not names_emotion(f"so {word}, then", *STEMS.values())] == []
    passed = ["happened", "saddle", "gloves", "angle", "hopped", "nerve", "grate", "cloves", "blister"]
    assert [word for word in passed if names_emotion(f"so {word}, then", *STEMS.values())] == []


# --- every text set


def test_every_string_is_non_empty_and_stripped(data):
    bad = [text for text in strings(data) if not text or text != text.strip() or "  " in text or "\n" in text]
    assert bad == []


def test_name_matches_the_file(data, request):
    assert data["name"] == request.node.callspec.params["data"]
    assert data["language"]


def test_emotions_have_a_group_and_passages(data):
    assert set(data["emotions"].values()) <= {"positive", "negative", "other"}
    assert list(data["passages"]) == list(data["emotions"])
    assert all(KEBAB.fullmatch(emotion) for emotion in data["emotions"])


def test_lists_hold_no_duplicates(data):
    for field in (
        "story_templates",
        "topic_templates",
        "neutral_story_templates",
        "topics",
        "neutral_passages",
        "neutral_sentences",
    ):
        assert distinct(data.get(field, [])), field
    assert distinct(every_passage(data))
    for label, prompts in data["prompts"].items():
        assert distinct(prompts.values()), label


def test_placeholders(data):
    for text in data["story_templates"]:
        assert holders(text).count("emotion") == 1, text
        assert set(holders(text)) <= {"emotion", "topic"}, text
    for text in data.get("topic_templates", []):
        assert sorted(holders(text)) == ["emotion", "topic"], text
    for text in data["neutral_story_templates"]:
        assert set(holders(text)) <= {"topic"}, text
    rest = [data["passages"], data["neutral_passages"], data["neutral_sentences"], data["prompts"]]
    assert not [text for text in strings([*rest, data["topics"]]) if "{" in text or "}" in text]


def test_a_passage_never_names_its_emotion(data):
    for emotion, passages in data["passages"].items():
        named = {text: names_emotion(text, stem(emotion)) for text in passages}
        assert not {text: word for text, word in named.items() if word}, emotion


def test_neutral_texts_name_no_emotion(data):
    stems = [stem(emotion) for emotion in data["emotions"]]
    texts = [*data["neutral_passages"], *data["neutral_sentences"], *data["neutral_story_templates"]]
    assert not [text for text in texts if names_emotion(text, *stems)]


def test_prompt_labels_are_kebab_case(data):
    labels = [*data["prompts"], *(label for prompts in data["prompts"].values() for label in prompts)]
    assert [label for label in labels if not KEBAB.fullmatch(label)] == []


def test_sets_named_by_a_number_hold_so_many(data):
    for label, prompts in data["prompts"].items():
        if match := re.fullmatch(r".+-(\d+)", label):
            assert len(prompts) == int(match[1]), label


def test_scenario_targets_match_the_prompts(data):
    targets = data.get("scenario_targets", {})
    for kind, target in targets.items():
        assert set(target) == {"emotion", "sign"}, kind
        assert target["sign"] in (1, -1), kind
        assert target["emotion"] in data["emotions"], kind
    if targets:
        labels = [label for prompts in data["prompts"].values() for label in prompts]
        kinds = {match[1] for label in labels if (match := NUMBERED.fullmatch(label))}
        assert set(targets) <= kinds


# --- nsteer.yaml alone


def test_the_twenty_emotions_in_order(main):
    assert list(main["emotions"]) == EMOTIONS
    assert main["emotions"] == {name: group for group, members in GROUPS.items() for name in members}


def test_counts(main):
    counts = {field: len(value) for field, value in main.items() if isinstance(value, list)}
    assert counts == {
        "story_templates": 5,
        "topic_templates": 12,
        "neutral_story_templates": 5,
        "topics": 100,
        "neutral_passages": 20,
        "neutral_sentences": 20,
    }
    per_emotion = {len(passages) for passages in main["passages"].values()}
    assert len(per_emotion) == 1
    assert per_emotion.pop() >= 10
    assert {name: len(prompts) for name, prompts in main["prompts"].items()} == {
        "scenarios-8": 8,
        "scenarios-40": 40,
        "neutral-24": 24,
    }


def test_story_templates_hold_the_emotion_alone(main):
    assert [holders(text) for text in main["story_templates"]] == [["emotion"]] * 5
    assert [holders(text) for text in main["neutral_story_templates"]] == [[]] * 5


def test_topics_are_short_neutral_phrases(main):
    stems = list(STEMS.values()) + list(SYNONYMS.values())
    assert not [topic for topic in main["topics"] if names_emotion(topic, *stems)]
    assert not [topic for topic in main["topics"] if not 2 <= words(topic) <= 8 or topic[-1] in ".!?"]


def test_passages_have_two_to_four_sentences_and_35_to_70_words(main):
    every = every_passage(main)
    assert not [(sentences(text), text) for text in every if not 2 <= sentences(text) <= 4]
    assert not [(words(text), text) for text in every if not 35 <= words(text) <= 70]


def test_passage_lengths_are_balanced(main):
    means = {emotion: mean(map(words, passages)) for emotion, passages in main["passages"].items()}
    middle = mean(means.values())
    means["neutral"] = mean(map(words, main["neutral_passages"]))
    assert not {name: value for name, value in means.items() if abs(value / middle - 1) > 0.25}


def test_no_two_passages_share_an_opening(main):
    seen: dict[tuple[str, ...], str] = {}
    for text in every_passage(main):
        assert opening(text) not in seen, (text, seen[opening(text)])
        seen[opening(text)] = text


def test_passages_name_none_of_the_emotions(main):
    for emotion, passages in main["passages"].items():
        for text in passages:
            word = names_emotion(text, *STEMS.values(), SYNONYMS[emotion])
            assert word is None, (emotion, word, text)


def test_no_character_returns(main):
    """Each passage has its own people, so that no name can stand for an emotion."""
    every = every_passage(main)
    plain = set(re.findall(r"(?<![\w'-])[a-zé][\w-]*", " ".join(every))) | CALENDAR
    first: dict[str, str] = {}
    for text in every:
        for name in {word for word in re.findall(r"\b[A-Z][\w-]+", text) if word.lower() not in plain}:
            assert name not in first, (name, text, first[name])
            first[name] = text


def test_neutral_sentences_are_short(main):
    assert not [text for text in main["neutral_sentences"] if not 6 <= words(text) <= 14]
    assert not [text for text in main["neutral_sentences"] if sentences(text) != 1 or text[-1] != "."]


def test_prompts_break_off_and_name_no_emotion(main):
    for label, text in [pair for prompts in main["prompts"].values() for pair in prompts.items()]:
        assert text[-1] not in ".!?…;:", label
        assert not names_emotion(text, *STEMS.values()), label
    every = [text for prompts in main["prompts"].values() for text in prompts.values()]
    assert distinct(every)


def test_neutral_prompts_have_5_to_15_words(main):
    assert not [text for text in main["prompts"]["neutral-24"].values() if not 5 <= words(text) <= 15]


def test_scenarios_8_has_one_of_each_kind(main):
    assert list(main["prompts"]["scenarios-8"])[:4] == ["aggressive", "neutral", "sad", "calm"]


def test_scenarios_40_is_eight_kinds_by_five(main):
    assert list(main["prompts"]["scenarios-40"]) == [f"{kind}-{n}" for kind in KINDS for n in range(1, 6)]
    targets = {kind: (target["emotion"], target["sign"]) for kind, target in main["scenario_targets"].items()}
    assert targets == TARGETS


def told_apart_by_words(emotional: list[str], neutral: list[str], draws: int = 10) -> float:
    """Held-out accuracy of a bag of words between as many emotional as neutral texts; 0.5 is chance."""
    there, accuracies = np.ones((2, len(neutral)), bool), []
    folds = np.tile(np.arange(len(neutral)), (2, 1))
    for k in range(draws):
        drawn = np.random.default_rng(k).choice(len(emotional), len(neutral), replace=False)
        texts = np.array([[emotional[i] for i in drawn], neutral], object)
        accuracies.append(accuracy(by_words(texts, there, folds)))
    return mean(accuracies)


def test_neutral_passages_are_of_the_same_genre_as_the_emotional_ones(main):
    """What sets them apart is to be the emotion, not that nobody is in them: then every vector has a person in it."""
    emotional = [text for texts in main["passages"].values() for text in texts]
    person = re.compile(r"\b(he|she|his|her|him)\b", re.I)
    shares = [mean(bool(person.search(text)) for text in texts) for texts in (emotional, main["neutral_passages"])]
    assert abs(shares[0] - shares[1]) < 0.1, shares
    assert told_apart_by_words(emotional, main["neutral_passages"]) < 0.8
    assert told_apart_by_words(emotional, ["The road is long.", "A table has four legs."] * 5) > 0.8, "it can tell"


def test_a_preset_that_samples_many_stories_has_an_instruction_for_each(main):
    wanted = PRESETS["anthropic2026"].fields["samples"]
    assert len(main["topic_templates"]) * len(main["topics"]) >= wanted


@pytest.mark.parametrize("name", texts.shipped())
def test_what_a_report_reads_of_a_text_set_is_what_the_whole_file_says(name):
    whole, extract = texts.load(texts.find(name)), outline(name)
    assert (extract.emotions, extract.scenario_targets) == (whole.emotions, whole.scenario_targets)
    assert list(extract.emotions) == list(whole.emotions) and extract.emotions
