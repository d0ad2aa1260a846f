"""What must hold before the first update: the policy that learns is the one that sampled, and is its reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.modules.rollout import Rollout


def is_exact(model: nn.Module, precision: Any = "32-true") -> bool:
    """Return whether a model and the Trainer's precision compute in at least float32."""
    return unwrap(model).dtype in (torch.float32, torch.float64) and str(precision) in ("32-true", "64-true")


def apart(logprobs: Tensor, expected: Tensor, exact: bool) -> tuple[float, bool]:
    """Return the difference of two computations of the same log-probabilities, and whether it exceeds rounding.

    Args:
        logprobs, expected: (N,) log-probabilities of tokens, or means over a response.
        exact: see :func:`is_exact`.
    """
    worst = difference(logprobs, expected, exact).item()
    return worst, exceeds_rounding(worst, exact)


def difference(logprobs: Tensor, expected: Tensor, exact: bool) -> Tensor:
    """Return the largest difference of log-probabilities (N,), where they are not exact the mean one, on their device.

    float32 rounds a log-probability to about 1e-5. bfloat16 rounds a single one to as much as 0.2 and their mean to
    about 0.005, so there the mean is compared.
    """
    differences = (logprobs.detach() - expected.detach()).abs()
    if not len(differences):
        return differences.new_zeros(())
    return differences.max() if exact else differences.mean()


def exceeds_rounding(worst: float, exact: bool) -> bool:
    """Return whether a :func:`difference` is more than rounding; False of NaN, which is reported with the loss."""
    return worst > (1e-3 if exact else 0.05)


def engine_difference(rollout: Rollout, reduce: Callable[..., Tensor]) -> dict[str, float]:
    """Return how far the engine's log-probabilities are from the policy's, over the sampled tokens of all ranks.

    Nothing where the engine gives none. The ratio of PPO is that of the policy to itself before the update, so a
    difference is off-policy.
    """
    if "engine_logprobs" not in rollout.tokens:
        return {}
    tokens = rollout.tokens
    gaps = (tokens["engine_logprobs"] - tokens["old_logprobs"])[rollout.mask].abs()
    total, count = reduce(torch.stack([gaps.sum(), gaps.new_tensor(float(len(gaps)))])).tolist()
    return {
        "rollout/logprob_difference": total / count,
        "rollout/logprob_difference_max": reduce(gaps.max()[None], "max").item(),
    }
