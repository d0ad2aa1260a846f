"""Ending a run when asked, between two optimizer steps."""

from __future__ import annotations

import signal
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Stop(Callback):
    """Ends training after the current batch on SIGTERM or Ctrl-C; the checkpoint callback then saves.

    A running validation or prediction is aborted, and none is started: a scheduler that asks a process to end does not
    wait long.
    """

    def __init__(self) -> None:
        self.received: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def note(number: int, frame: Any) -> None:
            if self.received is not None:
                raise KeyboardInterrupt  # second signal
            self.received = number

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)

    on_predict_start = on_train_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # not inside an accumulation window: its gradients would be lost
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and self.asked(trainer):
            trainer.should_stop = True
            trainer.limit_val_batches = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.asked(trainer):
            raise KeyboardInterrupt

    on_predict_batch_end = on_validation_batch_end

    def asked(self, trainer: Trainer) -> bool:
        """Return whether any rank was asked to end: only some get the signal, and they must end together."""
        asked = self.received is not None
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked and self.received is None:
            self.received = signal.SIGTERM
        return asked
