"""The KL of two language models by going through every response, where there are few."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

MOST_PREFIXES, ROWS = 1024, 256
"""Prefixes of responses to one prompt that are gone through; prefixes in one forward pass."""


def can_enumerate(lm: Any, max_new_tokens: int) -> bool:
    """Return whether the prefixes of responses of this length are few enough for :func:`exact_kl`."""
    return lm.config.get_text_config().vocab_size ** (max_new_tokens - 1) <= MOST_PREFIXES


@torch.no_grad()
def exact_kl(
    lm: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    eos_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 1.0,
) -> list[float]:
    """Return KL(pi : ref) in nats of the responses to each prompt, both models at the sampling temperature.

    It is the sum over all prefixes of a response, weighted by their probability, of the KL of the next token (chain
    rule). A response ends with one of `eos_ids` or after `max_new_tokens`.
    """
    return [_of_prompt(lm, reference, prompt, eos_ids, max_new_tokens, temperature) for prompt in prompts]


def _of_prompt(
    lm: Any, reference: Any, prompt: Sequence[int], eos_ids: Collection[int], length: int, temperature: float
) -> float:
    ids = torch.tensor([list(prompt)], device=lm.device)
    weights, total = torch.zeros(1, dtype=torch.float64), 0.0  # log-probabilities of the prefixes
    for place in range(length):
        ours, theirs = (_next_logprobs(model, ids, temperature) for model in (lm, reference))
        total += (weights.exp() * (ours.exp() * (ours - theirs)).sum(1)).sum().item()
        if place == length - 1:
            break
        going_on = torch.tensor([token for token in range(ours.shape[1]) if token not in eos_ids])
        weights = (weights[:, None] + ours[:, going_on]).flatten()
        tokens = going_on.to(ids.device).repeat(len(ids))[:, None]
        ids = torch.cat([ids.repeat_interleave(len(going_on), 0), tokens], 1)
    return total


def _next_logprobs(lm: Any, ids: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([lm(part).logits[:, -1] for part in ids.split(ROWS)])
    return (logits.double() / temperature).log_softmax(-1).cpu()
