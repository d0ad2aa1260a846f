"""Rewards that compare two responses to a prompt, such as a judge, where others score one.

Such a reward has a method `compare(prompts, pairs, metadata)` that returns for each pair of responses to a prompt the
probability (P,) that the first is the better one; 0.5 is no preference, and so is NaN, no verdict.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rlhf_lightning.errors import UserError

log = logging.getLogger(__name__)


def compares(reward: Any) -> bool:
    """Return whether a reward compares two responses."""
    return callable(getattr(reward, "compare", None))


class WinRate:
    """Scores a response by how often it is preferred to each other response to its prompt, the mean probability.

    Of two responses these are p and 1 - p. Equal texts are not compared and have probability 0.5.

    Args:
        judge: has the method `compare`.
        n: responses per prompt, at least 2; they follow each other.
    """

    def __init__(self, judge: Any, n: int) -> None:
        self.judge, self.n = judge, n

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        n = self.n
        places = [(s + i, s + j) for s in range(0, len(responses), n) for i, j in combinations(range(n), 2)]
        asked = [(i, j) for i, j in places if responses[i].strip() != responses[j].strip()]
        wins = torch.zeros(len(responses))
        for i, j in set(places) - set(asked):
            wins[i] += 0.5
            wins[j] += 0.5
        probabilities = self.compare(prompts, responses, metadata, asked)
        for (i, j), p in zip(asked, probabilities, strict=True):
            wins[i] += p
            wins[j] += 1 - p
        return wins / (n - 1)

    def compare(
        self,
        prompts: Sequence[str],
        responses: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        places: Sequence[tuple[int, int]],
    ) -> list[float]:
        """Return the probability of each pair of places that its first response is the better one.

        Raises:
            UserError: the judge returned something else.
        """
        if not places:
            return []
        returned = self.judge.compare(
            [prompts[i] for i, _ in places],
            [(responses[i], responses[j]) for i, j in places],
            [metadata[i] for i, _ in places],
        )
        values = torch.as_tensor(returned).detach().float().cpu()
        failed = values.isnan()
        if values.shape != (len(places),) or not (failed | ((values >= 0) & (values <= 1))).all():
            raise UserError(
                f"the judge returned {values.tolist()[:4]} for {len(places)} pairs; one probability each is needed"
            )
        if failed.any():
            log.warning("the judge has no verdict on %d of %d pairs: no preference", int(failed.sum()), len(places))
        return values.nan_to_num(0.5).tolist()
