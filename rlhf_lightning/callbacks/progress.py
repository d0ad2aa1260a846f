"""Progress with time left: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

SHOWN = (
    "train/loss",
    "val/loss",
    "train/accuracy",
    "val/accuracy",
    "reward/proxy",
    "reward/gold",
    "kl/reference",
)


def progress_bar() -> Callback:
    """Return a rich bar where the output is a terminal, plain lines elsewhere."""
    if sys.stdout.isatty():
        return RichProgressBar(theme=RichProgressBarTheme(metrics_format=".4g"))
    return LineProgress()


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LineProgress(Callback):
    """Prints one line every few seconds: steps done, time left, the main metrics."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds, self.printed, self.began, self.first, self.last = seconds, 0.0, 0.0, 0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = self.printed = time.monotonic()
        self.first = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self.printed >= self.seconds:
            self.printed, self.last = now, trainer.global_step
            print(self.line(trainer, pl_module, now), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step != self.last:
            print(self.line(trainer, pl_module, time.monotonic()), flush=True)

    def line(self, trainer: Trainer, pl_module: LightningModule, now: float) -> str:
        """Return the line for this moment."""
        done = trainer.global_step
        total = pl_module.total_steps() if hasattr(pl_module, "total_steps") else trainer.max_steps  # type: ignore[operator]
        total = max(total, done)  # PPO finishes the iteration that reaches the last update
        elapsed = now - self.began
        left = elapsed / max(done - self.first, 1) * max(total - done, 0)
        metrics = trainer.callback_metrics
        shown = "  ".join(f"{name} {float(metrics[name]):.4g}" for name in SHOWN if name in metrics)
        share = f"{100 * done / max(total, 1):.0f}%"
        return f"  step {done}/{total} ({share})  {duration(elapsed)} so far, {duration(left)} left  {shown}"
