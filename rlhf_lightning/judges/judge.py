"""What a judge is: it compares two responses in both orders, rates single responses, or ranks several.

A judge is an annotator whose answers are measured: every order, every sample and every failure is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from rlhf_lightning.data.comparisons import Comparison

UNREADABLE, REFUSAL = "no verdict", "refusal"
"""Failures of an answer that came; any other text of a failure says why none came."""
Value = float | tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One answer of a judge to one question.

    Args:
        value: of a pair the probability that the first response of the comparison is better, in whatever order it was
            shown; of a rating the number; of a ranking the rank of each response, 0 the best. None where it failed.
        failure: why there is no value: `UNREADABLE`, `REFUSAL`, or why no answer came.
        text: what the judge wrote, where it wrote.
        prompt_tokens, completion_tokens: what was read and written for it.
        seconds: until it came.
        cost: what it cost, in the currency of the prices; 0 where it was cached.
        mass: the share of the probability of all tokens that those of verdicts have, where they were looked at.
        cached: it was on disk.
    """

    value: Value | None
    failure: str | None = None
    text: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0
    mass: float | None = None
    cached: bool = False


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair, which it was asked about in both orders.

    Args:
        forward: an answer per sample, the first response shown first.
        swapped: an answer per sample, the first response shown second; its values, too, are probabilities that the
            first response is better.
        principle: the one by which it judged.
        votes: of several judges, the probability of each.
    """

    forward: tuple[Answer, ...]
    swapped: tuple[Answer, ...]
    principle: str | None = None
    votes: dict[str, float | None] | None = None

    @property
    def orders(self) -> tuple[float | None, float | None]:
        """The probability that the first response is better, shown first and shown second: the mean of the samples."""
        return _mean(self.forward), _mean(self.swapped)

    @property
    def probability(self) -> float | None:
        """The probability that the first response is better, the mean of both orders; None where one has no answer."""
        forward, swapped = self.orders
        return None if forward is None or swapped is None else (forward + swapped) / 2

    @property
    def outcome(self) -> float | None:
        """1 where the first response is better in both orders, 0 where the second is, else 0.5, a tie.

        None where one order has no answer. A verdict that changes with the order is a tie, as in Zheng et al. 2023
        (arXiv 2306.05685).
        """
        forward, swapped = self.orders
        if forward is None or swapped is None:
            return None
        return float(min(forward, swapped) > 0.5) + 0.5 * (min(forward, swapped) <= 0.5 <= max(forward, swapped))

    @property
    def answers(self) -> tuple[Answer, ...]:
        """All answers."""
        return self.forward + self.swapped


@dataclass(frozen=True)
class Rating:
    """What a judge says of one response: an answer per sample."""

    answers: tuple[Answer, ...]
    principle: str | None = None

    @property
    def value(self) -> float | None:
        """The mean of the samples; None where all failed."""
        return _mean(self.answers)


@dataclass(frozen=True)
class Ranking:
    """What a judge says of several responses at once, listed in order (`forward`) and in reverse (`swapped`)."""

    forward: tuple[Answer, ...]
    swapped: tuple[Answer, ...]
    principle: str | None = None

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The rank of each response by its mean rank, equal for ties; None where one order has no answer."""
        orders = [[a.value for a in part if isinstance(a.value, tuple)] for part in (self.forward, self.swapped)]
        if not all(orders):
            return None
        means = [sum(fmean(column) for column in parts) for parts in zip(*(zip(*o, strict=True) for o in orders))]  # noqa: B905
        levels = sorted({round(mean, 9) for mean in means})
        return tuple(levels.index(round(mean, 9)) for mean in means)

    @property
    def answers(self) -> tuple[Answer, ...]:
        """All answers."""
        return self.forward + self.swapped


class Judge(Protocol):
    """Judges responses. Results come as they are finished, each with the place of its comparison in the argument."""

    name: str
    """Of the annotator that it is in labels."""
    on_failure: str
    """"skip" returns a failed answer, "error" raises a UserError for it."""

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (place, verdict) of comparisons with two responses, each asked about in both orders."""
        ...

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        """Yield (place, a rating per response) of comparisons with any number of responses."""
        ...

    def rank(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Ranking]]:
        """Yield (place, ranking) of comparisons with two or more responses."""
        ...

    def close(self) -> None:
        """Free what it holds; a call that is running in another thread ends."""
        ...


def _mean(answers: Sequence[Answer]) -> float | None:
    values = [answer.value for answer in answers if isinstance(answer.value, int | float)]
    return fmean(values) if values else None
