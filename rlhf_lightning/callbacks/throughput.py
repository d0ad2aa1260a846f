"""Rows and tokens per second, seconds per step, and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from rlhf_lightning.distributed import data_ranks
from rlhf_lightning.ops.groups import GroupBatch


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GB: device memory where there is a GPU, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def batch_rows(batch: Any) -> int:
    """Return the rows of a batch, for `batch_size_fn` of Lightning's ThroughputMonitor."""
    return batch.groups if isinstance(batch, GroupBatch) else len(batch)


def batch_tokens(batch: Any) -> int:
    """Return the tokens of a batch as it is read, for `length_fn` of ThroughputMonitor."""
    return batch.tokens if isinstance(batch, GroupBatch) else sum(group.tokens for group in batch.groups)


class Throughput(Callback):
    """Logs perf/rows_per_s, perf/tokens_per_s, perf/step_s and perf/peak_memory_gb over the training batches.

    Rows are groups (demonstrations, pairs) or sampled responses; the first batch, which warms up, is left out. Times
    include training batches only, not validation, checkpoints or samples. `summary` has the means of the run.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.seconds = self.rows = self.tokens = 0.0
        self.batches = 0
        self.first_step = 0
        self.summary: dict[str, float] = {"perf/rows_per_s": 0.0, "perf/peak_memory_gb": 0.0}

    def state_dict(self) -> dict[str, Any]:
        return {"summary": self.summary}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.summary = state_dict["summary"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()
        if not self.batches:
            self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        elapsed = time.perf_counter() - self.started
        self.batches += 1
        if self.batches == 1:
            self.summary |= self.rates(trainer, pl_module, batch, elapsed, 1)
            self.first_step = trainer.global_step
            return
        rows, tokens = self.counts(trainer, pl_module, batch)
        self.seconds += elapsed
        self.rows += rows
        self.tokens += tokens
        steps = max(trainer.global_step - self.first_step, 1)
        self.summary |= {
            "perf/rows_per_s": self.rows / self.seconds,
            "perf/tokens_per_s": self.tokens / self.seconds,
            "perf/step_s": self.seconds / steps,
            "perf/peak_memory_gb": peak_memory_gb(),
        }
        pl_module.log_dict(self.summary)

    def rates(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, seconds: float, steps: int
    ) -> dict[str, float]:
        """Return the rates of one batch, used when a run has no second one."""
        rows, tokens = self.counts(trainer, pl_module, batch)
        return {
            "perf/rows_per_s": rows / seconds,
            "perf/tokens_per_s": tokens / seconds,
            "perf/step_s": seconds / steps,
            "perf/peak_memory_gb": peak_memory_gb(),
        }

    def counts(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> tuple[int, int]:
        """Return rows and real (unpadded) tokens of a batch, times the number of data-parallel ranks."""
        _, ranks = data_ranks(trainer)
        if isinstance(batch, GroupBatch):
            return batch.groups * ranks, batch.tokens * ranks
        rows, tokens = getattr(pl_module, "rollout_size", (0, 0))
        return rows * ranks, tokens * ranks
