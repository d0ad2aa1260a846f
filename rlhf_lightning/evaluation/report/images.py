"""The figures of a run as images, for the loggers that take them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.loggers import Logger

from rlhf_lightning.callbacks.loggers import log_image, takes_images


def log_figures(loggers: Iterable[Logger], folder: str | Path) -> None:
    """Give TensorBoard, W&B and MLflow the figures that a report shows of a run folder, as `figures/<title>`.

    In the folder of a pipeline they are those of the pipeline's report: in its colours, without the models that the
    reference was trained from.
    """
    takers = list(filter(takes_images, loggers))
    if not takers:
        return
    from rlhf_lightning.evaluation.plots import as_image  # they import matplotlib
    from rlhf_lightning.evaluation.report.page import drawings, looks_of, samples_of
    from rlhf_lightning.evaluation.report.store import Results, read_results, read_stage, stage_name

    folder = Path(folder).resolve()
    if stage_name(folder) and (folder.parent / ".hydra").is_dir():
        results = read_results(folder.parent)
    else:
        results = Results("", [folder], "", [])
        results.stages.append(read_stage("", folder, results.missing.append))
    looks = looks_of(results)
    results.stages = [stage for stage in results.stages if stage.folder == folder]
    for drawn in drawings(results, looks, samples_of(results, looks)):
        name, image = re.sub(r"[^\w.-]+", "_", drawn.title.lower()).strip("_"), as_image(drawn.figure)
        for logger in takers:
            log_image(logger, f"figures/{name}", image, 0)
