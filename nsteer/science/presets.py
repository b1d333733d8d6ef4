"""Named emotion sets and extraction protocols, as JSON data.

A preset is a set of fields of `methods.<name>`, or of a contrast. `assumed` lists those that its citation does not
state: a reproduction says so of each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JEONG_20 = [
    "happy",
    "sad",
    "calm",
    "desperate",
    "afraid",
    "angry",
    "proud",
    "guilty",
    "nervous",
    "hopeful",
    "brooding",
    "gloomy",
    "reflective",
    "enthusiastic",
    "hostile",
    "loving",
    "exasperated",
    "blissful",
    "anxious",
    "grateful",
]

EMOTION_SETS: dict[str, list[str]] = {"jeong-20": JEONG_20}

NEUTRAL = "neutral"
"""The label of the baseline beside the emotions, on the `emotion` axis of samples and activations."""


@dataclass(frozen=True)
class Ratings:
    """How emotion words stand on named scales, each from -1 to 1: scale -> emotion -> value."""

    scales: Mapping[str, Mapping[str, float]]
    citation: str


def _ratings(citation: str, **rows: tuple[float, float]) -> Ratings:
    scales = {name: {e: row[i] for e, row in rows.items()} for i, name in enumerate(("valence", "arousal"))}
    return Ratings(scales, citation)


RATINGS: dict[str, Ratings] = {
    "nsteer-20": _ratings(
        "set by hand for nsteer from the words' ordinary meaning, in steps of 0.1; no people were asked",
        happy=(0.9, 0.4),
        sad=(-0.7, -0.4),
        calm=(0.6, -0.8),
        desperate=(-0.8, 0.6),
        afraid=(-0.7, 0.7),
        angry=(-0.7, 0.8),
        proud=(0.7, 0.4),
        guilty=(-0.6, 0.0),
        nervous=(-0.4, 0.6),
        hopeful=(0.7, 0.2),
        brooding=(-0.4, -0.2),
        gloomy=(-0.6, -0.5),
        reflective=(0.2, -0.5),
        enthusiastic=(0.8, 0.8),
        hostile=(-0.8, 0.6),
        loving=(0.9, 0.2),
        exasperated=(-0.5, 0.5),
        blissful=(0.9, -0.1),
        anxious=(-0.6, 0.7),
        grateful=(0.8, 0.0),
    )
}
"""Tables of valence and arousal that a plan may name."""


@dataclass(frozen=True)
class Preset:
    """A protocol: its fields, where they come from, and which of them are assumed."""

    fields: Mapping[str, Any]
    citation: str
    assumed: tuple[str, ...] = ()


PRESETS: dict[str, Preset] = {
    "jeong2026-generation": Preset(
        {
            "source": "generation",
            "samples": 10,
            "neutral_samples": 10,
            "templates": "story_templates",
            "chat": "auto",
            "generate": {"max_new_tokens": 256},
            "context": "with_prompt",
            "pooling": {"kind": "mid_generation"},
            "baseline": "neutral_mean",
            "unit_norm": True,
        },
        "Jeong 2026, arXiv 2604.04064 (Method 1), and its author's public code",
        ("neutral_samples", "chat"),
    ),
    "jeong2026-comprehension": Preset(
        {
            "source": "comprehension",
            "samples": 3,
            "neutral_samples": 3,
            "chat": "never",
            "pooling": {"kind": "last"},
            "baseline": "neutral_mean",
            "unit_norm": True,
        },
        "Jeong 2026, arXiv 2604.04064 (Method 2), and its author's public code",
        ("baseline", "unit_norm"),
    ),
    "anthropic2026": Preset(
        {
            "source": "generation",
            "samples": 1200,
            "neutral_samples": 100,
            "templates": "topic_templates",
            "chat": "auto",
            "generate": {"max_new_tokens": 256, "sample": True, "temperature": 1.0},
            "context": "text",
            "pooling": {"kind": "mean_from", "k": 50},
            "baseline": "grand_mean",
            "project_out": {"variance": 0.5},
            "unit_norm": False,
        },
        "Emotion Concepts and their Function in a Large Language Model, 2604.07729",
        ("neutral_samples", "chat", "generate", "context", "unit_norm"),
    ),
}
"""Protocols of methods."""

CONTRASTS: dict[str, Preset] = {
    "persona2025": Preset(
        {
            "generate": {"samples": 10, "sample": True, "temperature": 1.0, "max_new_tokens": 1000},
            "filter": {"above": 50.0, "below": 50.0, "coherence": 50.0},
            "pooling": {"kind": "mean", "over": "generated"},
            "chat": "always",
        },
        "Persona Vectors: Monitoring and Controlling Character Traits in Language Models, arXiv 2507.21509, and its "
        "authors' public code (which drops an answer together with the other side's of the same number; here each is "
        "kept or not by itself)",
    ),
}
"""Protocols of contrasts whose texts the model writes; their scores are those of a judge that gives 0 to 100."""
