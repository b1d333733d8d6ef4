"""Turns a number of draws of a control into the least p that they allow, and what a verdict asks of them.

A vector that does more than each of m draws of a random direction is one of m + 1, any of which may be the largest: p
is (b + 1) / (m + 1), where b draws do as much (Phipson & Smyth 2010).
"""

from __future__ import annotations

import math

AGREEMENT = 0.005
"""The largest p of *agrees*: a claim taken for confirmed by noise is the error that a table of another's claims must
not make. None that ever agrees is safe from it altogether: half of this is what two-sided p leave of tables of
noise."""


def p_among(as_much: int, draws: int) -> float:
    """p of a vector as much as which so many of the draws do."""
    return (1 + as_much) / (1 + draws)


def enough(p: float = AGREEMENT) -> int:
    """The draws that allow a p as small as this."""
    return math.ceil(round(1 / p, 9)) - 1
