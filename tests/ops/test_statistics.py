"""Intervals against published values and their own coverage."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rlhf_lightning.ops.statistics import (
    as_columns,
    as_metrics,
    correlation_interval,
    mean_interval,
    share_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),
        (8, 10, 0.490162, 0.943318),
        (10, 10, 0.722467, 1.0),
        (61, 100, 0.512030, 0.699831),
        (570, 1000, 0.539105, 0.600359),
    ],
)
def test_wilson_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-7)


def test_wilson_stays_within_0_and_1_and_is_symmetric() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for n in (1, 7, 300):
        for successes in range(n + 1):
            low, high = wilson_interval(successes, n)
            assert 0 <= low <= successes / n + 1e-12
            assert successes / n - 1e-12 <= high <= 1
            mirrored = wilson_interval(n - successes, n)
            assert (1 - high, 1 - low) == pytest.approx(mirrored, abs=1e-12)


@pytest.mark.parametrize(("n", "p"), [(50, 0.5), (50, 0.1), (400, 0.85)])
def test_wilson_covers_the_truth(n: int, p: float) -> None:
    """Exact coverage over the binomial distribution; it moves around 95% because counts are whole."""
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k)
        for k in range(n + 1)
        if wilson_interval(k, n)[0] <= p <= wilson_interval(k, n)[1]
    )
    assert 0.93 < covered < 0.98


def test_mean_interval_by_hand() -> None:
    values = [1.0, 2.0, 6.0, 7.0]
    half = 3.182446 * statistics.stdev(values) / 2  # the table's t with 3 degrees of freedom
    assert mean_interval(values) == pytest.approx((4.0, 4 - half, 4 + half), abs=1e-5)
    assert mean_interval([2.0, 2.0]) == (2.0, 2.0, 2.0)
    assert all(math.isnan(v) for v in (*mean_interval([]), *share_interval([], [])))


def test_one_cluster_has_no_interval() -> None:
    for interval in (mean_interval([3.0]), mean_interval([3.0, 3.0], "aa"), share_interval([1.0, 1.0, 1.0], "aaa")):
        assert math.isfinite(interval[0])
        assert math.isnan(interval[1])
        assert math.isnan(interval[2])


@pytest.mark.parametrize("clusters", [2, 3, 8, 50])
@pytest.mark.parametrize("size", [1, 4])
def test_mean_intervals_cover_with_few_clusters(clusters: int, size: int) -> None:
    """4,000 samples of normal values that share a cluster's mean; the normal quantile covers 70% of two clusters."""
    rng = np.random.default_rng(clusters + size)
    of = [c for c in range(clusters) for _ in range(size)]
    values = rng.normal(size=(4000, clusters, 1)) + rng.normal(size=(4000, clusters, size))
    ends = np.array([mean_interval(row.tolist(), of)[1:] for row in values.reshape(4000, -1)])
    covered = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    assert 0.94 < covered < 0.96  # its standard deviation is 0.0034


@pytest.mark.slow
@pytest.mark.parametrize(("clusters", "responses"), [(30, 4), (30, 9), (100, 4)])
def test_accuracies_of_rankings_cover(clusters: int, responses: int) -> None:
    """4,000 samples of rankings, whose K (K - 1) / 2 pairs share the noise of K scores.

    With the pairs taken as independent .82 are covered at K = 4 and .46 at K = 9.
    """
    rng = np.random.default_rng(clusters * responses)
    first, second = np.triu_indices(responses, 1)  # response 0 is the best

    def outcomes(draws: int) -> np.ndarray:
        skill = rng.normal(size=(draws, clusters, 1))  # some prompts are easier
        scores = rng.normal(size=(draws, clusters, responses)) - 0.3 * np.exp(skill) * np.arange(responses)
        return scores[..., first] > scores[..., second]

    truth = outcomes(2000).mean()
    of = [c for c in range(clusters) for _ in first]
    ends = np.array([share_interval(row.ravel().astype(float).tolist(), of)[1:] for row in outcomes(4000)])
    covered = ((ends[:, 0] <= truth) & (ends[:, 1] >= truth)).mean()
    assert 0.94 < covered < 0.96


def test_mean_interval_covers_the_truth() -> None:
    """1,000 samples of 200 exponential values: 95% with a standard error of 0.7%."""
    rng = random.Random(0)
    covered = 0
    for _ in range(1000):
        _, low, high = mean_interval([rng.expovariate(1.0) for _ in range(200)])
        covered += low <= 1.0 <= high
    assert 925 <= covered <= 970


def test_repeating_every_value_makes_no_interval_narrower() -> None:
    values = [1.0, 2.0, 6.0, 7.0]
    repeated, clusters = [v for v in values for _ in range(9)], [c for c in range(4) for _ in range(9)]
    assert mean_interval(repeated, clusters) == pytest.approx(mean_interval(values), abs=1e-12)
    assert mean_interval(values, "abcd") == pytest.approx(mean_interval(values), abs=1e-12)
    shares = [float(v > 1) for v in repeated]
    # the design effect (3/4 * 1/4 / 3) / (3/4 * 1/4 / 35), then 3 degrees of freedom
    few = 36 * 3 / 35 * (1.959964 / 3.1824463) ** 2
    assert share_interval(shares, clusters) == pytest.approx((0.75, *wilson_interval(0.75 * few, few)), abs=1e-6)
    few_equal = 4 * (1.959964 / 3.1824463) ** 2
    assert share_interval([1.0] * 36, clusters) == pytest.approx(
        (1.0, *wilson_interval(few_equal, few_equal)), abs=1e-6
    )
    assert share_interval([1.0, 0.0] * 10, range(20)) == pytest.approx((0.5, *wilson_interval(10, 20)), abs=1e-12)


@pytest.mark.slow
def test_clustered_intervals_cover_the_truth() -> None:
    """1,000 samples of 100 prompts with 5 responses whose means vary; ignoring the prompts covers far less."""
    rng = random.Random(0)
    covered = {"mean": 0, "share": 0, "naive": 0}
    clusters = [c for c in range(100) for _ in range(5)]
    for _ in range(1000):
        centres = [rng.random() for _ in range(100)]
        values = [centres[c] + rng.gauss(0, 0.2) for c in clusters]
        shares = [float(rng.random() < centres[c]) for c in clusters]
        for name, (_, low, high) in {
            "mean": mean_interval(values, clusters),
            "share": share_interval(shares, clusters),
            "naive": mean_interval(values),
        }.items():
            covered[name] += low <= 0.5 <= high
    assert 925 <= covered["mean"] <= 970
    assert 925 <= covered["share"] <= 970
    assert covered["naive"] < 800


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlations_are_those_of_scipy(kind: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50).round(1)  # with ties
    y = x + rng.exponential(size=50)
    r, low, high = correlation_interval(x.tolist(), y.tolist(), kind=kind)
    expected: Any = (stats.pearsonr if kind == "pearson" else stats.spearmanr)(x, y)
    assert r == pytest.approx(expected.statistic)
    assert low < r < high
    assert (math.atanh(high) + math.atanh(low)) / 2 == pytest.approx(math.atanh(r))
    swapped = correlation_interval(y.tolist(), (-x).tolist(), kind=kind)
    assert swapped == pytest.approx((-r, -high, -low))


def test_correlations_at_the_ends() -> None:
    assert correlation_interval([1, 2, 3], [2, 4, 6]) == pytest.approx((1, 1, 1))
    assert correlation_interval([1, 2, 3], [5, 4, 1], kind="spearman") == pytest.approx((-1, -1, -1))
    for x in ([1.0, 1.0, 1.0], [1.0, 2.0], []):
        assert all(map(math.isnan, correlation_interval(x, list(range(len(x))))))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "true"), [("pearson", 0.5), ("spearman", 6 / math.pi * math.asin(0.25))])
def test_intervals_of_correlations_cover(kind: Any, true: float) -> None:
    """1,000 samples of 60 prompts with four responses that share half of their variance; as independent .86 are covered."""
    rng, of, covered = np.random.default_rng(1), [c for c in range(60) for _ in range(4)], 0
    for _ in range(1000):
        a, b = (np.repeat(rng.normal(size=60), 4) + rng.normal(size=240) for _ in range(2))
        _, low, high = correlation_interval(a.tolist(), (0.5 * a + math.sqrt(0.75) * b).tolist(), of, kind)
        covered += low <= true <= high
    assert 0.925 < covered / 1000 < 0.97


def test_an_interval_as_metrics_and_as_columns() -> None:
    assert as_metrics("a", (0.5, 0.25, 0.75)) == {"a": 0.5, "a_low": 0.25, "a_high": 0.75}
    assert as_metrics("a", (0.5, math.nan, math.nan)) == {"a": 0.5}
    assert as_metrics("a", (math.nan,) * 3) == {}
    assert as_columns("a", (0.5, math.nan, math.inf)) == {"a": 0.5, "low": None, "high": None}


def test_a_wider_level_is_a_wider_interval() -> None:
    values = [0.0, 1.0, 3.0, 4.0]
    mean, low, high = mean_interval(values, level=0.99)
    expected = stats.t.interval(0.99, 3, loc=2.0, scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    assert mean == 2.0
