"""What a run needs of each device, part by part, and what would make it fit; nothing is loaded and nothing is run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.loading import load_config, resolve_model
from rlhf_lightning.models.tiny import tiny_config
from rlhf_lightning.runtime import config
from rlhf_lightning.runtime.launch import ranks_asked

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOGITS = 2**27  # what token_logprobs holds at most
GB = 1e9


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide its memory."""

    parameters: int
    lora: int  # parameters that LoRA of rank 1 would add
    hidden: int
    intermediate: int
    layers: int
    key_values: int  # width of the keys of a token, all heads together
    vocabulary: int


@dataclass(frozen=True)
class Job:
    """What of a configuration decides memory; `tokens` and `counted` are those of one forward pass on one device."""

    weight_bytes: int
    activation_bytes: int
    tokens: int
    counted: int
    cached_tokens: int = 0
    lora: int = 0
    moments: int = 2
    checkpointing: bool = False
    shards: int = 1
    references: int = 0  # frozen copies of the policy
    rewards: int = 0  # reward models, about as large
    critic: bool = False


def estimate(shape: Shape, job: Job) -> dict[str, float]:
    """Return bytes a device needs, part by part.

    An activation is what plain PyTorch keeps of a Llama layer for the backward pass: about 13 D + 4 F numbers a token
    (norms, queries, keys, values and their output, gate, up, and their product), one D with recomputation.
    """
    trained = shape.lora * job.lora if job.lora else shape.parameters
    models = 2 if job.critic else 1
    layer = 13 * shape.hidden + 4 * shape.intermediate
    kept = (shape.hidden * shape.layers + layer) if job.checkpointing else layer * shape.layers
    chunk = min(job.counted, max(LOGITS // shape.vocabulary, 1)) if job.counted else 0
    return {
        "weights": models * shape.parameters * job.weight_bytes / job.shards,
        "gradients": models * trained * job.weight_bytes / job.shards,
        "optimizer": models * trained * job.weight_bytes * job.moments / job.shards,
        "frozen models": (job.references / job.shards + job.rewards) * shape.parameters * job.weight_bytes,
        "activations": job.tokens * kept * job.activation_bytes,
        "logits": 3 * chunk * shape.vocabulary * 4,
        "key-value cache": job.cached_tokens * 2 * shape.key_values * shape.layers * job.weight_bytes,
    }


def read_shape(settings: dict[str, Any]) -> Shape:
    """Return the sizes of the model of a configuration from its config file; no weights are read."""
    model = settings["model"]
    if settings["init_from"] or model["name"] != "tiny":
        name = resolve_model(str(settings["init_from"] or model["name"]), settings["paths"]["cache"])
        found: Any = load_config(name).get_text_config()
    else:
        found = tiny_config(**model["build"])
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(found)
    linear = [m for n, m in lm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    heads = found.num_attention_heads
    size = getattr(found, "head_dim", None) or found.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in lm.parameters()),
        lora=sum(m.in_features + m.out_features for m in linear),
        hidden=found.hidden_size, intermediate=getattr(found, "intermediate_size", 4 * found.hidden_size),
        layers=found.num_hidden_layers, key_values=(getattr(found, "num_key_value_heads", None) or heads) * size,
        vocabulary=found.vocab_size,
    )  # fmt: skip


def read_job(settings: dict[str, Any]) -> Job:
    """Return what the configuration asks for, with rows as long as data.max_length allows."""
    stage, data, trainer, load = settings["stage"], settings["data"], settings["trainer"], settings["model"]["load"]
    options, optimizer = settings[stage], settings["optimizer"]["_target_"].rpartition(".")[2]
    online = stage in ("ppo", "rloo", "grpo")
    ranks = ranks_asked(settings["trainer"]) or 1
    readers = max(ranks // together(settings), 1)
    rows = math.ceil(data["batch_size"] / (readers * trainer["accumulate_grad_batches"]))
    tokens = options["microbatch_tokens"] if online else rows * data["max_length"]
    weight = BYTES[load["dtype"]]
    lora = settings["adapter"]["r"] if settings["adapter"] else 0
    reference = not lora and (
        online or (stage == "dpo" and options["loss"] != "simpo" and options["reference"] != "cached")
    )
    rewards = settings["reward_from"] or []
    folders = [r for r in (rewards if isinstance(rewards, list) else [rewards]) if ":" not in str(r) and r != "world"]
    answers = data["batch_size"] // readers * options["samples"] if online else 0
    return Job(
        weight_bytes=weight,
        activation_bytes=2 if "16" in str(trainer["precision"]) else weight,
        tokens=tokens,
        counted=0 if stage == "reward" else tokens,
        cached_tokens=min(
            answers * (data["max_length"] + options["max_new_tokens"]), settings["sampler"]["batch_tokens"]
        )
        if online
        else 0,
        lora=lora,
        moments={"SGD": 0}.get(optimizer, 2),
        checkpointing=load["gradient_checkpointing"],
        shards=ranks if sharded(settings) else 1,
        references=int(reference),
        rewards=len(folders) if online else 0,
        critic=online and options.get("critic") == "reward",
    )


def sharded(settings: dict[str, Any]) -> bool:
    strategy = settings["strategy"]
    return isinstance(strategy, dict) and strategy["_target_"].endswith(".ShardedStrategy")


def together(settings: dict[str, Any]) -> int:
    """Return the number of devices that share every layer and read the same rows."""
    return int(settings["strategy"].get("tensor_parallel_size", 1)) if sharded(settings) else 1


def remedies(job: Job, settings: dict[str, Any]) -> list[tuple[str, Job]]:
    """Return changes that need less memory, the cheapest in time first, each on top of those before it."""
    ranks, found = (ranks_asked(settings["trainer"]) or 1), []
    online = settings["stage"] in ("ppo", "rloo", "grpo")
    rows = settings["data"]["batch_size"] // max(ranks // together(settings), 1)
    if not online and rows > 1:
        job = replace(
            job, tokens=settings["data"]["max_length"], counted=job.counted and settings["data"]["max_length"]
        )
        found.append((f"trainer.accumulate_grad_batches={rows}", job))
    if job.activation_bytes > 2:
        job = replace(job, activation_bytes=2)
        found.append(("trainer.precision=bf16-mixed", job))
    if ranks > 1 and job.shards == 1:
        job = replace(job, shards=ranks)
        found.append(("strategy=fsdp2", job))
    if not job.checkpointing:
        job = replace(job, checkpointing=True)
        found.append(("model.load.gradient_checkpointing=true", job))
    if not job.lora:
        job = replace(job, lora=8, references=0)
        found.append(("adapter=lora", job))
    return found


def run_plan(cfg: DictConfig) -> None:
    """Print what the run needs on each device, and which changes make it need less."""
    settings = config.plain(cfg)
    if settings["stage"] not in ("sft", "reward", "dpo", "ppo", "rloo", "grpo"):
        raise UserError(f"plan is for stages that train, not for stage={settings['stage']}")
    shape, job = read_shape(settings), read_job(settings)
    limit = float(settings["plan"]) if not isinstance(settings["plan"], bool) else device_gb()
    console = Console()
    parts = estimate(shape, job)
    table = Table(
        title=f"{settings['stage']}, {shape.parameters / 1e6:,.0f}M parameters: GB a device", show_header=False
    )
    for name, size in parts.items():
        if size:
            table.add_row(name, f"{size / GB:.2f}")
    total = sum(parts.values())
    table.add_section()
    table.add_row("together", f"{total / GB:.2f}", style="bold")
    console.print(table)
    console.print(
        f"rows count as {settings['data']['max_length']} tokens, the longest there can be; libraries take 1 GB more"
    )
    room = limit * 0.9 - 1
    fits = total / GB <= room
    console.print(
        f"a device has {limit:.0f} GB: this {'fits' if fits else 'may not fit'}", style="" if fits else "yellow"
    )
    if fits:
        return
    advice = Table(title="each with those above it")
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
