"""Labels dealt out again: what a method finds where there is nothing to find."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Deal = dict[str, list[tuple[str, int]]]


def deal(counts: Mapping[str, int], draw: np.random.Generator) -> Deal:
    """Which samples stand for each label once labels are shuffled: {label: [(label it was, number), …]}.

    Labels change places among the samples of one number, so templates and topics, which go by number, stay balanced.

    counts : samples of every label
    """
    dealt: Deal = {label: [] for label in counts}
    for number in range(max(counts.values(), default=0)):
        holders = [label for label, count in counts.items() if number < count]
        for label, place in zip(holders, draw.permutation(len(holders)), strict=True):
            dealt[label].append((holders[place], number))
    return dealt


def dealt(samples: Mapping[str, np.ndarray], hands: Deal) -> dict[str, np.ndarray]:
    """The samples {label: [sample, …]} as `deal` gave them out; a label that it did not know keeps its own."""
    given = {e: np.stack([samples[label][number] for label, number in hand]) for e, hand in hands.items() if hand}
    return {**samples, **given}
