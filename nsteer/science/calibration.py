"""Finds the strength at which a measured curve reaches a target, trying several strengths at once, round by round.

Numbers alone: what is measured at a strength, and how, is the caller's matter. What is tried depends on what came back
and on nothing else, so the same curve gives the same strength, however its points travelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

SCAN = 9
"""Strengths of the first round, geometric between the least and the most."""

FAN = 4
"""Strengths of every later round."""

ROUNDS = 10
"""Rounds after which a target is given up."""

TRIALS = SCAN + 1 + FAN * ROUNDS
"""No search tries more strengths."""

NARROW = 1e-5
"""Relative width of a bracket in which a curve that still misses its target must jump."""


@dataclass
class Search:
    """The search for the least strength above 0 at which a curve rises to `target`.

    min_strength, max_strength : the first round lies between them; below `min_strength` it goes on as far as it must
    tolerance : relative, of the value at the strength that is found; that value is measured, not interpolated
    rest : the value of a model that is not edited, from which the curve starts
    at_zero : whether strength 0 edits too, so that the value there must be measured
    tried : strength -> value, of every round so far; a value that is not a number is beyond any target
    """

    target: float
    min_strength: float
    max_strength: float
    tolerance: float
    rest: float = 0.0
    at_zero: bool = False
    tried: dict[float, float] = field(default_factory=dict)
    rounds: int = 0
    reason: str = ""

    def add(self, values: dict[float, float]) -> None:
        """What a round measured."""
        self.rounds += 1
        self.tried |= {s: v if math.isfinite(v) else math.inf for s, v in values.items()}

    def propose(self) -> list[float]:
        """The strengths of the next round, none of them tried before; none where the search is over."""
        if not self.tried:
            return [0.0] * self.at_zero + [float(s) for s in np.geomspace(self.min_strength, self.max_strength, SCAN)]
        if self.strength is not None or self.reason:
            return []
        points, self.reason = self._next()
        fresh = [s for s in dict.fromkeys(map(float, points)) if s not in self.tried and 0 <= s <= self.max_strength]
        if not fresh and not self.reason:
            self.reason = self._missed()
        if self.rounds >= ROUNDS and not self.reason:
            self.reason = f"not found within {ROUNDS} rounds: {self._missed()}"
        return [] if self.reason else fresh

    @property
    def strength(self) -> float | None:
        """The strength, of those tried where the curve first rises through the target, that is near enough to it.

        Where it never does, one that just misses it from below.
        """
        reached = any(value >= self.target for value in self.tried.values())
        among = self.bracket() or (() if reached else self.tried)
        near = [s for s in among if s > 0 and self._off(self.tried[s]) <= self.tolerance]
        return min(near, key=lambda s: (self._off(self.tried[s]), s), default=None)

    @property
    def monotone(self) -> bool:
        """Whether the value never falls with strength, in what was tried, by more than the tolerance."""
        values = [v for _, v in self.curve()]
        return all(b >= a - self.tolerance * abs(a - self.rest) for a, b in pairwise(values))

    def curve(self) -> list[tuple[float, float]]:
        """(strength, value) of everything tried, by strength; a model that is not edited has strength 0."""
        rest = {} if self.at_zero else {0.0: self.rest}
        return sorted({**rest, **self.tried}.items())

    def bracket(self) -> tuple[float, float] | None:
        """The first two neighbours of which one is below the target and the next is not."""
        curve = self.curve()
        for (a, low), (b, high) in pairwise(curve):
            if low < self.target <= high:
                return a, b
        return None

    def _off(self, value: float) -> float:
        return abs(value / self.target - 1)

    def _next(self) -> tuple[list[float], str]:
        """Strengths to try, or why there are none."""
        bracket, curve = self.bracket(), self.curve()
        if bracket is None:
            return self._higher(curve)
        low, high = bracket
        if high - low <= NARROW * high or high < self.min_strength * 1e-9:
            return [], self._missed()
        if low == 0:
            return self._lower(high), ""
        guess = self._between(low, high)
        fan = [guess, guess * (high / guess) ** 0.15, guess * (low / guess) ** 0.15, math.sqrt(low * high)]
        return fan, ""

    def _higher(self, curve: list[tuple[float, float]]) -> tuple[list[float], str]:
        """No rise through the target among what was tried: again about the highest point, or the lowest above it."""
        top = max(range(len(curve)), key=lambda i: curve[i][1])
        strength, value = curve[top]
        above = value >= self.target
        if above:  # all of it: an op that acts at strength 0
            top = min(range(len(curve)), key=lambda i: curve[i][1])
        if 0 < top < len(curve) - 1 and self.rounds < 4:
            return [float(s) for s in np.linspace(curve[top - 1][0], curve[top + 1][0], FAN + 2)[1:-1]], ""
        if above:
            first = curve[0][1]
            return (
                [],
                f"the value is {first:.4g} at strength 0 already, where the op acts too, and never below the target",
            )
        highest = f"the highest value is {value:.4g}, at {strength:.4g}"
        return [], f"no strength up to {self.max_strength:g} reaches it: {highest}"

    def _lower(self, high: float) -> list[float]:
        """Between 0 and the first strength that is too much."""
        above = self.tried[high] - self.rest
        if self.at_zero:
            return [float(s) for s in np.linspace(0, high, FAN + 2)[1:-1]]
        share = math.sqrt((self.target - self.rest) / above) if math.isfinite(above) else 0.1
        guess = high * min(share, 0.9)
        return [guess, math.sqrt(guess * high), guess / 2, guess / 8]

    def _between(self, low: float, high: float) -> float:
        """Where the target should be: a power law between two points, or their middle where there is none."""
        a, b = self.tried[low] - self.rest, self.tried[high] - self.rest
        share = 0.5
        if a > 0 and b > a and math.isfinite(b):
            share = math.log((self.target - self.rest) / a) / math.log(b / a)
        share = min(max(share, 0.03), 0.97)
        return low ** (1 - share) * high**share

    def _missed(self) -> str:
        bracket = self.bracket()
        if bracket is None:
            return "no strength was near enough"
        low, high = bracket
        values = dict(self.curve())
        return f"the value goes from {values[low]:.4g} at {low:.6g} to {values[high]:.4g} at {high:.6g}"
