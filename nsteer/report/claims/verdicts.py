"""Turns rows into verdicts: one rule, applied to all rows of a table at once (the table in docs/science.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy import special

from nsteer.report.claims.evidence import AGREES, DIFFERS, INCONCLUSIVE, OPEN, Row
from nsteer.science import statistics
from nsteer.science.draws import AGREEMENT
from nsteer.science.statistics import Interval

ALPHA = 0.05
"""The largest p, all tests of the table counted, of any verdict."""


def claimed(
    interval: Interval, above: float = -math.inf, below: float = math.inf, p: float | None = None
) -> dict[str, Any]:
    """The fields of a row whose estimate is to lie in (above, below): value, low, high, n, p and the region.

    p : of a test of the nearest edge of the region, where there is an exact one; else that of the interval
    """
    if p is None:
        p = max(edge_p(interval, edge) for edge in _near(interval.estimate, above, below))
    return {
        "value": interval.estimate,
        "low": interval.low,
        "high": interval.high,
        "n": interval.n,
        "p": p,
        "above": above,
        "below": below,
    }


def _near(estimate: float, above: float, below: float) -> list[float]:
    """The edges that the estimate must be distinguished from: of a region that it lies in all, else the one it is
    beyond."""
    inside = [edge for edge in (above, below) if math.isfinite(edge)]
    if above < estimate < below or not inside:
        return inside or [math.nan]
    return [min(inside, key=lambda edge: abs(edge - estimate))]


def edge_p(interval: Interval, edge: float) -> float:
    """Two-sided p of the estimate being `edge`, from its interval: 1 - level where an end just touches the edge."""
    end = interval.low if edge < interval.estimate else interval.high
    reach = abs(interval.estimate - end)
    if not math.isfinite(reach) or math.isnan(edge) or not reach:
        return math.nan
    tail, far = (1 + interval.level) / 2, abs(interval.estimate - edge) / reach
    if math.isinf(interval.df):
        return float(2 * special.ndtr(-special.ndtri(tail) * far))
    return float(2 * special.stdtr(interval.df, -special.stdtrit(interval.df, tail) * far))


def decided(rows: Sequence[Row]) -> list[Row]:
    """The rows with their verdicts. A row says what its claim says of the value, (above, below); the rest follows.

    A row with a reason why it can not be compared keeps it. Every other that tests something counts in one family:
    p is adjusted for how many there are (Benjamini & Hochberg 1995), and a verdict stands only where it stands after
    that: of the findings of a table 5 % are false on average, and where nothing is to be found, 5 % of tables have one.
    *agrees* is asked for more, `draws.AGREEMENT`.
    """
    tests = [i for i, row in enumerate(rows) if row.tests and not math.isnan(row.p)]
    adjusted = statistics.benjamini_hochberg([rows[i].p for i in tests])
    after = dict(zip(tests, adjusted.tolist(), strict=True))
    return [_decided(row, after.get(i, math.nan), len(tests)) for i, row in enumerate(rows)]


def _decided(row: Row, adjusted: float, family: int) -> Row:
    if not row.tests:
        return replace(row, verdict=OPEN, why=row.why or "the paper gives no figure, or its claim names none")
    verdict, why = _verdict(row, adjusted, family)
    return replace(row, verdict=verdict, why="; ".join(text for text in (why, row.why) if text), p_adjusted=adjusted)


def _verdict(row: Row, adjusted: float, family: int) -> tuple[str, str]:
    low, high = row.low, row.high
    if math.isnan(row.value) or math.isnan(low) or math.isnan(high):
        return INCONCLUSIVE, "" if row.why else "no interval: too few independent samples"
    if math.isinf(low) or math.isinf(high):
        return INCONCLUSIVE, "" if row.why else "the interval has no end"
    if low >= high:
        return INCONCLUSIVE, "the interval has no width: nothing varied among what was sampled"
    if row.above < low and high < row.below:
        side = AGREES
    elif high <= row.above or low >= row.below:
        side = DIFFERS
    else:
        return INCONCLUSIVE, "the interval leaves it open"
    if math.isnan(row.p):
        return INCONCLUSIVE, "no test"
    if row.p > ALPHA:
        return INCONCLUSIVE, f"p = {row.p:.2g}"
    if not adjusted <= (limit := AGREEMENT if side == AGREES else ALPHA):
        said = f"p = {row.p:.2g} alone, {adjusted:.2g} when all {family} tests of the table are counted"
        return INCONCLUSIVE, said + (f": to agree it takes {limit:g}" if side == AGREES else "")
    return side, ""
