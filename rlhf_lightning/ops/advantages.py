"""Returns, advantages and their normalization, on right-padded (S, T) tensors; entries with mask False are ignored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return generalized advantages and returns (S, T); both are 0 where the mask is False.

    delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lam)^l delta_{t+l}, R_t = A_t + V_t, and the
    value after the last token of the mask is 0. Source: arXiv 1506.02438 eq. 16.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0]) if rewards.shape[1] else rewards.sum(1)
    next_value = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        advantages[:, t] = following
        next_value = values[:, t]
    return advantages, (advantages + values) * mask


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """Return G_t = sum_k gamma^k r_{t+k} (S, T), 0 where the mask is False."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


def whiten(
    values: Tensor, mask: Tensor, shift_mean: bool = True, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return (x - mean) / sqrt(var + 1e-8) over the masked values, plus the mean when not `shift_mean`.

    Args:
        values, mask: any shape, the same.
        shift_mean: False keeps the mean, as for rewards.
        reduce: sums a small tensor over ranks, so that statistics are global.

    The variance is the biased one, as in the original RLHF code (Huang et al. 2023, detail on whitening).
    """
    mean, variance = moments(values, mask, reduce)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def moments(values: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, two scalars, of the masked values; `reduce` sums a small tensor over ranks."""
    reduce = reduce or (lambda partial: partial)
    masked = values[mask]
    count, total = reduce(torch.stack([masked.new_tensor(float(masked.numel())), masked.sum()]))
    mean = total / count.clamp_min(1)
    # a second pass over centred values: the difference of squares loses all digits when the mean is large
    return mean, reduce(((masked - mean) ** 2).sum()[None])[0] / count.clamp_min(1)


def rloo(scores: Tensor) -> Tensor:
    """Return r_i - mean of the other n - 1 samples of the prompt, from and to (P, n) (arXiv 2402.14740)."""
    n = scores.shape[1]
    return (scores - scores.mean(1, keepdim=True)) * (n / (n - 1))


def grpo(scores: Tensor, scale: bool = True) -> Tensor:
    """Return (r_i - mean) / (std + 1e-4) over the n samples of the prompt, (P, n) (arXiv 2402.03300).

    `scale=False` leaves the standard deviation out, as Dr. GRPO does (arXiv 2503.20783).
    """
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if scale else centred


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Return 1 - Var(R - V) / Var(R) over the masked entries, a scalar; 0 when the returns do not vary.

    `reduce` sums a small tensor over ranks.
    """
    _, residual = moments(returns - values, mask, reduce)
    _, variance = moments(returns, mask, reduce)
    return torch.where(variance > 1e-12, 1 - residual / variance.clamp_min(1e-12), 0.0)
