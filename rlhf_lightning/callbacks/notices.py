"""One-line notices where a run differs from its settings, and why."""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from rich.console import Console

from rlhf_lightning.callbacks.progress import planned_updates

log = logging.getLogger(__name__)


class Notices(Callback):
    """Says when `max_epochs` ends a run before `max_steps`, why EarlyStopping ended it, when all rewards were equal.

    The first rank prints the lines and writes them to the log file.
    """

    def __init__(self) -> None:
        self.lowest, self.highest = math.inf, -math.inf  # rewards of the run, restored on resume

    def state_dict(self) -> dict[str, Any]:
        return {"lowest": self.lowest, "highest": self.highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest, self.highest = state_dict["lowest"], state_dict["highest"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        planned = planned_updates(trainer, pl_module)
        if planned is not None and planned < trainer.max_steps:
            say(
                trainer,
                f"max_epochs={trainer.max_epochs} ends the run after {planned} of max_steps={trainer.max_steps} "
                "updates; add max_epochs=-1 to repeat the data",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics
        if "reward/proxy" in metrics and "reward/proxy_std" in metrics:
            mean, spread = float(metrics["reward/proxy"]), float(metrics["reward/proxy_std"])
            self.lowest, self.highest = min(self.lowest, mean - spread), max(self.highest, mean + spread)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = f"{trainer.global_step} of max_steps={trainer.max_steps} updates"
        if trainer.max_steps < 0:
            done = f"{trainer.global_step} updates"
        if trainer.should_stop:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EarlyStopping) and callback.stopping_reason_message:
                    reason = callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
                    say(trainer, f"EarlyStopping ended the run after {done}: {reason}")
        elif trainer.global_step < trainer.max_steps and 0 < (trainer.max_epochs or -1) <= trainer.current_epoch:
            epochs = f"max_epochs={trainer.max_epochs}"
            say(trainer, f"{epochs} ended the run after {done}; add max_epochs=-1 to repeat the data")
        # a sum of equal rewards divided by their number may be off in the last digits
        if 0 <= self.highest - self.lowest <= 1e-5 * max(1.0, abs(self.highest)):
            say(
                trainer,
                f"every reward of the run was {self.highest:.4g}, so nothing could be learned from it: look at "
                "reward_from",
            )


def say(trainer: Trainer, text: str) -> None:
    """Print a line on the first rank and write it to the log file."""
    if trainer.is_global_zero:
        log.info("%s", text)  # at INFO: the console shows warnings of the log, and this line is printed below
        console = Console()  # created now: a progress bar may have redirected stdout
        console.print(text, style="yellow", soft_wrap=not console.is_terminal, markup=False, highlight=False)
