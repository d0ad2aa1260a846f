"""What packed groups are compared with: plain forward passes, and the kernel of an accelerator, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf_lightning.models import flex
from rlhf_lightning.ops.groups import Group


def exact(model: nn.Module) -> nn.Module:
    """Let every RMSNorm compute in the dtype of its input, after showing that it is the same function."""
    module: Any
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            gemma = "Gemma" in type(module).__name__
            scale = 1 + module.weight if gemma else module.weight
            eps = module.eps if gemma else module.variance_epsilon
            example = torch.randn(3, len(module.weight))
            expected = module(example.to(module.weight.dtype))

            def forward(self: Any, x: Tensor, gemma: bool = gemma, eps: float = eps) -> Tensor:
                weight = 1 + self.weight if gemma else self.weight
                return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

            module.forward = MethodType(forward, module)
            torch.testing.assert_close(module(example.to(scale.dtype)), expected, rtol=1e-5, atol=1e-5)
    return model


def plain_logprobs(lm: nn.Module, groups: list[Group]) -> Tensor:
    """Log-probabilities of the counted tokens, response by response."""
    found = []
    for group in groups:
        for k, response in enumerate(group.responses):
            logits = lm(input_ids=torch.tensor([[*group.prompt, *response]])).logits[0, len(group.prompt) - 1 : -1]
            chosen = logits.log_softmax(-1)[range(len(response)), torch.tensor(response)]
            found.append(chosen[torch.tensor(group.loss_mask[k])] if group.loss_mask else chosen)
    return torch.cat(found)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare every entry of every gradient, relative to the largest one of its weight where that is above 1."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), 1.0)
        assert (found[name] - gradient).abs().max().item() < tolerance * scale, name


def bottom_right(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *longest: int, **options: Any
) -> Tensor:
    """What `varlen_attn` computes on an accelerator, segment by segment in the precision given."""
    left, right = options["window_size"]
    assert right == 0
    outputs = []
    for q, k, v in zip(
        query.tensor_split(query_ends[1:-1].long()),
        *(x.tensor_split(key_ends[1:-1].long()) for x in (key, value)),
        strict=True,
    ):
        assert len(q) <= longest[0]
        assert len(k) <= longest[1]
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if left >= 0:  # keys from `left` before the query on
            mask = mask.triu(len(k) - len(q) - left)
        parts = (x.transpose(0, 1)[None] for x in (q, k, v))
        found = scaled_dot_product_attention(*parts, attn_mask=mask, scale=options["scale"])
        outputs.append(found[0].transpose(0, 1))
    return torch.cat(outputs)


@contextmanager
def flex_on_cpu() -> Iterator[None]:
    """Let FlexAttention run on a CPU, backward pass included: traced as for a kernel, then operation by operation."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *args: None)
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        flex.compiled.cache_clear()
        try:
            yield
        finally:
            flex.compiled.cache_clear()
