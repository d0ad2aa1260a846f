"""Best-of-n: what the response with the highest of n scores is worth, and how far that policy is from the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_lightning.ops.kl import best_of_n_kl


def best_of_n_means(scores: Tensor, values: Tensor) -> Tensor:
    """Return (N,): for n = 1 to N the expected value of the response with the highest of n scores.

    The unbiased estimate from N samples: the mean over all subsets of n of them. With the samples in ascending order
    of score, the i-th is the best of C(i - 1, n - 1) of the C(N, n) subsets (as in the estimate of WebGPT, Nakano et
    al. 2021, arXiv 2112.09332, appendix I). Equal scores are each as likely to be kept.

    Args:
        scores: (N,) scores that decide.
        values: (N,) or (M, N) values that are averaged; with M rows the result is (M, N).
    """
    order = scores.argsort(stable=True)
    _, ties, counts = scores[order].unique_consecutive(return_inverse=True, return_counts=True)
    values = values[..., order].double()
    sums = values.new_zeros(*values.shape[:-1], len(counts)).index_add_(-1, ties, values)
    return (sums / counts)[..., ties] @ _weights(len(scores)).T


def _weights(size: int) -> Tensor:
    """Return (N, N): in row n - 1 the probability of each sample, in ascending order, to be the best of n."""
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    n = ranks[:, None]
    logs = (torch.lgamma(ranks) + torch.lgamma(n + 1) + torch.lgamma(size - n + 1)) - (
        torch.lgamma(n) + torch.lgamma((ranks - n + 1).clamp(min=1)) + torch.lgamma(torch.tensor(size + 1.0).double())
    )
    return logs.exp() * (ranks >= n)


def best_of_n_kl_with_ties(scores: Tensor) -> Tensor:
    """Return (N,): for n = 1 to N the KL of best-of-n to the reference, where N samples say how often scores tie.

    Equal scores are told apart by chance, so the policy keeps the reference's odds between them, and with F(s) the
    share of samples with a score of at most s the KL is sum_s P_n(s) log(P_n(s) / P_1(s)),
    P_n(s) = F(s)^n - F(s-)^n (Beirami et al. 2024, arXiv 2401.01879). With F from samples it is an estimate, too low
    where n is near N. It is never above :func:`rlhf_lightning.ops.kl.best_of_n_kl`, which holds without ties.
    """
    size = len(scores)
    counts = scores.unique(return_counts=True)[1].double()
    return torch.stack([_kl(counts / size, n) for n in range(1, size + 1)])


def _kl(probabilities: Tensor, n: int) -> Tensor:
    above = probabilities.cumsum(0).clamp(max=1.0)
    chosen = above**n - (above - probabilities).clamp(min=0.0) ** n
    return torch.xlogy(chosen, chosen / probabilities).sum().clamp(0.0, best_of_n_kl(n))
