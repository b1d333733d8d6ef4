"""Two methods compared where they move a model equally far: planted truth, and the row of the table."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr
from kit import found_too_often

from nsteer.report.claims.matched import at_equal_kl
from nsteer.science import effects, statistics

REACH = np.array([0.1, 0.3, 1.0])
PROMPTS = 12


def changes(rng, size: float, noise: float = 0.3) -> np.ndarray:
    """[target, prompt]: the effect grows straight with KL; a prompt has a size of its own at all targets."""
    own = size + noise * rng.normal(size=PROMPTS)
    return REACH[:, None] * own + 0.05 * rng.normal(size=(3, PROMPTS))


def test_the_area_is_the_mean_of_a_curve():
    areas = effects.area(np.stack([REACH, 2 * REACH, np.r_[0.1, np.nan, 1.0]], 1), REACH)
    assert areas[:2] == pytest.approx([0.5, 1.0]) and np.isnan(areas[2])
    y = np.random.default_rng(0).normal(size=(3, 4))
    grid = np.linspace(0, 1, 200_001)
    slow = [np.interp(grid, np.r_[0, REACH], np.r_[0, curve]).mean() for curve in y.T]
    assert effects.area(y, REACH) == pytest.approx(slow, abs=1e-4)


def test_the_difference_of_two_methods_is_unbiased_and_covered_and_noise_gives_few_findings():
    rng = np.random.default_rng(1)
    for truth in (0.0, 0.2):
        means, covered, told, n = [], [], [], 400 if truth else 2000
        for _ in range(n):
            first, second = (effects.area(changes(rng, size), REACH) for size in (0.5 + 2 * truth, 0.5))
            interval = statistics.mean_interval(first - second)
            means.append(interval.estimate)
            covered.append(interval.low <= truth <= interval.high)
            told.append(statistics.paired_permutation(first - second, np.zeros(PROMPTS)).p <= 0.05)
        assert abs(np.mean(means) - truth) < 0.01
        assert np.mean(covered) >= 0.9
        assert truth or not found_too_often(sum(told), n)


def labelled_changes(values: np.ndarray, strengths=REACH) -> xr.Dataset:
    coords = {"strength": list(strengths), "prompt": [f"p{i}" for i in range(values.shape[1])], "control": ["none"]}
    return xr.Dataset({"change": (tuple(coords), values[..., None])}, coords)


def test_the_row_is_of_the_targets_and_prompts_that_both_have():
    rng = np.random.default_rng(2)
    first, second = changes(rng, 0.9), changes(rng, 0.3)[:2, ::-1]
    evidence = SimpleNamespace(settings=lambda op: {"strengths": {"kl": REACH.tolist()} if op == "by-kl" else [0.1]})
    turned = labelled_changes(second, REACH[:2]).assign_coords(prompt=[f"p{i}" for i in range(PROMPTS)][::-1])
    setups = {("m", op, "all"): {"a": labelled_changes(first), "b": turned} for op in ("by-kl", "by-hand")}
    (row,) = at_equal_kl(evidence, setups)
    want = effects.area(first[:2], REACH[:2]) - effects.area(second[:, ::-1], REACH[:2])
    assert row.value == pytest.approx(want.mean()) and row.n == PROMPTS and row.low < row.value < row.high
    assert "KL 0.1, 0.3" in row.control and not row.tests and "by-kl" in row.scope
