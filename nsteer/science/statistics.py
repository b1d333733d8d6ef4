"""Turns samples of numbers into tests, effects and intervals that carry their n, means and SDs (scipy underneath).

Arrays in, frozen records out. NaN are missing values: dropped, and counted out of n. Nothing here knows of emotions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special

from nsteer.science import metrics
from nsteer.science.draws import p_among

Alternative = Literal["two-sided", "less", "greater"]
LEVEL = 0.95
NAN = float("nan")


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at `level`; `n` observations stand behind it. `df`: of its t, if it has one."""

    estimate: float
    low: float
    high: float
    n: int
    level: float = LEVEL
    method: str = ""
    df: float = math.inf

    def holds(self, value: float) -> bool:
        """Whether a value lies within."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Groups:
    """Two groups of numbers, as any effect or test of them must print: n, mean and SD (n - 1) of each."""

    n_a: int
    n_b: int
    mean_a: float
    mean_b: float
    sd_a: float
    sd_b: float

    @property
    def difference(self) -> float:
        """mean_a - mean_b."""
        return self.mean_a - self.mean_b

    @property
    def pooled_sd(self) -> float:
        """Root of the mean variance, weighted by n - 1."""
        df = self.n_a + self.n_b - 2
        squares = [(n - 1) * sd**2 for n, sd in ((self.n_a, self.sd_a), (self.n_b, self.sd_b)) if n > 1]
        return math.sqrt(sum(squares) / df) if df > 0 else NAN

    def __str__(self) -> str:
        return (
            f"n {self.n_a} and {self.n_b}, means {self.mean_a:.4g} and {self.mean_b:.4g}, "
            f"SDs {self.sd_a:.4g} and {self.sd_b:.4g}"
        )


@dataclass(frozen=True)
class Test:
    """A test: its statistic, its p value, and the groups behind it."""

    __test__ = False  # no test class to pytest

    name: str
    statistic: float
    p: float
    groups: Groups
    method: str


@dataclass(frozen=True)
class Effect:
    """A standardised difference with its interval, and the groups behind it."""

    name: str
    value: float
    low: float
    high: float
    groups: Groups
    level: float = LEVEL
    method: str = ""


@dataclass(frozen=True)
class Null:
    """An observed statistic against what shuffled labels give."""

    observed: float
    p: float
    mean: float
    low: float
    high: float
    n: int


def clean(values: Any) -> np.ndarray:
    """The numbers as one float array, NaN dropped."""
    flat = np.asarray(values, float).ravel()
    return flat[~np.isnan(flat)]


def groups(a: Any, b: Any) -> Groups:
    """n, mean and SD of two groups; an empty one has NaN, a single number an SD of NaN."""
    a, b = clean(a), clean(b)
    mean = [float(x.mean()) if len(x) else NAN for x in (a, b)]
    sd = [float(x.std(ddof=1)) if len(x) > 1 else NAN for x in (a, b)]
    return Groups(len(a), len(b), mean[0], mean[1], sd[0], sd[1])


# ---- tests ---------------------------------------------------------------------------------------------------


def mann_whitney(a: Any, b: Any, alternative: Alternative = "two-sided") -> Test:
    """Exact Mann-Whitney U of `a` (Mann & Whitney 1947), ties by midranks: p over all permutations of the ranks.

    Without ties it is scipy.stats.mannwhitneyu(method="exact"); with ties scipy has no exact form, this has. Two-sided
    p is twice the smaller tail, at most 1. An empty group gives NaN.
    """
    a, b = clean(a), clean(b)
    about = groups(a, b)
    if not len(a) or not len(b):
        return Test("Mann-Whitney U", NAN, NAN, about, "exact")
    doubled = np.rint(2 * metrics.ranks(np.concatenate([a, b]))).astype(int)
    ways = _subset_sums(doubled.tolist(), len(a))
    observed = int(doubled[: len(a)].sum())
    u = observed / 2 - len(a) * (len(a) + 1) / 2
    return Test("Mann-Whitney U", u, _tail(ways, observed, alternative), about, "exact, midranks for ties")


def _subset_sums(values: Sequence[int], size: int) -> np.ndarray:
    """How many subsets of `size` of the values have each sum: [sum] as floats (counts pass 2^63)."""
    ways = np.zeros((size + 1, sum(sorted(values)[-size:]) + 1))
    ways[0, 0] = 1.0
    for value in values:
        for k in range(size, 0, -1):
            ways[k, value:] += ways[k - 1, : ways.shape[1] - value]
    return ways[size]


def _tail(ways: np.ndarray, observed: int, alternative: Alternative) -> float:
    """The p value of a count of ways for each value of a statistic."""
    total = ways.sum()
    less, greater = ways[: observed + 1].sum() / total, ways[observed:].sum() / total
    return float({"less": less, "greater": greater, "two-sided": min(1.0, 2 * min(less, greater))}[alternative])


def wilcoxon(a: Any, b: Any, alternative: Alternative = "two-sided") -> Test:
    """Exact Wilcoxon signed-rank test of pairs (Wilcoxon 1945): W+, p over all signs; ties by midranks.

    Pairs of equal numbers say nothing and are dropped (Wilcoxon's own rule), pairs with NaN too. Without ties it is
    scipy.stats.wilcoxon(method="exact"). n of the groups counts the pairs that were left. No pair left gives NaN.
    """
    a, b = _paired(a, b)
    keep = a != b
    a, b = a[keep], b[keep]
    about = groups(a, b)
    if not len(a):
        return Test("Wilcoxon W+", NAN, NAN, about, "exact")
    doubled = np.rint(2 * metrics.ranks(np.abs(a - b))).astype(int)
    ways = np.zeros(int(doubled.sum()) + 1)
    ways[0] = 1.0
    for rank in doubled:
        ways[rank:] = ways[rank:] + ways[: len(ways) - rank]
    observed = int(doubled[a > b].sum())
    return Test("Wilcoxon W+", observed / 2, _tail(ways, observed, alternative), about, "exact")


def _paired(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Two equally long arrays less the pairs with a missing value. Raises ValueError when they are not equally long."""
    a, b = np.asarray(a, float).ravel(), np.asarray(b, float).ravel()
    if len(a) != len(b):
        raise ValueError(f"pairs need as many numbers on both sides, found {len(a)} and {len(b)}")
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known]


def paired_permutation(a: Any, b: Any, alternative: Alternative = "two-sided", n: int = 9999, seed: int = 0) -> Test:
    """Permutation test of the mean difference of pairs: the sign of each difference flipped at will.

    All 2^pairs signs when there are at most 16 pairs, else `n` random ones, the observed among them (p >= 1/(n+1)).
    """
    a, b = _paired(a, b)
    about, difference = groups(a, b), a - b
    if not len(difference):
        return Test("paired permutation", NAN, NAN, about, "exact")
    exact = len(difference) <= 16
    if exact:
        bits = np.arange(2 ** len(difference))[:, None] >> np.arange(len(difference))
        signs = 1.0 - 2.0 * (bits & 1)
    else:
        drawn = np.random.default_rng(seed).integers(0, 2, (n, len(difference)))
        signs = np.concatenate([np.ones((1, len(difference))), 1.0 - 2.0 * drawn])
    null, observed = signs @ difference / len(difference), float(difference.mean())
    slack = 1e-12 * max(float(np.abs(difference).max()), 1e-300)  # equal sums, added in another order
    less, greater = float((null <= observed + slack).mean()), float((null >= observed - slack).mean())
    both = float((np.abs(null) >= abs(observed) - slack).mean())
    p = {"less": less, "greater": greater, "two-sided": both}[alternative]
    return Test("paired permutation", observed, p, about, "exact" if exact else f"{n} random sign flips")


def permutation_null(
    statistic: Callable[[np.ndarray], float],
    labels: Any,
    strata: Any = None,
    n: int = 999,
    alternative: Alternative = "greater",
    seed: int = 0,
) -> Null:
    """`statistic(labels)` against the same of shuffled labels; within strata where given.

    p = (1 + count at least as extreme) / (1 + n), which is never 0 and holds its level exactly (Phipson & Smyth 2010).
    Two-sided counts distance from the null's mean. `low`, `high`: the central 95 % of the null.
    """
    labels, rng = np.asarray(labels), np.random.default_rng(seed)
    strata = np.zeros(len(labels), int) if strata is None else np.asarray(strata)
    groups = [np.flatnonzero(strata == stratum) for stratum in np.unique(strata)]
    null = np.empty(n)
    for i in range(n):
        drawn = labels.copy()
        for group in groups:
            drawn[group] = labels[rng.permutation(group)]
        null[i] = statistic(drawn)
    return against(float(statistic(labels)), null, alternative)


def against(observed: float, null: Any, alternative: Alternative = "greater") -> Null:
    """An observed number against numbers from shuffled labels; see `permutation_null`."""
    null = clean(null)
    if not len(null) or math.isnan(observed):
        return Null(observed, NAN, NAN, NAN, NAN, len(null))
    slack, centre = 1e-12, null.mean()
    more = {
        "greater": null >= observed - slack,
        "less": null <= observed + slack,
        "two-sided": np.abs(null - centre) >= abs(observed - centre) - slack,
    }[alternative]
    low, high = np.quantile(null, [0.025, 0.975])
    p = p_among(int(more.sum()), len(null))
    return Null(observed, p, float(centre), float(low), float(high), len(null))


# ---- effects -------------------------------------------------------------------------------------------------


def cohens_d(a: Any, b: Any, level: float = LEVEL) -> Effect:
    """Cohen's d = (mean_a - mean_b) / pooled SD (Cohen 1988), its interval by the noncentral t.

    What Jeong 2026 divides by is not stated; the pooled SD is assumed here, and n, means and SDs stand beside it.
    """
    about = groups(a, b)
    d = _over(about.difference, about.pooled_sd)
    low, high = _noncentral(d, about, level)
    return Effect("Cohen's d", d, low, high, about, level, "pooled SD; noncentral t")


def hedges_g(a: Any, b: Any, level: float = LEVEL) -> Effect:
    """Hedges' g = J d, J = gamma(m/2) / (sqrt(m/2) gamma((m-1)/2)), m = n_a + n_b - 2 (Hedges 1981).

    The interval is that of d by the noncentral t, times J.
    """
    about = groups(a, b)
    d, j = _over(about.difference, about.pooled_sd), correction(about.n_a + about.n_b - 2)
    low, high = _noncentral(d, about, level)
    return Effect("Hedges' g", j * d, j * low, j * high, about, level, "exact small-sample correction; noncentral t")


def cohens_dz(a: Any, b: Any) -> Effect:
    """d of pairs: mean difference / SD of the differences. Another number than d: never set them side by side."""
    a, b = _paired(a, b)
    difference = a - b
    sd = float(difference.std(ddof=1)) if len(difference) > 1 else NAN
    return Effect("Cohen's dz", _over(float(difference.mean()) if len(a) else NAN, sd), NAN, NAN, groups(a, b))


def implied_sd(difference: float, d: float) -> float:
    """The SD that a difference of means would need for this d: |difference / d|."""
    return abs(_over(difference, d))


def correction(df: int) -> float:
    """Hedges' exact J for df degrees of freedom; NaN below 2."""
    if df < 2:
        return NAN
    return float(math.exp(special.gammaln(df / 2) - special.gammaln((df - 1) / 2)) / math.sqrt(df / 2))


def _over(a: float, b: float) -> float:
    return a / b if b else NAN


def _noncentral(d: float, about: Groups, level: float) -> tuple[float, float]:
    """The interval of d: the noncentralities at which the observed t is just at the edge (Steiger & Fouladi 1997)."""
    df = about.n_a + about.n_b - 2
    if math.isnan(d) or df < 1:
        return NAN, NAN
    root = math.sqrt(about.n_a * about.n_b / (about.n_a + about.n_b))
    t = d * root
    edges = [_noncentrality(t, df, tail) / root for tail in ((1 + level) / 2, (1 - level) / 2)]
    return edges[0], edges[1]


def _noncentrality(t: float, df: int, tail: float) -> float:
    """The noncentrality at which P(T <= t) is `tail`."""
    low = high = t
    step = 1.0
    while noncentral_cdf(t, df, low) < tail:
        low, step = low - step, 2 * step
    step = 1.0
    while noncentral_cdf(t, df, high) > tail:
        high, step = high + step, 2 * step
    if not low < high:
        return t
    from scipy.optimize import brentq  # here: few reports need it

    return float(brentq(lambda nc: noncentral_cdf(t, df, nc) - tail, low, high, xtol=1e-9))


def noncentral_cdf(t: float, df: int, nc: float) -> float:
    """P(T <= t) of the noncentral t. scipy's for |t| <= 3; beyond, where it may fail, an integral over the normal part.

    T = (Z + nc) / sqrt(V / df): for t > 0, P = E_Z[ P(V >= df ((Z + nc) / t)^2) ] where Z + nc > 0, else 1.
    """
    if abs(t) <= 3 and abs(nc) < 30:
        return float(special.nctdtr(df, nc, t))
    if t < 0:
        return 1.0 - noncentral_cdf(-t, df, -nc)
    z = np.linspace(-9.0, 9.0, 4001)
    inside = np.where(z + nc > 0, special.chdtrc(df, df * ((z + nc) / t) ** 2), 1.0)
    weight = np.exp(-(z**2) / 2)
    return float((inside * weight).sum() / weight.sum())


# ---- intervals -----------------------------------------------------------------------------------------------


def wilson(k: float, n: int, level: float = LEVEL) -> Interval:
    """k of n with Wilson's score interval (Wilson 1927): 37 of 40 is 0.925, 0.80 to 0.97. No observation gives NaN.

    k may be a sum of shares, one for each of n independent units: a share varies at most as much as a yes or no of the
    same mean, so that the interval is no narrower than it may be. Raises ValueError unless 0 <= k <= n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} of {n} is no share")
    if n == 0:
        return Interval(NAN, NAN, NAN, 0, level, "Wilson")
    z, share = float(special.ndtri((1 + level) / 2)), k / n
    middle, reach = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = ((middle + side * reach) / (1 + z**2 / n) for side in (-1, 1))
    return Interval(share, low if k else 0.0, high if k < n else 1.0, int(n), level, "Wilson")


def binomial_p(k: float, n: int, share: float) -> float:
    """Two-sided exact binomial p of k of n against a share: of all counts that are no likelier; NaN for n = 0.

    A sum of shares is rounded towards what is expected. The score test, whose interval is Wilson's, finds too much: of
    40 with a true share of 0.8 it calls 7.2 % of samples another share at 0.05, of 11 with one half 6.5 %.
    """
    if not n or not 0 < share < 1:
        return NAN
    whole = math.floor(k + 1e-9) if k > n * share else math.ceil(k - 1e-9)
    counts = np.arange(n + 1)
    ways = special.gammaln(n + 1) - special.gammaln(counts + 1) - special.gammaln(n - counts + 1)
    chance = np.exp(ways + counts * math.log(share) + (n - counts) * math.log1p(-share))
    return min(1.0, float(chance[chance <= chance[whole] * (1 + 1e-9)].sum()))


def shift(a: Any, b: Any, level: float = LEVEL) -> Interval:
    """The Hodges-Lehmann shift of `a` over `b` with the interval of the exact Mann-Whitney test; n = n_a + n_b.

    Infinite edges where so few numbers reach no such level.
    """
    a, b = clean(a), clean(b)
    apart = np.sort(np.subtract.outer(a, b).ravel())
    if not len(apart):
        return Interval(NAN, NAN, NAN, len(a) + len(b), level, "Hodges-Lehmann")
    ways = _subset_sums(list(range(1, len(a) + len(b) + 1)), len(a))
    below = np.cumsum(ways / ways.sum())[len(a) * (len(a) + 1) // 2 :]  # P(U <= u)
    cut = int((below <= (1 - level) / 2 + 1e-12).sum())  # differences to leave out on each side
    low, high = (apart[cut - 1], apart[-cut]) if cut else (-math.inf, math.inf)
    return Interval(float(np.median(apart)), float(low), float(high), len(a) + len(b), level, "Hodges-Lehmann")


def difference(a: Interval, b: Interval) -> Interval:
    """a - b of two independent estimates, from their intervals (MOVER; Zou & Donner 2008): lopsided ones stay so."""
    low = a.estimate - b.estimate - math.hypot(a.estimate - a.low, b.high - b.estimate)
    high = a.estimate - b.estimate + math.hypot(a.high - a.estimate, b.estimate - b.low)
    return Interval(a.estimate - b.estimate, low, high, a.n + b.n, a.level, "MOVER", min(a.df, b.df))


def jackknife(estimate: float, left: Any, level: float = LEVEL) -> Interval:
    """An estimate with the t interval of its values with each unit left out in turn; NaN edges where one has none."""
    left = np.asarray(left, float)
    n = len(left)
    if n < 3 or np.isnan(left).any():
        return Interval(estimate, NAN, NAN, n, level, "jackknife")
    error = math.sqrt((n - 1) / n * float(((left - left.mean()) ** 2).sum()))
    reach = float(special.stdtrit(n - 1, (1 + level) / 2)) * error
    return Interval(estimate, estimate - reach, estimate + reach, n, level, "jackknife", n - 1)


def heterogeneity(estimates: Any, errors: Any, level: float = LEVEL) -> tuple[Interval, float]:
    """The SD between true values behind estimates with known standard errors, and p that there is none (Cochran's Q).

    The interval is the Q profile (Viechtbauer 2007): the SDs at which Q is not surprising.
    """
    y, v = np.asarray(estimates, float), np.asarray(errors, float) ** 2
    known = np.isfinite(y) & np.isfinite(v) & (v > 0)
    y, v = y[known], v[known]
    k = len(y)
    if k < 2:
        return Interval(NAN, NAN, NAN, k, level, "Q profile"), NAN

    def q(tau2: float) -> float:
        weight = 1 / (v + tau2)
        return float((weight * (y - (weight * y).sum() / weight.sum()) ** 2).sum())

    def at(target: float) -> float:
        if q(0.0) <= target:
            return 0.0
        top = 1.0
        while q(top) > target:
            top *= 2
        from scipy.optimize import brentq  # here: few reports need it

        return math.sqrt(float(brentq(lambda x: q(x) - target, 0.0, top)))

    edges = [at(float(special.chdtri(k - 1, 1 - tail))) for tail in ((1 + level) / 2, (1 - level) / 2)]
    return Interval(at(k - 1.0), edges[0], edges[1], k, level, "Q profile"), float(special.chdtrc(k - 1, q(0.0)))


def correlation_interval(r: float, n: int, level: float = LEVEL) -> Interval:
    """Spearman's r with the interval of Bonett & Wright (2000), by Fisher's z; NaN edges for n < 5."""
    if n < 5 or not abs(r) < 1:
        return Interval(r, NAN, NAN, n, level, "Bonett-Wright")
    reach = float(special.ndtri((1 + level) / 2)) * math.sqrt((1 + r**2 / 2) / (n - 3))
    z = math.atanh(r)
    return Interval(r, math.tanh(z - reach), math.tanh(z + reach), n, level, "Bonett-Wright")


def slope(x: Any, y: Any, level: float = LEVEL) -> Interval:
    """The slope of a least-squares line with its t interval; NaN edges for fewer than four points."""
    x, y = _paired(x, y)
    n = len(x)
    if n < 4 or len(set(x.tolist())) < 2:
        return Interval(NAN, NAN, NAN, n, level, "t")
    off = x - x.mean()
    rise = float((off * y).sum() / (off**2).sum())
    rest = y - y.mean() - rise * off
    error = math.sqrt(float((rest**2).sum()) / (n - 2) / float((off**2).sum()))
    reach = float(special.stdtrit(n - 2, (1 + level) / 2)) * error
    return Interval(rise, rise - reach, rise + reach, n, level, "t", n - 2)


def bootstrap(
    statistic: Callable[..., float], *samples: Any, n: int = 2000, level: float = LEVEL, seed: int = 0
) -> Interval:
    """`statistic(*samples)` with a percentile bootstrap interval: every sample drawn again by itself (Efron 1979).

    n of the interval is the size of the smallest sample; fewer than two there give NaN edges.
    """
    known = [clean(sample) for sample in samples]
    least = min(map(len, known))
    estimate = float(statistic(*known)) if least else NAN
    if least < 2:
        return Interval(estimate, NAN, NAN, least, level, "bootstrap")
    rng = np.random.default_rng(seed)
    if statistic is np.mean and len(known) == 1 and n * least < 2**26:  # the common case, in one go
        drawn: Any = known[0][rng.integers(0, least, (n, least))].mean(1)
    else:
        drawn = [statistic(*(sample[rng.integers(0, len(sample), len(sample))] for sample in known)) for _ in range(n)]
    low, high = np.nanquantile(np.asarray(drawn, float), [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate, float(low), float(high), least, level, f"percentile bootstrap, {n} resamples")


def mean_interval(values: Any, level: float = LEVEL) -> Interval:
    """The mean with its t interval; one number alone has none."""
    known = clean(values)
    if len(known) < 2:
        return Interval(float(known.mean()) if len(known) else NAN, NAN, NAN, len(known), level, "t")
    reach = float(special.stdtrit(len(known) - 1, (1 + level) / 2) * known.std(ddof=1) / math.sqrt(len(known)))
    mean = float(known.mean())
    return Interval(mean, mean - reach, mean + reach, len(known), level, "t", len(known) - 1)


def spearman(x: Any, y: Any, exact: int = 7, n: int = 9999, seed: int = 0) -> tuple[float, float, int]:
    """Spearman's rho, two-sided permutation p, n: all orders for at most `exact` pairs, else `n` random ones."""
    from itertools import permutations

    x, y = _paired(x, y)
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return NAN, NAN, len(x)
    a, b = (metrics.ranks(values) - (len(x) + 1) / 2 for values in (x, y))
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    rho = float(a @ b) / scale
    if len(x) <= exact:
        null = np.array([a @ np.array(order) for order in permutations(b)]) / scale
        return rho, float((np.abs(null) >= abs(rho) - 1e-12).mean()), len(x)
    rng = np.random.default_rng(seed)
    null = np.array([a @ rng.permutation(b) for _ in range(n)]) / scale
    return rho, against(abs(rho), np.abs(null)).p, len(x)


def lowest(estimate: np.ndarray, deviation: np.ndarray, df: float, n: int = 4000, seed: int = 0) -> np.ndarray:
    """p of each of several estimates being the lowest in truth: those above 0.05 hold the argmin with a chance of 95 %.

    estimate : [k]; deviation : [k, unit], whose products add up to the covariance of the estimates
    p is that of the greatest gap of one above another, among equals (maximum of studentised differences, drawn from a
    multivariate t of `df`). A lowest that noise chose keeps its rivals beside it.
    """
    rng = np.random.default_rng(seed)
    drawn = deviation @ rng.standard_normal((deviation.shape[1], n))  # [k, draw]
    drawn = drawn / np.sqrt(rng.chisquare(df, n) / df)
    p = np.ones(len(estimate))
    for i in range(len(estimate)):
        error = np.sqrt(((deviation[i] - deviation) ** 2).sum(1))
        others = error > 1e-12 * max(float(np.abs(estimate).max()), 1e-300)
        if others.any():
            gap = (estimate[i] - estimate[others]) / error[others]
            null = ((drawn[i] - drawn[others]) / error[others, None]).max(0)
            p[i] = p_among(int((null >= gap.max()).sum()), n)
    p[int(estimate.argmin())] = 1.0
    return p


def fieller(top: float, bottom: float, v_top: float, v_bottom: float, v_both: float, t: float) -> tuple[float, float]:
    """Fieller's interval of top / bottom; infinite when the bottom is not distinguishable from zero."""
    quadratic = bottom**2 - t**2 * v_bottom
    if quadratic <= 0:
        return -math.inf, math.inf
    linear = top * bottom - t**2 * v_both
    root = math.sqrt(max(linear**2 - quadratic * (top**2 - t**2 * v_top), 0.0))
    return (linear - root) / quadratic, (linear + root) / quadratic


# ---- many tests ----------------------------------------------------------------------------------------------


def holm(p: Any) -> np.ndarray:
    """Holm's adjusted p values (1979): the chance of any false finding is held. NaN stay NaN and do not count."""
    p = np.asarray(p, float)
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    running = 0.0
    for i, at in enumerate(order):
        running = max(running, min(1.0, (len(order) - i) * p[at]))
        out[at] = running
    return out


def fisher(table: Any) -> float:
    """Fisher's exact test of a table [2, 2] of counts: two-sided p, the tables that are no likelier than this one."""
    (a, b), (c, d) = np.asarray(table, int).tolist()
    first, left, n = a + b, a + c, a + b + c + d
    ways = [
        math.comb(first, k) * math.comb(n - first, left - k) for k in range(max(0, left - c - d), min(first, left) + 1)
    ]
    seen = math.comb(first, a) * math.comb(n - first, c)
    return sum(way for way in ways if way <= seen) / math.comb(n, left)


def benjamini_hochberg(p: Any) -> np.ndarray:
    """Benjamini & Hochberg's adjusted p values (1995): the share of false findings is held. NaN do not count."""
    p = np.asarray(p, float)
    out, held = np.full(p.shape, np.nan), np.flatnonzero(~np.isnan(p))
    order = held[np.argsort(p.ravel()[held], kind="stable")]
    adjusted = p.ravel()[order] * len(order) / np.arange(1, len(order) + 1)
    out.ravel()[order] = np.minimum(np.minimum.accumulate(adjusted[::-1])[::-1], 1.0)
    return out


def multiplicity(p: Mapping[str, float], level: float = 0.05) -> str:
    """What is left of several tests when all of them are counted, in a sentence."""
    names = [name for name, value in p.items() if not math.isnan(value)]
    values = [p[name] for name in names]
    if not names:
        return "no test"
    alone = sum(value <= level for value in values)
    kept = [name for name, value in zip(names, holm(values), strict=True) if value <= level]
    discoveries = int((benjamini_hochberg(values) <= level).sum())
    shown = f": {', '.join(kept)}" if kept else ""
    return (
        f"{len(names)} tests: {alone} at p <= {level:g} alone, {discoveries} after Benjamini-Hochberg, "
        f"{len(kept)} after Holm{shown}"
    )
