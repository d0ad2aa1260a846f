"""Comparisons and what annotators say of them: the record that the labeling page, agreement and aggregation share.

A *comparison* is a prompt with two or more responses; a *labeled comparison* is one annotator's ranking of them. Its
row is read as a ranking by :mod:`rlhf_lightning.data.records`, so a file of labels is training data too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_lightning.data.messages import Message

OF_OTHERS = {
    "prompt", "messages", "conversations", "conversation", "response", "completion", "chosen", "rejected", "responses",
    "ranking", "rating", "scores", "group_scores", "disagreement", "margin", "label", "annotator", "group",
}  # fmt: skip
"""Columns about the prompt, which is written as `prompt`, or about other responses."""


@dataclass(frozen=True)
class Comparison:
    """A prompt with two or more responses.

    Args:
        id: the same for every annotator's label of it.
        prompt: the conversation that the responses answer.
        responses: their texts; indices below refer to this order.
        metadata: the other columns of its row.
    """

    id: str
    prompt: list[Message]
    responses: tuple[str, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


def digest(prompt: Sequence[Message], responses: Sequence[str]) -> str:
    """Return the id of a comparison without one: the same in whatever order its responses are listed."""
    texts = sorted(text.strip() for text in responses)
    turns = [[message["role"], message["content"].strip()] for message in prompt]
    return hashlib.sha256(json.dumps([turns, texts]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LabeledComparison:
    """What one annotator says of a comparison.

    Args:
        comparison: what was compared.
        ranking: the rank of each response, 0 the best; equal ranks are ties.
        annotator: who says so, a person or a judge.
        group: the annotator's self-described group.
        strength: of a pair: 0 a tie, 1 slightly better, 2 better, 3 much better.
        shown: the order in which the responses were shown, left to right: indices of `responses`.
        seconds: the time taken.
        time: when, ISO 8601 in UTC.
        check: of a check question: the index of the response that is known to be best.
        acceptable: whether each response is good enough to be used at all, where the annotator was asked.
    """

    comparison: Comparison
    ranking: tuple[int, ...]
    annotator: str
    group: str | None = None
    strength: int | None = None
    shown: tuple[int, ...] | None = None
    seconds: float | None = None
    time: str | None = None
    check: int | None = None
    acceptable: tuple[bool, ...] | None = None

    @property
    def value(self) -> int:
        """Of a pair: -1 where the first response is better, 1 where the second, 0 for a tie."""
        first, second = self.ranking
        return (first > second) - (first < second)

    def aligned(self, comparison: Comparison) -> LabeledComparison:
        """Return the same label with the responses in the order of `comparison`, which has the same texts.

        Raises:
            ValueError: its responses are others.
        """
        mine = [text.strip() for text in self.comparison.responses]
        order: list[int] = []  # place there -> place here
        for text in comparison.responses:
            order.append(next((i for i, other in enumerate(mine) if other == text.strip() and i not in order), -1))
        if -1 in order or len(order) != len(mine):
            raise ValueError("other responses")
        place = {here: there for there, here in enumerate(order)}
        return replace(
            self,
            comparison=comparison,
            ranking=tuple(self.ranking[i] for i in order),
            shown=self.shown and tuple(place[i] for i in self.shown),
            check=None if self.check is None else place[self.check],
            acceptable=self.acceptable and tuple(self.acceptable[i] for i in order),
        )

    def row(self) -> dict[str, Any]:
        """Return it as a row: `id`, `prompt`, `responses`, `ranking`, `annotator` and what else is known."""
        known = {
            "group": self.group, "strength": self.strength, "shown": self.shown and list(self.shown),
            "seconds": self.seconds, "time": self.time, "check": self.check,
            "acceptable": self.acceptable and list(self.acceptable),
        }  # fmt: skip
        return {
            **self.comparison.metadata,
            "id": self.comparison.id,
            "prompt": self.comparison.prompt,
            "responses": list(self.comparison.responses),
            "ranking": list(self.ranking),
            "annotator": self.annotator,
            **{name: value for name, value in known.items() if value is not None},
        }


@dataclass(frozen=True)
class ItemLabel:
    """One annotator's label of one item, such as whether a response is a refusal: it says nothing of others.

    Args:
        id: the same for every annotator's label of the item.
        label: one of a set of names without an order.
        annotator, group, seconds: as in :class:`LabeledComparison`.
    """

    id: str
    label: str
    annotator: str
    group: str | None = None
    seconds: float | None = None
