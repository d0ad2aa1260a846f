"""Ridge regression of a linear head on hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def ridge_step(
    states: Tensor, residuals: Tensor, prior: float, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the changes of a linear head's weights (D,) and bias, a scalar, that fit what it leaves unexplained.

    argmin over (d, c) of sum_i (x_i d + c - residual_i)^2 + prior s |d|^2, where s is the mean variance of a coordinate
    of x: the weights before count as `prior` observations. Levine et al. 2017 (arXiv 1705.07461, eq. 5) fit the last
    layer of a value network so.

    Args:
        states: x (N, D), the inputs of the head.
        residuals: (N,), target less the output of the head.
        prior: above 0.
        reduce: sums a tensor over ranks, whose observations then count together.
    """
    reduce = reduce or (lambda partial: partial)
    if states.device.type == "mps":  # has no float64
        states, residuals = states.cpu(), residuals.cpu()
    x, y = states.double(), residuals.double()
    count = reduce(x.new_tensor([float(len(x))])).clamp_min(1)
    mean_x, mean_y = reduce(x.sum(0)) / count, reduce(y.sum()[None]) / count
    x, y = x - mean_x, y - mean_y
    gram, moment = reduce(x.T @ x), reduce(x.T @ y)
    spread = (gram.diagonal().mean() / count).clamp_min(1e-12)  # states that are all equal explain nothing
    weight = torch.linalg.solve(gram + prior * spread * torch.eye(len(gram), dtype=x.dtype, device=x.device), moment)
    bias = mean_y[0] - mean_x @ weight
    return weight.to(residuals), bias.to(residuals)
