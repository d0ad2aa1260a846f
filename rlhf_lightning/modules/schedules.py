"""Learning-rate schedules: a factor of the peak rate, as a function of the optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import UserError

SHAPES = ("constant", "linear", "cosine")


class Shape:
    """Warmup from 0 over the first steps, then constant, linear or cosine down to `final` of the peak.

    An object rather than a function: LambdaLR stores its attributes, which are primitives, in the checkpoint.
    """

    def __init__(self, shape: str, warmup: float, final: float, total_steps: int) -> None:
        if shape not in SHAPES:
            raise UserError(f"schedule.shape={shape!r} is not one of {', '.join(SHAPES)}")
        self.shape, self.final, self.total = shape, final, max(total_steps, 1)
        self.warmup = int(warmup * self.total) if warmup < 1 else int(warmup)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return 1.0
        done = min((step - self.warmup) / max(self.total - self.warmup, 1), 1.0)
        rest = 1 - done if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * rest


def schedule(
    optimizer: Optimizer, total_steps: int, shape: str = "cosine", warmup: float = 0.0, final: float = 0.1
) -> LambdaLR:
    """Return the schedule of `optimizer` over `total_steps` updates.

    Args:
        shape: constant, linear or cosine.
        warmup: below 1 a fraction of all steps, else a number of steps.
        final: the rate at the end, as a fraction of the peak.
    """
    return LambdaLR(optimizer, Shape(shape, warmup, final, total_steps))
