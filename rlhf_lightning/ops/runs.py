"""The runs of packed completion groups: what lets attention compute only the pairs of tokens the group rule allows.

The tokens of a batch, without padding, are one row that is cut into its runs: a prompt with its first response is one
causal run, every further response attends to the prompt and itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

INDICES = ("real", "key_tokens", "query_ends", "key_ends")
"""The tensors of :class:`Runs`."""


@dataclass(frozen=True)
class Run:
    """`size` tokens that follow one another: a prompt or one response.

    `prompt` is the number of the run that holds the prompt of a response, -1 for prompts; `first` marks the response
    that directly follows its prompt.
    """

    size: int
    prompt: int = -1
    first: bool = False


@dataclass(frozen=True)
class Runs:
    """The runs of all rows, one row after the other, and the same as indices for one call of varlen attention.

    `real` (T,) is the flat index of every token that is not padding. A segment is a response with the queries it
    needs: those of the first response include the prompt's. The queries of the segments are the T tokens in order,
    `key_tokens` (K,) names among the T tokens the keys of one segment after the other; `query_ends` and `key_ends`
    (segments + 1,), int32, are where the segments end in both, from 0 on. `longest` holds the most queries and keys of
    a segment. The last query of a segment attends to its last key (bottom-right alignment).
    """

    runs: Sequence[Run]
    real: Tensor
    key_tokens: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest: tuple[int, int]

    @property
    def shared(self) -> bool:
        """Whether several responses attend to one prompt; else the keys are the T tokens in order."""
        return len(self.key_tokens) > len(self.real)

    def to(self, device: torch.device | str, **kwargs: bool) -> Runs:
        """Return the runs with their indices on `device`."""
        return replace(self, **{name: getattr(self, name).to(device, **kwargs) for name in INDICES})

    def pin_memory(self) -> Runs:
        """Return the runs with their indices in pinned memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in INDICES})


def find_runs(group_ids: Tensor, response_ids: Tensor) -> Runs:
    """Return the runs of packed rows (R, L), without padding (group id -1)."""
    runs: list[Run] = []
    prompt = -1
    for groups, responses in zip(group_ids.tolist(), response_ids.tolist(), strict=True):
        for (group, response), members in groupby(zip(groups, responses, strict=True)):
            size = sum(1 for _ in members)
            if group < 0:
                continue
            if response == 0:
                prompt = len(runs)
            runs.append(Run(size) if response == 0 else Run(size, prompt, first=response == 1))
    return _index(runs, (group_ids >= 0).flatten().nonzero().squeeze(1))


def _index(runs: list[Run], real: Tensor) -> Runs:
    starts = np.cumsum([0, *(run.size for run in runs)])
    keys, queries = [], []
    for number, run in enumerate(runs):
        if run.prompt < 0:
            continue  # its queries and keys are in the segment of its first response
        prompt = np.arange(starts[run.prompt], starts[run.prompt + 1])
        keys.append(np.concatenate([prompt, np.arange(starts[number], starts[number + 1])]))
        queries.append(run.size + len(prompt) * run.first)

    def ends(sizes: list[int]) -> Tensor:
        return torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32, device=real.device)

    key_sizes = [len(segment) for segment in keys]
    return Runs(
        runs,
        real,
        torch.tensor(np.concatenate(keys), device=real.device),
        ends(queries),
        ends(key_sizes),
        (max(queries), max(key_sizes)),
    )
