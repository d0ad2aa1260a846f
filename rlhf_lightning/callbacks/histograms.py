"""Distributions inside a rollout of online training: rewards, advantages, lengths, KL by position."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from rlhf_lightning.callbacks.loggers import log_histogram
from rlhf_lightning.errors import check_number
from rlhf_lightning.modules.online import Online
from rlhf_lightning.modules.rollout import Rollout


class Histograms(Callback):
    """Gives TensorBoard and W&B the :func:`distributions` of the first rank's rollout, on the x axis of the scalars.

    At the first iteration, every `every_n_iterations` after it, and at the last. A stage that generates nothing has
    none.

    Args:
        every_n_iterations: iterations between two sets; 0 is off.
    """

    def __init__(self, every_n_iterations: int = 10) -> None:
        check_number("callbacks.histograms.every_n_iterations", every_n_iterations, "[0, inf)", whole=True)
        self.every, self.written_at = every_n_iterations, -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and isinstance(pl_module, Online) and (pl_module.iteration - 1) % self.every == 0:
            self.write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.every and isinstance(pl_module, Online):
            self.write(trainer, pl_module)

    def write(self, trainer: Trainer, module: Online) -> None:
        """Write the histograms of the last rollout, once."""
        step = module.iteration - 1
        if module.last_rollout is None or step == self.written_at or not trainer.is_global_zero:
            return
        self.written_at = step
        found = {
            name: (values.cpu().numpy(), None if weights is None else weights.cpu().numpy())
            for name, (values, weights) in distributions(module.last_rollout).items()
        }
        for logger in trainer.loggers:
            for name, (values, weights) in found.items():
                log_histogram(logger, f"histograms/{name}", values, step, weights)


def distributions(rollout: Rollout) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Return values (N,) and their weights by name, of a rollout whose tokens have been filled in.

    Rewards and lengths are of responses, advantages of tokens. The KL of a position (from 1) is its weight: nats per
    response, so that the weights add up to the KL of a response; 0 where the estimate is negative, as a bar cannot be.
    """
    mask, tokens = rollout.mask, rollout.tokens
    found: dict[str, tuple[Tensor, Tensor | None]] = {
        "reward": (rollout.scores, None),
        "length": (mask.sum(1), None),
        "kl_by_position": (torch.arange(1, mask.shape[1] + 1), tokens["kl"].mean(0).clamp_min(0.0)),
    }
    if "advantages" in tokens:
        found["advantage"] = (tokens["advantages"][mask], None)
    return found
