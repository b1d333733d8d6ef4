"""Turns figures of an overview into sentences, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Iterator

from nsteer.report.overview.judging import Card


def card_said(card: Card) -> str:
    """A judge's card in sentences."""
    sentences = [
        f"Of {card.n} passages of known concepts it gives {card.accuracy:.2f} to the class of their own (95 % "
        f"{card.low:.2f} to {card.high:.2f}; chance {1 / max(len(card.columns), 1):.2f})."
    ]
    wrong = [f"{row} as {column} ({n})" for n, row, column in _mistakes(card)]
    sentences += [f"Most often wrong: {', '.join(wrong[:3])}."] if wrong else []
    sentences += [f"Classes that it gives to none: {', '.join(card.silent)}."] if card.silent else []
    sentences += [f"No class stands for: {', '.join(card.unmatched)}."] if card.unmatched else []
    return " ".join(sentences)


def _mistakes(card: Card) -> Iterator[tuple[int, str, str]]:
    mistakes = [
        (n, row, column)
        for row, counts in zip(card.rows, card.counts, strict=True)
        for column, n in zip(card.columns, counts, strict=True)
        if n and row in card.targets and column not in card.targets[row]
    ]
    return iter(sorted(mistakes, key=lambda entry: -entry[0]))
