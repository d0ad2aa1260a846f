"""Token log-probabilities without holding all logits at once, and sums over responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**27  # logits that exist at a time
BLOCK = 2**22  # logits converted to float32 at a time; small enough that their memory is reused


class TargetLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[targets] in float32; makes no tensor as large as the logits but their gradient.

    Not cross_entropy, which needs as little memory: with its rounding GRPO, which divides by the spread of rewards,
    misses the known optimum (tests/modules/test_reach_optimum.py). It has a first derivative only.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
        normalizer = torch.cat([block.logsumexp(-1) for block in widened(logits, temperature)])
        ctx.save_for_backward(logits, targets, normalizer)
        ctx.temperature = temperature
        return logits.gather(-1, targets[:, None]).squeeze(-1).to(normalizer.dtype) / temperature - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, targets, normalizer = ctx.saved_tensors
        logits_gradient = torch.empty_like(logits)
        gradient = (gradient / ctx.temperature)[:, None]
        begin = 0
        for block in widened(logits, ctx.temperature):
            rows = slice(begin, begin := begin + len(block))
            shares = (block - normalizer[rows, None]).exp_().mul_(-gradient[rows])
            logits_gradient[rows] = shares.scatter_add_(-1, targets[rows, None], gradient[rows])
        return logits_gradient, None, None


def widened(logits: Tensor, temperature: float) -> Iterator[Tensor]:
    """Yield logits / temperature (rows, V) in at least float32, some rows at a time."""
    for block in logits.split(max(BLOCK // logits.shape[-1], 1)):
        block = block.float() if block.dtype in (torch.bfloat16, torch.float16) else block
        yield block if temperature == 1 else block / temperature


def entropies(logits: Tensor, temperature: float) -> Tensor:
    """Return the entropy (M,) in nats of softmax(logits / temperature)."""
    blocks = widened(logits, temperature)
    return torch.cat([block.logsumexp(-1) - (torch.softmax(block, -1) * block).sum(-1) for block in blocks])


def token_logprobs(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    max_logits: int = MAX_LOGITS,
    entropy_gradient: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Return log softmax(head(hidden) / temperature)[targets], and the entropy of that distribution if asked.

    At most `max_logits` logits exist at a time; with gradients each chunk is recomputed in the backward pass.
    Half precision logits are converted to float32 first.

    Args:
        hidden: (N, D) states that predict the targets.
        head: maps (M, D) to logits (M, V).
        targets: (N,) token ids.
        temperature: > 0, the one used in sampling.
        entropy_gradient: False where the entropy is only logged; it then needs no memory.

    Returns:
        (N,) log-probabilities and (N,) entropies in nats, or None.
    """

    def chunk(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = head(states)
        logprobs = TargetLogprobs.apply(logits, ids, temperature)
        if not entropy:
            return logprobs, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy_gradient):
            return logprobs, entropies(logits, temperature)

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
    chunk_entropies = [chunk_entropy for _, chunk_entropy in parts if chunk_entropy is not None]
    return torch.cat([logprobs for logprobs, _ in parts]), torch.cat(chunk_entropies) if entropy else None


def sequence_sum(values: Tensor, sequence_ids: Tensor, count: int) -> Tensor:
    """Return the sum (count,) of `values` (N,) over each sequence."""
    return values.new_zeros(count).index_add(0, sequence_ids, values)
