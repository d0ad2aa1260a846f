"""Classifiers with a head per group of annotators: adding heads, naming them, and combining them into one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError
from rlhf_lightning.models.completion import unwrap

RESERVED = ("mean", "worst", "low", "high", "disagreement")
"""What metrics are called of all groups together, the ends of an interval, and the spread of an ensemble."""


def heads(config: Any) -> list[str]:
    """Return the names of the groups that a reward model's config has heads for; none for a plain reward model."""
    if not isinstance(getattr(config, "reward_mean", None), list):
        return []
    return [str(config.id2label[number]) for number in range(len(config.reward_mean))]


def check_names(names: Sequence[Any], key: str = "reward.groups") -> list[str]:
    """Return the names of groups.

    Raises:
        UserError: no list of different names, or one that metrics use.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise UserError(f"{key}={names!r} is not a list of names of groups")
    texts = [str(name) for name in names]
    if len(set(texts)) != len(texts) or set(texts) & {*RESERVED, ""}:
        raise UserError(f"{key}={texts}: names are different, and none of {', '.join(RESERVED)}")
    return texts


def with_heads(load: Callable[[], Any], names: Sequence[str] | None) -> Any:
    """Return what `load` returns, a sequence classifier, with a head for each of `names`.

    A model with one head gets a copy of it for every group, so that they differ only in what they learn. A model that
    has these heads keeps them.

    Raises:
        UserError: the model has heads for other groups.
    """
    model = load()
    config, present = model.config, heads(model.config)
    if present or not names:
        if present != list(names or []):
            raise UserError(
                f"{config._name_or_path} has heads for the groups {', '.join(present)}: "
                f"reward.groups=[{','.join(present)}]"
            )
        return model
    old, count = model.score, len(names)
    new = nn.Linear(old.in_features, count, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        for target, source in zip(new.parameters(), old.parameters(), strict=True):
            target.copy_(source.expand(count, *source.shape[1:]))
    model.score = new
    model.num_labels = config.num_labels = count
    config.id2label = dict(enumerate(names))
    config.label2id = {name: number for number, name in enumerate(names)}
    config.reward_mean, config.reward_std = [0.0] * count, [1.0] * count
    return model


def fold(model: Any, weights: Sequence[float]) -> Any:
    """Return a classifier with one head whose score is the weighted sum of the normalized scores of its heads (H,)."""
    config = unwrap(model).config
    scale = torch.tensor(weights, dtype=torch.float64) / torch.tensor(config.reward_std, dtype=torch.float64)

    def summed(values: Tensor) -> Tensor:
        return (scale.to(values.device) @ values.double())[None]

    old = model.score
    new = nn.Linear(old.in_features, 1, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
    with torch.no_grad():
        for target, source in zip(new.parameters(), old.parameters(), strict=True):
            target.copy_(summed(source))
    mean = summed(torch.tensor(config.reward_mean)).item()
    model.score, model.num_labels, config.num_labels = new, 1, 1
    config.reward_mean, config.reward_std = mean, 1.0
    return model
