"""Rewards: any callable `(prompts, responses, metadata) -> one number per response`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.spec import parse

Reward = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Any]


class MeanReward:
    """The mean of several rewards, an ensemble."""

    def __init__(self, members: Sequence[Reward]) -> None:
        self.members = members

    def to(self, device: torch.device | str) -> MeanReward:
        """Move the members that are models and return self."""
        for member in self.members:
            to_device(member, device)
        return self

    def __call__(self, *args: Any) -> Tensor:
        return torch.stack([torch.as_tensor(member(*args)).float() for member in self.members]).mean(0)


def load_reward(spec: Any, dtype: str = "float32") -> Reward:
    """Return the reward that `spec` names, the mean of several.

    Args:
        spec: a callable, a value of `reward_from` (:func:`rlhf_lightning.rewards.spec.parse`), or a list of these.
        dtype: of the weights of reward models.

    Raises:
        UserError: when the module, the function or the folder is not there.
    """
    if callable(spec):
        return spec
    members = [load_reward(member, dtype) for member in spec] if isinstance(spec, list | tuple) else []
    if members:
        return MeanReward(members)
    named = parse(spec)
    if not named:
        raise UserError("reward_from is needed: a reward model folder, module:function, or world")
    return named[0].load(dtype)


def to_device(reward: Any, device: torch.device | str) -> None:
    """Move a reward that is or contains a model to `device`."""
    if hasattr(reward, "to"):
        reward.to(device)


def score(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Tensor:
    """Return the rewards (S,) as float32, or raise a UserError with the response that has no finite reward."""
    try:
        returned = reward(prompts, responses, metadata)
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the reward failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error
    try:
        values = torch.as_tensor(returned).detach().float().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the reward returned no numbers for {len(responses)} responses: {error}") from error
    if values.shape != (len(responses),):
        raise UserError(
            f"the reward returned shape {tuple(values.shape)} for {len(responses)} responses; one number each is needed"
        )
    if not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).nonzero()[0])
        raise UserError(
            f"the reward is {values[bad].item()} for the response {responses[bad][:200]!r} to {prompts[bad][:200]!r}"
        )
    return values
