"""`rlhf stage=dpo`: direct preference optimization."""

from __future__ import annotations

from functools import partial

from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.training import train


def run(run: Run) -> float | None:
    """Train a policy on preferences."""
    folder = run.start_folder()
    return train(run, folder, partial(load_causal_lm, folder, **run.settings["model"]["load"]), **run.options)
