"""Completion groups: a prompt with K responses, and how they are laid out for one forward pass.

A demonstration is a group with K = 1, a preference pair K = 2, a ranking K = 4..9, the samples of one prompt K = n.
A group is the token run ``[prompt][y_1]...[y_K]``; positions restart at ``len(prompt)`` for every response, and
:func:`rlhf_lightning.ops.masking.group_attention_mask` keeps responses from seeing each other, so the prompt is
computed once. Several groups share a row. Everything that reads a model's output does so through flat indices into
the (R * L) tokens, so the losses do not know the layout.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["packed", "padded"]


@dataclass(frozen=True)
class Group:
    """One prompt with K responses, as token ids.

    Args:
        prompt: at least one token id.
        responses: K lists of at least one id each, the end-of-sequence token included where the response ended.
        counted: which response tokens are learned or scored, per response; None means all.
        ranks: 0 for the best response, equal numbers for ties; None means the order given.
        margin: how much better the best response is, in units of the reward (Bradley-Terry margin).
        label: the probability that the first response is preferred to the second (1 = certain).
        index: row number in the data set.
        ref_logprobs: cached reference log-probability of each response.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    counted: Sequence[Sequence[bool]] | None = None
    ranks: Sequence[int] | None = None
    margin: float = 0.0
    label: float = 1.0
    index: int = -1
    ref_logprobs: Sequence[float] | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the packed group."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def counted_tokens(self) -> int:
        """Number of response tokens that enter a loss."""
        if self.counted is None:
            return sum(len(response) for response in self.responses)
        return sum(sum(flags) for flags in self.counted)


@dataclass
class GroupBatch:
    """R rows of L tokens that hold G groups with S responses and N counted response tokens.

    Shapes: `input_ids`, `position_ids`, `group_ids` (-1 = padding), `response_ids` (0 = prompt, k = k-th response)
    are (R, L). `source` (N,) is the flat index of the position that predicts a counted token, `targets` (N,) the token,
    `sequence_ids` (N,) its response; the order is response by response, then time. `last` (S,) is the flat index of
    the last token of each response, `lengths` (S,) its number of counted tokens, `group_of` (S,) its group, `ranks`
    (S,) its rank. `margins`, `labels`, `index` are (G,).

    `per_token` and `per_group` are the weights that make a sum over this batch's tokens or groups a mean over the
    whole optimizer step, after Lightning's average over accumulation and ranks.
    """

    input_ids: Tensor
    position_ids: Tensor
    group_ids: Tensor
    response_ids: Tensor
    source: Tensor
    targets: Tensor
    sequence_ids: Tensor
    last: Tensor
    lengths: Tensor
    group_of: Tensor
    ranks: Tensor
    margins: Tensor
    labels: Tensor
    index: Tensor
    per_token: float
    per_group: float
    padded: bool = False
    ref_logprobs: Tensor | None = None

    @property
    def groups(self) -> int:
        """G, the number of groups."""
        return self.margins.shape[0]

    @property
    def sequences(self) -> int:
        """S, the number of responses."""
        return self.last.shape[0]

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return int((self.group_ids >= 0).sum())

    def to(self, device: torch.device | str, **kwargs: Any) -> GroupBatch:
        """Return the batch with every tensor on `device`."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: v.to(device, **kwargs) if isinstance(v, Tensor) else v for k, v in values.items()}
        return GroupBatch(**moved)


def pack(
    groups: Sequence[Group],
    row_tokens: int = 1024,
    pad_id: int = 0,
    layout: Layout = "packed",
    per_token: float | None = None,
    per_group: float | None = None,
) -> GroupBatch:
    """Lay out `groups` as a :class:`GroupBatch`.

    Args:
        groups: at least one group.
        row_tokens: token budget of a row; a longer group gets a row of its own.
        pad_id: any valid token id; padding is masked by position, never by this id.
        layout: "packed" shares rows and prompts, "padded" gives every response a row of its own with its prompt.
        per_token: weight of a counted token; 1 / N when None.
        per_group: weight of a group; 1 / G when None.
    """
    if layout == "packed":
        rows = _fit(groups, row_tokens)
    else:
        rows = [[(g, k)] for g, group in enumerate(groups) for k in range(len(group.responses))]
    return _Builder(groups, pad_id).build(rows, layout == "padded", per_token, per_group)


def _fit(groups: Sequence[Group], row_tokens: int) -> list[list[tuple[int, int | None]]]:
    """Assign groups to rows within the budget, for the number of rows that needs least padding.

    An entry is (group, None) for a whole group. Rows of about equal length leave little padding, and being short they
    cost little attention.
    """
    capacity = max(row_tokens, max(group.tokens for group in groups))
    least = -(-sum(group.tokens for group in groups) // capacity)
    spreads = (_spread(groups, count) for count in range(least, len(groups) + 1))
    fitting = islice((found for found in spreads if found[0] <= capacity), 3)
    return min(fitting, key=lambda found: found[0] * len(found[1]))[1]


def _spread(groups: Sequence[Group], count: int) -> tuple[int, list[list[tuple[int, int | None]]]]:
    """Return the longest row and `count` rows, filled by putting the longest group left into the shortest row."""
    rows: list[list[tuple[int, int | None]]] = [[] for _ in range(count)]
    loads = [(0, row) for row in range(count)]
    for g in sorted(range(len(groups)), key=lambda g: (-groups[g].tokens, g)):
        load, row = heapq.heappop(loads)
        rows[row].append((g, None))
        heapq.heappush(loads, (load + groups[g].tokens, row))
    return max(load for load, _ in loads), rows


class _Builder:
    """Writes groups into rows and keeps, per response, where its tokens went."""

    def __init__(self, groups: Sequence[Group], pad_id: int) -> None:
        self.groups = groups
        self.pad_id = pad_id
        self.source: dict[tuple[int, int], list[tuple[int, int]]] = {}

    def build(
        self,
        rows: Sequence[Sequence[tuple[int, int | None]]],
        padded: bool,
        per_token: float | None,
        per_group: float | None,
    ) -> GroupBatch:
        written = [self._row(r, entries) for r, entries in enumerate(rows)]
        length = max(len(row[0]) for row in written)
        fill = (self.pad_id, 0, -1, 0)
        columns = [torch.tensor([row[c] + [fill[c]] * (length - len(row[c])) for row in written]) for c in range(4)]
        source, targets, sequence_ids, last, lengths, group_of, ranks = [], [], [], [], [], [], []
        for g, group in enumerate(self.groups):
            for k, response in enumerate(group.responses):
                places = self.source[g, k]
                counted = group.counted[k] if group.counted is not None else [True] * len(response)
                s = len(last)
                for (row, column), token, counts in zip(places, response, counted, strict=False):
                    if counts:
                        source.append(row * length + column)
                        targets.append(token)
                        sequence_ids.append(s)
                row, column = places[-1]
                last.append(row * length + column)
                lengths.append(sum(map(bool, counted)))
                group_of.append(g)
                ranks.append(group.ranks[k] if group.ranks is not None else k)
        cached = [group.ref_logprobs for group in self.groups]
        flat = [value for values in cached if values is not None for value in values]
        return GroupBatch(
            *columns,
            *(torch.tensor(x, dtype=torch.long) for x in (source, targets, sequence_ids)),
            *(torch.tensor(x, dtype=torch.long) for x in (last, lengths, group_of, ranks)),
            margins=torch.tensor([group.margin for group in self.groups], dtype=torch.float32),
            labels=torch.tensor([group.label for group in self.groups], dtype=torch.float32),
            index=torch.tensor([group.index for group in self.groups], dtype=torch.long),
            per_token=1.0 / max(len(source), 1) if per_token is None else per_token,
            per_group=1.0 / len(self.groups) if per_group is None else per_group,
            padded=padded,
            ref_logprobs=torch.tensor(flat) if len(flat) == len(last) else None,
        )

    def _row(self, row: int, entries: Sequence[tuple[int, int | None]]) -> tuple[list[int], ...]:
        ids: list[int] = []
        positions: list[int] = []
        group_ids: list[int] = []
        response_ids: list[int] = []
        for g, only in entries:
            group = self.groups[g]
            start, size = len(ids), len(group.prompt)
            ids.extend(group.prompt)
            positions.extend(range(size))
            response_ids.extend([0] * size)
            chosen = range(len(group.responses)) if only is None else [only]
            for number, k in enumerate(chosen, start=1):
                response = group.responses[k]
                before = len(ids)
                # the first token is predicted by the last prompt token, each later one by its predecessor
                columns = [start + size - 1, *range(before, before + len(response) - 1)]
                self.source[g, k] = [(row, column) for column in columns] + [(row, before + len(response) - 1)]
                ids.extend(response)
                positions.extend(range(size, size + len(response)))
                response_ids.extend([number] * len(response))
            group_ids.extend([g] * (len(ids) - start))
        return ids, positions, group_ids, response_ids
