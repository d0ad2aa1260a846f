"""One iteration's rollout: generated groups, their scores, and per-token quantities as (S, T) tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_lightning.ops.groups import Group, GroupBatch, Layout, pack, token_budget


@dataclass
class Rollout:
    """P prompts with n generated responses each, S = P n, T = the longest response.

    `mask` (S, T) is True at generated tokens. Whether a response ended with EOS is stored in `finished` (S,), never
    inferred from padding. `tokens` holds named (S, T) tensors: old_logprobs, ref_logprobs, values, kl, rewards,
    advantages, returns. `rounds` maps a rank's number of microbatches to the number of forward passes it must make.
    """

    groups: list[Group]
    num_generations: int
    finished: Tensor
    scores: Tensor
    layout: Layout
    device: torch.device
    microbatch_tokens: int
    rounds: Callable[[int], int] = lambda count: count
    gold: Tensor | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        lengths = torch.tensor([len(r) for g in self.groups for r in g.responses])
        self.mask = (torch.arange(int(lengths.max()))[None, :] < lengths[:, None]).to(self.device)

    def rows(self, places: Sequence[int]) -> Tensor:
        """Return the sequence numbers of the groups at `places`, in their order."""
        n = self.num_generations
        return torch.tensor([g * n + k for g in places for k in range(n)], device=self.device)

    def microbatches(self, places: Sequence[int]) -> Iterator[tuple[Tensor, GroupBatch, bool]]:
        """Yield (sequence numbers, packed batch, whether it is real) of groups, each within the token budget.

        `rounds` of the number of batches are made; those beyond repeat the last one and are dummy forward passes.
        """
        parts = token_budget([self.groups[g].tokens for g in places], self.microbatch_tokens)
        for number in range(self.rounds(len(parts))):
            members = [places[i] for i in parts[min(number, len(parts) - 1)]]
            batch = pack([self.groups[g] for g in members], layout=self.layout)
            yield self.rows(members), batch.to(self.device), number < len(parts)

    def fill(self, compute: Callable[[GroupBatch], dict[str, Tensor]]) -> None:
        """Store the named (N,) results of `compute` on every microbatch as (S, T) tensors."""
        for rows, batch, _ in self.microbatches(range(len(self.groups))):
            for name, flat in compute(batch).items():
                dtype = torch.promote_types(flat.dtype, torch.float32)  # whatever the Trainer's precision makes default
                table = self.tokens.setdefault(name, torch.zeros(self.mask.shape, dtype=dtype, device=self.device))
                block = table[rows]
                block[self.mask[rows]] = flat.to(dtype)
                table[rows] = block

    def flat(self, name: str, rows: Tensor) -> Tensor:
        """Return the values (N,) of `name` at the tokens of the sequences `rows`, in the order of a packed batch."""
        return self.tokens[name][rows][self.mask[rows]]
