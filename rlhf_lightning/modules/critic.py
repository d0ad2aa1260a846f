"""The critic's linear head, which is solved for instead of descended to, and the critic's learning rate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rlhf_lightning.models.shards import local_part, slices
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.regression import ridge_step

VALUE_HEAD_LR, CRITIC_LR = 1e-3, 1e-5


def learning_rate(is_head: bool, refit: float | None) -> float:
    """Return the default rate: 1e-3 of a value head that gradients alone bring to its place from zero, else 1e-5."""
    return VALUE_HEAD_LR if is_head and refit is None else CRITIC_LR


@torch.no_grad()
def refit_head(head: nn.Linear | None, rollout: Rollout, responses: float, reduce: Callable[[Tensor], Tensor]) -> None:
    """Move a critic's head towards the returns of the rollout by a ridge regression, and the values with it.

    The advantages are of the values before, which had not seen these returns. The last states of a transformer are
    badly conditioned, a few coordinates being far larger than the rest, so that Adam on the head overshoots or needs
    thousands of steps; the solution of the normal equations needs some hundred responses.

    Args:
        head: Linear(D, 1) with a bias, which may be sharded.
        responses: how many the head as it was counts as.
        reduce: sums a tensor over ranks.
    """
    mask, tokens = rollout.mask, rollout.tokens
    states = tokens.pop("states")[mask]
    count, everyone = reduce(torch.tensor([float(len(states)), float(len(mask))])).tolist()
    prior = responses * count / max(everyone, 1)
    weight, bias = ridge_step(states, (tokens["returns"] - tokens["values"])[mask], prior, reduce)
    assert head is not None
    for parameter, change in ((head.weight, weight[None]), (head.bias, bias[None])):
        local, at = local_part(parameter)
        local += change.to(local)[slices(at, local.shape)]
    tokens["values"][mask] += (states.to(weight) @ weight + bias).to(tokens["values"])
