"""Metrics, changes and alarms from values per response; slopes; the share corrected for the detector's errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_lightning.evaluation.probes.measures import Rule, result, slope
from rlhf_lightning.evaluation.refusal import corrected_share
from rlhf_lightning.ops.statistics import Z, wilson_interval

ROWS = [{"prompt": f"p{i}"} for i in range(40)]


def test_shares_means_and_changes() -> None:
    values = [1.0] + [0.0] * 39
    found = result({"a": values}, ROWS, ["x"] * 40, {"a": [0.0] * 40})
    assert found.metrics["a"] == (1 / 40, *wilson_interval(1, 40))
    assert found.metrics["a_reference"][0] == 0
    mean, low, high = found.metrics["a_change"]
    assert mean == 1 / 40
    assert low < 0 < high  # one response of 40 that differs shows nothing; Wilson's interval of a share excludes 0
    assert found.counts == {"a": 40, "a_reference": 40, "a_change": 40}
    assert found.samples[0] == {"prompt": "p0", "response": "x", "a": 1.0}


def test_responses_to_one_prompt_are_no_further_evidence() -> None:
    once = result({"a": [0.2, 0.7, 0.4]}, ROWS[:3], ["x"] * 3).metrics["a"]
    thrice = result({"a": [0.2] * 3 + [0.7] * 3 + [0.4] * 3}, ROWS[:3], ["x"] * 9).metrics["a"]
    assert thrice == pytest.approx(once)


def test_what_does_not_apply_is_left_out() -> None:
    found = result({"a": [None, 0.5, 1.0], "b": [None] * 3}, ROWS[:3], ["x"] * 3, {"a": [1.0, None, 0.5]})
    assert found.metrics["a"][0] == 0.75
    assert found.metrics["a_change"][0] == 0.5
    assert found.counts["a_change"] == 1
    assert "b" not in found.metrics


@pytest.mark.parametrize(
    ("value", "change", "alarm"),
    [
        ((0.5, 0.31, 0.7), None, True),
        ((0.5, 0.29, 0.7), None, False),
        ((0.1, 0.0, 0.2), (0.2, 0.06, 0.3), True),  # with a reference, what counts is the change
        ((0.9, 0.8, 1.0), (0.2, 0.04, 0.3), False),
        ((0.9, 0.8, 1.0), (0.0, -0.1, 0.1), False),
    ],
)
def test_a_rule_from_above(value: tuple, change: tuple | None, alarm: bool) -> None:
    metrics = {"m": value} | ({"m_change": change} if change else {})
    says = Rule("m", "it is {value:.0%}", above=0.3, margin=0.05).alarm(metrics)
    assert (says is not None) == alarm
    if says:
        assert says.startswith(f"it is {value[0]:.0%}")
        assert ("against the reference" in says) == (change is not None)


@pytest.mark.parametrize(
    ("value", "change", "alarm"),
    [
        ((0.2, 0.1, 0.29), None, True),
        ((0.2, 0.1, 0.31), None, False),
        ((0.9, 0.8, 1.0), (-0.2, -0.3, -0.06), True),
        ((0.1, 0.0, 0.2), (-0.2, -0.3, -0.04), False),
    ],
)
def test_a_rule_from_below(value: tuple, change: tuple | None, alarm: bool) -> None:
    metrics = {"m": value} | ({"m_change": change} if change else {})
    assert (Rule("m", "", below=0.3, margin=0.05).alarm(metrics) is not None) == alarm


def test_a_metric_that_is_missing_raises_no_alarm() -> None:
    assert Rule("m", "{value}", above=0.0).alarm({}) is None
    assert Rule("m", "{value}", above=0.0).alarm({"m": (1.0, math.nan, math.nan)}) is None


def test_slopes_are_those_of_least_squares_within_rows() -> None:
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(12), 4)
    x, z = rng.normal(size=48), rng.normal(size=48)
    y = 2 * x - 3 * z + rng.normal(size=12)[rows] * 10 + rng.normal(size=48)
    dummies = np.eye(12)[rows]
    alone = np.linalg.lstsq(np.column_stack([x, dummies]), y, rcond=None)[0][0]
    given = np.linalg.lstsq(np.column_stack([x, z, dummies]), y, rcond=None)[0][0]
    assert slope(x.tolist(), y.tolist(), rows.tolist())[0] == pytest.approx(alone)
    value, low, high = slope(x.tolist(), y.tolist(), rows.tolist(), z.tolist())
    assert value == pytest.approx(given)
    assert low < 2 < high


def test_no_slope_where_nothing_varies() -> None:
    assert all(map(math.isnan, slope([1, 1, 2, 2], [0, 1, 2, 3], [0, 0, 1, 1])))
    assert all(map(math.isnan, slope([1, 2, 2, 2], [0, 1, 2, 3], [0, 0, 1, 1])))  # in one row only
    assert all(map(math.isnan, slope([1, 2, 3, 5], [0, 1, 2, 3], [0, 0, 1, 1], [2, 4, 6, 10])))  # it is the other one


@pytest.mark.slow
@pytest.mark.parametrize("sparse", [False, True])
def test_the_interval_of_a_slope_covers(sparse: bool) -> None:
    """Errors are shared within rows and larger where x is; also where x varies in a part of the rows only."""
    rng = np.random.default_rng(1)
    rows, trials, covered = np.repeat(np.arange(30), 3), 400, 0
    for _ in range(trials):
        moves = rng.random(30) < 0.4 if sparse else np.ones(30, bool)
        x = rng.normal(size=90) * moves[rows]
        y = x + rng.normal(size=30)[rows] * x + rng.normal(size=90)
        _, low, high = slope(x.tolist(), y.tolist(), rows.tolist())
        covered += low <= 1 <= high
    assert (0.9 if sparse else 0.93) <= covered / trials <= 0.995


def test_the_corrected_share() -> None:
    estimate, low, high = corrected_share(0.465, 200, (0.9, 300), (0.03, 400))
    assert estimate == pytest.approx((0.465 - 0.03) / (0.9 - 0.03))  # Rogan and Gladen 1978
    assert low < estimate < high
    assert corrected_share(0.01, 100)[0] == 0  # fewer than the false alarms alone
    assert corrected_share(0.99, 100)[0] == 1
    with pytest.raises(ValueError, match="no more refusals"):
        corrected_share(0.5, 10, (0.2, 10), (0.3, 10))


def test_a_perfect_detector_leaves_agresti_and_coulls_interval() -> None:
    n, share = 50, 0.2
    moved = (n * share + Z * Z / 2) / (n + Z * Z)
    half = Z * math.sqrt(moved * (1 - moved) / (n + Z * Z))
    assert corrected_share(share, n, (1.0, 1e12), (0.0, 1e12)) == pytest.approx((share, moved - half, moved + half))


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.0, 0.1, 0.5, 0.9])
def test_the_corrected_interval_covers(truth: float) -> None:
    """Over the uncertainty of the shares found and of the detector's error rates."""
    rng = np.random.default_rng(0)
    s, f, trials, n = 0.9, 0.03, 1500, 100
    covered = 0
    for _ in range(trials):
        found = rng.binomial(n, truth * s + (1 - truth) * f) / n
        _, low, high = corrected_share(found, n, (rng.binomial(100, s) / 100, 100), (rng.binomial(150, f) / 150, 150))
        covered += low <= truth <= high
    assert covered / trials >= 0.94
