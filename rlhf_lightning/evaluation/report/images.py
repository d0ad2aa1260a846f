"""The figures of a run as images, for the loggers that take them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import Logger

from rlhf_lightning.callbacks.loggers import log_image, takes_images


def log_figures(loggers: Iterable[Logger], folder: str | Path) -> None:
    """Give TensorBoard, W&B and MLflow the figures that a report shows of a run folder, as `figures/<title>`.

    Raises:
        UserError: `folder` is no run folder.
    """
    takers = list(filter(takes_images, loggers))
    if not takers:
        return
    from rlhf_lightning.evaluation.plots import as_image  # they import matplotlib
    from rlhf_lightning.evaluation.report.page import drawings, looks_of, samples_of
    from rlhf_lightning.evaluation.report.store import read_results

    results = read_results(folder)
    looks = looks_of(results)
    for drawn in drawings(results, looks, samples_of(results, looks)):
        name, image = re.sub(r"[^\w.-]+", "_", drawn.title.lower()), as_image(drawn.figure)
        for logger in takers:
            log_image(logger, f"figures/{name}", image, 0)
