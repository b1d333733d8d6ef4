"""Permuted labels, and shuffled sides: what a method or a contrast finds where there is nothing to find."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Permutation = dict[str, list[tuple[str, int]]]
"""Label -> the samples that stand for it: [(label they were given, number), …]."""


def permutation(counts: Mapping[str, int], draw: np.random.Generator) -> Permutation:
    """Which samples stand for each label once labels are shuffled: {label: [(label it was, number), …]}.

    Labels change places among the samples of one number, so templates and topics, which go by number, stay balanced.

    counts : samples of every label
    """
    places: Permutation = {label: [] for label in counts}
    for number in range(max(counts.values(), default=0)):
        holders = [label for label, count in counts.items() if number < count]
        for label, place in zip(holders, draw.permutation(len(holders)), strict=True):
            places[label].append((holders[place], number))
    return places


def permuted(samples: Mapping[str, np.ndarray], places: Permutation) -> dict[str, np.ndarray]:
    """The samples {label: [sample, …]} under a `permutation`; a label that it does not know keeps its own."""
    given = {e: np.stack([samples[label][number] for label, number in own]) for e, own in places.items() if own}
    return {**samples, **given}


def sides_shuffled(positive: int, negative: int, draw: np.random.Generator) -> np.ndarray:
    """Which texts of a contrast stand on its positive side once sides are shuffled: [positive + negative], bool.

    Where both sides have as many texts, the i-th of each are a pair, and every pair changes sides or not, by a coin;
    else sides change among all texts. Either way a side keeps its number of texts.

    positive, negative : texts of each side; those of the positive side come first
    """
    if positive == negative:
        stays = draw.random(positive) < 0.5
        return np.concatenate([stays, ~stays])
    here = np.zeros(positive + negative, bool)
    here[draw.permutation(positive + negative)[:positive]] = True
    return here
