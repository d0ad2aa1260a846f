"""Learning-rate schedules: a factor of the peak rate, as a function of the optimizer step."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlhf_lightning.errors import UserError, nearest

SHAPES = ("constant", "linear", "cosine", "wsd")


class Shape:
    """Warmup from 0 over the first steps, then constant, linear or cosine down to `final` of the peak.

    "wsd" (warmup, stable, decay) is constant and then linear over the last steps, arXiv 2404.06395.

    An object rather than a function: LambdaLR stores its attributes, which are primitives, in the checkpoint.
    """

    def __init__(self, shape: str, warmup: float, final: float, total_steps: int | None, decay: float = 0.2) -> None:
        if shape not in SHAPES:
            raise UserError(f"schedule.shape={shape!r} is not one of {', '.join(SHAPES)}.{nearest(shape, SHAPES)}")
        if total_steps is None and (shape != "constant" or 0 < warmup < 1):
            raise UserError(
                f"schedule={shape} with schedule.warmup={warmup} needs the number of updates of the run: give "
                "max_steps or max_epochs beside max_time, or schedule=constant schedule.warmup=0"
            )
        self.shape, self.final, self.total = shape, final, max(total_steps or 1, 1)
        self.warmup = self.updates(warmup)
        self.decay = self.updates(decay) if shape == "wsd" else self.total - self.warmup
        if shape == "wsd" and self.warmup + self.decay > self.total:
            raise UserError(
                f"schedule.warmup={warmup} and schedule.decay={decay} are more than the {self.total} updates of the run"
            )

    def updates(self, length: float) -> int:
        """Return a length in updates, which below 1 is a fraction of all."""
        return int(length * self.total) if length < 1 else int(length)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.shape == "constant":
            return 1.0
        done = min(max(step - self.total + self.decay, 0) / max(self.decay, 1), 1.0)
        rest = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.final + (1 - self.final) * rest


def schedule(
    optimizer: Optimizer,
    total_steps: int | None,
    shape: str = "cosine",
    warmup: float = 0.0,
    final: float = 0.1,
    decay: float = 0.2,
) -> LambdaLR:
    """Return the schedule of `optimizer` over `total_steps` updates.

    Args:
        total_steps: None where nothing limits the run but time: only a constant rate has no need of it.
        shape: constant, linear, cosine or wsd.
        warmup: below 1 a fraction of all steps, else a number of steps.
        final: the rate at the end, as a fraction of the peak.
        decay: of wsd, the last steps over which the rate falls, a fraction or a number like `warmup`.

    Raises:
        UserError: another shape, or one that needs a number of steps where there is none.
    """
    return LambdaLR(optimizer, Shape(shape, warmup, final, total_steps, decay))
