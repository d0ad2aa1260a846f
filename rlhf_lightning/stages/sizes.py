"""What of a configuration decides memory: the sizes of its model, what a step computes, and the device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.models.adapters import add_lora, quantizable
from rlhf_lightning.models.layers import decoder_layers
from rlhf_lightning.models.loading import load_config
from rlhf_lightning.models.tiny import tiny_config
from rlhf_lightning.rewards.spec import parse
from rlhf_lightning.runtime.launch import ranks_asked
from rlhf_lightning.runtime.memory import AUTO, BYTES, GB, Job, Shape
from rlhf_lightning.runtime.run import starting_point
from rlhf_lightning.runtime.step_time import Hardware, Step
from rlhf_lightning.stages import STAGES
from rlhf_lightning.stages.critic import critic_candidate

MOMENTS: dict[str, Callable[[dict[str, Any], int], float]] = {
    "SGD": lambda options, weight: int(bool(options.get("momentum"))),
    "RMSprop": lambda options, weight: 1 + bool(options.get("momentum")) + bool(options.get("centered")),
    "AdamW8bit": lambda options, weight: 2 / weight,
}
"""Optimizer -> numbers of the size of a weight that it keeps for each; Adam and what is not here keep two."""


def read_config(settings: dict[str, Any]) -> Any:
    """Return the decoder's config of a configuration's model, from its config file or GGUF header."""
    name = starting_point(settings, convert=False)
    dropout = settings["model"]["load"]["dropout"]
    return load_config(name, dropout).get_text_config() if name else tiny_config(**settings["model"]["build"])


def has_experts(settings: dict[str, Any]) -> bool:
    """Return whether the model is a mixture of experts."""
    config = read_config(settings)
    return any(getattr(config, key, None) for key in ("num_local_experts", "num_experts", "n_routed_experts"))


def read_shape(settings: dict[str, Any]) -> Shape:
    """Return the sizes of the model of a configuration; no weights are read."""
    config = read_config(settings)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
        parameters = sum(p.numel() for p in lm.parameters())
        matrices = sum(p.numel() for layer in decoder_layers(lm) for p in layer.parameters() if p.ndim > 1)
        adapter = settings["adapter"] or {}
        linear = sum(layer.weight.numel() for layer in quantizable(lm, adapter.get("modules_to_save") or ()).values())
        given = {key: adapter[key] for key in ("target_modules", "modules_to_save") if key in adapter}
        adapted = list(add_lora(lm, r=1, **given).named_parameters())
    return replace(
        layer_sizes(config),
        parameters=parameters,
        layer_weights=matrices,
        lora=sum(p.numel() for name, p in adapted if ".lora_" in name),
        whole=sum(p.numel() for name, p in adapted if ".modules_to_save." in name),
        linear=linear,
    )


def layer_sizes(config: Any) -> Shape:
    """Return the sizes that a config says, without the number of parameters."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=0,
        lora=0,
        hidden=config.hidden_size,
        intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
        layers=config.num_hidden_layers,
        key_values=(getattr(config, "num_key_value_heads", None) or heads) * size,
        vocabulary=config.vocab_size,
        queries=heads * size,
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
    given = trainer["accumulate_grad_batches"]
    rows = math.ceil(data["batch_size"] / (readers * (given if given != AUTO else 1)))
    tokens = options["microbatch_tokens"] if stage.online else rows * data["max_length"]
    weight = BYTES[load["dtype"]]
    lora = settings["adapter"]["r"] if settings["adapter"] else 0
    models = [reward for reward in parse(settings["reward_from"]) if reward.is_model] if stage.online else []
    cached = 0
    if stage.online:
        responses = data["batch_size"] // readers * options["num_generations"]
        longest = data["max_length"] + options["max_new_tokens"]
        cached = min(responses * longest, settings["sampler"].get("batch_tokens", 0))  # 0: it samples elsewhere
    return Job(
        weight_bytes=weight,
        activation_bytes=2 if "16" in str(trainer["precision"]) else weight,
        tokens=tokens,
        loss_tokens=tokens if stage.generative else 0,
        cached_tokens=cached,
        lora=lora,
        moments=MOMENTS.get(optimizer, lambda options, weight: 2)(settings["optimizer"], weight),
        checkpointing=load["gradient_checkpointing"],
        shards=ranks if sharded(settings) else 1,
        references=int((stage.online or reads_reference(options)) and not lora),
        rewards=len(models),
        critic=stage.online and critic_candidate(settings) is not None,
        four_bit=bool(settings["adapter"] and settings["adapter"]["quantization"]),
        offload=stage.online and options["offload"],
        gathered=stage.online and sharded(settings) and bool(settings["strategy"].get("gather_sampling")),
    )


def reads_reference(options: dict[str, Any]) -> bool:
    """Return whether a step of DPO with these options computes log-probabilities under the reference."""
    return "reference" in options and options["loss"] != "simpo" and options["reference"] != "cached"


def read_step(settings: dict[str, Any], job: Job) -> Step:
    """Return what a device computes in a step, with rows, prompts and responses of the maximum lengths.

    Raises:
        UserError: a number of devices that depends on the machine, or that tensor parallelism does not divide.
    """
    stage, data, trainer = STAGES[settings["stage"]], settings["data"], settings["trainer"]
    options, size = settings[stage.name], tensor_parallel_size(settings)
    ranks, longest = ranks_asked(trainer), data["max_length"]
    if ranks is None:
        raise UserError(f"trainer.devices={trainer['devices']} depends on the machine; hardware= plans for a number")
    if ranks % size:
        raise UserError(f"strategy.tensor_parallel_size={size} does not divide {ranks} devices")
    rows = math.ceil(data["batch_size"] * size / ranks)
    where = {"devices": ranks // trainer["num_nodes"], "nodes": trainer["num_nodes"], "tensor_parallel": size}
    if not stage.online:
        tokens = rows * longest
        return Step(
            tokens, tokens * stage.generative, tokens * longest / 2, math.ceil(tokens / job.tokens),
            forwards=int(reads_reference(options)), **where,
        )  # fmt: skip
    new, n = options["max_new_tokens"], options["num_generations"]
    tokens, epochs = rows * (longest + n * new), options.get("ppo_epochs", 1)
    batch_tokens = settings["sampler"].get("batch_tokens")  # none where another process samples
    return Step(
        tokens,
        rows * n * new,
        rows * (longest**2 / 2 + n * new * (longest + new / 2)),
        math.ceil(tokens / job.tokens),
        epochs=epochs,
        updates=epochs * options.get("num_minibatches", 1),
        forwards=2 + job.critic + job.rewards,  # log-probs of the rollout and of the reference
        sequences=rows * n if batch_tokens else 0,
        prompts=rows if batch_tokens else 0,
        prompt_tokens=longest,
        new_tokens=new,
        decode_batches=math.ceil(rows * n * (longest + new) / batch_tokens) if batch_tokens else 1,
        gather_sampling=sharded(settings) and settings["strategy"].get("gather_sampling", False),
        **where,
    )


def read_hardware(settings: dict[str, Any]) -> Hardware | None:
    """Return the device that is planned for, None without `hardware`.

    Raises:
        UserError: a figure that is missing, unknown, or no number in its range.
    """
    given = settings["hardware"]
    if not given:
        return None
    names = [field.name for field in fields(Hardware)]
    for key in set(given) ^ set(names):
        state = "missing" if key in names else f"not one of {', '.join(names)}"
        raise UserError(f"hardware.{key} is {state}.{'' if key in names else nearest(key, names)}")
    for key, value in given.items():
        if key != "name":
            check_number(f"hardware.{key}", value, "(0, 1]" if key in ("mfu", "mbu", "link_efficiency") else "(0, inf)")
    return Hardware(**given)


def sharded(settings: dict[str, Any]) -> bool:
    """Return whether the strategy shards the model."""
    strategy = settings["strategy"]
    return isinstance(strategy, dict) and strategy["_target_"].endswith(".ShardedStrategy")


def tensor_parallel_size(settings: dict[str, Any]) -> int:
    """Return the number of devices that share every layer and read the same rows."""
    return int(settings["strategy"].get("tensor_parallel_size", 1)) if sharded(settings) else 1


def room(gigabytes: float) -> float:
    """Return the GB of a device that a run may fill: libraries need one, and allocation leaves gaps."""
    return gigabytes * 0.9 - 1


def device_gb() -> float:
    """Return the memory of an accelerator that no process uses, else the memory of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))[0] / GB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
