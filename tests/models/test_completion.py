"""Packed completion groups equal the plain padded computation: log-probabilities, values, scores and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.ops.groups import Group, pack
from tests.helpers.models import tiny_config

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    return {
        "llama": LlamaForCausalLM(tiny_config()),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEADS)),
        "gemma3": Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **HEADS, sliding_window=4)),
        "mistral": MistralForCausalLM(MistralConfig(**SMALL, **HEADS, sliding_window=4)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        ),
    }


def by_hand(lm: nn.Module, groups: list[Group], temperature: float) -> Tensor:
    """Log-probabilities from one unpadded Hugging Face forward a response."""
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            logits = lm(ids).logits[0, len(group.prompt) - 1 : -1] / temperature
            found.append(logits.log_softmax(-1)[range(len(response)), torch.tensor(response)])
    return torch.cat(found)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "gpt2"])
def test_logprobs_and_gradients_equal_the_plain_forward(name: str, groups: list[Group]) -> None:
    lm = models()[name].double().eval()
    model = CompletionModel(lm)
    layout, reason = choose_layout(lm)
    assert (layout == "padded") == (name in ("gemma3", "mistral")), reason
    weights = torch.linspace(-1, 1, sum(g.loss_tokens for g in groups), dtype=torch.float64)
    expected = by_hand(lm, groups, 0.7)
    (expected * weights).sum().backward()
    reference = {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}
    for chosen in {layout, "padded"}:
        lm.zero_grad()
        found = model(pack(groups, row_tokens=20, layout=chosen), temperature=0.7).logprobs  # type: ignore[arg-type]
        # token_logprobs is float32 by contract for lower precisions; float64 stays float64
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 if name == "gpt2" else 1e-6)
        (found * weights).sum().backward()
        for parameter, gradient in reference.items():
            actual = lm.get_parameter(parameter).grad
            # Hugging Face's RMSNorm computes in float32 even in a float64 model, so its rounding is what remains
            tolerance = 1e-9 if name == "gpt2" else 1e-5
            torch.testing.assert_close(actual, gradient, rtol=tolerance, atol=tolerance, msg=parameter)


def test_a_model_that_does_more_to_its_logits_is_refused(tiny_lm: LlamaForCausalLM) -> None:
    class Scaled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output["logits"] = 1.5 * output["logits"]
            return output

    choose_layout(tiny_lm)
    with pytest.raises(UserError, match="Scaled computes its logits in a way that is not supported"):
        choose_layout(Scaled(tiny_config()))


def test_only_response_rows_reach_the_head(groups: list[Group], tiny_lm: LlamaForCausalLM) -> None:
    rows = []
    tiny_lm.get_output_embeddings().register_forward_hook(lambda *args: rows.append(args[1][0].shape[0]))
    CompletionModel(tiny_lm)(pack(groups))
    assert sum(rows) == sum(g.loss_tokens for g in groups)


def test_scores_and_values_equal_the_plain_forward(groups: list[Group]) -> None:
    torch.manual_seed(2)
    inner = LlamaForSequenceClassification(tiny_config(num_labels=1)).double().eval()
    model = ScalarModel(inner)
    scores, states = [], []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            hidden = inner.model(ids).last_hidden_state
            scores.append(inner(ids).logits[0, 0])
            states.append(inner.score(hidden)[0, len(group.prompt) - 1 : -1, 0])
    batch = pack(groups, row_tokens=16)
    torch.testing.assert_close(model(batch).double(), torch.stack(scores), rtol=0, atol=1e-6)
    torch.testing.assert_close(model(batch, at="source").double(), torch.cat(states), rtol=0, atol=1e-6)
    inner.config.reward_mean, inner.config.reward_std = 0.5, 2.0
    torch.testing.assert_close(model(batch).double(), (torch.stack(scores) - 0.5) / 2, rtol=0, atol=1e-6)


def test_a_zero_value_head_values_every_state_at_zero(groups: list[Group], tiny_lm: LlamaForCausalLM) -> None:
    output = CompletionModel(tiny_lm, value_head=True)(pack(groups), values=True)
    assert output.values is not None
    assert output.values.tolist() == [0.0] * sum(g.loss_tokens for g in groups)
    with pytest.raises(ValueError, match="value head"):
        CompletionModel(tiny_lm)(pack(groups), values=True)
