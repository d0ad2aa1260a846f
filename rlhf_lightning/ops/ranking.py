"""Reward-model losses: Bradley-Terry over pairs of a ranking, and Plackett-Luce over the whole of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0, label: Tensor | float = 1.0
) -> Tensor:
    """Return -p log sigma(r_c - r_r - m) - (1 - p) log sigma(r_r - r_c - m) of each pair (P,).

    Bradley and Terry 1952; margin as in Llama 2 (arXiv 2307.09288 eq. 2); p is the soft label.
    """
    difference = chosen - rejected
    return -label * F.logsigmoid(difference - margin) - (1 - label) * F.logsigmoid(-difference - margin)


def ranked_pairs(ranks: Tensor, group_of: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices (P,) of the better and the worse response of every untied pair within a group.

    Args:
        ranks: (S,) 0 is the best.
        group_of: (S,) group of each response.
    """
    better = (group_of[:, None] == group_of[None, :]) & (ranks[:, None] < ranks[None, :])
    first, second = better.nonzero(as_tuple=True)
    return first, second


def text_ranks(responses: Sequence[str], scores: Sequence[float]) -> list[int]:
    """Return the rank of each response, 0 the best; equal texts share a rank whatever the rounding of their scores."""
    texts = [response.strip() for response in responses]
    by_text = [scores[texts.index(text)] for text in texts]
    levels = sorted(set(by_text), reverse=True)
    return [levels.index(value) for value in by_text]


def pairs_in_order(gaps: Tensor) -> Tensor:
    """Return 1 for each pair (P,) whose better response scores higher, 0.5 for equal scores, else 0, in float64."""
    return (gaps > 0).double() + 0.5 * (gaps == 0).double()


def count_each(ids: Tensor, size: int) -> Tensor:
    """Return how often each of 0 .. `size` - 1 is in `ids`; `bincount` would wait for a GPU."""
    return torch.zeros(size, dtype=torch.long, device=ids.device).index_add(0, ids, torch.ones_like(ids))


def pairwise_ranking(
    scores: Tensor,
    ranks: Tensor,
    group_of: Tensor,
    margins: Tensor,
    labels: Tensor,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the Bradley-Terry loss of each group (G,), a mean over untied pairs, and the scores' gaps (P,).

    All pairs of one prompt are one item of the batch, as in InstructGPT (arXiv 2203.02155 eq. 1). A group
    whose responses all tie has loss 0. `pairs` are those of :func:`ranked_pairs` where they are known already.
    """
    first, second = ranked_pairs(ranks, group_of) if pairs is None else pairs
    group = group_of[first]
    losses = bradley_terry(scores[first], scores[second], margins[group], labels[group])
    count = count_each(group, len(margins)).clamp_min(1)
    return losses.new_zeros(len(margins)).index_add(0, group, losses) / count, scores[first] - scores[second]


def plackett_luce(scores: Tensor, ranks: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Return -sum_i [r_(i) - log sum_{j not better than i} exp r_(j)] of each group (groups,).

    Plackett 1975, Luce 1959. Tied responses share one denominator (Breslow's treatment), the last place
    adds nothing.
    """
    same = group_of[:, None] == group_of[None, :]
    remaining = same & (ranks[None, :] >= ranks[:, None])
    below = remaining & (ranks[None, :] > ranks[:, None])
    table = scores[None, :].expand(len(scores), -1).masked_fill(~remaining, float("-inf"))
    terms = torch.where(below.any(1), table.logsumexp(1) - scores, torch.zeros_like(scores))
    return terms.new_zeros(groups).index_add(0, group_of, terms)


def centering(scores: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Return (2 x mean score)^2 of each group (groups,): (r_c + r_r)^2 for a pair (arXiv 2312.09244, TRL)."""
    sums = scores.new_zeros(groups).index_add(0, group_of, scores)
    return (2 * sums / count_each(group_of, groups).clamp_min(1)) ** 2
