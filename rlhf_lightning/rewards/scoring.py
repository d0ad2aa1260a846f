"""Rewards: any callable `(prompts, responses, metadata) -> one number per response`, or a reward function of TRL's."""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.models.heads import check_names
from rlhf_lightning.rewards.groups import MEAN, Combination, GroupedReward, combined
from rlhf_lightning.rewards.spec import parse

Reward = Callable[..., Any]
"""Called by :func:`call_reward`; may be `async`."""


NONE = ("error", "skip")
"""Values of `reward_none`: what it means that a reward returns None for a response, an error or no score."""


class MeanReward:
    """The mean of several rewards, an ensemble; with `none="skip"` of those that give a response a score."""

    def __init__(self, members: Sequence[Reward], none: str = "error") -> None:
        if none not in NONE:
            raise UserError(f"reward_none={none!r} is not one of {', '.join(NONE)}.{nearest(str(none), NONE)}")
        self.members, self.none = members, none

    def to(self, device: torch.device | str) -> MeanReward:
        """Move the members that are models and return self."""
        for member in self.members:
            to_device(member, device)
        return self

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        skip = self.none == "skip"
        mean = torch.stack([score(member, prompts, responses, metadata, skip) for member in self.members]).nanmean(0)
        if mean.isnan().any():
            place = int(mean.isnan().nonzero()[0])
            raise UserError(
                f"no reward of {len(self.members)} has a score for {_response(responses, prompts, place)}; with "
                "reward_none=skip every response needs one of them"
            )
        return mean


class RewardPerGroup(GroupedReward):
    """A reward for each group, such as a reward model of its own, combined into one."""

    def __init__(self, members: Mapping[str, Reward], how: Combination = MEAN) -> None:
        super().__init__(check_names(list(members), "reward_from"), how)
        self.members = members
        if measured := next((m.measures for m in members.values() if hasattr(m, "measures")), None):
            self.measures = measured

    def to(self, device: torch.device | str) -> RewardPerGroup:
        """Move the members that are models and return self."""
        for member in self.members.values():
            to_device(member, device)
        return self

    def by_group(
        self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        return {name: score(member, prompts, responses, metadata) for name, member in self.members.items()}


def load_reward(
    spec: Any,
    dtype: str = "float32",
    how: Combination = MEAN,
    none: str = "error",
    settings: Mapping[str, Any] | None = None,
) -> Reward:
    """Return the reward that `spec` names: the mean of a list of several, of a map one reward per group.

    Args:
        spec: a callable, a value of `reward_from` (:func:`rlhf_lightning.rewards.spec.parse`), a list or map of these.
        dtype: of the weights of reward models.
        how: how the scores of groups are combined, a value of `reward_groups`.
        none: what a None from a member of a list, or from a judge, means: a value of `reward_none`.
        settings: the configuration, of which `judge:<judge>` reads the key `judge`.

    Raises:
        UserError: when the module, the function or the folder is not there, or `how` is about groups that are not.
    """
    reward = _load(spec, dtype, how, none, settings)
    if how != MEAN and not any(getattr(r, "groups", None) for r in [reward, *getattr(reward, "members", ())]):
        raise UserError(
            f"reward_groups={how}: reward_from={spec} has no groups; a reward model gets them with reward.groups"
        )
    return reward


def _load(spec: Any, dtype: str, how: Combination, none: str, settings: Mapping[str, Any] | None) -> Reward:
    if callable(spec):
        return spec
    if isinstance(spec, Mapping) and spec:
        return RewardPerGroup({str(n): _load(member, dtype, how, none, settings) for n, member in spec.items()}, how)
    members = [_load(m, dtype, how, NONE[0], settings) for m in spec] if isinstance(spec, list | tuple) else []
    if members:
        return MeanReward(members, none)
    named = parse(spec)
    if not named:
        raise UserError("reward_from is needed: a reward model folder, module:function, judge:<judge>, or world")
    reward = named[0].load(dtype, how, settings)
    if none != NONE[0]:
        if not hasattr(reward, "fill"):
            raise UserError(f"reward_none={none} is for a list of rewards: nothing but {spec} could give a score")
        reward.fill = True
    return reward


def to_device(reward: Any, device: torch.device | str) -> None:
    """Move a reward that is or contains a model to `device`."""
    if hasattr(reward, "to"):
        reward.to(device)


def call_reward(
    reward: Reward, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Any:
    """Return what `reward` returns, called in the way that its parameters ask for; a coroutine is awaited.

    A function with a parameter `completions`, or one that does not take three positional arguments, is called by
    keyword, as TRL does: `prompts`, `completions` (also as `responses`), `metadata`, and every column of the rows as a
    list, with None where a row lacks it. It gets those that it names, and all with `**kwargs`.
    """
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # a builtin without one
        signature = None
    if signature is None or _is_positional(signature):
        returned = reward(prompts, responses, metadata)
    else:
        columns = dict.fromkeys(name for row in metadata for name in row)
        given: dict[str, Any] = {name: [row.get(name) for row in metadata] for name in columns}
        given |= {"prompts": prompts, "completions": responses}
        named = {"responses": responses, "metadata": metadata}
        given |= {name: value for name, value in named.items() if name in signature.parameters}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
        returned = reward(**{name: value for name, value in given.items() if takes_all or name in signature.parameters})
    if inspect.isawaitable(returned):
        with ThreadPoolExecutor(1) as thread:  # a notebook's own event loop is running in this one
            returned = thread.submit(asyncio.run, _awaited(returned)).result()
    return returned


def _is_positional(signature: inspect.Signature) -> bool:
    """Return whether a function takes (prompts, responses, metadata) rather than keywords."""
    try:
        signature.bind((), (), ())
    except TypeError:
        return False
    return "completions" not in signature.parameters


async def _awaited(returned: Any) -> Any:
    return await returned


def score(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    skip: bool = False,
) -> Tensor:
    """Return the rewards (S,) as float32, or raise a UserError with the response that has no finite reward.

    Args:
        skip: return NaN where the reward is None, instead of raising.
    """
    try:
        returned = call_reward(reward, prompts, responses, metadata)
    except UserError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"the reward failed at {place.filename}:{place.lineno}: {type(error).__name__}: {error}"
        ) from error
    missing = torch.zeros(len(responses), dtype=torch.bool)
    if skip and isinstance(returned, Sequence) and len(returned) == len(responses):
        missing = torch.tensor([value is None for value in returned])
        returned = [math.nan if value is None else value for value in returned]
    elif isinstance(returned, Sequence) and None in returned:
        where = list(returned).index(None)
        raise UserError(
            f"the reward is None for {_response(responses, prompts, where)}; every response needs a finite number"
            " (reward_none=skip leaves it to the others of a list)"
        )
    try:
        values = torch.as_tensor(returned).detach().float().cpu()
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"the reward returned no numbers for {len(responses)} responses: {error}") from error
    if values.shape != (len(responses),):
        raise UserError(
            f"the reward returned shape {tuple(values.shape)} for {len(responses)} responses; one number each is needed"
        )
    if (wrong := ~torch.isfinite(values) & ~missing).any():
        bad = int(wrong.nonzero()[0])
        raise UserError(f"the reward is {values[bad].item()} for {_response(responses, prompts, bad)}")
    return values


def score_groups(
    reward: Reward,
    prompts: Sequence[str],
    responses: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    skip: bool = False,
) -> dict[str, Tensor]:
    """Return the rewards (S,) as "", and under its name the scores (S,) of every group of a reward that has groups.

    Args:
        skip: as in :func:`score`, of a reward without groups.
    """
    if not isinstance(reward, GroupedReward) or not reward.groups:
        return {"": score(reward, prompts, responses, metadata, skip)}
    parts: dict[str, Tensor] = {}

    def total(*texts: Any) -> Tensor:
        parts.update(reward.by_group(*texts))
        return combined(parts, reward.how)

    return {"": score(total, prompts, responses, metadata)} | parts


def _response(responses: Sequence[str], prompts: Sequence[str], place: int) -> str:
    """Return a response and its prompt for a message."""
    if place >= len(responses):
        return f"response {place + 1} of {len(responses)}"
    return f"the response {responses[place][:200]!r} to {prompts[place][:200]!r}"
