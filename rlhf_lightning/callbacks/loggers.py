"""What a run gives its loggers beside metrics: hyperparameters, tables of text, and TensorBoard's HParams tab."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard.summary import hparams as summaries

log = logging.getLogger(__name__)
CHARTS = {
    "loss": ("train/loss", "val/loss"),
    "accuracy": ("train/accuracy", "val/accuracy"),
    "reward": ("reward/proxy", "reward/gold"),
    "KL (nats)": ("kl/reference",),
    "tokens": ("rollout/length",),
    "entropy": ("policy/entropy",),
}
"""The charts of a training: title -> the tags that belong in one, in TensorBoard's custom scalars and in reports."""


def quiet_writer_threads() -> None:
    """Do not print what ends TensorBoard's writer thread: the next call of the writer raises it, as one line."""
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if type(arguments.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
            previous(arguments)
            return
        log.info("TensorBoard's writer ended: %s", arguments.exc_value)

    threading.excepthook = hook


def log_table(logger: Logger, name: str, rows: Sequence[Mapping[str, Any]], text: str, step: int) -> None:
    """Give a logger a table: W&B its `rows`, TensorBoard and MLflow its `text` in Markdown; others take no text."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_text(name, text, step)
    elif isinstance(logger, WandbLogger):
        columns = list(dict.fromkeys(key for row in rows for key in row))
        logger.log_table(name, columns, [[cell(row.get(key)) for key in columns] for row in rows], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_text(logger.run_id, text, f"{name}/step_{step:06d}.md")


def cell(value: Any) -> Any:
    """Return a value of one of the types that W&B compares within a column."""
    if isinstance(value, bool) or value is None:
        return value
    return float(value) if isinstance(value, int | float) else str(value)


def log_settings(logger: Logger, hparams: Mapping[str, Any]) -> None:
    """Give a logger the hyperparameters; TensorBoard gets them at the end, see :func:`write_hparams`."""
    if not isinstance(logger, TensorBoardLogger):
        logger.log_hyperparams(dict(hparams))


def summary_writer(trainer: Trainer) -> Any:
    """Return the run's SummaryWriter, or None without a TensorBoard logger or on another rank."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def write_charts(trainer: Trainer) -> None:
    """Lay out TensorBoard's tab of custom scalars; a tag that the run does not log is left out there."""
    writer = summary_writer(trainer)
    if writer is not None:
        charts = {
            title: ["Multiline", [f"^{tag}$" for tag in tags]] for title, tags in CHARTS.items()
        }  # they are patterns
        writer.add_custom_scalars({"training": charts})


def judged_by(monitor: str, metrics: Mapping[str, Any]) -> str | None:
    """Return the metric a run is judged by: `monitor`, or without held-out rows its training counterpart."""
    training = {"val/loss": "train/loss", "val/accuracy": "train/accuracy", "val/reward": "reward/proxy"}
    return next((name for name in (monitor, training.get(monitor)) if name in metrics), None)


def write_hparams(trainer: Trainer, hparams: dict[str, Any], metric: str | None, value: float) -> None:
    """Fill the HParams tab with a run's hyperparameters and its final metric.

    TensorBoard takes its columns from the first experiment record it finds and only lists metrics that are in it, so it
    is written once, at the end, and not by a trial of a sweep, whose record the sweep writes.

    Args:
        hparams: flat dict; what is not a primitive is written as text.
        metric: name and value of what the run is judged by; None writes nothing.
    """
    writer = summary_writer(trainer)
    if writer is None or metric is None:
        return
    primitives = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in hparams.items()}
    experiment, *session = summaries(primitives, {f"hparams/{metric}": value})
    for record in session if "RLHF_TRIAL" in os.environ else (experiment, *session):
        writer._get_file_writer().add_summary(record)
    writer.add_scalar(f"hparams/{metric}", value, trainer.global_step)
    writer.flush()
