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
from rlhf_lightning.rewards.ensemble import DISAGREEMENT, Aggregation, aggregated, check_aggregation, disagreement
from rlhf_lightning.rewards.groups import MEAN, Combination, GroupedReward, combined
from rlhf_lightning.rewards.spec import parse

Reward = Callable[..., Any]
"""Called by :func:`call_reward`; may be `async`."""


NONE = ("error", "skip")
"""Values of `reward_none`: what it means that a reward returns None for a response, an error or no score."""


class Ensemble:
    """Several rewards combined into one; with `none="skip"` those that give a response a score.

    Args:
        how: see :func:`rlhf_lightning.rewards.ensemble.aggregated`. Other than the mean it compares the scores of the
            members, so reward models have to be normalized.
    """

    def __init__(self, members: Sequence[Reward], none: str = "error", how: Aggregation = MEAN) -> None:
        if none not in NONE:
            raise UserError(f"reward_none={none!r} is not one of {', '.join(NONE)}.{nearest(str(none), NONE)}")
        check_aggregation(how)
        if how != MEAN:
            if len(members) < 2:
                raise UserError(f"reward_ensemble={how}: reward_from is a list of one reward; it needs two or more")
            if raw := next((m for m in members if getattr(m, "normalized", True) is False), None):
                raise UserError(
                    f"reward_ensemble={how} compares the scores of its members, and {raw.folder} is not normalized: "  # type: ignore[attr-defined]
                    "its config.json has no reward_mean and reward_std, which reward.normalize=true writes"
                )
        self.members, self.none, self.how = members, none, how

    def to(self, device: torch.device | str) -> Ensemble:
        """Move the members that are models and return self."""
        for member in self.members:
            to_device(member, device)
        return self

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return aggregated(self.by_member(prompts, responses, metadata), self.how)

    def by_member(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        """Return the scores (M, S) of the members, NaN where one has none."""
        skip = self.none == "skip"
        scores = torch.stack([score(member, prompts, responses, metadata, skip) for member in self.members])
        if (missing := scores.isnan().all(0)).any():
            place = int(missing.nonzero()[0])
            raise UserError(
                f"no reward of {len(self.members)} has a score for {_response(responses, prompts, place)}; with "
                "reward_none=skip every response needs one of them"
            )
        return scores


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
    ensemble: Aggregation = MEAN,
) -> Reward:
    """Return the reward that `spec` names: of a list of several an ensemble, of a map one reward per group.

    Args:
        spec: a callable, a value of `reward_from` (:func:`rlhf_lightning.rewards.spec.parse`), a list or map of these.
        dtype: of the weights of reward models.
        how: how the scores of groups are combined, a value of `reward_groups`.
        none: what a None from a member of a list, or from a judge, means: a value of `reward_none`.
        settings: the configuration, of which `judge:<judge>` reads the key `judge`.
        ensemble: how the scores of a list are combined, a value of `reward_ensemble`.

    Raises:
        UserError: when the module, the function or the folder is not there, `how` is about groups that are not, or
            `ensemble` about a list that is not.
    """
    check_aggregation(ensemble)
    if ensemble != MEAN and not isinstance(spec, list | tuple):
        raise UserError(f"reward_ensemble={ensemble}: reward_from={spec} is no list of rewards")
    reward = _load(spec, dtype, how, none, settings, ensemble)
    if how != MEAN and not any(getattr(r, "groups", None) for r in [reward, *getattr(reward, "members", ())]):
        raise UserError(
            f"reward_groups={how}: reward_from={spec} has no groups; a reward model gets them with reward.groups"
        )
    return reward


def _load(
    spec: Any,
    dtype: str,
    how: Combination,
    none: str,
    settings: Mapping[str, Any] | None,
    ensemble: Aggregation = MEAN,
) -> Reward:
    if callable(spec):
        return spec
    if isinstance(spec, Mapping) and spec:
        return RewardPerGroup({str(n): _load(member, dtype, how, none, settings) for n, member in spec.items()}, how)
    members = [_load(m, dtype, how, NONE[0], settings) for m in spec] if isinstance(spec, list | tuple) else []
    if members:
        return Ensemble(members, none, ensemble)
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
    """Return the rewards (S,) as "", and by name the parts (S,) that they have.

    These are the scores of every group of a reward with groups, and as "disagreement" the standard deviation over the
    members of an ensemble.

    Args:
        skip: as in :func:`score`, of a reward without parts.
    """
    parts: dict[str, Tensor] = {}

    def total(*texts: Any) -> Any:
        if isinstance(reward, Ensemble) and len(reward.members) > 1:
            scores = reward.by_member(*texts)
            parts[DISAGREEMENT] = disagreement(scores)
            return aggregated(scores, reward.how)
        if isinstance(reward, GroupedReward) and reward.groups:
            parts.update(reward.by_group(*texts))
            return combined(parts, reward.how)
        return call_reward(reward, *texts)

    return {"": score(total, prompts, responses, metadata, skip)} | parts


def _response(responses: Sequence[str], prompts: Sequence[str], place: int) -> str:
    """Return a response and its prompt for a message."""
    if place >= len(responses):
        return f"response {place + 1} of {len(responses)}"
    return f"the response {responses[place][:200]!r} to {prompts[place][:200]!r}"
