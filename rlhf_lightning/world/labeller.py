"""A simulated labeller: the gold reward seen through declared biases, values and noise."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.world.gold import gold, measures
from rlhf_lightning.world.prompts import declared

SIDES = ("helpful", "honest", "harmless")


def group_of(annotator: str) -> str:
    """Return the group of an annotator, as "careful" of "careful-2"."""
    return annotator.rpartition("-")[0]


def group_value(row: dict[str, Any], response: str, group: str) -> float:
    """Return what a response is worth to a group: weight for the side that the prompt tests * outcome, less padding.

    That is the group's own gold reward; of the group "balanced" it is the gold reward.
    """
    weights, score = declared()["groups"][group], gold(row, response)
    sides = [name for name in SIDES if getattr(score, name) is not None]
    weight = sum(weights[name] for name in sides) / len(sides)
    return weight * score.outcome + weights.get("padding", 1.0) * (score.total - score.outcome)


def group_gold(group: str) -> Callable[..., list[float]]:
    """Return the gold reward of a group as a reward callable.

    Raises:
        UserError: a group that is not declared.
    """
    check_group(group, "world:")

    def reward(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
        return [group_value(row, response, group) for row, response in zip(metadata, responses, strict=True)]

    # what evaluate reports beside it; gold stands for this group's
    reward.measures = lambda row, response: {  # pyright: ignore[reportFunctionMemberAccess]
        name: value for name, value in measures(row, response).items() if not name.startswith("gold")
    }
    return reward


def check_group(group: str, key: str, others: Sequence[str] = ()) -> None:
    """Raise a UserError for a group that `world.yaml` does not declare and that is none of `others`."""
    names = [*declared()["groups"], *others]
    if group not in names:
        raise UserError(f"{key}{group!r} is not one of {', '.join(names)}.{nearest(group, names)}")


def check_shares(shares: Mapping[str, Any], key: str) -> dict[str, float]:
    """Return the shares of groups, scaled to a sum of 1.

    Raises:
        UserError: no group, one that is not declared, or a share that is no number of at least 0.
    """
    for group, share in shares.items():
        check_group(group, f"{key}: ")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < math.inf:
            raise UserError(f"{key}.{group}={share!r} is not a number of at least 0")
    total = math.fsum(shares.values())
    if not total:
        raise UserError(f"{key}={dict(shares)} gives no group a share above 0")
    return {group: share / total for group, share in shares.items() if share}


def ranking(values: Sequence[float], noise: float, rng: random.Random, ties: bool = True) -> tuple[int, ...]:
    """Return the rank of each of K responses, 0 the best, as somebody sees them who makes mistakes.

    Args:
        values: (K,) perceived values.
        noise: probability that two neighbors of the ranking change places; of a pair that it is flipped.
        ties: responses of equal value share a rank; otherwise chance decides.
    """
    seen = [round(value, 6) for value in values]  # equal worth must not differ by rounding
    order = sorted(range(len(seen)), key=lambda i: (-seen[i], 0.0 if ties else rng.random()))
    tied = [ties and seen[a] == seen[b] for a, b in pairwise(order)]
    ranks = [sum(not tie for tie in tied[:place]) for place in range(len(order))]
    for place in range(len(order) - 1):
        if rng.random() < noise:
            order[place], order[place + 1] = order[place + 1], order[place]
    ranking = [0] * len(order)
    for place, number in enumerate(order):
        ranking[number] = ranks[place]
    return tuple(ranking)


def shown_values(values: Sequence[float], shown: Sequence[int], position_bias: float) -> list[float]:
    """Return the values (K,) as perceived in the order `shown`: the first gains the bias, the last nothing."""
    seen = list(values)
    for place, number in enumerate(shown):
        seen[number] += position_bias * (len(shown) - 1 - place) / (len(shown) - 1)
    return seen


@dataclass(frozen=True)
class Labeller:
    """Prefers the response with the higher perceived value.

    Perceived value = the group's, see :func:`group_value`, + length_bias * words / 10
    + agreement_bias * [agrees with the user's belief] + refusal_bias * [refuses].

    Args:
        noise: probability of a flipped preference.
        length_bias, agreement_bias, refusal_bias: in units of the gold reward; 0 is unbiased.
        group: a group of `world.yaml`, "mixed" to draw one of those listed there for every row, or group -> share.
    """

    noise: float = 0.0
    length_bias: float = 0.0
    agreement_bias: float = 0.0
    refusal_bias: float = 0.0
    group: str | Mapping[str, float] = "balanced"

    def __post_init__(self) -> None:
        if isinstance(self.group, str):
            check_group(self.group, "data.world.labeller.group=", ["mixed"])
        else:
            check_shares(self.group, "data.world.labeller.group")
        if not 0 <= self.noise <= 1:
            raise UserError(f"data.world.labeller.noise={self.noise} is not a probability")

    def annotator(self, rng: random.Random) -> str:
        """Return the id of the person who labels a row, group and number."""
        if isinstance(self.group, str):
            group = rng.choice(declared()["mixed"]) if self.group == "mixed" else self.group
        else:
            (group,) = rng.choices(list(self.group), list(self.group.values()))
        return f"{group}-{rng.randrange(4)}"

    def value(self, row: dict[str, Any], response: str, annotator: str) -> float:
        """Return the value of a response to `annotator`, before noise."""
        score = gold(row, response)
        value = group_value(row, response, group_of(annotator)) + self.length_bias * score.words / 10
        return value + self.agreement_bias * score.flattered + self.refusal_bias * score.refused

    def prefers_first(self, row: dict[str, Any], first: str, second: str, annotator: str, rng: random.Random) -> bool:
        """Return whether `first` is chosen over `second`."""
        gap = self.value(row, first, annotator) - self.value(row, second, annotator)
        better = gap > 0 if gap else rng.random() < 0.5
        return better != (rng.random() < self.noise)
