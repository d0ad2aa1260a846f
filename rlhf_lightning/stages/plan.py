"""`plan=true`: the memory a run needs per device, and changes that make it fit; nothing is loaded or run."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.loading import load_config
from rlhf_lightning.models.tiny import tiny_config
from rlhf_lightning.rewards.spec import parse
from rlhf_lightning.runtime.launch import ranks_asked
from rlhf_lightning.runtime.memory import BYTES, GB, Job, Shape, estimate
from rlhf_lightning.runtime.run import starting_point
from rlhf_lightning.runtime.settings import to_container
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages.online import critic_candidate


def read_shape(settings: dict[str, Any]) -> Shape:
    """Return the sizes of the model of a configuration from its config file or GGUF header; no weights are read."""
    name = starting_point(settings, convert=False)
    config: Any = load_config(name).get_text_config() if name else tiny_config(**settings["model"]["build"])
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in lm.parameters())
        adapter = settings["adapter"] or {}
        given = {key: adapter[key] for key in ("target_modules", "modules_to_save") if key in adapter}
        adapted = list(add_lora(lm, r=1, **given).named_parameters())
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=parameters,
        lora=sum(p.numel() for name, p in adapted if ".lora_" in name),
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
        layers=config.num_hidden_layers,
        key_values=(getattr(config, "num_key_value_heads", None) or heads) * size,
        vocabulary=config.vocab_size,
        whole=sum(p.numel() for name, p in adapted if ".modules_to_save." in name),
    )


def read_job(settings: dict[str, Any]) -> Job:
    """Return what the configuration asks for, with rows of data.max_length tokens."""
    stage, data, trainer, load = (
        STAGES[settings["stage"]],
        settings["data"],
        settings["trainer"],
        settings["model"]["load"],
    )
    options, optimizer = settings[stage.name], settings["optimizer"]["_target_"].rpartition(".")[2]
    ranks = ranks_asked(trainer) or 1
    readers = max(ranks // tensor_parallel_size(settings), 1)
    rows = math.ceil(data["batch_size"] / (readers * trainer["accumulate_grad_batches"]))
    tokens = options["microbatch_tokens"] if stage.online else rows * data["max_length"]
    weight = BYTES[load["dtype"]]
    lora = settings["adapter"]["r"] if settings["adapter"] else 0
    live = "reference" in options and options["loss"] != "simpo" and options["reference"] != "cached"
    models = [reward for reward in parse(settings["reward_from"]) if reward.is_model] if stage.online else []
    cached = 0
    if stage.online:
        responses = data["batch_size"] // readers * options["num_generations"]
        longest = data["max_length"] + options["max_new_tokens"]
        cached = min(responses * longest, settings["sampler"]["batch_tokens"])
    return Job(
        weight_bytes=weight,
        activation_bytes=2 if "16" in str(trainer["precision"]) else weight,
        tokens=tokens,
        loss_tokens=tokens if stage.generative else 0,
        cached_tokens=cached,
        lora=lora,
        moments={"SGD": 0}.get(optimizer, 2),
        checkpointing=load["gradient_checkpointing"],
        shards=ranks if sharded(settings) else 1,
        references=int((stage.online or live) and not lora),
        rewards=len(models),
        critic=stage.online and critic_candidate(settings) is not None,
    )


def sharded(settings: dict[str, Any]) -> bool:
    """Return whether the strategy shards the model."""
    strategy = settings["strategy"]
    return isinstance(strategy, dict) and strategy["_target_"].endswith(".ShardedStrategy")


def tensor_parallel_size(settings: dict[str, Any]) -> int:
    """Return the number of devices that share every layer and read the same rows."""
    return int(settings["strategy"].get("tensor_parallel_size", 1)) if sharded(settings) else 1


def remedies(job: Job, settings: dict[str, Any]) -> list[tuple[str, Job]]:
    """Return changes that need less memory, the cheapest in time first, each on top of those before it."""
    ranks, changes = (ranks_asked(settings["trainer"]) or 1), []
    rows = settings["data"]["batch_size"] // max(ranks // tensor_parallel_size(settings), 1)
    if not STAGES[settings["stage"]].online and rows > 1:
        longest = settings["data"]["max_length"]
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
    if not job.lora:
        job = replace(job, lora=8, references=0, critic=False)
        changes.append(("adapter=lora", job))
    return changes


def run_plan(cfg: DictConfig) -> None:
    """Print the memory the run needs per device, and changes that reduce it."""
    settings = to_container(cfg)
    if not STAGES[settings["stage"]].trains:
        raise UserError(f"plan is for stages that train, not for stage={settings['stage']}")
    shape, job = read_shape(settings), read_job(settings)
    limit = float(settings["plan"]) if not isinstance(settings["plan"], bool) else device_gb()
    console = Console()
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
    console.print(
        f"rows are counted with {settings['data']['max_length']} tokens, the maximum; libraries need 1 GB more"
    )
    room = limit * 0.9 - 1
    fits = total / GB <= room
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
        advice.add_row(change, f"{size:.2f}", "fits" if size <= room else "")
    console.print(advice)


def device_gb() -> float:
    """Return the memory of the first accelerator, else of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
