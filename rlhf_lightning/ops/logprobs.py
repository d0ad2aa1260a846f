"""Token log-probabilities without ever holding all logits, and sums over responses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    max_logits: int = 2**27,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(head(hidden) / temperature)[targets], and the entropy of that distribution if asked.

    At most `max_logits` logits exist at a time; with gradients each chunk is recomputed in the backward pass.
    Half precision logits are widened to float32 first.

    Args:
        hidden: (N, D) states that predict the targets.
        head: maps (M, D) to logits (M, V).
        targets: (N,) token ids.
        temperature: > 0, the one used in sampling.
        entropy_gradient: False where the entropy is only looked at; it then costs no memory.

    Returns:
        (N,) log-probabilities and (N,) entropies in nats, or None.
    """

    def chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(states)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        logits = logits if temperature == 1 else logits / temperature
        # not cross_entropy, which needs less memory: with its rounding GRPO, which divides by the spread of rewards,
        # misses the known optimum (tests/modules/test_reach_optimum.py)
        normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, ids[:, None]).squeeze(-1) - normalizer
        if not entropy:
            return logprobs, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            return logprobs, normalizer - (torch.softmax(logits, -1) * logits).sum(-1)

    if not len(targets):
        return chunk(hidden, targets)
    vocabulary = head(hidden[:1].detach()).shape[-1] if len(targets) * 2048 > max_logits // 128 else 1
    size = max(max_logits // vocabulary, 1)
    if len(targets) <= size:
        return chunk(hidden, targets)
    save = torch.is_grad_enabled()  # for frozen states too: a head that learns keeps the logits of all chunks
    parts = [
        checkpoint(chunk, h, t, use_reentrant=False) if save else chunk(h, t)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    entropies = [e for _, e in parts if e is not None]
    return torch.cat([p for p, _ in parts]), torch.cat(entropies) if entropy else None


def sequence_sum(values: Tensor, sequence_ids: Tensor, count: int) -> Tensor:
    """Return the sum (count,) of `values` (N,) over each sequence."""
    return values.new_zeros(count).index_add(0, sequence_ids, values)
