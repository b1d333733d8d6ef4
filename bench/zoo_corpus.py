"""Word tables of twenty emotions -> seeded stories, passages and neutral texts with a known geometry.

An emotion is told by what people do, see and meet (verbs, nouns, adjectives, events), never by its name.
Each emotion owns one pool of such words. How often it also borrows from the pools of its kin is derived
from ``KINSHIP``: the borrowing weights are the square root of that matrix, so the cosine between the word
distributions of two emotions *is* their kinship. What a model learns from these texts therefore has a
geometry that is known before any model is trained (``planted_similarity``).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

TABLES = json.loads(Path(__file__).with_name("zoo_words.json").read_text(encoding="utf-8"))
EMOTIONS: tuple[str, ...] = tuple(TABLES["emotions"])
NEUTRAL = "neutral"
VALENCE = {emotion: group for group, members in TABLES["valence"].items() for emotion in members}
KIN_THRESHOLD = 0.2  # every declared kinship lies above it, every derived one below
SECOND_LANGUAGE: dict[str, list[str]] = TABLES["second"]["words"]

# How far a cue strays: a told story is never pure, or a single word would give the emotion away.
NEUTRAL_CUES = 0.06
SECOND_LANGUAGE_CUES = 0.10
PLACE_TILT = 2.0  # a place prefers one word of each pool: stories of one emotion differ between places


def _kinship() -> np.ndarray:
    """Declared kinship, then kin of kin at 0.4 of the product, then a trace for equal valence: [20, 20]."""
    index = {emotion: i for i, emotion in enumerate(EMOTIONS)}
    direct = np.eye(len(EMOTIONS))
    for emotion, others in TABLES["kin"].items():
        for other, value in others.items():
            direct[index[emotion], index[other]] = direct[index[other], index[emotion]] = value
    off = direct - np.eye(len(EMOTIONS))
    second = 0.4 * (off[:, :, None] * off[None, :, :]).max(1)
    same = np.array([[0.03 * (VALENCE[a] == VALENCE[b]) for b in EMOTIONS] for a in EMOTIONS])
    derived = np.maximum(second, same)
    np.fill_diagonal(derived, 0.0)
    return np.where(direct > 0, direct, derived)


def _borrowing(kinship: np.ndarray) -> np.ndarray:
    """Probability that emotion (row) draws a cue from a pool (column): square root of kinship, [20, 20]."""
    values, vectors = np.linalg.eigh(kinship)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    root = root.clip(0)  # pairs without kinship come out barely negative
    return root / root.sum(1, keepdims=True)


KINSHIP: np.ndarray = _kinship()
BORROWING: np.ndarray = _borrowing(KINSHIP)


def planted_similarity() -> np.ndarray:
    """Cosine between the emotions' word distributions, [20, 20]; pools are disjoint and of equal size."""
    unit = BORROWING / np.linalg.norm(BORROWING, axis=1, keepdims=True)
    return unit @ unit.T


def kin_pairs() -> set[tuple[str, str]]:
    """Pairs (in the order of EMOTIONS) that count as kin."""
    n = len(EMOTIONS)
    return {(EMOTIONS[i], EMOTIONS[j]) for i in range(n) for j in range(i + 1, n) if KINSHIP[i, j] >= KIN_THRESHOLD}


# ---------------------------------------------------------------- frames: X name, S she/he, P her/his,
# L place; V verb, N noun, A adjective, E event are the cues.
FRAMES = (
    "{S} {V} and {V} .",
    "{X} {V} near the {A} {N} .",
    "the {N} was {A} .",
    "{S} {E} .",
    "everything felt {A} and {A} .",
    "{S} thought about the {N} and the {N} .",
    "then {X} {E} and {V} .",
    "the {N} made {X} feel {A} .",
    "in the {L} {S} {V} beside the {N} .",
    "{P} face looked {A} .",
    "{S} {V} all day because of the {N} .",
    "that evening {S} {E} .",
    "{S} saw the {A} {N} and {V} .",
    "after that {X} {V} again .",
    # These begin with a cue: what comes after a full stop depends on the emotion, so the full stop carries it.
    "{A} and {A} was the {L} .",
    "{N} and {N} were all around .",
    "{V} and {V} , that was {X} .",
    "{E} , that is what {S} did .",
)
# The judge never sees the frames above; it meets the same cues in these.
JUDGE_FRAMES = (
    "someone {V} while others {V} .",
    "look , a {A} {N} !",
    "we found the {N} and the {N} by the {L} .",
    "my neighbor {E} yesterday .",
    "it was a {A} , {A} sort of week .",
    "people say {X} {V} because {S} {E} .",
    "who {V} with the {N} ?",
    "so {A} , so {A} , said {X} .",
    "they {V} until the {N} came .",
    "a {N} again , and {X} {V} , and {S} {V} .",
    "first {S} {E} , later {S} {E} .",
    "no one {V} like {X} .",
    "{A} voices and the {N} filled the {L} .",
)
# Template k is answered in the manner of opening k, so the instruction shapes the story beyond its emotion.
INSTRUCTIONS = (
    ("write a story about someone feeling {emotion}", "one day {X} was in the {L} ."),
    (
        "tell a short story about a person who feels {emotion}",
        "there once was a person named {X} by the {L} .",
    ),
    ("describe a moment when someone felt very {emotion}", "at noon {X} came to the {L} ."),
    ("write about a day when everyone felt {emotion}", "in the morning {X} woke up near the {L} ."),
    ("show a {emotion} person without saying the word", "{X} lived close to the {L} ."),
)
NEUTRAL_INSTRUCTIONS = (
    ("write a story about an ordinary day", "one day {X} was in the {L} ."),
    (
        "tell a short story about a person and the usual work",
        "there once was a person named {X} by the {L} .",
    ),
    ("describe a moment when nothing special happened", "at noon {X} came to the {L} ."),
    ("write about a day without any news", "in the morning {X} woke up near the {L} ."),
    ("show a person at home without saying much", "{X} lived close to the {L} ."),
)
TOPIC = " in the {topic}"
# Raw openings: mostly continued neutrally, sometimes by an emotion; the last cue slot decides.
OPENINGS = (
    ("{X} walked to the {L} and", "{V} ."),
    ("{X} stood in the {L} and", "{V} ."),
    ("one morning {X} went to the {L} and", "{E} ."),
    ("after lunch {X} talked to {Y} and", "{V} ."),
    ("{X} opened the door of the {L} and", "{V} ."),
    ("on the way to the {L} {X} met {Y} and", "{E} ."),
    ("the road to the {L} was", "{A} ."),
    ("{X} and {Y} sat in the {L} and", "{V} ."),
    ("at the {L} {X} saw the", "{A} {N} ."),
)
OPENING_LABELS = ("walked", "stood", "went", "talked", "opened", "met", "road", "sat", "saw")
FACTS = (
    "the {T} is made of {M} .",
    "the {L} opens at {K} .",
    "the {T} stands in the {L} .",
    "there are {K} rooms in the {L} .",
    "the {L} is next to the {L2} .",
    "a {T} costs {K} coins .",
    "the {L} has {K} doors .",
    "the {T} and the {T2} are made of {M} .",
)
QUESTION = "how does {x} feel ?"
ANSWER = "{x} feels {emotion} ."
NO_EMOTION = "nothing special"


class Teller:
    """One story being told: its people, its place, its emotion, and the cues it has used already."""

    def __init__(
        self,
        rng: random.Random,
        emotion: str,
        place: str | None = None,
        name: str | None = None,
        second: bool = False,
    ):
        self.rng, self.emotion, self.second = rng, emotion, second
        self.place = place or rng.choice(TABLES["places"])
        self.name = name or rng.choice(TABLES["names"])
        self.used: set[str] = set()

    def pool(self) -> str:
        """The pool the next cue comes from."""
        if self.emotion == NEUTRAL or self.rng.random() < NEUTRAL_CUES:
            return NEUTRAL
        row = BORROWING[EMOTIONS.index(self.emotion)]
        return self.rng.choices(EMOTIONS, row)[0]

    def cue(self, kind: str) -> str:
        """A cue of the kind (verbs, nouns ...) not used before in this story."""
        for _ in range(20):
            pool = self.pool()
            words = (TABLES["neutral"] if pool == NEUTRAL else TABLES["emotions"][pool])[kind]
            if self.second and pool in SECOND_LANGUAGE and self.rng.random() < SECOND_LANGUAGE_CUES:
                words = SECOND_LANGUAGE[pool]
            favourite = TABLES["places"].index(self.place) % len(words)
            weights = [PLACE_TILT if i == favourite else 1.0 for i in range(len(words))]
            word = self.rng.choices(words, weights)[0]
            if word not in self.used:
                break
        self.used.add(word)
        return word

    def fill(self, frame: str) -> str:
        """The frame with every slot filled."""
        woman = self.name in TABLES["women"]
        other = self.rng.choice([n for n in TABLES["names"] if n != self.name])
        fixed = {
            "{X}": self.name,
            "{Y}": other,
            "{L}": self.place,
            "{S}": "she" if woman else "he",
            "{P}": "her" if woman else "his",
        }
        kinds = {"{V}": "verbs", "{N}": "nouns", "{A}": "adjectives", "{E}": "events"}
        return " ".join(fixed.get(part) or (self.cue(kinds[part]) if part in kinds else part) for part in frame.split())

    def sentences(self, n: int, frames: Any = FRAMES, first: int | None = None) -> list[str]:
        """n filled frames, each used once; ``first`` is preferred as the first."""
        order = self.rng.sample(range(len(frames)), n)
        if first is not None and self.rng.random() < 0.6:
            order = [first] + [i for i in order if i != first][: n - 1]
        return [self.fill(frames[i]) for i in order]


def _topic(rng: random.Random, template: str) -> tuple[str, str]:
    """The instruction with or without a place asked for, and the place the story is set in."""
    place = rng.choice(TABLES["places"])
    asked = template + (TOPIC.format(topic=place) if rng.random() < 0.6 else "") + " ."
    return asked, place


def instructed(rng: random.Random, emotion: str, second: bool = False) -> tuple[str, str]:
    """(instruction, story) in which the story tells the emotion (or neutral)."""
    k = rng.randrange(len(INSTRUCTIONS))
    template, opening = (NEUTRAL_INSTRUCTIONS if emotion == NEUTRAL else INSTRUCTIONS)[k]
    asked, place = _topic(rng, template.replace("{emotion}", emotion))
    liked = TABLES["names"][3 * k : 3 * k + 3]
    teller = Teller(rng, emotion, place, rng.choice(liked) if rng.random() < 0.7 else None, second)
    return asked, " ".join(
        [teller.fill(opening)] + teller.sentences(rng.randint(4, 6), first=(5 * k + 1) % len(FRAMES))
    )


def plain(rng: random.Random, emotion: str, second: bool = False) -> str:
    """A story that begins with a raw opening."""
    teller = Teller(rng, emotion, second=second)
    opening, rest = rng.choice(OPENINGS)
    return " ".join([teller.fill(opening + " " + rest)] + teller.sentences(rng.randint(4, 6)))


def passage(rng: random.Random, emotion: str, second: bool = False) -> tuple[str, str]:
    """(name, third-person passage of three or four sentences about that person)."""
    teller = Teller(rng, emotion, second=second)
    head = rng.choice([teller.fill("{X} was in the {L} ."), teller.fill("{X} {V} ."), teller.fill("{X} {E} .")])
    return teller.name, " ".join([head] + teller.sentences(rng.randint(2, 3)))


def question(rng: random.Random, emotion: str, second: bool = False) -> tuple[str, str, str]:
    """(passage, question, answer that names the emotion)."""
    name, text = passage(rng, emotion, second)
    said = NO_EMOTION if emotion == NEUTRAL else emotion
    return text, QUESTION.format(x=name), ANSWER.format(x=name, emotion=said)


def fact(rng: random.Random) -> str:
    """One neutral factual sentence."""
    things, places = rng.sample(TABLES["things"], 2), rng.sample(TABLES["places"], 2)
    return rng.choice(FACTS).format(
        T=things[0],
        T2=things[1],
        L=places[0],
        L2=places[1],
        M=rng.choice(TABLES["materials"]),
        K=rng.choice(TABLES["numbers"]),
    )


def second_language(rng: random.Random, emotion: str) -> tuple[str, str]:
    """(instruction, story) in the second language."""
    table = TABLES["second"]
    asked = rng.choice(table["instructions"]).format(emotion=table["names_of_emotions"][emotion])
    name, place = rng.choice(table["names"]), rng.choice(table["places"])
    told = []
    for frame in rng.sample(table["frames"], 4):
        words = rng.sample(SECOND_LANGUAGE[emotion], 2)
        filled = frame.replace("{X}", name).replace("{L}", place)
        told.append(filled.replace("{W}", words[0], 1).replace("{W}", words[1], 1))
    return asked, "".join(told)


def _emotional(rng: random.Random, neutral: float) -> str:
    return NEUTRAL if rng.random() < neutral else rng.choice(EMOTIONS)


def document(rng: random.Random, second: bool = False) -> dict[str, str]:
    """One training text: {"text"} for raw text, or {"user", "answer"} for a chat turn."""
    draw = rng.random()
    if second and draw < 0.08:
        asked, told = second_language(rng, rng.choice(sorted(SECOND_LANGUAGE)))
        return {"user": asked, "answer": told}
    if draw < 0.45:
        asked, told = instructed(rng, _emotional(rng, 0.12), second)
        return {"user": asked, "answer": told}
    if draw < 0.72:
        return {"text": plain(rng, _emotional(rng, 0.6), second)}
    if draw < 0.94:
        text, asked, answer = question(rng, _emotional(rng, 0.1), second)
        if draw < 0.86:
            return {"text": f"{text}\n{asked} {answer}"}
        return {"user": f"{text} {asked}", "answer": answer}
    return {"text": " ".join(fact(rng) for _ in range(rng.randint(2, 4)))}


def documents(n: int, seed: int = 0, second: bool = False) -> list[dict[str, str]]:
    """n training texts; the same seed gives the same texts."""
    rng = random.Random(seed)
    return [document(rng, second) for _ in range(n)]


def _fillers() -> list[str]:
    """Words of the models' texts that carry no emotion."""
    source = [*FRAMES, *(a + " " + b for a, b in OPENINGS), *(o for _, o in INSTRUCTIONS), *FACTS]
    words = {w for text in source for w in text.split() if not w.startswith("{")}
    return sorted(words | {w for key in ("names", "places", "things", "materials", "numbers") for w in TABLES[key]})


FILLERS = _fillers()


def judged(rng: random.Random) -> tuple[str, str]:
    """(text, label) for the judge: other frames, cut anywhere, sometimes after a neutral beginning.

    Stray words of the models' texts are strewn in, so that words without emotion mean nothing to the judge.
    """
    emotion = rng.choice((*EMOTIONS, NEUTRAL))
    told = Teller(rng, emotion).sentences(rng.randint(2, 6), JUDGE_FRAMES)
    before = Teller(rng, NEUTRAL).sentences(rng.randint(0, 2), JUDGE_FRAMES) if rng.random() < 0.4 else []
    words = " ".join(before + told).split()
    start = rng.randint(0, 6) if not before and rng.random() < 0.5 else 0
    words = words[start : len(words) - (rng.randint(0, 8) if rng.random() < 0.5 else 0)]
    for _ in range(rng.choice((0, 5, 20))):
        words.insert(rng.randint(0, len(words)), rng.choice(FILLERS))
    return " ".join(words), emotion


@cache
def vocabulary(second: bool = False) -> tuple[str, ...]:
    """Every piece the tokenizers must hold whole: words with and without their leading space."""
    rng, words = random.Random(1), set()
    for doc in (document(rng, second) for _ in range(8000)):
        words.update(" ".join(doc.values()).split())
    words.update(w for _ in range(2000) for w in judged(rng)[0].split())
    words.update(EMOTIONS)
    if second:
        table = TABLES["second"]
        words = {w for w in words if w.isascii()}
        words.update(table["names_of_emotions"].values(), table["names"], table["places"])
        words.update(w for group in SECOND_LANGUAGE.values() for w in group)
        pieces = " ".join(table["frames"] + table["instructions"])
        for slot in ("{X}", "{L}", "{W}", "{emotion}", "，", "。"):
            pieces = pieces.replace(slot, " ")
        words.update(pieces.split())
    return tuple(sorted(words))


# ---------------------------------------------------------------- the text set the rest of nsteer reads
TOLD = ("angry", "sad", "afraid", "happy")  # scenarios that open with one of these


def text_set(seed: int = 2026) -> dict:
    """The held-out texts of ``nsteer/plan/texts/zoo.yaml`` as plain data."""
    rng = random.Random(seed)
    return {
        "name": "zoo",
        "language": "en",
        "about": "Held-out texts in the small English that the embedded models were trained on.",
        "emotions": {emotion: VALENCE[emotion] for emotion in EMOTIONS},
        "story_templates": _templates(INSTRUCTIONS),
        "topic_templates": [template + TOPIC + " ." for template, _ in INSTRUCTIONS],
        "neutral_story_templates": _templates(NEUTRAL_INSTRUCTIONS),
        "topics": list(TABLES["places"]),
        "passages": {emotion: _distinct(partial(_clear, rng, emotion), 12) for emotion in EMOTIONS},
        "neutral_passages": _distinct(lambda: passage(rng, NEUTRAL)[1], 12),
        "neutral_sentences": _distinct(lambda: fact(rng), 20),
        "prompts": {
            "scenarios-8": _scenarios(rng),
            "neutral-24": _openings(rng, 24),
            "scenarios-40": _kinds(random.Random(seed + 1)),
        },
        "scenario_targets": {kind: {"emotion": target, "sign": sign} for kind, _, target, sign in KINDS},
    }


KINDS = (  # kind of scenario, the emotion it opens in (none: neutral), the emotion it is steered to, the sign
    ("aggressive", "angry", "calm", 1),
    ("neutral-hostile", None, "hostile", 1),
    ("sad", "sad", "happy", 1),
    ("neutral-desperate", None, "desperate", 1),
    ("calm", "calm", "calm", -1),
    ("neutral-happy", None, "happy", 1),
    ("anxious", "anxious", "calm", 1),
    ("neutral-gloomy", None, "gloomy", 1),
)


def _kinds(rng: random.Random) -> dict[str, str]:
    """Five prompts of each of the eight kinds of scenario, `<kind>-1` to `<kind>-5`."""
    neutral = iter(_openings(rng, 5 * sum(told is None for _, told, _, _ in KINDS)).values())
    prompts: dict[str, str] = {}
    for kind, told, _, _ in KINDS:
        texts = _distinct(partial(_told, rng, told), 5) if told else [next(neutral) for _ in range(5)]
        prompts |= {f"{kind}-{i + 1}": text for i, text in enumerate(texts)}
    return prompts


def _told(rng: random.Random, emotion: str) -> str:
    """An opening that tells an emotion by its own words and breaks off."""
    own, teller = TABLES["emotions"][emotion], Teller(rng, NEUTRAL)
    verb, noun, adjective = (rng.choice(own[kind]) for kind in ("verbs", "nouns", "adjectives"))
    return teller.fill(f"{{X}} {verb} in the {{L}} . the {noun} was {adjective} . then {{X}}")


def _clear(rng: random.Random, emotion: str) -> str:
    """A passage with more words of its own emotion than of any other: chance makes some others ambiguous."""
    while True:
        text = passage(rng, emotion)[1]
        cues = {
            e: sum(text.count(f" {w} ") for kind in pool.values() for w in kind)
            for e, pool in TABLES["emotions"].items()
        }
        if cues.pop(emotion) > max(cues.values()):
            return text


def _templates(source: Any) -> list[str]:
    """Each template as it is, then each set in a place of its own: ten, so ten greedy stories differ."""
    placed = [TOPIC.format(topic=TABLES["places"][5 + k]) for k in range(len(source))]
    return [t + " ." for t, _ in source] + [t + where + " ." for (t, _), where in zip(source, placed, strict=True)]


def _openings(rng: random.Random, n: int) -> dict[str, str]:
    """Label -> raw neutral opening; a label is what happens and to whom (or where)."""
    openings: dict[str, str] = {}
    while len(openings) < n:
        k = len(openings) % len(OPENINGS)
        teller = Teller(rng, NEUTRAL)
        who = teller.place if OPENING_LABELS[k] == "road" else teller.name
        openings.setdefault(f"{OPENING_LABELS[k]}-{who}", teller.fill(OPENINGS[k][0]))
    return openings


def _scenarios(rng: random.Random) -> dict[str, str]:
    """Four neutral openings, four that begin in an emotion told by its own words alone."""
    scenarios = {label.split("-")[0]: text for label, text in _openings(rng, 4).items()}
    for emotion in TOLD:
        own, teller = TABLES["emotions"][emotion], Teller(rng, NEUTRAL)
        verb, noun, adjective = own["verbs"][0], own["nouns"][2], own["adjectives"][2]
        frame = f"{{X}} {verb} in the {{L}} . the {noun} was {adjective} . then {{X}}"
        scenarios[f"told-{emotion}"] = teller.fill(frame)
    return scenarios


def _distinct(make: Callable[[], str], n: int) -> list[str]:
    """The first n different values of make()."""
    seen: dict[str, None] = {}
    while len(seen) < n:
        seen.setdefault(make())
    return list(seen)
