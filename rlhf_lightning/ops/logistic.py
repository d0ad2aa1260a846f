"""Logistic regression by Newton's method, of all resamples of a bootstrap in one call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit

STEPS, TOLERANCE, LONGEST = 200, 1e-9, 4.0
"""Of Newton's method; LONGEST bounds the change of a coefficient in one step, which else may overshoot."""


def logistic(
    design: np.ndarray, wins: np.ndarray, losses: np.ndarray, ridge: float | Sequence[float] = 0.0
) -> np.ndarray:
    """Return the coefficients (B, k) of B logistic regressions without intercept that share their rows.

    They maximize sum_i wins_bi log sigma(x_i c_b) + losses_bi log sigma(-x_i c_b) - sum_j ridge_j / 2 c_bj^2. There
    is a maximum where every ridge is above 0, or no combination of columns separates wins from losses.

    Args:
        design: (n, k), the rows x_i.
        wins, losses: (B, n), how often row i was won and lost; fractions are allowed.
        ridge: strength of the L2 penalty, of all coefficients or of each.

    Raises:
        ArithmeticError: it does not converge.
    """
    count, width = design.shape
    products = (design[:, :, None] * design[:, None, :]).reshape(count, width * width)
    coefficients, penalty = np.zeros((len(wins), width)), np.diag(np.broadcast_to(ridge, width))
    for _ in range(STEPS):
        chance = expit(coefficients @ design.T)
        gradient = (wins - (wins + losses) * chance) @ design - coefficients @ penalty
        hessian = (((wins + losses) * chance * (1 - chance)) @ products).reshape(-1, width, width) + penalty
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        longest = np.abs(step).max(1, keepdims=True)
        coefficients += step * np.minimum(1.0, LONGEST / np.maximum(longest, TOLERANCE))
        if longest.max() < TOLERANCE:
            return coefficients
    raise ArithmeticError("the logistic regression does not converge: nothing bounds its coefficients")
