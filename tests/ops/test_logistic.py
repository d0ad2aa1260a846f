"""Logistic regressions against statsmodels, and the bootstrap against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import t

from rlhf_lightning.ops.bootstrap import bootstrap_interval, bootstrap_weights
from rlhf_lightning.ops.logistic import logistic
from rlhf_lightning.ops.statistics import mean_interval


def rows(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a design (n, 3) and outcomes (n,) with ties, by the coefficients 1, -0.5 and 2."""
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(count, 3))
    wins = (rng.random(count) < expit(design @ [1.0, -0.5, 2.0])).astype(float)
    wins[::7] = 0.5
    return design, wins


@pytest.mark.slow
def test_coefficients_are_those_of_statsmodels() -> None:
    sm: Any = pytest.importorskip("statsmodels.api")
    design, wins = rows(300, 0)
    weights = np.random.default_rng(1).exponential(size=(3, 300))
    found = logistic(design, weights * wins, weights * (1 - wins))
    for row, expected in zip(weights, found, strict=True):
        twice, outcomes = np.concatenate([design, design]), np.repeat([1.0, 0.0], 300)
        model = sm.GLM(
            outcomes, twice, sm.families.Binomial(), freq_weights=np.concatenate([row * wins, row * (1 - wins)])
        )
        assert expected == pytest.approx(model.fit(tol=1e-12).params, abs=1e-6)


def test_a_share_has_its_log_odds_and_a_penalty_the_stationary_point() -> None:
    ones = np.ones((1, 1))
    assert logistic(ones, 3 * ones, ones)[0, 0] == pytest.approx(math.log(3))
    design, wins = rows(50, 2)
    penalties = [0.5, 0.0, 4.0]
    found = logistic(design, wins[None], 1 - wins[None], penalties)[0]
    assert (wins - expit(design @ found)) @ design == pytest.approx(np.array(penalties) * found, abs=1e-7)


def test_separated_rows_do_not_converge_without_a_penalty() -> None:
    design = np.array([[1.0], [2.0]])
    with pytest.raises((ArithmeticError, np.linalg.LinAlgError)):
        logistic(design, np.ones((1, 2)), np.zeros((1, 2)))
    assert 0 < logistic(design, np.ones((1, 2)), np.zeros((1, 2)), 0.1)[0, 0] < 10


def test_weights_are_of_clusters() -> None:
    weights = bootstrap_weights(["a", "b", "a", "c"], seed=3, resamples=2000)
    assert weights.shape == (2001, 4)
    assert (weights[0] == 1).all()
    assert (weights[:, 0] == weights[:, 2]).all()
    assert weights[1:, [0, 1, 3]].mean(0) == pytest.approx([1, 1, 1], abs=0.1)
    assert (weights > 0).all()
    assert (weights == bootstrap_weights(["a", "b", "a", "c"], seed=3, resamples=2000)).all()
    assert (weights[1:] != bootstrap_weights(["a", "b", "a", "c"], seed=4, resamples=2000)[1:]).any()


@pytest.mark.parametrize("clusters", [6, 40])
def test_of_a_mean_it_is_the_ordinary_interval(clusters: int) -> None:
    values = np.random.default_rng(clusters).normal(3.0, 2.0, clusters)
    weights = bootstrap_weights(range(clusters), resamples=20_000)
    found = bootstrap_interval(weights @ values / weights.sum(1), clusters)
    assert found == pytest.approx(mean_interval(list(values)), abs=0.04)


def test_of_a_share_it_is_on_the_scale_of_log_odds() -> None:
    values = np.array([0.8, 0.7, 0.9, 0.75, 0.85])
    value, low, high = bootstrap_interval(values, 10, share=True)
    half = t.ppf(0.975, 9) * math.sqrt(11 / 9) * float(np.std(logit(values[1:])))
    assert (value, logit(low), logit(high)) == pytest.approx((0.8, logit(0.8) - half, logit(0.8) + half))
    for others, clusters in ((np.ones(5), 10), (np.zeros(5), 10), (np.full(5, 0.3), 10), (values, 1)):
        assert [math.isnan(end) for end in bootstrap_interval(others, clusters, share=True)] == [False, True, True]
