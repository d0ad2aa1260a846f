"""Packed completion groups are the plain computation: the loss and every gradient, for K = 1, 2, 4, 9.

The plain computation is one unpadded Hugging Face forward pass a response. In float64 both agree to 1e-9; Hugging
Face's RMSNorm computes in float32 whatever the model is, so it is replaced here by the same formula in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from rlhf_lightning.models.adapters import add_lora
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.ops.groups import Group, GroupBatch, pack
from rlhf_lightning.ops.logprobs import sequence_sum
from rlhf_lightning.ops.ranking import pairwise_ranking
from tests.helpers.plain import exact, gradients, plain_logprobs, same

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "num_labels": 1}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0, "num_labels": 1}
PACKED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen3": Qwen3Config(**SMALL),
    "gemma3": Gemma3TextConfig(**SMALL, layer_types=["full_attention", "full_attention"]),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, **NO_DROPOUT),
    "mistral": MistralConfig(**SMALL, sliding_window=None),
}
PADDED: dict[str, PretrainedConfig] = {  # Hugging Face's sdpa does not apply their windows to a mask of ours
    "gemma3 window": Gemma3TextConfig(**SMALL, sliding_window=4),
    "mistral window": MistralConfig(**SMALL, sliding_window=4),
}
EVERY = PACKED | PADDED
CASES = [
    # neither knows of the other: every K without LoRA, and LoRA at one K
    pytest.param(
        k, lora, id=f"{k}-{'lora' if lora else 'full'}", marks=[pytest.mark.nightly] if lora and k != 2 else []
    )
    for k in (1, 2, 4, 9)
    for lora in (False, True)
]


def groups_of(k: int) -> list[Group]:
    """Three groups with k responses each, all lengths unequal, and one token that does not count."""
    made, token = [], 3
    for g in range(3):
        sizes = [2 + g, *(1 + (5 * i + 3 * g) % 7 for i in range(k))]
        runs = []
        for size in sizes:
            runs.append([3 + (token + 7 * i) % 61 for i in range(size)])
            token += 11
        counted = [[i > 0 or len(y) == 1 for i in range(len(y))] for y in runs[1:]] if g == 1 else None
        made.append(Group(runs[0], runs[1:], counted, label=0.8 if g == 0 else 1.0, margin=0.3 * g))
    return made


def plain_scores(model: nn.Module, groups: list[Group]) -> Tensor:
    """The score at the last token of each response."""
    inputs = [torch.tensor([[*group.prompt, *response]]) for group in groups for response in group.responses]
    return torch.cat([model(input_ids=ids).logits[:, 0] for ids in inputs])


def ranking_loss(scores: Tensor, groups: list[Group]) -> Tensor:
    """The Bradley-Terry loss of all pairs of each group, written out."""
    total, start = scores.new_zeros(()), 0
    for group in groups:
        mine = scores[start : start + len(group.responses)]
        start += len(group.responses)
        gaps = [mine[i] - mine[j] for i in range(len(mine)) for j in range(i + 1, len(mine))]
        p, m = group.label, group.margin
        losses = [-p * logsigmoid(gap - m) - (1 - p) * logsigmoid(-gap - m) for gap in gaps]
        total = total + sum(losses, scores.new_zeros(())) / max(len(losses), 1)
    return total / len(groups)


def adapted(model: Any, lora: bool) -> Any:
    """Add LoRA layers with weights that are not zero, so that every factor has a gradient."""
    if lora:
        model = add_lora(model, r=2, alpha=4)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return model.double().eval()


def build(kind: Callable[..., Any], config: PretrainedConfig, lora: bool) -> Any:
    torch.manual_seed(1)
    return adapted(exact(kind.from_config(config).double()), lora)  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("k", "lora"), CASES)
@pytest.mark.parametrize("name", EVERY)
def test_log_likelihood_and_its_gradients(name: str, k: int, lora: bool) -> None:
    lm, groups = build(AutoModelForCausalLM, EVERY[name], lora), groups_of(k)
    assert choose_layout(lm)[0] == ("packed" if name in PACKED else "padded")
    plain = plain_logprobs(lm, groups)
    weights = torch.linspace(-1, 1, len(plain), dtype=torch.float64)
    expected = gradients(lm, (plain * weights).sum())
    for layout in ("packed", "padded") if name in PACKED else ("padded",):
        batch = pack(groups, row_tokens=max(g.tokens for g in groups) + 12, layout=layout)  # type: ignore[arg-type]
        if layout == "packed" and k == 1:
            assert batch.input_ids.shape[0] < len(groups)  # several groups share a row
        found = CompletionModel(lm)(batch).logprobs
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-9)
        same(gradients(lm, (found * weights).sum()), expected, 1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("k", "lora"), CASES[2:])
@pytest.mark.parametrize("name", EVERY)
def test_ranking_loss_and_its_gradients(name: str, k: int, lora: bool) -> None:
    model, groups = build(AutoModelForSequenceClassification, EVERY[name], lora), groups_of(k)
    plain = plain_scores(model, groups)
    wanted = ranking_loss(plain, groups)
    expected = gradients(model, wanted)
    for layout in ("packed", "padded") if name in PACKED else ("padded",):
        batch = pack(groups, row_tokens=200, layout=layout)  # type: ignore[arg-type]
        scores = ScalarModel(model)(batch)
        # a score is float32 by contract, so that is what remains of it
        torch.testing.assert_close(scores.double(), plain, rtol=0, atol=1e-6)
        losses, _ = pairwise_ranking(scores, batch.ranks, batch.group_of, batch.margins, batch.labels)
        torch.testing.assert_close(losses.mean().double(), wanted, rtol=0, atol=1e-6)
        same(gradients(model, losses.mean()), expected, 1e-6)


tokens = st.lists(st.integers(3, 63), min_size=1, max_size=6)
some_groups = st.lists(st.builds(Group, tokens, st.lists(tokens, min_size=1, max_size=4)), min_size=1, max_size=5)


@pytest.mark.slow
@given(some_groups, st.integers(1, 60), st.integers(0, 63), st.sampled_from(["packed", "padded"]), st.randoms())
@settings(max_examples=60, deadline=None)
def test_order_padding_and_rows_change_nothing(
    groups: list[Group], row_tokens: int, pad_id: int, layout: str, random: Random
) -> None:
    """Whatever the order of groups, the token budget of a row, the padding id and its amount, each response keeps its sum."""
    lm = small_llama()
    order = random.sample(range(len(groups)), len(groups))
    expected = [[part.item() for part in sums(lm, pack([group], layout="padded"))] for group in groups]
    batch = pack([groups[i] for i in order], row_tokens, pad_id, layout)  # type: ignore[arg-type]
    found = sums(lm, batch).tolist()
    assert found == pytest.approx([value for i in order for value in expected[i]], abs=1e-9)


@cache
def small_llama() -> CompletionModel:
    return CompletionModel(build(AutoModelForCausalLM, EVERY["llama"], lora=False))


@torch.no_grad()
def sums(model: CompletionModel, batch: GroupBatch) -> Tensor:
    return sequence_sum(model(batch).logprobs, batch.sequence_ids, batch.sequences)
