"""`plan=true`: the memory a run needs per device, and changes that make it fit; nothing is loaded or run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlhf_lightning.errors import UserError
from rlhf_lightning.runtime.launch import ranks_asked
from rlhf_lightning.runtime.memory import AUTO, GB, Job, Shape, estimate
from rlhf_lightning.runtime.settings import to_container
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages.sizes import device_gb, read_job, read_shape, room, tensor_parallel_size


def rows_per_device(settings: dict[str, Any]) -> int:
    """Return the rows of a step that a device reads."""
    ranks = ranks_asked(settings["trainer"]) or 1
    return max(settings["data"]["batch_size"] // max(ranks // tensor_parallel_size(settings), 1), 1)


def split(shape: Shape, job: Job, settings: dict[str, Any], available: float) -> tuple[int, Job]:
    """Return the fewest microbatches with which rows of data.max_length tokens fit `available` GB, and one of them."""
    rows, longest, parts = rows_per_device(settings), settings["data"]["max_length"], 1
    for parts in range(1, rows + 1):
        tokens = math.ceil(rows / parts) * longest
        job = replace(job, tokens=tokens, loss_tokens=job.loss_tokens and tokens)
        if sum(estimate(shape, job).values()) / GB <= available:
            break
    return parts, job


def remedies(job: Job, settings: dict[str, Any]) -> list[tuple[str, Job]]:
    """Return changes that need less memory, the cheapest in time first, each on top of those before it."""
    ranks, changes = (ranks_asked(settings["trainer"]) or 1), []
    rows, longest = rows_per_device(settings), settings["data"]["max_length"]
    if not STAGES[settings["stage"]].online and job.tokens > longest:
        job = replace(job, tokens=longest, loss_tokens=job.loss_tokens and longest)
        changes.append((f"trainer.accumulate_grad_batches={rows}", job))
    if job.activation_bytes > 2:
        job = replace(job, activation_bytes=2)
        changes.append(("trainer.precision=bf16-mixed", job))
    if ranks > 1 and job.shards == 1:
        job = replace(job, shards=ranks)
        changes.append(("strategy=fsdp2", job))
    if not job.checkpointing:
        job = replace(job, checkpointing=True)
        changes.append(("model.load.gradient_checkpointing=true", job))
    if job.rewards and job.shards == 1 and not job.offload:
        job = replace(job, offload=True)
        changes.append((f"{settings['stage']}.offload=true", job))
    if not job.lora:
        job = replace(job, lora=8, references=0, critic=False)
        changes.append(("adapter=lora", job))
    if not job.four_bit and job.shards == 1:
        job = replace(job, four_bit=True)
        changes.append(("adapter=qlora", job))
    return changes


def run_plan(cfg: DictConfig) -> None:
    """Print the memory the run needs per device, and changes that reduce it."""
    settings = to_container(cfg)
    if not STAGES[settings["stage"]].trains:
        raise UserError(f"plan is for stages that train, not for stage={settings['stage']}")
    shape, job = read_shape(settings), read_job(settings)
    limit = float(settings["plan"]) if not isinstance(settings["plan"], bool) else device_gb()
    console, available = Console(), room(limit)
    if not STAGES[settings["stage"]].online and settings["trainer"]["accumulate_grad_batches"] == AUTO:
        microbatches, job = split(shape, job, settings, available)
        console.print(f"trainer.accumulate_grad_batches=auto: a step is split into {microbatches} or more microbatches")
    parts = estimate(shape, job)
    table = Table(
        title=f"{settings['stage']}, {shape.parameters / 1e6:,.0f}M parameters: GB per device", show_header=False
    )
    for name, size in parts.items():
        if size:
            table.add_row(name, f"{size / GB:.2f}")
    total = sum(parts.values())
    table.add_section()
    table.add_row("total", f"{total / GB:.2f}", style="bold")
    console.print(table)
    if job.offload:
        console.print(f"{settings['stage']}.offload=true: the parts of the phase of an iteration that needs most")
    console.print(
        f"rows are counted with {settings['data']['max_length']} tokens, the maximum; libraries need 1 GB more"
    )
    fits = total / GB <= available
    console.print(
        f"a device has {limit:.0f} GB: this {'fits' if fits else 'may not fit'}", style="" if fits else "yellow"
    )
    if fits:
        return
    advice = Table(title="changes, each with those above it")
    for name in ("change", "GB", ""):
        advice.add_column(name)
    for change, less in remedies(job, settings):
        size = sum(estimate(shape, less).values()) / GB
        advice.add_row(change, f"{size:.2f}", "fits" if size <= available else "")
    console.print(advice)
