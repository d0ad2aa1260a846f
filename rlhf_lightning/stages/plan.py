"""`plan=true`: the memory a run needs per device, changes that make it fit, and the time of a step on `hardware=`.

Nothing is loaded or run.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.attention import PATHS, possible_paths
from rlhf_lightning.models.layers import BUCKET
from rlhf_lightning.runtime.launch import ranks_asked
from rlhf_lightning.runtime.memory import AUTO, GB, Job, Shape, estimate
from rlhf_lightning.runtime.settings import to_container
from rlhf_lightning.runtime.step_time import Hardware, Step, bounds, step_seconds
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages.sizes import (
    device_gb,
    has_experts,
    read_config,
    read_hardware,
    read_job,
    read_shape,
    read_step,
    room,
    tensor_parallel_size,
)


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


def attention(settings: dict[str, Any], hardware: bool = False) -> str:
    """Return the attention paths that a run tries in turn, on an accelerator with `hardware`."""
    load, trainer = settings["model"]["load"], settings["trainer"]
    if load["attn_implementation"] != "sdpa":
        return f"as attn_implementation={load['attn_implementation']} allows: a dense mask, or padded rows"
    asked, precision = str(trainer["accelerator"]), str(trainer["precision"])
    cuda = hardware or asked in ("gpu", "cuda") or (asked == "auto" and torch.cuda.is_available())
    half = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else None
    device = "cuda" if cuda else "cpu" if asked == "auto" else asked
    paths = possible_paths(read_config(settings), device, half or getattr(torch, load["dtype"]))
    return ", else ".join(PATHS[path] for path in paths) + "; the run tries which is right, else rows are padded"


def figure(value: float) -> str:
    """Return a positive number with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def time_table(shape: Shape, job: Job, step: Step, hardware: Hardware) -> Table:
    """Return the seconds of a step by part, and the step with its collectives hidden and not."""
    parts = step_seconds(shape, job, step, hardware)
    least, most = bounds(parts)
    devices = step.devices * step.nodes
    table = Table(title=f"seconds per step on {devices} {hardware.name} ({step.nodes} x {step.devices})")
    table.add_column("part")
    table.add_column("seconds", justify="right")
    for name, seconds in parts.items():
        if seconds:
            table.add_row(name, figure(seconds))
    table.add_section()
    rates = (step.tokens / (seconds * step.tensor_parallel) for seconds in (most, least))
    for name, both in (("step", (least, most)), ("tokens per second and device", rates)):
        table.add_row(name, " to ".join(dict.fromkeys(map(figure, both))), style="bold" if name == "step" else None)
    return table


def run_plan(cfg: DictConfig) -> None:
    """Print the memory the run needs per device, changes that reduce it, and the time of a step."""
    settings = to_container(cfg)
    if not STAGES[settings["stage"]].trains:
        raise UserError(f"plan is for stages that train, not for stage={settings['stage']}")
    shape, job = read_shape(settings), read_job(settings)
    hardware = read_hardware(settings)
    if hardware and not isinstance(settings["plan"], bool):
        raise UserError(f"plan={settings['plan']} is for this machine's device; with hardware= set hardware.memory_gb")
    limit = hardware.memory_gb if hardware else device_gb()
    limit = limit if isinstance(settings["plan"], bool) else float(settings["plan"])
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
    if STAGES[settings["stage"]].online and not job.cached_tokens:
        engine = settings["sampler"]["_target_"].rpartition(".")[2]
        console.print(f"responses are generated by {engine}: what a server needs on this device is not counted")
    if settings["model"]["load"]["compile"]:
        console.print(f"decoder layers are compiled: rows are filled up to a multiple of {BUCKET} tokens")
    console.print(f"attention: {attention(settings, hardware is not None)}", soft_wrap=True)
    fits = total / GB <= available
    console.print(
        f"a device has {limit:.0f} GB: this {'fits' if fits else 'may not fit'}", style="" if fits else "yellow"
    )
    if not fits:
        advice = Table(title="changes, each with those above it")
        for name in ("change", "GB", ""):
            advice.add_column(name)
        for change, less in remedies(job, settings):
            size = sum(estimate(shape, less).values()) / GB
            advice.add_row(change, f"{size:.2f}", "fits" if size <= available else "")
        console.print(advice)
    if hardware and has_experts(settings):
        console.print("the time is not estimated: the model is a mixture of experts, of which a token reads a few")
    elif hardware:
        console.print(time_table(shape, job, read_step(settings, job), hardware))
        console.print("of two figures the first hides collectives behind the forward and backward passes")
