"""Turns the words and patterns of a rule into compiled patterns, and those with a text into hits, in bounded time.

A pattern is somebody's: compiled it may take all memory (repeats within repeats are spelled out), and matched it may
run for years. So counted repeats are bounded before it is compiled, and each text has SECONDS.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod
from typing import Any

import regex

from nsteer.plan.schema import Rule

SECONDS = 2.0
"""What the patterns of a class may take with one text."""

LONGEST = 2000
"""Characters of a pattern."""

REPEATS = 1000
"""The product of all counted repeats of a pattern: more may not fit in memory once it is compiled."""

_COUNTED = re.compile(r"\{(\d*)(?:,(\d*))?\}")

TRIALS = (
    "a" * 3000 + "!",
    "a " * 1000 + "!",
    "ab1_" * 500 + "\n",
    "The cat sat, and the cat sat. " * 60,
    "\t \n" * 500,
)
"""Texts on which a pattern must not run away when a plan is checked."""

TRIAL_SECONDS = 1.0


def flaw(pattern: str, case: bool = False) -> str:
    """Why a pattern can be none, in words; "" for a sound one."""
    if len(pattern) > LONGEST:
        return f"a pattern of {len(pattern):,} characters, above {LONGEST:,}"
    counts = [max((int(n) for n in match.groups() if n), default=1) for match in _COUNTED.finditer(pattern)]
    if prod(max(n, 1) for n in counts) > REPEATS:
        return f"counted repeats that make {prod(max(n, 1) for n in counts):,}, above {REPEATS:,}"
    try:
        matcher = _compile(pattern, case)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        return f"a pattern that does not compile: {error}"
    if matcher.fullmatch("") or matcher.search(""):
        return "a pattern that is found in every text: it matches nothing at all"
    try:
        for text in TRIALS:
            count_matches([matcher], text, once=True, seconds=TRIAL_SECONDS)
    except TimeoutError:
        return "a pattern that runs away: it has repeats within repeats"
    return ""


def compiled(rule: Rule) -> dict[str, list[Any]]:
    """Class -> its patterns, those of its words first."""
    names = dict.fromkeys([*rule.words, *rule.regex])
    return {
        name: [
            *(_word(word, rule) for word in rule.words.get(name, ())),
            *(_compile(pattern, rule.case) for pattern in rule.regex.get(name, ())),
        ]
        for name in names
    }


def count_matches(patterns: Sequence[Any], text: str, once: bool = False, seconds: float = SECONDS) -> int:
    """How often patterns are found in a text, or with `once` whether any is. Raises TimeoutError."""
    if once:
        return int(any(pattern.search(text, timeout=seconds) for pattern in patterns))
    return sum(sum(1 for _ in pattern.finditer(text, timeout=seconds)) for pattern in patterns)


def _word(word: str, rule: Rule) -> Any:
    """A word or phrase: any white space where it has some, and no letter beside it where it is to be whole."""
    spelled = r"\s+".join(map(regex.escape, word.split()))
    return _compile(rf"(?<!\w){spelled}(?!\w)" if rule.whole_word else spelled, rule.case)


def _compile(pattern: str, case: bool) -> Any:
    return regex.compile(pattern, 0 if case else regex.IGNORECASE)
