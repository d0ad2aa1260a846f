"""The reward of a judge: its rating of each response, and on request which of two responses it prefers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.data.comparisons import Comparison, digest
from rlhf_lightning.data.messages import turn
from rlhf_lightning.errors import UserError
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.judges.table import load_judge


def load_judged(name: str, dtype: str, settings: Mapping[str, Any] | None) -> JudgeReward:
    """Return the reward `judge:<judge>` of the settings below `judge`, which have the `dtype` of its model."""
    if not settings or not settings.get("kind"):
        raise UserError(f"reward_from={name}: the settings of the judge are missing; choose judge={name[6:]}")
    return JudgeReward(load_judge(settings))


class JudgeReward:
    """Scores responses by a judge's ratings.

    Args:
        judge: rates and compares.
        fill: a failed rating is the mean of the other ratings of the call, in place of None.
    """

    def __init__(self, judge: Judge, fill: bool = False) -> None:
        self.judge, self.fill = judge, fill

    def to(self, device: torch.device | str) -> JudgeReward:
        """Move a judge that is a model and return self."""
        if hasattr(self.judge, "to"):
            self.judge.to(device)  # type: ignore[attr-defined]
        return self

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> list[float | None]:
        """Return the rating of each response; responses to the same conversation are rated together."""
        groups: dict[str, list[int]] = {}
        for place, (prompt, extra) in enumerate(zip(prompts, metadata, strict=True)):
            groups.setdefault(digest(conversation(prompt, extra), ()), []).append(place)
        asked = [
            comparison([prompts[i] for i in p], [responses[i] for i in p], metadata[p[0]]) for p in groups.values()
        ]
        scores: list[float | None] = [None] * len(responses)
        members = list(groups.values())
        for number, ratings in self.judge.rate(asked):
            for place, rating in zip(members[number], ratings, strict=True):
                scores[place] = rating.value
        known = [score for score in scores if score is not None]
        return [fmean(known) if score is None else score for score in scores] if self.fill and known else scores

    def compare(
        self, prompts: Sequence[str], pairs: Sequence[tuple[str, str]], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        """Return the probability (P,) that the first response of each pair is better, the mean of both orders.

        It is 0.5, no preference, where the judge gave no verdict.
        """
        asked = [comparison([p], pair, extra) for p, pair, extra in zip(prompts, pairs, metadata, strict=True)]
        result = torch.full((len(asked),), 0.5)
        for number, verdict in self.judge.compare(asked):
            if verdict.probability is not None:
                result[number] = verdict.probability
        return result


def conversation(prompt: str, metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the conversation that is answered, as rewards get it."""
    return metadata.get("messages") or [turn("user", prompt)]


def comparison(prompts: Sequence[str], responses: Sequence[str], metadata: dict[str, Any]) -> Comparison:
    """Return responses to one prompt as a comparison, whose id depends on their texts."""
    content = conversation(prompts[0], metadata)
    return Comparison(digest(content, responses), content, tuple(responses), metadata)
