"""KL estimators, the KL penalty in the reward, and controllers of its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Return a per-token estimate of KL(pi : ref) from samples of pi, with x = log pi - log ref.

    k1 = x (unbiased), k2 = x^2 / 2 (biased, small variance), k3 = exp(-x) - 1 + x (unbiased, never negative).
    Source: Schulman, "Approximating KL Divergence", 2020. As a loss on samples of pi, k2 has the gradient of
    KL(pi : ref), k3 that of KL(ref : pi), and k1 none in expectation.
    """
    x = logprobs - ref_logprobs
    if kind == "k1":
        return x
    if kind == "k2":
        return 0.5 * x**2
    if kind == "k3":
        return torch.expm1(-x) + x
    raise ValueError(f"kl estimator {kind!r} is not one of: k1, k2, k3")


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return -beta kl_t at every token of the mask plus the score at the last one, (S, T) from `scores` (S,)."""
    rewards = -beta * kl * mask
    last = mask.sum(1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last] += scores.to(rewards.dtype)
    return rewards


@dataclass
class KLController:
    """The weight beta of the KL penalty: fixed, or steered towards a target.

    With a `target`, beta is multiplied after every iteration by 1 + K clip(kl / target - 1, -0.2, 0.2) with K = 0.1
    (arXiv 1909.08593 section 2.2). That paper's code has K = n / horizon for n responses per iteration, which reacts
    to small batches in proportion; a `horizon` asks for it, at most 1, which keeps beta positive.

    Args:
        beta: start value.
        target: KL of a whole response in nats, or None for a fixed beta.
        horizon: responses over which beta can change by about a fifth, or None for K = 0.1 at any batch size.
    """

    beta: float
    target: float | None = None
    horizon: float | None = None

    def update(self, kl: float, responses: int) -> None:
        """Update beta after an iteration with mean response KL `kl` over `responses` responses."""
        if self.target is not None and math.isfinite(kl):
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            gain = 0.1 if self.horizon is None else min(responses / self.horizon, 1.0)
            self.beta *= 1 + gain * error


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, the upper bound of KL(best-of-n : reference) (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n
