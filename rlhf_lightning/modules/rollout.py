"""One iteration's experience: sampled groups, their scores, and per-token quantities as (S, T) tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_lightning.data.planning import token_budget
from rlhf_lightning.ops.groups import Group, GroupBatch, Layout, pack


@dataclass
class Rollout:
    """P prompts with n sampled responses each, S = P n, T = the longest response.

    `mask` (S, T) is True at sampled tokens. Whether a response ended with EOS is stored in `finished` (S,), never
    inferred from padding. `tokens` holds named (S, T) tensors: old_logprobs, ref_logprobs, values, kl, rewards,
    advantages, returns.
    """

    groups: list[Group]
    samples: int
    finished: Tensor
    scores: Tensor
    layout: Layout
    device: torch.device
    microbatch_tokens: int
    rounds: Callable[[int], int] = lambda count: count
    tokens: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(r) for g in self.groups for r in g.responses])
        self.mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).to(self.device)

    def rows(self, chosen: Sequence[int]) -> Tensor:
        """Return the sequence numbers of the groups `chosen`, in their order."""
        return torch.tensor([g * self.samples + k for g in chosen for k in range(self.samples)], device=self.device)

    def microbatches(self, chosen: Sequence[int]) -> Iterator[tuple[Tensor, GroupBatch, bool]]:
        """Yield (sequence numbers, packed batch, whether it counts) of the groups `chosen`, within the token budget.

        `rounds` of the number of batches are made; those beyond repeat the last one and do not count.
        """
        parts = token_budget([self.groups[g].tokens for g in chosen], self.microbatch_tokens)
        for number in range(self.rounds(len(parts))):
            found = [chosen[i] for i in parts[min(number, len(parts) - 1)]]
            batch = pack([self.groups[g] for g in found], layout=self.layout)
            yield self.rows(found), batch.to(self.device), number < len(parts)

    def fill(self, compute: Callable[[GroupBatch], dict[str, Tensor]]) -> None:
        """Store the named (N,) results of `compute` on every microbatch as (S, T) tensors."""
        for rows, batch, _ in self.microbatches(range(len(self.groups))):
            for name, flat in compute(batch).items():
                held = self.tokens.setdefault(name, torch.zeros(self.mask.shape, device=self.device))
                block = held[rows]
                block[self.mask[rows]] = flat.float()
                held[rows] = block

    def flat(self, name: str, rows: Tensor) -> Tensor:
        """Return the counted values (N,) of `name` for the sequences `rows`, in the order of a packed batch."""
        return self.tokens[name][rows][self.mask[rows]]
