"""What must hold before the first update: the policy that learns is the one that sampled, and is its reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.models.completion import unwrap


def is_exact(model: nn.Module, precision: Any = "32-true") -> bool:
    """Return whether a model and the Trainer's precision compute in at least float32."""
    return unwrap(model).dtype in (torch.float32, torch.float64) and str(precision) in ("32-true", "64-true")


def apart(logprobs: Tensor, expected: Tensor, exact: bool) -> tuple[float, bool]:
    """Return the difference of two computations of the same log-probabilities, and whether it exceeds rounding.

    float32 rounds a log-probability to about 1e-5. bfloat16 rounds a single one to as much as 0.2 and their mean to
    about 0.005, so there the mean is compared.

    Args:
        logprobs, expected: (N,) log-probabilities of tokens, or means over a response.
        exact: see :func:`is_exact`.
    """
    differences = (logprobs.detach() - expected.detach()).abs()
    worst = (differences.max() if exact else differences.mean()).item() if len(differences) else 0.0
    return worst, worst > (1e-3 if exact else 0.05)  # values that are not finite are reported with the loss
