"""What a run gives its loggers beside metrics: settings, text, images, histograms, and TensorBoard's HParams tab."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard.summary import hparams as summaries

from rlhf_lightning.errors import needs

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

BINS = 64
"""Most bins of a histogram."""


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


def log_image(logger: Logger, name: str, image: np.ndarray, step: int) -> None:
    """Give a logger that :func:`takes_images` an image (height, width, 3) of uint8."""
    if isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, image, step, dataformats="HWC")
    elif isinstance(logger, WandbLogger):
        logger.log_image(name, [image], step=step)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, image, f"{name}/step_{step:06d}.png")


def takes_images(logger: Logger) -> bool:
    """Return whether images can be given to a logger, so that nobody draws them for a CSV file."""
    return isinstance(logger, TensorBoardLogger | WandbLogger | MLFlowLogger)


def log_histogram(logger: Logger, name: str, values: np.ndarray, step: int, weights: np.ndarray | None = None) -> None:
    """Give TensorBoard or W&B a histogram of values (N,); the bins of integers begin and end between two integers.

    Args:
        weights: (N,) what each value adds to the height of its bin, at least 0; None is 1.
    """
    if not isinstance(logger, TensorBoardLogger | WandbLogger):
        return
    bins: Any = BINS
    if np.issubdtype(values.dtype, np.integer):
        low, high = values.min(), values.max() + 1
        bins = np.arange(low, high + (width := -(-(high - low) // BINS)), width) - 0.5
    heights, edges = np.histogram(values, bins, weights=weights)
    if isinstance(logger, WandbLogger):
        histogram = needs("wandb", "wandb").Histogram(np_histogram=(heights, edges))
        logger.log_metrics({name: histogram}, step=step)  # type: ignore[dict-item]
        return
    each = np.ones(len(values)) if weights is None else weights
    logger.experiment.add_histogram_raw(
        name,
        min=edges[0],
        max=edges[-1],
        num=each.sum(),
        sum=(each * values).sum(),
        sum_squares=(each * values**2).sum(),
        bucket_limits=edges[1:],
        bucket_counts=np.maximum(heights, 1e-12),  # it widens the first bin over empty ones before it
        global_step=step,
    )


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
            f"{title}: {', '.join(tags)}": ["Multiline", [f"^{tag}$" for tag in tags]]  # they are patterns
            for title, tags in CHARTS.items()
        }
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
