"""`trainer.accumulate_grad_batches=auto`: into how many microbatches an optimizer step is split.

The loss is a mean over the step, so the number changes memory and the order of sums, not the result.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from rlhf_lightning.data.base import RowData
from rlhf_lightning.runtime.launch import of_first_rank, ranks, ranks_asked
from rlhf_lightning.runtime.memory import AUTO, GB, bytes_per_token, estimate
from rlhf_lightning.runtime.run import Run
from rlhf_lightning.stages.sizes import (
    device_gb,
    layer_sizes,
    read_config,
    read_job,
    read_shape,
    room,
    tensor_parallel_size,
)

CPU_TOKENS = 1024
"""On a CPU a forward pass over more tokens is hardly faster per token, and keeps more activations."""
CPU_BYTES = 1.5 * GB
"""Activations that a CPU may keep whatever the number of tokens: steps of small models are not split."""
COUNT_BATCHES = ("limit_train_batches", "overfit_batches", "fast_dev_run", "val_check_interval")
"""Arguments of the Trainer that count microbatches: where one is given, a microbatch is a step."""


def split_steps(run: Run, data: Any, kept: int | None = None) -> None:
    """Put a number in the place of `trainer.accumulate_grad_batches=auto` in the run's settings.

    Args:
        data: the data module, set up.
        kept: microbatches per step of the run that is resumed, whose position counts them.
    """
    trainer = run.settings["trainer"]
    if trainer["accumulate_grad_batches"] != AUTO:
        return
    counted = any(trainer[name] for name in COUNT_BATCHES)
    chosen = 1 if run.stage.online or counted or not isinstance(data, RowData) else choose(run, data)
    trainer["accumulate_grad_batches"] = kept or chosen


def choose(run: Run, data: RowData) -> int:
    """Return the fewest microbatches that are about as fast as larger ones (CPU), or that fit (accelerator)."""
    started = ranks()
    devices = started[1] if started is not None else ranks_asked(run.settings["trainer"])
    if devices is None:  # known after the Trainer is built
        return 1
    readers = max(devices // tensor_parallel_size(run.settings), 1)
    rows = data.rows["train"]
    tokens = np.full(data.batch_size, data.max_length) if data.windows is not None else np.asarray(rows.tokens)
    most = max(min(data.batch_size, len(tokens)) // readers, 1)
    if run.device == "cpu":
        return min(math.ceil(most * float(tokens.mean()) / tokens_per_pass(run.settings)), most)
    longest = np.sort(tokens)[::-1].cumsum()

    def fewest() -> str:
        limit = tokens_that_fit(run.settings, device_gb())
        return str(next((n for n in range(1, most) if longest[math.ceil(most / n) - 1] <= limit), most))

    # free memory differs between devices, and the steps of all ranks are split alike
    return int(of_first_rank("microbatches", fewest) if devices > 1 else fewest())


def tokens_per_pass(settings: dict[str, Any]) -> float:
    """Return the tokens of a forward pass beyond which a CPU gains little."""
    return max(CPU_TOKENS, CPU_BYTES / sum(bytes_per_token(layer_sizes(read_config(settings)), read_job(settings))))


def tokens_that_fit(settings: dict[str, Any], gigabytes: float) -> float:
    """Return the tokens of a forward pass that an accelerator has memory for, 0 or less where it has none."""
    shape, job = read_shape(settings), read_job(settings)
    parts = estimate(shape, replace(job, tokens=0))
    logits = parts.pop("logits")  # computed in chunks, whatever the number of tokens
    free, (saved, again) = room(gigabytes) * GB - sum(parts.values()), bytes_per_token(shape, job)
    return min((free - logits) / saved, free / (saved + again))
