"""Completion groups: a prompt with K responses, and how they are laid out for one forward pass.

A demonstration is a group with K = 1, a preference pair K = 2, a ranking K = 4..9, the samples of one prompt K = n.
A group is the token run ``[prompt][y_1]...[y_K]``; positions restart at ``len(prompt)`` for every response, and
:func:`rlhf_lightning.ops.masking.group_attention_mask` keeps responses from seeing each other, so the prompt is
computed once. Several groups share a row. Everything that reads a model's output does so through flat indices into
the (R * L) tokens, so the losses do not know the layout.

Loaders yield lists of groups (:class:`GroupList` with the weights of a planned step); a module packs them.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_lightning.ops.runs import Runs, find_runs

Layout = Literal["packed", "padded"]


@dataclass
class Group:
    """One prompt with K responses, as token ids.

    Args:
        prompt: at least one token id.
        responses: K lists of at least one id each, the end-of-sequence token included where the response ended.
        loss_mask: which response tokens enter the loss, per response; None means all.
        ranks: 0 for the best response, equal numbers for ties; None means the order given.
        margin: how much better the best response is, in units of the reward (Bradley-Terry margin).
        label: the probability that the first response is preferred to the second (1 = certain).
        index: row number in the data set.
        text: the prompt as a reward reads it, its last user turn; None is the decoded prompt.
        annotators: the group of annotators that ranked the responses.
        metadata: the other columns of the row, handed to rewards.
        differs: why the tokens are not those of the chat template; None when they are.
    """

    prompt: Sequence[int]
    responses: Sequence[Sequence[int]]
    loss_mask: Sequence[Sequence[bool]] | None = None
    ranks: Sequence[int] | None = None
    margin: float = 0.0
    label: float = 1.0
    index: int = -1
    text: str | None = None
    annotators: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    differs: str | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens of the packed group."""
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def loss_tokens(self) -> int:
        """Number of response tokens in the loss mask."""
        if self.loss_mask is None:
            return sum(len(response) for response in self.responses)
        return sum(sum(flags) for flags in self.loss_mask)


class GroupList:
    """The groups of a microbatch, not yet packed, with the weights of :class:`GroupBatch` (None: a mean over it).

    `row_tokens` is the token budget of a packed row. `ptx` holds the demonstrations of the pretraining mix beside a
    batch of prompts, which are groups without responses. `places` are the places of the groups among all of the
    optimizer step, also those of other ranks; None where a loader does not plan steps.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        row_tokens: int = 1024,
        per_token: float | None = None,
        per_group: float | None = None,
        ptx: GroupList | GroupBatch | None = None,
        places: Sequence[int] | None = None,
    ) -> None:
        self.groups, self.row_tokens = list(groups), row_tokens
        self.per_token, self.per_group, self.ptx, self.places = per_token, per_group, ptx, places
        self.packed: GroupBatch | None = None  # made ahead

    def __len__(self) -> int:
        return len(self.groups)

    def pack(self, layout: Layout = "packed") -> GroupBatch:
        """Return the packed batch."""
        return pack(self.groups, self.row_tokens, 0, layout, self.per_token, self.per_group)

    def to(self, device: torch.device | str, **kwargs: Any) -> GroupList:
        """Return the list with its tensors, those of a packed `ptx`, on `device`."""
        if isinstance(self.ptx, GroupBatch):
            self.ptx = self.ptx.to(device, **kwargs)
        return self


@dataclass
class GroupBatch:
    """R rows of L tokens that hold G groups with S responses and N response tokens in the loss mask.

    Shapes: `input_ids`, `position_ids`, `group_ids` (-1 = padding), `response_ids` (0 = prompt, k = k-th response)
    are (R, L). `source` (N,) is the flat index of the position that predicts a token in the loss mask, `targets` (N,)
    the token, `sequence_ids` (N,) its response; the order is response by response, then time. `last` (S,) is the flat
    index of the last token of each response, `lengths` (S,) its number of tokens in the loss mask, `group_of` (S,) its
    group, `ranks` (S,) its rank. `better` and `worse` (P,) are the responses of every untied pair within a group.
    `margins`, `labels`, `index` are (G,); `annotators` has for each group the name of the group of annotators that
    ranked its responses. `tokens` is the number of tokens that are not padding.

    `per_token` and `per_group` are the weights that make a sum over this batch's tokens or groups a mean over the
    whole optimizer step, after Lightning's average over accumulation and ranks. `runs` are those of packed rows; None
    where they were not looked for.
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
    better: Tensor
    worse: Tensor
    margins: Tensor
    labels: Tensor
    index: Tensor
    per_token: float
    per_group: float
    tokens: int
    padded: bool = False
    runs: Runs | None = None
    annotators: tuple[str | None, ...] = ()

    @property
    def groups(self) -> int:
        """G, the number of groups."""
        return self.margins.shape[0]

    @property
    def sequences(self) -> int:
        """S, the number of responses."""
        return self.last.shape[0]

    def to(self, device: torch.device | str, **kwargs: Any) -> GroupBatch:
        """Return the batch with every tensor on `device`."""
        return self._with(lambda tensors: tensors.to(device, **kwargs))

    def pin_memory(self) -> GroupBatch:
        """Return the batch with every tensor that is on the CPU in pinned memory."""
        return self._with(lambda tensors: tensors.pin_memory()) if self.input_ids.is_cpu else self

    def _with(self, change: Callable[[Any], Any]) -> GroupBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return GroupBatch(**{k: change(v) if isinstance(v, Tensor | Runs) else v for k, v in values.items()})


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
        per_token: weight of a token in the loss mask; 1 / N when None.
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
    fitting = islice((spread for spread in spreads if spread[0] <= capacity), 3)
    return min(fitting, key=lambda spread: spread[0] * len(spread[1]))[1]


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
        pairs: list[tuple[int, int]] = []
        for g, group in enumerate(self.groups):
            order = range(len(group.responses)) if group.ranks is None else group.ranks
            first = len(last)
            pairs += [(first + i, first + j) for i, a in enumerate(order) for j, b in enumerate(order) if a < b]
            for k, response in enumerate(group.responses):
                places = self.source[g, k]
                mask = group.loss_mask[k] if group.loss_mask is not None else [True] * len(response)
                s = len(last)
                for (row, column), token, in_loss in zip(places, response, mask, strict=False):
                    if in_loss:
                        source.append(row * length + column)
                        targets.append(token)
                        sequence_ids.append(s)
                row, column = places[-1]
                last.append(row * length + column)
                lengths.append(sum(map(bool, mask)))
                group_of.append(g)
                ranks.append(order[k])
        return GroupBatch(
            *columns,
            *(torch.tensor(x, dtype=torch.long) for x in (source, targets, sequence_ids)),
            *(torch.tensor(x, dtype=torch.long) for x in (last, lengths, group_of, ranks)),
            *torch.tensor(pairs, dtype=torch.long).view(-1, 2).unbind(1),
            margins=torch.tensor([group.margin for group in self.groups], dtype=torch.float32),
            labels=torch.tensor([group.label for group in self.groups], dtype=torch.float32),
            index=torch.tensor([group.index for group in self.groups], dtype=torch.long),
            per_token=1.0 / max(len(source), 1) if per_token is None else per_token,
            per_group=1.0 / len(self.groups) if per_group is None else per_group,
            tokens=sum(len(row[0]) for row in written),
            padded=padded,
            runs=None if padded else find_runs(columns[2], columns[3]),
            annotators=tuple(group.annotators for group in self.groups),
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
            included = range(len(group.responses)) if only is None else [only]
            for number, k in enumerate(included, start=1):
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


def token_budget(tokens: Sequence[int] | np.ndarray, budget: int) -> list[list[int]]:
    """Split rows, in length order, into lists whose token sum stays within `budget` (one row at least)."""
    batches: list[list[int]] = []
    load = budget + 1
    for row in np.argsort(-np.asarray(tokens), kind="stable").tolist():
        if load + tokens[row] > budget or not batches:
            batches.append([])
            load = 0
        batches[-1].append(row)
        load += int(tokens[row])
    return batches


def microbatches(
    groups: Sequence[Group], tokens: int, layout: Layout = "packed", row_tokens: int = 1024
) -> Iterator[tuple[list[int], GroupBatch]]:
    """Yield (places in `groups`, packed batch) of all groups, at most `tokens` tokens (one group at least) a batch."""
    for places in token_budget([group.tokens for group in groups], tokens):
        yield places, pack([groups[place] for place in places], row_tokens, layout=layout)
