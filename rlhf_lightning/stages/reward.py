"""`rlhf stage=reward`: a reward model from preferences."""

from __future__ import annotations

from functools import partial

from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import train


def run(run: Run) -> float | None:
    """Train a sequence classifier with one output on preferences."""
    folder, settings = run.start_folder(), run.settings
    load = partial(load_scalar_model, folder, seed=settings["seed"], **settings["model"]["load"])
    return train(run, folder, load, **run.options)
