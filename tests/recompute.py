"""Recomputes rows of a claims table from arrays, by numpy and scipy alone and by the definitions of docs/science.md.

Nothing of nsteer's own arithmetic is used: sums over pairs are loops, tests are scipy's.
"""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
from scipy import stats
from scipy.cluster import hierarchy


def cv_cosine(samples: np.ndarray, neutral: np.ndarray) -> float:
    """samples [emotion, sample, d], neutral [sample, d]; a sample number is a fold; a plain ratio."""
    top, bottom = cv_parts(samples, neutral)
    return top / bottom


def cv_parts(samples: np.ndarray, neutral: np.ndarray) -> tuple[float, float]:
    groups = [*samples, neutral]

    def product(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [(x, y) for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)) if i != j]
        return float(np.mean([x @ y for x, y in pairs]))

    own = len(samples)
    to_neutral = [product(sample, neutral) for sample in samples]
    base = product(neutral, neutral)
    crossed = [
        product(groups[e], groups[f]) - to_neutral[e] - to_neutral[f] + base
        for e, f in itertools.combinations(range(own), 2)
    ]
    length = [product(groups[e], groups[e]) - 2 * to_neutral[e] + base for e in range(own)]
    return float(np.mean(crossed)), float(np.mean(length))


def jackknife_by_folds(samples: np.ndarray, neutral: np.ndarray) -> tuple[float, float, float]:
    """The cosine and Fieller's interval when folds are left out in turn."""
    top, bottom = cv_parts(samples, neutral)
    n = samples.shape[1]
    left = np.array([cv_parts(np.delete(samples, k, 1), np.delete(neutral, k, 0)) for k in range(n)])
    cov = (n - 1) / n * (left - left.mean(0)).T @ (left - left.mean(0))
    t = stats.t.ppf(0.975, n - 1)
    # |top - r bottom| <= t * sd(top - r bottom)
    a = bottom**2 - t**2 * cov[1, 1]
    b = -2 * (top * bottom - t**2 * cov[0, 1])
    c = top**2 - t**2 * cov[0, 0]
    low, high = sorted(np.roots([a, b, c]).real)
    ratio = top / bottom
    return ratio - (ratio * cov[1, 1] - cov[0, 1]) / bottom**2, low, high


def accuracy(samples: np.ndarray, neutral: np.ndarray) -> float:
    """Held-out nearest vector by cosine; a sample number of all emotions is left out together."""
    right = []
    base = neutral.mean(0)
    for k in range(samples.shape[1]):
        vectors = np.delete(samples, k, 1).mean(1) - base
        for e in range(len(samples)):
            x = samples[e, k] - base
            cosine = [x @ v / np.linalg.norm(x) / np.linalg.norm(v) for v in vectors]
            right.append(int(np.argmax(cosine)) == e)
    return float(np.mean(right))


def wilson(k: float, n: int) -> tuple[float, float]:
    """The two shares at which k of n is just at the edge of the score test."""
    z = stats.norm.ppf(0.975)
    roots = np.roots([n + z**2, -(2 * k + z**2), k**2 / n])
    return float(min(roots)), float(max(roots))


def sign_flips(values: np.ndarray) -> float:
    """Two-sided p of a mean of 0 over all signs."""
    means = [abs(np.mean(values * signs)) for signs in itertools.product((1, -1), repeat=len(values))]
    return float(np.mean(np.array(means) >= abs(values.mean()) - 1e-12))


def mean_t(values: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def verdict(low: float, high: float, above: float, below: float, p_adjusted: float) -> str:
    """The rule of docs/science.md of a row that tests something."""
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        return "inconclusive"
    inside, outside = above < low and high < below, high <= above or low >= below
    if not (inside or outside) or not p_adjusted <= (0.005 if inside else 0.05):
        return "inconclusive"
    return "agrees" if inside else "differs"


# ---- shares, effects and costs ------------------------------------------------------------------------------------


def binomial(k: float, n: int, share: float) -> float:
    """Two-sided exact p of k of n under a share, of a whole k."""
    return float(stats.binomtest(int(k), n, share).pvalue)


def score_of(row: np.ndarray, classes: list[str], target: dict) -> float:
    """The score of a target in a judge's row [class]: classes that are to rise less those that are to fall."""
    side = {s: sum(row[classes.index(c)] for c in target.get(s, [])) for s in ("rises", "falls")}
    return float(side["rises"] - side["falls"])


def said(row: np.ndarray, classes: list[str], target: dict) -> bool:
    """Whether the likeliest class of a row is of the target."""
    best = classes[int(np.argmax(row))]
    return (best in target.get("rises", []) or not target.get("rises")) and best not in target.get("falls", [])


def chosen(change: np.ndarray, usable: np.ndarray) -> list[int]:
    """change, usable [strength, prompt] -> of each prompt the strength that is best on the others, -1 for none."""
    places = []
    for p in range(change.shape[1]):
        best, place = -np.inf, -1
        for s in range(len(change)):
            others, fit = np.delete(change[s], p), np.delete(usable[s], p)
            if np.isnan(change[s, p]) or np.isnan(others).all():
                continue
            if not np.isnan(fit).all() and np.nanmean(fit) < 0.8:
                continue
            if np.nanmean(others) > best:
                best, place = float(np.nanmean(others)), s
        places.append(place)
    return places


def over_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is there; NaN where nothing is."""
    flat = values.reshape(len(values), -1).T
    return np.array([np.mean(column[~np.isnan(column)]) if (~np.isnan(column)).any() else np.nan for column in flat])


def at(values: np.ndarray, place: list[int]) -> np.ndarray:
    """values [strength, prompt, ...] of each prompt at its strength; NaN where it has none."""
    return np.array([values[s, p] if s >= 0 else np.full(values.shape[2:], np.nan) for p, s in enumerate(place)])


def selectivity(taken: np.ndarray, target: int) -> np.ndarray:
    """taken [prompt, class]: the target's change less that of the class that rises most on the other prompts."""
    out = []
    for p in range(len(taken)):
        others = np.delete(taken, p, 0)
        rivals = [c for c in range(taken.shape[1]) if c != target]
        rival = max(rivals, key=lambda c: np.nanmean(others[:, c]))
        out.append(taken[p, target] - taken[p, rival])
    return np.array(out)


def tau(change: np.ndarray, strengths: list[float]) -> list[float]:
    """Kendall's tau-b of each prompt's change [strength, prompt] with strength, no change at 0 among them."""
    coefficients = []
    for column in change.T:
        x, y = np.r_[0.0, strengths], np.r_[0.0, column]
        known = ~np.isnan(y)
        if known.sum() > 2:
            coefficients.append(float(stats.kendalltau(x[known], y[known]).statistic))
    return [coefficient for coefficient in coefficients if not np.isnan(coefficient)]


def area(change: np.ndarray, reach: list[float]) -> np.ndarray:
    """Mean of each prompt's curve [target, prompt] over KL from no change at 0."""
    return np.trapezoid(np.r_[np.zeros((1, change.shape[1])), change], np.r_[0.0, reach], axis=0) / reach[-1]


def right(log_likelihood: np.ndarray) -> np.ndarray:
    """[..., item, choice], the right one first -> whether it is likelier than every other."""
    return (log_likelihood[..., :1] > log_likelihood[..., 1:]).all(-1).astype(float)


def kappa(a: list, b: list) -> float:
    """Cohen's kappa from the table of both verdicts."""
    labels = sorted(set(a) | set(b))
    table = np.array([[sum((x, y) == (i, j) for x, y in zip(a, b, strict=True)) for j in labels] for i in labels])
    expected = (table.sum(0) * table.sum(1)).sum() / table.sum() ** 2
    return float((np.trace(table) / table.sum() - expected) / (1 - expected))


def weighted_kappa(a: np.ndarray, b: np.ndarray) -> float:
    """1 - mean squared difference over that of all pairs of texts."""
    return float(1 - ((a - b) ** 2).mean() / ((a[:, None] - b[None]) ** 2).mean())


# ---- over models, layers and texts ---------------------------------------------------------------------------------


def hodges_lehmann(a: list[float], b: list[float]) -> float:
    return float(np.median([x - y for x in a for y in b]))


def cohens_d(a: list[float], b: list[float]) -> float:
    pooled = ((len(a) - 1) * np.var(a, ddof=1) + (len(b) - 1) * np.var(b, ddof=1)) / (len(a) + len(b) - 2)
    return float((np.mean(a) - np.mean(b)) / np.sqrt(pooled))


def spread(values: np.ndarray, errors: np.ndarray) -> tuple[float, float]:
    """SD of true values (Paule-Mandel), and p of Cochran's Q."""

    def q(tau2: float) -> float:
        return float(
            sum(
                (v - np.average(values, weights=1 / (errors**2 + tau2))) ** 2 / (e**2 + tau2)
                for v, e in zip(values, errors, strict=True)
            )
        )

    k, steps = len(values), np.r_[0.0, np.geomspace(1e-8, 10, 20_001)]
    under = next((t for t in steps if q(t) <= k - 1), np.nan)
    return float(np.sqrt(under)), float(stats.chi2.sf(q(0.0), k - 1))


def pair_cosine(vectors: np.ndarray) -> float:
    """Mean cosine over pairs of [vector, d]."""
    unit = [v / np.linalg.norm(v) for v in vectors]
    return float(np.mean([a @ b for a, b in itertools.combinations(unit, 2)]))


def distances(samples: np.ndarray, neutral: np.ndarray) -> np.ndarray:
    """1 - cosine of every two mean differences, of [emotion, sample, d]."""
    vectors = samples.mean(1) - neutral.mean(0)
    return np.array([1 - pair_cosine(np.stack(pair)) for pair in itertools.combinations(vectors, 2)])


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(stats.spearmanr(a, b).statistic)


def follows(samples: np.ndarray, neutral: np.ndarray, read: np.ndarray, asked: np.ndarray) -> tuple[int, int]:
    """Texts nearest to their own emotion more often than to the instruction's, and texts nearest to either more often.

    samples [emotion, sample, d]; read [emotion, sample, swap, d], asked [emotion, sample, swap]; a sample is a fold
    """
    base, mine, theirs = neutral.mean(0), 0, 0
    for e, k in np.ndindex(samples.shape[:2]):
        vectors = np.delete(samples, k, 1).mean(1) - base
        near = [int(np.argmax([(x - base) @ v / np.linalg.norm(v) for v in vectors])) for x in read[e, k]]
        own = sum(emotion == e for emotion in near)
        other = sum(emotion == a for emotion, a in zip(near, asked[e, k], strict=True))
        mine, theirs = mine + (own > other), theirs + (other > own)
    return mine, mine + theirs


def repeats(ids: list[int], n: int = 4) -> float:
    """1 - distinct / all n-grams, of the whole or, from 16 tokens, of the last half."""
    parts = [ids, ids[len(ids) // 2 :]] if len(ids) >= 16 else [ids]
    grams = [[tuple(part[i : i + n]) for i in range(len(part) - n + 1)] for part in parts]
    return max((1 - len(set(ngrams)) / len(ngrams) for ngrams in grams if ngrams), default=0.0)


def regime(ids: list[int], ratio: float) -> str:
    return "repetitive" if repeats(ids) >= 0.5 else "explosive" if ratio >= 10 else "surgical"


def author_label(texts: list[str]) -> str:
    """The label of a model by the author's later code."""

    def loops(text: str) -> bool:
        words = text.split()
        triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
        return any(triples.count(triple) >= 3 for triple in triples)

    if np.mean([loops(text) for text in texts]) > 0.5:
        return "repetitive"
    return "explosive" if np.mean([len(text.split()) < 3 for text in texts]) > 0.3 else "surgical"


def foreign(text: str) -> float:
    """Share of letters that are not Latin, by their Unicode names."""
    letters = [letter for letter in text if letter.isalpha()]
    return float(np.mean(["LATIN" not in unicodedata.name(letter) for letter in letters])) if letters else np.nan


def first_component(vectors: np.ndarray, k: int) -> np.ndarray:
    """Scores [emotion] on principal component k of [emotion, d]."""
    centred = vectors - vectors.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, k] * s[k]


def two_sides(vectors: np.ndarray) -> np.ndarray:
    """The first split of average linkage of 1 - cosine: [emotion] -> 1 or 2."""
    apart = [1 - pair_cosine(np.stack(pair)) for pair in itertools.combinations(vectors, 2)]
    return hierarchy.fcluster(hierarchy.linkage(apart, "average"), 2, "maxclust")
