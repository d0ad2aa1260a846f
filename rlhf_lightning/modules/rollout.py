"""One iteration's rollout: generated groups, their scores, and per-token quantities as (S, T) tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_lightning.ops.groups import Group, GroupBatch, Layout, pack, token_budget
from rlhf_lightning.ops.transfer import send


@dataclass
class Rollout:
    """P prompts with n generated responses each, S = P n, T = the longest response.

    `lengths` (S,) is on the CPU, `mask` (S, T) is True at generated tokens. Whether a response ended with EOS is stored
    in `finished` (S,), never inferred from padding. `tokens` holds named (S, T) tensors: old_logprobs, ref_logprobs,
    values, kl, rewards, advantages, returns, and engine_logprobs of an engine that gives them; and the (S, T, D) states
    that the values are of until the critic's head is refitted. `rounds` maps a rank's
    number of microbatches to the number of forward passes it must make. `texts` (S,) are the responses as text. `parts`
    holds (S,) scores of groups of people beside `scores` and `gold`, as reward_<group> and gold_<group>. `places` (P,)
    are the places of the prompts among those of all ranks. `value_clip` is how far a value may move from the one in
    `tokens` without being clipped, None for any distance.
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
    texts: Sequence[str] = ()
    parts: dict[str, Tensor] = field(default_factory=dict)
    places: Sequence[int] = ()
    value_clip: float | None = None
    tokens: dict[str, Tensor] = field(default_factory=dict)
    lengths: Tensor = field(init=False)
    mask: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = torch.tensor([len(r) for g in self.groups for r in g.responses])
        self.mask = (torch.arange(int(self.lengths.max()))[None, :] < self.lengths[:, None]).to(self.device)

    def rows(self, places: Sequence[int]) -> Tensor:
        """Return the sequence numbers of the groups at `places`, in their order, on the CPU as `lengths` are."""
        n = self.num_generations
        return torch.tensor([g * n + k for g in places for k in range(n)], dtype=torch.long)

    def microbatches(self, places: Sequence[int]) -> Iterator[tuple[Tensor, GroupBatch, bool]]:
        """Yield (cells, packed batch, whether it is real) of groups, see :func:`matched_microbatches`.

        `cells` (N,) are the flat indices in a (S, T) tensor of the batch's tokens, in its order. They are made from
        `lengths`, on the CPU: finding them by a mask would wait for a GPU. Ranks
        reduce gradients together, so one without groups makes a dummy pass.
        """
        width = self.mask.shape[1]
        for members, batch, is_real in matched_microbatches(
            self.groups, places, self.microbatch_tokens, self.layout, lambda count: max(self.rounds(count), 1)
        ):
            ranges = [torch.arange(int(self.lengths[row])) + row * width for row in self.rows(members)]
            yield send(torch.cat(ranges), self.device), send(batch, self.device), is_real

    def fill(self, compute: Callable[[GroupBatch], dict[str, Tensor]]) -> None:
        """Store the named (N, ...) results of `compute` on every microbatch as (S, T, ...) tensors."""
        for cells, batch, _ in self.microbatches(range(len(self.groups))):
            for name, flat in compute(batch).items():
                # numbers are float32 whatever the Trainer makes default; states, being many, stay as they are
                dtype = torch.promote_types(flat.dtype, torch.float32) if flat.ndim == 1 else flat.dtype
                if name not in self.tokens:
                    shape = (*self.mask.shape, *flat.shape[1:])
                    self.tokens[name] = torch.zeros(shape, dtype=dtype, device=self.device)
                self.tokens[name].flatten(0, 1)[cells] = flat.to(dtype)

    def keep(self, name: str, rows: Sequence[Sequence[float]]) -> None:
        """Store S lists, of a number for each token of a response, as an (S, T) tensor."""
        table = torch.zeros(self.mask.shape, device=self.device)
        table[self.mask] = torch.tensor([value for row in rows for value in row], device=self.device)
        self.tokens[name] = table

    def flat(self, name: str, cells: Tensor) -> Tensor:
        """Return the values (N,) of `name` at the tokens `cells` of :meth:`microbatches`."""
        return self.tokens[name].flatten()[cells]


def matched_microbatches(
    groups: Sequence[Group],
    places: Sequence[int],
    tokens: int,
    layout: Layout,
    rounds: Callable[[int], int],
) -> Iterator[tuple[list[int], GroupBatch, bool]]:
    """Yield (members of `places`, packed batch, whether it is real), each batch within the budget of `tokens`.

    `rounds` of the number of batches are made, so that ranks make equally many forward passes; those beyond repeat the
    last batch, or the first group where there are no places, and are dummy passes.
    """
    parts = token_budget([groups[place].tokens for place in places], tokens)
    real = [[places[i] for i in part] for part in parts]
    for number in range(rounds(len(real))):
        members = real[min(number, len(real) - 1)] if real else [0]
        batch = [groups[g] for g in members]
        # attention costs the length of a row for each of its tokens, and two groups in a row leave little padding
        yield members, pack(batch, 2 * max(group.tokens for group in batch), layout=layout), number < len(real)
