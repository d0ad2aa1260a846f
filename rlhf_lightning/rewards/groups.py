"""Rewards of groups of people, combined into one: the mean over groups, the worst group, or given weights.

Groups whose wishes conflict cannot all be served by one reward (Chakraborty et al. 2024, MaxMin-RLHF, arXiv
2402.08925). What is optimized instead is a choice: the mean of the groups' normalized scores is the utilitarian one.
"worst", the lowest score that a response has in any group, is egalitarian: its mean is a lower bound of their objective
min over groups of E[r_g], which depends on all responses of a policy and not on each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.heads import fold, heads
from rlhf_lightning.models.loading import load_scalar_model

MEAN, WORST = "mean", "worst"
Combination = str | Mapping[str, float]
"""A value of `reward_groups`: "mean", "worst", or group -> weight."""


def group_weights(how: Combination, names: Sequence[str]) -> list[float] | None:
    """Return the weight of each group, with a sum of 1; None for the worst group.

    Raises:
        UserError: neither mean, worst nor weights of at least 0 of groups that there are.
    """
    if how == WORST:
        return None
    if how == MEAN:
        return [1.0 / len(names)] * len(names)
    if not isinstance(how, Mapping):
        hint = nearest(str(how), [MEAN, WORST])
        raise UserError(f"reward_groups={how!r} is not {MEAN}, {WORST} or {{<group>: <weight>}}.{hint}")
    for name, weight in how.items():
        if name not in names:
            hint = nearest(name, names)
            raise UserError(f"reward_groups.{name}: the reward has the groups {', '.join(names)}.{hint}")
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise UserError(f"reward_groups.{name}={weight!r} is not a number of at least 0")
    total = math.fsum(how.values())
    if not total:
        raise UserError("reward_groups gives no group a weight above 0")
    return [how.get(name, 0.0) / total for name in names]


def combined(parts: Mapping[str, Tensor], how: Combination) -> Tensor:
    """Return the reward (S,) of the scores of each group, each (S,)."""
    weights, table = group_weights(how, list(parts)), torch.stack(list(parts.values()))
    return table.amin(0) if weights is None else sum(w * row for w, row in zip(weights, table, strict=True))  # type: ignore[return-value]


class GroupedReward:
    """A reward with scores of several groups; without `groups` it is a plain one.

    Args:
        groups: their names.
        how: see :data:`Combination`.
    """

    def __init__(self, groups: Sequence[str], how: Combination = MEAN) -> None:
        self.groups, self.how = list(groups), how
        if self.groups:
            group_weights(how, self.groups)

    def by_group(
        self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """Return the scores (S,) of each group."""
        raise NotImplementedError

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return combined(self.by_group(prompts, responses, metadata), self.how)


def load_critic(folder: str, how: Combination = MEAN, **options: Any) -> Any:
    """Return the reward model of a folder as a critic to be trained, its heads combined into one.

    The minimum of several heads is no linear head: with "worst" the critic starts from their mean.

    Args:
        options: see :func:`load_scalar_model`.
    """
    model = load_scalar_model(folder, trained=True, **options)
    names = heads(model.config)
    if not names:
        return model
    return fold(model, group_weights(how, names) or group_weights(MEAN, names) or [])
