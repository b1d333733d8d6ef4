"""Turns figures of an overview into sentences, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator

from nsteer.report.overview.judging import Card


def card_said(one: Card) -> str:
    """A judge's card in sentences."""
    sentences = [
        f"Of {one.n} passages of known concepts it gives {one.accuracy:.2f} to the class of their own (95 % "
        f"{one.low:.2f} to {one.high:.2f}; chance {1 / max(len(one.columns), 1):.2f})."
    ]
    wrong = [f"{row} as {column} ({n})" for n, row, column in _mistakes(one)]
    sentences += [f"Most often wrong: {', '.join(wrong[:3])}."] if wrong else []
    sentences += [f"Classes that it gives to none: {', '.join(one.silent)}."] if one.silent else []
    sentences += [f"No class stands for: {', '.join(one.unmatched)}."] if one.unmatched else []
    return " ".join(sentences)


def _mistakes(one: Card) -> Iterator[tuple[int, str, str]]:
    found = [
        (n, row, column)
        for row, counts in zip(one.rows, one.counts, strict=True)
        for column, n in zip(one.columns, counts, strict=True)
        if n and row in one.targets and column not in one.targets[row]
    ]
    return iter(sorted(found, key=lambda entry: -entry[0]))
