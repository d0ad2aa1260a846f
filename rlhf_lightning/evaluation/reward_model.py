"""Evaluating a reward model on held-out preferences."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.checks import ids_fit
from rlhf_lightning.data.datamodules import PreferenceData
from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.completion import ScalarModel, choose_layout, vocabulary_size
from rlhf_lightning.models.heads import heads
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.ranking import pairs_in_order, ranked_pairs
from rlhf_lightning.ops.statistics import Interval, mean_interval, share_interval


@dataclass(frozen=True)
class TextPair:
    """The better and the worse response to a prompt, as texts."""

    prompt: Hashable
    better: str
    worse: str

    @property
    def better_is_shorter(self) -> bool:
        """Whether the better response has fewer characters."""
        return len(self.better) < len(self.worse)


def text_pairs(group: Group, template: Template) -> Iterator[TextPair]:
    """Yield the pairs of a ranking in the order of :func:`ranked_pairs`, as a model reads them: cut to max_length."""
    texts = [template.decode(response) for response in group.responses]
    ranks = torch.tensor(range(len(texts)) if group.ranks is None else group.ranks)
    for better, worse in zip(*ranked_pairs(ranks, torch.zeros_like(ranks)), strict=True):
        yield TextPair(tuple(group.prompt), texts[better], texts[worse])


def accuracies(gaps: Tensor, pairs: Sequence[TextPair]) -> dict[str, Interval]:
    """Return the accuracy, and as `shorter_accuracy` that of the pairs whose better response is the shorter one.

    The pairs of one prompt, whether of one ranking or of several rows, are not independent.

    Args:
        gaps: (P,) how far the better response of each pair scores higher; 0 counts half.
    """
    correct, prompts = pairs_in_order(gaps).tolist(), [pair.prompt for pair in pairs]
    table = {"accuracy": share_interval(correct, prompts)}
    if shorter := [place for place, pair in enumerate(pairs) if pair.better_is_shorter]:
        table["shorter_accuracy"] = share_interval([correct[i] for i in shorter], [prompts[i] for i in shorter])
    return table


@torch.no_grad()
def evaluate_reward_model(model: Any, data: PreferenceData, device: str = "cpu") -> tuple[dict[str, Interval], int]:
    """Return the accuracies on the held-out pairs of `data` with their intervals, and the number of pairs.

    A model with a head per group orders a pair by the head of the group that the row names, by the mean of the
    normalized heads where it names none. Where rows name several groups, whatever the model, there is also the accuracy
    of each, their mean and the worst.

    Raises:
        UserError: a row of a group that the model has no head for.
    """
    ids_fit(data, "val", vocabulary_size(model))
    model.to(device).eval()
    layout, _ = choose_layout(model)
    scorer, names = ScalarModel(model), heads(model.config)
    gaps: list[Tensor] = []
    pairs: list[TextPair] = []
    owners: list[str | None] = []
    for groups in data.val_dataloader():
        batch = groups.pack(layout).to(device)
        table = scorer(batch).view(batch.sequences, -1)
        columns = [head_of(group.annotators, names, data, group.index) for group in groups.groups]
        better, worse = ranked_pairs(batch.ranks, batch.group_of)
        for first, second, group in zip(better.tolist(), worse.tolist(), batch.group_of[better].tolist(), strict=True):
            gap: Tensor = table[first] - table[second]
            gaps.append((gap.mean() if columns[group] is None else gap[columns[group]]).cpu())
            owners.append(groups.groups[group].annotators)
        pairs += [pair for group in groups.groups for pair in text_pairs(group, data.template)]
    found = torch.stack(gaps) if gaps else torch.zeros(0)
    by_group = of_groups(pairs_in_order(found).tolist(), [pair.prompt for pair in pairs], owners)
    return accuracies(found, pairs) | by_group, len(pairs)


def head_of(name: str | None, names: list[str], data: PreferenceData, row: int) -> int | None:
    """Return the head that orders the pairs of a row, None for the mean of all heads."""
    if name is None or not names:
        return None
    if name not in names:
        place = data.where("val", [row])
        raise UserError(f"{place}: the group {name!r} has no head, only {', '.join(names)}.{nearest(name, names)}")
    return names.index(name)


def of_groups(correct: Sequence[float], prompts: Sequence[Any], owners: Sequence[str | None]) -> dict[str, Interval]:
    """Return the accuracy of each group, the mean of these and the worst; nothing where rows name fewer than two."""
    table: dict[str, Interval] = {}
    names = sorted({name for name in owners if name is not None})
    if len(names) < 2:
        return {}
    counts = {name: owners.count(name) for name in names}
    for name in names:
        mine = [place for place, owner in enumerate(owners) if owner == name]
        table[f"accuracy_{name}"] = share_interval([correct[i] for i in mine], [prompts[i] for i in mine])
    owned = [place for place, owner in enumerate(owners) if owner is not None]
    # a mean over pairs whose weights give every group the same part
    weighted = [correct[i] * len(owned) / (len(names) * counts[str(owners[i])]) for i in owned]
    mean, low, high = mean_interval(weighted, [prompts[i] for i in owned])
    return table | {"accuracy_mean": (mean, max(low, 0.0), min(high, 1.0)), "accuracy_worst": min(table.values())}
