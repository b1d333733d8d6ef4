"""Turns the `positions` of a plan into masks over the tokens of a text: of its prompt, and of what is written after.

`positions` is a word (`all`, `prompt`, `generated`, `last`), an index, a list of them, or a mapping (`plan.Where`)
whose fields add up and whose `except` is taken away. Positions of a prompt count its real tokens from 0, BOS among
them, or from its end (-1); generated tokens count from 0, the first that the model wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

WORDS: dict[str, dict[str, Any]] = {
    "all": {"prompt": "all", "generated": "all"},
    "prompt": {"prompt": "all"},
    "generated": {"generated": "all"},
    "last": {"index": -1},
}
PROMPT = ("index", "from_", "to", "ids", "text", "prompt")


def fields(positions: Any) -> dict[str, Any]:
    """What positions say, by field of `plan.Where`; a mapping of `except` alone starts from `all`."""
    if isinstance(positions, str):
        return dict(WORDS[positions])
    if isinstance(positions, int | list):
        return {"index": positions}
    attributes = {name: getattr(positions, name, None) for name in (*PROMPT, "role", "generated", "except_")}
    given = {name: value for name, value in attributes.items() if value is not None}
    return {**WORDS["all"], **given} if set(given) == {"except_"} else given


def prompted(positions: Any) -> bool:
    """Whether they are of prompts, too."""
    given = fields(positions)
    return given.get("role") == "user" or any(name in given for name in PROMPT)


def written(positions: Any) -> bool:
    """Whether they are of generated tokens, too."""
    given = fields(positions)
    return given.get("role") == "assistant" or "generated" in given


def bounded(positions: Any) -> bool:
    """Whether some generated tokens are meant and others are not."""
    given = fields(positions)
    taken = given.get("except_")
    return written(positions) and (given.get("generated", "all") != "all" or (taken is not None and written(taken)))


def sought(positions: Any) -> bool:
    """Whether they rest on where the characters of a prompt stand."""
    given = fields(positions)
    return bool({"text", "role"} & set(given)) or ("except_" in given and sought(given["except_"]))


def may_miss(positions: Any) -> bool:
    """Whether a text may have none of them."""
    return not isinstance(positions, str)


def said(positions: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """What they say and what their `except` says, each with its path."""
    given = fields(positions)
    yield (), given
    if "except_" in given:
        yield ("except",), fields(given["except_"])


def many(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def of_prompt(
    positions: Any,
    tokens: Sequence[int],
    spans: Sequence[tuple[int, int]],
    text: str,
    turns: Sequence[tuple[str, int, int]],
) -> Any:
    """Which positions of a prompt are meant: [token] bool.

    spans : the characters [start, stop) of `text` that each token holds; turns: role, start and stop of each turn in it
    A token is meant by a text, or a role, when it holds one of its characters.
    """
    import numpy as np

    given, total = fields(positions), len(tokens)
    mask = np.zeros(total, bool)
    if given.get("prompt") == "all":
        mask[:] = True
    mask |= numbered(given, total)
    if "ids" in given:
        mask |= np.isin(np.asarray(tokens), many(given["ids"]))
    ranges = [(start, stop) for role, start, stop in turns if role == given.get("role")]
    ranges += occurrences(text, many(given["text"]) if "text" in given else [], turns)
    if ranges:
        mask |= holding(spans, ranges)
    if "except_" in given:
        mask &= ~of_prompt(given["except_"], tokens, spans, text, turns)
    return mask


def occurrences(text: str, words: Sequence[str], turns: Sequence[tuple[str, int, int]]) -> list[tuple[int, int]]:
    """Where words stand within turns, each as often as it does: characters [start, stop)."""
    ranges = []
    for word in words:
        for _, start, stop in turns:
            at = text.find(word, start, stop)
            while at >= 0:
                ranges.append((at, at + len(word)))
                at = text.find(word, at + 1, stop)
    return ranges


def holding(spans: Sequence[tuple[int, int]], ranges: Sequence[tuple[int, int]]) -> Any:
    """Which tokens hold a character of any of these ranges of a text: [token] bool."""
    import numpy as np

    mask = np.zeros(len(spans), bool)
    for start, stop in ranges:
        mask |= np.array([first < stop and start < last for first, last in spans], bool)
    return mask


def of_generated(positions: Any, new: int) -> Any:
    """Which of `new` generated tokens are meant: [token] bool."""
    import numpy as np

    given = fields(positions)
    chosen = given.get("generated")
    mask = np.full(new, chosen == "all" or given.get("role") == "assistant")
    if chosen is not None and chosen != "all":
        mask |= numbered({name: getattr(chosen, name) for name in ("index", "from_", "to")}, new)
    return mask & ~of_generated(given["except_"], new) if "except_" in given else mask


def numbered(given: dict[str, Any], total: int) -> Any:
    """The positions that `index`, `from` and `to` name among so many: [position] bool."""
    import numpy as np

    mask = np.zeros(total, bool)
    if given.get("from_") is not None or given.get("to") is not None:
        mask[slice(given.get("from_"), given.get("to"))] = True
    for index in many(given["index"]) if given.get("index") is not None else []:
        if -total <= index < total:
            mask[index] = True
    return mask
