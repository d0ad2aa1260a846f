"""A simulated labeller: the gold reward seen through declared biases, values and noise."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.world.gold import gold
from rlhf_lightning.world.prompts import declared


@dataclass(frozen=True)
class Labeller:
    """Prefers the response with the higher perceived value.

    Perceived value = weight of the group for the side the prompt tests * outcome - padding cost
    + length_bias * words / 10 + agreement_bias * [agrees with the user's belief] + refusal_bias * [refuses].

    Args:
        noise: probability of a flipped preference.
        length_bias, agreement_bias, refusal_bias: in units of the gold reward; 0 is unbiased.
        group: a group of `world.yaml`, or "mixed" to draw one for every row.
    """

    noise: float = 0.0
    length_bias: float = 0.0
    agreement_bias: float = 0.0
    refusal_bias: float = 0.0
    group: str = "balanced"

    def __post_init__(self) -> None:
        names = [*declared()["groups"], "mixed"]
        if self.group not in names:
            raise UserError(f"data.world.labeller.group={self.group!r} is not one of {', '.join(names)}")
        if not 0 <= self.noise <= 1:
            raise UserError(f"data.world.labeller.noise={self.noise} is not a probability")

    def annotator(self, rng: random.Random) -> str:
        """Return the id of the person who labels a row, group and number."""
        groups = list(declared()["groups"])
        group = rng.choice(groups) if self.group == "mixed" else self.group
        return f"{group}-{rng.randrange(4)}"

    def value(self, row: dict[str, Any], response: str, annotator: str) -> float:
        """Return the value of a response to `annotator`, before noise."""
        weights = declared()["groups"][annotator.rpartition("-")[0]]
        score = gold(row, response)
        sides = [n for n in ("helpful", "honest", "harmless") if getattr(score, n) is not None]
        weight = sum(weights[n] for n in sides) / len(sides)
        value = weight * score.outcome + (score.total - score.outcome) + self.length_bias * score.words / 10
        return value + self.agreement_bias * score.flattered + self.refusal_bias * score.refused

    def prefers_first(self, row: dict[str, Any], first: str, second: str, annotator: str, rng: random.Random) -> bool:
        """Return whether `first` is chosen over `second`."""
        gap = self.value(row, first, annotator) - self.value(row, second, annotator)
        better = gap > 0 if gap else rng.random() < 0.5
        return better != (rng.random() < self.noise)
