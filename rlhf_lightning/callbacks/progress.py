"""Progress of the whole run: a bar on a terminal, lines in a log."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar as Bar
from rich.table import Table
from rich.text import Text

from rlhf_lightning.modules.base import StageModule

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
    """Return a bar where the output is a terminal, else lines."""
    return RunProgressBar() if sys.stdout.isatty() else LineProgress()


def duration(seconds: float) -> str:
    """Return seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def planned_updates(trainer: Trainer, pl_module: LightningModule) -> int | None:
    """Return the optimizer updates of the whole run, None where nothing limits them or the data has no length."""
    if isinstance(pl_module, StageModule):
        return pl_module.total_steps()
    if trainer.max_steps == -1 and trainer.max_epochs == -1:
        return None
    planned = trainer.estimated_stepping_batches
    return int(planned) if 0 <= planned < math.inf else None


def main_metrics(trainer: Trainer) -> str:
    """Return the metrics of `SHOWN` that were logged, as "name value" pairs."""
    logged = trainer.callback_metrics
    return "  ".join(f"{name} {float(logged[name]):.4g}" for name in SHOWN if name in logged)


class Pace:
    """The optimizer updates or batches done of `total`, and the time left at the rate since this process began.

    Args:
        total: None where it is unknown.
        first: done before this process, in a run that is resumed.
    """

    def __init__(self, total: int | None, first: int = 0) -> None:
        self.total, self.first, self.done = total, first, first
        self.began = self.updated = time.monotonic()
        self.ended = False

    def update(self, done: int) -> None:
        """Set what is done now."""
        self.done, self.updated = done, time.monotonic()
        if self.total is not None:
            self.total = max(self.total, done)  # PPO finishes the iteration that reaches the last update

    def times(self) -> str:
        """Return the time since the start and the time left, which is not known before the first update."""
        now = self.updated if self.ended else time.monotonic()
        text = f"{duration(now - self.began)} so far"
        stopped = self.ended and self.done != self.total
        if self.total is None or self.done == self.first or stopped:
            return text
        per_unit = (self.updated - self.began) / (self.done - self.first)
        left = per_unit * (self.total - self.done) - (now - self.updated)
        return f"{text}, {duration(max(left, 0.0))} left"


class RunProgressBar(ProgressBar):
    """One bar for all updates of a run with the time left and the main metrics; one for a running validation.

    It stays on the terminal when training ends. Below the bar is the phase of a long training step
    (`StageModule.phase`). Only the first rank draws.
    """

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.live: Live | None = None
        self.redirected = ExitStack()
        self.training: Pace | None = None
        self.evaluation: tuple[str, Pace] | None = None  # a running validation or prediction
        self.metrics, self.metrics_read = "", -math.inf

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    # ---- hooks -----------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training = Pace(planned_updates(trainer, pl_module), trainer.global_step)
        self.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.training is None or not self.enabled:
            return
        if trainer.global_step > self.training.done:
            self.training.update(trainer.global_step)
        # not every batch: reading a metric waits for the device
        if time.monotonic() - self.metrics_read >= 0.25:
            self.read_metrics()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.training is not None and self.enabled:
            self.training.update(trainer.global_step)
            self.training.ended = True
            self.read_metrics()
        self.stop()
        self.training = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.begin(self.validation_description, trainer.num_val_batches)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.evaluation is not None:
            pace = self.evaluation[1]
            pace.update(pace.done + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluation = None
        if self.training is None:
            self.stop()
        elif self.enabled:
            self.read_metrics()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(self.predict_description, trainer.num_predict_batches)

    on_predict_batch_end = on_validation_batch_end
    on_predict_end = on_validation_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()

    # ---- drawing ---------------------------------------------------------------------------------------------------

    def begin(self, description: str, batches: list[int | float]) -> None:
        """Draw a bar for the batches of a validation or prediction."""
        total = sum(batches)
        self.evaluation = (description, Pace(int(total) if total < math.inf else None))
        self.start()

    def start(self) -> None:
        """Draw on the terminal four times a second until :meth:`stop`; a validation alone leaves nothing behind."""
        if not self.enabled or self.live is not None:
            return
        self.live = Live(get_renderable=self.render, console=Console(), transient=self.training is None)
        self.redirected.enter_context(self.live)
        self.redirected.enter_context(log_above())

    def stop(self) -> None:
        """Draw once more and leave the terminal."""
        self.redirected.close()
        self.live = None

    def read_metrics(self) -> None:
        """Keep the main metrics as text: the thread that draws must not wait for the device."""
        self.metrics, self.metrics_read = main_metrics(self.trainer), time.monotonic()

    def render(self) -> RenderableType:
        """Return what is drawn on the terminal now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(max_width=40)
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
        if self.training is not None:
            # PPO makes several updates per batch, which are shown before the batch ends
            row(
                table, self.train_description, self.training, max(self.training.done, self.trainer.global_step), "steps"
            )
        if self.evaluation is not None:
            description, pace = self.evaluation
            row(table, description, pace, pace.done, "batches")
        if self.training is None:
            return table
        module = self.trainer.lightning_module
        phase = module.phase if isinstance(module, StageModule) and not self.training.ended else ""
        line = Text(self.metrics, no_wrap=True, overflow="ellipsis")
        line.append(f"{'  ' if self.metrics and phase else ''}{phase}", style="dim")
        return Group(table, line)


def row(table: Table, description: str, pace: Pace, done: int, unit: str) -> None:
    """Add a bar to the table: description, bar, count, times."""
    total = None if pace.total is None else max(pace.total, done)
    bar = Bar(total=total or 1, completed=done, pulse=total is None)
    table.add_row(description, bar, f"{done}{'' if total is None else f'/{total}'} {unit}", pace.times())


@contextmanager
def log_above() -> Iterator[None]:
    """Let log lines appear above a bar that is being drawn: their handlers hold the terminal from before it."""
    terminals = (sys.__stdout__, sys.__stderr__)
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in terminals
    ]
    streams = [handler.setStream(sys.stdout) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, streams, strict=True):
            handler.setStream(stream)


class LineProgress(Callback):
    """Prints one line every few seconds: steps done, time left, the main metrics."""

    def __init__(self, seconds: float = 15.0) -> None:
        self.seconds, self.printed, self.last = seconds, 0.0, -1
        self.pace = Pace(None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pace = Pace(planned_updates(trainer, pl_module), trainer.global_step)
        self.printed = self.pace.began

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if trainer.is_global_zero and now - self.printed >= self.seconds:
            self.printed, self.last = now, trainer.global_step
            print(self.line(trainer), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and trainer.global_step != self.last:
            self.pace.ended = True
            print(self.line(trainer), flush=True)

    def line(self, trainer: Trainer) -> str:
        """Return the line for this moment."""
        pace = self.pace
        pace.update(trainer.global_step)
        share = "" if pace.total is None else f"/{pace.total} ({100 * pace.done / max(pace.total, 1):.0f}%)"
        return f"  step {pace.done}{share}  {pace.times()}  {main_metrics(trainer)}".rstrip()
