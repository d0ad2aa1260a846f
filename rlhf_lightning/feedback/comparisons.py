"""Comparisons and what annotators say of them: the record that the labeling page, agreement and aggregation share.

A *comparison* is a prompt with two or more responses; a *labeled comparison* is one annotator's ranking of them. Its
row is read as a ranking by :mod:`rlhf_lightning.data.records`, so a file of labels is training data too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.data.messages import Message

OF_OTHERS = {
    "prompt", "messages", "conversations", "conversation", "response", "completion", "chosen", "rejected", "responses",
    "ranking", "rating", "scores", "margin", "label", "annotator",
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

    def row(self) -> dict[str, Any]:
        """Return it as a row: `id`, `prompt`, `responses`, `ranking`, `annotator` and what else is known."""
        known = {
            "group": self.group, "strength": self.strength, "shown": self.shown and list(self.shown),
            "seconds": self.seconds, "time": self.time, "check": self.check,
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
