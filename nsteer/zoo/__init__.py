"""Names of the embedded models -> the folders that hold them.

**These are toys, made for this package, and no member of any real model family.** Each is a causal language
model of well under a million parameters with the *architecture* of a family (GPT-2, Gemma, Qwen, Llama,
Mistral), trained on synthetic stories of some five hundred words in which twenty emotions are told without
being named; ``judge`` is a text classifier trained apart from them on the same words in other sentences.
They exist so that everything can be seen, tested and timed without a download, against a geometry of
emotions that is known by construction. They speak no English beyond their
stories and say nothing about how real language models hold emotions. MODEL_CARD.md has the measurements,
``bench/zoo_train.py`` of the repository makes them again.
"""

from pathlib import Path

FAMILIES = ("gpt2", "gemma", "qwen", "llama", "mistral")
JUDGE = "judge"


def names() -> tuple[str, ...]:
    """The five language models, then the judge."""
    return (*FAMILIES, JUDGE)


def path(name: str) -> Path:
    """Folder that ``from_pretrained`` loads; raises KeyError with the known names."""
    if name not in names():
        raise KeyError(f"no embedded model {name!r}; known: {', '.join(names())}")
    return Path(__file__).parent / name
