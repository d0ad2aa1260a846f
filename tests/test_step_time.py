"""`plan=true hardware=<device>`: the time of a step, against counted operations, closed forms and measured steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.loading import _prepare
from rlhf_lightning.runtime.memory import Job, Shape
from rlhf_lightning.runtime.settings import check_groups
from rlhf_lightning.runtime.step_time import (
    Hardware,
    Step,
    all_reduce_seconds,
    bounds,
    communication_seconds,
    decode_bytes,
    forward_flops,
    gather_seconds,
    passes,
    step_seconds,
)
from rlhf_lightning.stages import plan, sizes
from tests.helpers.compose import composed
from tests.helpers.models import tiny_config
from tests.test_plan import settings

UNIT = Hardware("unit", 1e-12, 1, 1e-9, 1e-9, 1e-9, mfu=1, mbu=1, link_efficiency=1)
"""One operation, one byte read and one byte sent per second."""


@cache
def hardware(name: str) -> Hardware:
    found = sizes.read_hardware(settings("stage=sft", f"hardware={name}", "plan=true"))
    assert found is not None
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tolerance"), [("full", 1e-3), ("checkpointing", 0.1), ("lora", 0.15)])
def test_operations_are_those_that_torch_counts(kind: str, tolerance: float) -> None:
    """Eager attention computes every pair.

    Checkpointing recomputes neither the head nor a layer's last product; with LoRA the first layer needs no gradient of
    its inputs.
    """
    tokens = 24
    config = tiny_config(
        vocab_size=64, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_key_value_heads=2
    )
    config._attn_implementation = "eager"
    lm: Any = LlamaForCausalLM(config).train()
    shape = replace(
        sizes.layer_sizes(config), layer_weights=sum(p.numel() for p in lm.model.layers.parameters() if p.ndim > 1)
    )
    if kind == "checkpointing":
        lm = _prepare(lm, gradient_checkpointing=True, compile=False)
    if kind == "lora":
        lm = add_lora(lm, r=1)
    forward = forward_flops(shape, tokens, tokens, tokens**2)
    with FlopCounterMode(display=False) as counter:
        logits = lm(input_ids=torch.arange(tokens)[None] % 60).logits
    assert counter.get_total_flops() == pytest.approx(forward, rel=0.05 if kind == "lora" else 1e-3)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    job = Job(4, 4, tokens, tokens, lora=int(kind == "lora"), checkpointing=kind == "checkpointing")
    assert counter.get_total_flops() == pytest.approx((passes(job) - 1) * forward, rel=tolerance)


def test_collectives_have_closed_forms() -> None:
    """Rings on one node; between nodes every device exchanges its eighth."""
    assert gather_seconds(100, 1, 1, UNIT) == 0
    assert gather_seconds(100, 4, 1, UNIT) == pytest.approx(75)
    assert all_reduce_seconds(100, 4, 1, UNIT) == pytest.approx(150)
    assert gather_seconds(100, 1, 4, UNIT) == pytest.approx(75)
    slow = replace(UNIT, inter_node_gb_s=1e-10, link_efficiency=0.5)
    assert gather_seconds(800, 8, 4, slow) == pytest.approx((7 / 8 * 800 + 3 / 4 * 100 / 0.1) / 0.5)


SHAPE = Shape(1000, 10, 4, 8, 2, 4, 5, queries=4, layer_weights=900)
JOB = Job(4, 4, 16, 16)


def test_every_strategy_sends_what_it_must() -> None:
    step = Step(32, 32, 64, microbatches=2, devices=4)
    assert communication_seconds(SHAPE, JOB, replace(step, devices=1), UNIT) == {}
    ddp = communication_seconds(SHAPE, JOB, step, UNIT)
    assert ddp == pytest.approx({"gradient all-reduce": 2 * 3 / 4 * 4000})  # once, whatever the microbatches
    lora = communication_seconds(SHAPE, replace(JOB, lora=3), step, UNIT)
    assert lora == pytest.approx({"gradient all-reduce": 2 * 3 / 4 * 4 * 30})
    sharded = communication_seconds(SHAPE, replace(JOB, shards=4), replace(step, forwards=1), UNIT)
    assert sharded == pytest.approx({
        "weight all-gather": 2 * 3 * 3 / 4 * 4000, "gradient reduce-scatter": 2 * 3 / 4 * 4000
    })  # fmt: skip
    half = communication_seconds(SHAPE, replace(JOB, activation_bytes=2, shards=4), step, UNIT)
    assert half["weight all-gather"] == pytest.approx(2 * 2 * 3 / 4 * (900 * 2 + 100 * 4))
    assert half["gradient reduce-scatter"] == sharded["gradient reduce-scatter"]
    tensor = communication_seconds(SHAPE, replace(JOB, shards=4), replace(step, tensor_parallel=4), UNIT)
    # 4 all-reduces of 32 tokens of width 4 in each of 2 layers
    assert tensor == pytest.approx({"activation all-reduce": 4 * 2 * 2 * 3 / 4 * 32 * 4 * 4})
    both = communication_seconds(SHAPE, replace(JOB, shards=4), replace(step, tensor_parallel=2), UNIT)
    assert both["activation all-reduce"] == pytest.approx(4 * 2 * 2 * 1 / 2 * 32 * 4 * 4)
    assert both["weight all-gather"] == pytest.approx(2 * 2 * 1 / 2 * 2000)


def test_sampling_reads_weights_and_cache_for_every_token() -> None:
    assert decode_bytes(SHAPE, JOB, 3, 10) == (900 + 20) * 4 + 3 * 10 * 2 * 4 * 2 * 4
    mixed = replace(JOB, activation_bytes=2)
    assert decode_bytes(SHAPE, mixed, 0, 0) == (900 + 20) * (4 + 2 + 2)
    assert decode_bytes(SHAPE, replace(mixed, shards=2), 0, 0) == (900 + 20) * 2
    step = Step(
        120, 100, 0, sequences=10, prompts=5, prompt_tokens=4, new_tokens=10, decode_batches=2, devices=2, forwards=2
    )
    parts = step_seconds(SHAPE, replace(JOB, shards=2), step, UNIT)
    assert parts["decoding"] == 2 * 10 * decode_bytes(SHAPE, JOB, 5, 9)
    assert parts["prefill"] == forward_flops(SHAPE, 20, 5, 5 * 8)
    assert parts["weight all-gather of sampling"] == pytest.approx(2 * 10 * 2000)
    once = communication_seconds(SHAPE, replace(JOB, shards=2), replace(step, gather_sampling=True), UNIT)
    assert once["weight all-gather of sampling"] == pytest.approx(2000)
    assert parts["forward of frozen models and log-probs"] == 2 * forward_flops(SHAPE, 120, 100, 0)
    least, most = bounds(parts)
    assert most == sum(parts.values())
    hidden = parts["weight all-gather"] + parts["gradient reduce-scatter"]
    assert least == pytest.approx(most - min(hidden, 5 * forward_flops(SHAPE, 120, 100, 0)))


# ---- measured steps ------------------------------------------------------------------------------------------------

LAYER = 2 * 2048 * 2048 + 2 * 2048 * 1024 + 3 * 2048 * 5632
ONE_B = Shape(1_078_020_096, 0, 2048, 5632, 20, 1024, 32_768, queries=2048, layer_weights=20 * LAYER)
PAIRS = 14 * (1536**2 / 2 + 2 * 256 * (1536 + 128))


def rollout(prompts: int, n: int, prompt: int, new: int, epochs: int) -> Step:
    return Step(
        prompts * (prompt + n * new), prompts * n * new, prompts * (prompt**2 / 2 + n * new * (prompt + new / 2)),
        epochs=epochs, updates=epochs, forwards=2, sequences=prompts * n, prompts=prompts, prompt_tokens=prompt,
        new_tokens=new,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "measured", "low", "high"),
    [
        (Step(28_672, 28_672, 14 * 2048**2 / 2), 0.646, 0.96, 1.04),  # SFT, from which the share of the peak is
        (Step(28_672, 0, PAIRS), 0.579, 0.98, 1.10),  # reward model
        (Step(28_672, 7_168, PAIRS, forwards=1), 0.785, 0.98, 1.10),  # DPO
        (rollout(16, 8, 256, 128, 1), 2.12, 0.75, 1.05),  # GRPO
        (rollout(64, 1, 256, 128, 4), 3.67, 0.80, 1.05),  # PPO
    ],
)
def test_steps_of_an_h200_are_computed(step: Step, measured: float, low: float, high: float) -> None:
    """docs/benchmarks.md, with the shares of the peak that conf/hardware ships."""
    seconds = bounds(step_seconds(ONE_B, Job(4, 2, 28_672, 28_672), step, hardware("h200")))[1]
    assert low < seconds / measured < high


@pytest.mark.slow
def test_sampling_on_an_h200_is_computed() -> None:
    """9,507 tokens per second, from which the share of the memory bandwidth is; 56% and 28% of GRPO and PPO."""
    for step, measured, off in (
        (rollout(64, 1, 128, 128, 1), 64 * 128 / 9507, 0.05),
        (rollout(16, 8, 256, 128, 1), 0.56 * 2.12, 0.2),
        (rollout(64, 1, 256, 128, 4), 0.28 * 3.67, 0.2),
    ):
        parts = step_seconds(ONE_B, Job(4, 2, 28_672, 28_672), step, hardware("h200"))
        assert parts["prefill"] + parts["decoding"] == pytest.approx(measured, rel=off)


def mpt(hidden: int, layers: int) -> Shape:
    weights = 12 * hidden**2 * layers
    return Shape(
        weights + 50_368 * hidden, 0, hidden, 4 * hidden, layers, hidden, 50_368, queries=hidden, layer_weights=weights
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "layers", "length", "devices", "rows", "microbatches", "checkpointing", "published"),
    [
        (4096, 32, 2048, 8, 6, 1, False, 10_643),  # 7b, from which the share of the peak is
        (2048, 24, 2048, 8, 14, 1, False, 45_455),  # 1b
        (2048, 24, 512, 8, 56, 4, False, 52_275),
        (2048, 24, 2048, 64, 20, 1, False, 44_402),
        (2560, 32, 2048, 64, 6, 3, False, 22_525),  # 3b
        (4096, 32, 8192, 8, 8, 2, True, 6_935),
        (5120, 40, 2048, 8, 2, 1, False, 4_792),  # 13b
        (5120, 40, 2048, 64, 2, 1, False, 4_800),
        (7168, 48, 2048, 8, 3, 21, True, 2_002),  # 30b
        (7168, 48, 2048, 32, 14, 3, True, 2_308),
        (8192, 80, 2048, 32, 2, 16, True, 882),  # 70b
        (8192, 80, 2048, 64, 8, 4, True, 1_039),
    ],
)
def test_published_rates_of_h100s_are_computed(
    hidden: int, layers: int, length: int, devices: int, rows: int, microbatches: int, checkpointing: bool,
    published: float,
) -> None:  # fmt: skip
    """Tokens per second and device of llm-foundry's FSDP in bfloat16 (scripts/train/benchmarking), within a fifth."""
    tokens = rows * microbatches * length
    job = Job(2, 2, rows * length, rows * length, checkpointing=checkpointing, shards=devices)
    step = Step(tokens, tokens, tokens * length / 2, microbatches=microbatches, devices=8, nodes=devices // 8)
    least, _ = bounds(step_seconds(mpt(hidden, layers), job, step, replace(hardware("h100"), mfu=0.45)))
    assert tokens / least == pytest.approx(published, rel=0.22)


# ---- from a configuration ------------------------------------------------------------------------------------------


def step_of(*overrides: str) -> tuple[Job, Step]:
    given = settings(*overrides)
    job = sizes.read_job(given)
    return job, sizes.read_step(given, job)


@pytest.mark.slow
def test_a_step_is_that_of_the_configuration(tmp_path: Path) -> None:
    rows = ["data.max_length=100", "data.batch_size=32"]
    nodes = ["trainer.devices=4", "trainer.num_nodes=2", "strategy=ddp"]
    _, sft = step_of("stage=sft", *rows, *nodes, "trainer.accumulate_grad_batches=2")
    assert sft == Step(400, 400, 400 * 50, microbatches=2, devices=4, nodes=2)
    assert step_of("stage=reward", *rows)[1].loss_tokens == 0
    for forwards, given in (
        (1, ["dpo.reference=live"]), (1, ["adapter=lora"]), (0, ["dpo.reference=cached"]), (0, ["dpo.loss=simpo"])
    ):  # fmt: skip
        assert step_of("stage=dpo", *rows, *given)[1].forwards == forwards
    _, tensor = step_of("stage=sft", *rows, "trainer.devices=4", "strategy=tensor_parallel")
    assert (tensor.tokens, tensor.tensor_parallel) == (3200, 4)
    options = ["ppo.num_generations=2", "ppo.max_new_tokens=50", "ppo.num_minibatches=2", "ppo.microbatch_tokens=500"]
    _, ppo = step_of("stage=ppo", "reward_from=world", *rows, *options, "sampler.batch_tokens=4800")
    assert ppo == Step(
        6400, 3200, 32 * (5000 + 2 * 50 * 125), microbatches=13, epochs=4, updates=8, forwards=2, sequences=64,
        prompts=32, prompt_tokens=100, new_tokens=50, decode_batches=2,
    )  # fmt: skip
    server = settings("stage=grpo", "reward_from=world", *rows)
    del server["sampler"]["batch_tokens"]  # as that of a server
    elsewhere = sizes.read_step(server, sizes.read_job(settings("stage=grpo", "reward_from=world", *rows)))
    assert (elsewhere.sequences, elsewhere.prompts, elsewhere.decode_batches) == (0, 0, 1)
    critic = step_of("stage=ppo", f"reward_from={tmp_path}", "ppo.critic=reward", *rows)[1]
    assert critic.forwards == 4  # of the rollout, the reference, the critic and the reward model


@pytest.mark.slow
def test_what_hardware_cannot_be_is_refused() -> None:
    for given, match in (
        (["trainer.devices=auto"], "trainer.devices=auto depends on the machine"),
        (["trainer.devices=8", "strategy=tensor_parallel", "strategy.tensor_parallel_size=3"], "3 does not divide 8"),
    ):
        with pytest.raises(UserError, match=match):
            step_of("stage=sft", *given)
    with pytest.raises(UserError, match="add plan=true"):
        check_groups(composed("stage=sft", "hardware=h100"))
    with pytest.raises(UserError, match=r"hardware\.mfu=1\.5 is not a finite number in \(0, 1\]"):
        sizes.read_hardware(settings("stage=sft", "hardware=h100", "hardware.mfu=1.5", "plan=true"))
    with pytest.raises(UserError, match=r"hardware\.tflops=fast is not a finite number"):
        sizes.read_hardware(settings("stage=sft", "hardware=h100", "hardware.tflops=fast", "plan=true"))
    given = settings("stage=sft", "hardware=h100", "plan=true")
    del given["hardware"]["mbu"]
    with pytest.raises(UserError, match=r"hardware\.mbu is missing"):
        sizes.read_hardware(given)
    with pytest.raises(UserError, match=r"hardware\.mfus is not one of .*Did you mean 'mfu'"):
        sizes.read_hardware(settings("stage=sft", "hardware=h100", "+hardware.mfus=1", "plan=true"))
    with pytest.raises(UserError, match=r"set hardware\.memory_gb"):
        plan.run_plan(OmegaConf.create(settings("stage=sft", "hardware=h100", "plan=80")))


@pytest.mark.slow
def test_the_plan_prints_the_time_of_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    """An eighth of the bandwidth takes eight times as long."""
    many = ["trainer.devices=8", "trainer.num_nodes=2", "strategy=ddp", "plan=true", "hardware=h100"]
    found = []
    for bandwidth in (50, 6.25):
        given = settings(
            "stage=grpo",
            "reward_from=world",
            *many,
            f"hardware.inter_node_gb_s={bandwidth}",
            "hardware.intra_node_gb_s=1e6",
        )
        plan.run_plan(OmegaConf.create(given))
        printed = capsys.readouterr().out
        assert "seconds per step on 16 h100 (2 x 8)" in printed
        assert "a device has 80 GB: this fits" in printed
        assert "decoding" in printed
        found.append(float(next(line for line in printed.splitlines() if "all-reduce" in line).split("│")[2]))
    assert found[1] / found[0] == pytest.approx(8, rel=0.01)
