"""Lightning as tests use it."""

from __future__ import annotations

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
