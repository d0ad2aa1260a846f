"""Lightning as tests use it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest


def quiet_lightning(test: object) -> object:
    """Mark a test in which Lightning's advice is not an error."""
    for text in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*The '.*_dataloader' does not have.*",
        ".*Trying to infer the `batch_size`.*",
        ".*you skipped validation.*|.*You defined a `validation_step`.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*in eval mode at the start of training.*",
        ".*is smaller than the logging interval.*",
        ".*WeightAveraging doesn't support sharding.*",
    ):
        test = pytest.mark.filterwarnings(f"ignore:{text}")(test)  # type: ignore[arg-type]
    return test


def stub_trainer(rank: int = 0, ranks: int = 1, **changes: Any) -> Any:
    """Return what a data module reads of its Trainer, on one of several ranks."""
    given = {
        "strategy": SimpleNamespace(distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank}),
        "loggers": [], "max_steps": -1, "current_epoch": 0, "accumulate_grad_batches": 1, "limit_train_batches": 1.0,
        "limit_val_batches": 1.0, "overfit_batches": 0.0, "reload_dataloaders_every_n_epochs": 0,
    }  # fmt: skip
    return SimpleNamespace(**given | changes)
