"""Ending a run when asked, between two optimizer steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

SIGNALS = (signal.SIGTERM, signal.SIGINT)


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

        for number in SIGNALS:
            signal.signal(number, note)

    # each of these is the first hook of a loop after Lightning has put handlers of its own in place
    on_sanity_check_start = on_validation_start = on_predict_start = on_train_start

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


@contextmanager
def interruptible(trainer: Trainer) -> Iterator[None]:
    """Raise what Lightning makes of SIGTERM and Ctrl-C as KeyboardInterrupt(128 + signal); it ends with 0 or 1.

    For one of the Trainer's loops, which may be ended before :class:`Stop` listens.
    """
    stops = [callback for callback in trainer.callbacks if isinstance(callback, Stop)]  # type: ignore[attr-defined]
    received: int | None = None
    try:
        yield
    except SystemExit as error:
        received = next((stop.received for stop in stops if stop.received), None)
        if received is None and isinstance(error, SIGTERMException):
            received = signal.SIGTERM
        if received is None and isinstance(error.__context__, KeyboardInterrupt):
            received = (error.__context__.args or [128 + signal.SIGINT])[0] - 128
        if received is None:
            raise
    received = received or next((stop.received for stop in stops if stop.received), None)
    if received is not None:
        raise KeyboardInterrupt(128 + received)


@contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Raise KeyboardInterrupt(128 + signal) where SIGTERM or Ctrl-C arrives, as while a model folder is written."""

    def end(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(128 + number)

    previous = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
