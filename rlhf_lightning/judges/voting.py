"""Several judges and a vote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.judges.judge import Answer, Judge, Ranking, Rating, Verdict

VOTES = ("mean", "majority")
CHUNK = 64
"""Comparisons that every judge judges before the next ones."""


class Jury:
    """A judge that asks others.

    A judge whose answer failed has no vote; where all failed, so did the vote.

    Args:
        members: judges by name, or the settings of judges.
        vote: "mean" of their probabilities and ratings, or "majority": each has one vote, a tie half a vote.
        name: the annotator that it is in labels.
    """

    def __init__(
        self, members: Mapping[str, Judge | Mapping[str, Any]], vote: str = "mean", name: str = "jury"
    ) -> None:
        if vote not in VOTES:
            raise UserError(f"judge.vote={vote} is not one of {', '.join(VOTES)}.{nearest(str(vote), VOTES)}")
        if not members:
            raise UserError("judge=many needs members: judge.members.<name>.kind=<judge>")
        self.members, self.vote, self.name = {n: _made(n, m) for n, m in members.items()}, vote, str(name)
        self.on_failure = "error" if all(m.on_failure == "error" for m in self.members.values()) else "skip"

    def to(self, device: Any) -> Jury:
        """Move the members that are models of this process and return self."""
        for member in self.members.values():
            if hasattr(member, "to"):
                member.to(device)  # type: ignore[attr-defined]
        return self

    def close(self) -> None:
        """Close every member."""
        for member in self.members.values():
            member.close()

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (place, vote)."""
        return self._each(comparisons, lambda judge, part: judge.compare(part), self._voted)

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        """Yield (place, the mean rating of each response)."""
        return self._each(comparisons, lambda judge, part: judge.rate(part), self._rated)

    def rank(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Ranking]]:
        """Yield (place, the ranking by the mean rank)."""
        return self._each(comparisons, lambda judge, part: judge.rank(part), self._ranked)

    def _each(
        self,
        comparisons: Sequence[Comparison],
        ask: Callable[[Judge, Sequence[Comparison]], Iterator[tuple[int, Any]]],
        combine: Callable[[dict[str, Any]], Any],
    ) -> Iterator[tuple[int, Any]]:
        for begin in range(0, len(comparisons), CHUNK):
            part = comparisons[begin : begin + CHUNK]
            votes = {name: dict(ask(judge, part)) for name, judge in self.members.items()}
            for number in range(len(part)):
                yield begin + number, combine({name: results[number] for name, results in votes.items()})

    def _voted(self, verdicts: dict[str, Verdict]) -> Verdict:
        votes = {name: verdict.probability for name, verdict in verdicts.items()}
        sides = zip(*(verdict.orders for verdict in verdicts.values()), strict=True)
        forward, swapped = (self._answer(list(side)) for side in sides)
        kept = [answer for verdict in verdicts.values() for answer in verdict.answers]
        spent = Answer(
            None, None, None, sum(a.prompt_tokens for a in kept), sum(a.completion_tokens for a in kept),
            sum(a.seconds for a in kept), sum(a.cost for a in kept), None, all(a.cached for a in kept),
        )  # fmt: skip
        return Verdict((_spending(forward, spent),), (swapped,), _principle(verdicts.values()), votes)

    def _answer(self, values: list[float | None]) -> Answer:
        known = [value for value in values if value is not None]
        if not known:
            return Answer(None, "no judge gave a verdict")
        if self.vote == "majority":
            known = [0.5 if value == 0.5 else float(value > 0.5) for value in known]
        return Answer(fmean(known))

    def _rated(self, ratings: dict[str, tuple[Rating, ...]]) -> tuple[Rating, ...]:
        return tuple(
            Rating(tuple(answer for rating in of_one for answer in rating.answers), _principle(of_one))
            for of_one in zip(*ratings.values(), strict=True)
        )

    def _ranked(self, rankings: dict[str, Ranking]) -> Ranking:
        return Ranking(
            tuple(answer for ranking in rankings.values() for answer in ranking.forward),
            tuple(answer for ranking in rankings.values() for answer in ranking.swapped),
            _principle(rankings.values()),
        )


def _made(name: str, member: Judge | Mapping[str, Any]) -> Judge:
    from rlhf_lightning.judges.table import load_judge

    return load_judge(member, f"judge.members.{name}") if isinstance(member, Mapping) else member


def _principle(results: Any) -> str | None:
    names = {result.principle for result in results}
    return names.pop() if len(names) == 1 else None


def _spending(answer: Answer, spent: Answer) -> Answer:
    return Answer(
        answer.value, answer.failure, None, spent.prompt_tokens, spent.completion_tokens, spent.seconds, spent.cost,
        None, spent.cached,
    )  # fmt: skip
