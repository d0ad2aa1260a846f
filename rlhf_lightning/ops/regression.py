"""Ridge regression of a linear head on hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK = 8192
"""Observations that are converted to float64 at a time."""


def ridge_step(
    states: Tensor, residuals: Tensor, prior: float, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the changes of a linear head's weights (D,) and bias, a scalar, that fit what it leaves unexplained.

    argmin over (d, c) of sum_i (x_i d + c - residual_i)^2 + prior s |d|^2, where s is the mean variance of a coordinate
    of x: the weights before count as `prior` observations. Levine et al. 2017 (arXiv 1705.07461) fit the last layer
    of a value network so.

    Args:
        states: x (N, D), the inputs of the head.
        residuals: (N,), target less the output of the head.
        prior: above 0.
        reduce: sums a tensor over ranks, whose observations then count together.
    """
    reduce = reduce or (lambda partial: partial)
    if states.device.type == "mps":  # has no float64
        states, residuals = states.cpu(), residuals.cpu()
    exact: dict[str, Any] = {"dtype": torch.float64, "device": states.device}
    count = reduce(torch.full((1,), float(len(states)), **exact)).clamp_min(1)
    mean_x, mean_y = (
        reduce(values.sum(0, keepdim=True, dtype=torch.float64)) / count for values in (states, residuals)
    )
    size = states.shape[1]
    gram, moment = torch.zeros(size, size, **exact), torch.zeros(size, **exact)
    for part, left in zip(states.split(CHUNK), residuals.split(CHUNK), strict=True):
        x = part.double() - mean_x
        gram += x.T @ x
        moment += x.T @ (left.double() - mean_y)
    gram, moment = reduce(gram), reduce(moment)
    spread = (gram.diagonal().mean() / count).clamp_min(1e-12)  # states that are all equal explain nothing
    weight = torch.linalg.solve(gram + prior * spread * torch.eye(size, **exact), moment)
    bias = mean_y[0] - mean_x[0] @ weight
    return weight.to(residuals), bias.to(residuals)
