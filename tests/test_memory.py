"""The memory of a training step, measured operation by operation, against what `plan=true` says."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lightning import DPO, SFT
from rlhf_lightning.models import completion
from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.attention import GROUP_SDPA
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.loading import _prepare
from rlhf_lightning.ops.groups import Group, GroupBatch, pack
from rlhf_lightning.ops.logprobs import token_logprobs
from rlhf_lightning.runtime import memory
from tests.helpers.memory import Live
from tests.modules.offline import sgd

LIMIT = 2**21
"""Logits at a time, for a test; 2^27 where it is not said otherwise."""


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "token_logprobs", partial(token_logprobs, max_logits=LIMIT))
    monkeypatch.setattr(memory, "MAX_LOGITS", LIMIT)


def load(vocabulary: int, hidden: int, intermediate: int, layers: int, checkpointing: bool) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    ))  # fmt: skip
    model.set_attn_implementation(GROUP_SDPA)
    return _prepare(model, checkpointing, False)


def batch_of(prompt: int, response: int) -> GroupBatch:
    return pack([Group(list(range(1, prompt + 1)), [list(range(1, response)), list(range(1, response + 1))])])


def measured(loss: Any, model: nn.Module) -> Live:
    """Return what the second microbatch of a step needs, beside the weights and the gradients of the first."""
    loss().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    with Live([*model.parameters(), *model.buffers(), *gradients]) as live:
        loss().backward()
    return live


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [None, {"r": 8}, {"r": 8, "quantization": "nf4"}], ids=["all", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plan_is_what_a_step_needs(adapter: dict[str, Any] | None, checkpointing: bool) -> None:
    """Peak of a microbatch in float32, within 15%; the largest tensor is a chunk of logits."""
    if adapter and "quantization" in adapter:
        pytest.importorskip("bitsandbytes")
    lm = load(4096, 192, 512, 4, checkpointing)
    parameters = sum(p.numel() for p in lm.parameters())
    model = CompletionModel(lm if adapter is None else add_lora(lm, **adapter))
    batch = batch_of(300, 300)
    live = measured(lambda: model(batch).logprobs.sum(), model)
    shape = memory.Shape(parameters, 0, hidden=192, intermediate=512, layers=4, key_values=192, vocabulary=4096)
    job = memory.Job(4, 4, tokens=batch.tokens, loss_tokens=599, checkpointing=checkpointing, lora=8 if adapter else 0)
    plan = memory.estimate(shape, job)
    assert live.largest <= 4 * LIMIT
    assert live.peak == pytest.approx(plan["activations"] + plan["logits"], rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_logits_are_never_whole(stage: str) -> None:
    """With the vocabulary of SmolLM2 and 400 response tokens the largest tensor is a chunk, 85 times smaller."""
    lm = load(49_152, 16, 32, 2, True)
    batch = batch_of(40, 200)
    module: Any = SFT(lambda: lm, sgd()) if stage != "dpo" else DPO(lambda: lm, sgd())
    module.configure_model()

    def loss() -> Tensor:
        if stage == "dpo":
            return module.losses(batch, "train").sum()
        output = module.policy(batch, 0.7, entropy=stage == "ppo")
        return output.logprobs.sum() + (0.01 * output.entropy.sum() if stage == "ppo" else 0.0)

    live = measured(loss, nn.ModuleList([module, *([module.reference.model] if stage == "dpo" else [])]))
    assert live.largest <= 4 * LIMIT
    assert 9 * 4 * LIMIT < 4 * 399 * 49_152
