"""The floating-point operations that a training step needs."""

from __future__ import annotations

from typing import Any

from rlhf_lightning.models.completion import unwrap
from rlhf_lightning.ops.masking import group_attention_mask


def step_flops(module: Any, batch: Any) -> float:
    """Return the FLOPs that the step needs: no padding, no attention outside of a group, nothing recomputed.

    A forward pass is 2 per weight and token (the head's for tokens in the loss mask only) and 4 D per pair of tokens
    and layer; the backward pass is two more, the reference one more.
    """
    lm = unwrap(module.trained_model())
    config = lm.config
    layers = sum(p.numel() for n, p in lm.named_parameters() if ".layers." in n and p.ndim == 2)
    tokens = batch.tokens
    real = (batch.group_ids >= 0)[:, None, :, None]
    pairs = int((group_attention_mask(batch.group_ids, batch.response_ids) & real).sum())
    head = len(batch.targets) * config.hidden_size * config.vocab_size if hasattr(module, "policy") else 0
    forward = 2 * layers * tokens + 2 * head + 4 * pairs * config.hidden_size * config.num_hidden_layers
    return forward * (4 if getattr(module, "reference", None) is not None else 3)
