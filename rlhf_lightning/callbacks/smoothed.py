"""A held-out metric averaged over the last validations, for callbacks that look for its peak."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lightning.errors import UserError, check_number, nearest


class Smoothed(Callback):
    """Adds `<monitor>_smoothed`, the mean of `monitor` over the last `window` validations, to what callbacks can read.

    EarlyStopping and ModelCheckpoint monitor it like any other metric (callbacks=peak): a validation that is high by
    chance neither is kept as the best nor puts off the end. They have to come after this callback. The mean trails the
    metric by (window - 1) / 2 validations.

    Args:
        monitor: a metric that validation logs, such as val/gold.
        window: validations; before there are as many, those that there are.
    """

    def __init__(self, monitor: str, window: int = 3) -> None:
        check_number("callbacks.smoothed.window", window, "[1, inf)", whole=True)
        self.monitor = monitor
        self.values: deque[float] = deque(maxlen=window)

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values.extend(state_dict["values"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:  # exported weights are validated once more
            return
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise UserError(
                f"callbacks.smoothed.monitor={self.monitor} is not logged in validation; val/gold needs "
                f"gold_from=<reward>.{nearest(self.monitor, metrics)}"
            )
        self.values.append(float(metrics[self.monitor]))
        metrics[f"{self.monitor}_smoothed"] = torch.tensor(sum(self.values) / len(self.values))
