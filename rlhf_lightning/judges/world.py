"""A scripted judge of the built-in world, with declared errors, and what the world's principles say of a response."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf_lightning.data.comparisons import Comparison, digest
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.judges.constitution import Constitution, Principle, load_constitution
from rlhf_lightning.judges.judge import Answer, Ranking, Rating, Verdict
from rlhf_lightning.world.gold import Score, gold, row_problem
from rlhf_lightning.world.labeller import ranking, shown_values

HIGH_RISK, LOOKS_HARMFUL = "high-risk", "looks-harmful"
"""Names of the rules for conflicts that the world knows."""


def _harmless(row: dict[str, Any], score: Score, rules: set[str]) -> bool:
    # without the rule, what looks harmful is harmful
    answered = row["family"] == "lookalike" and LOOKS_HARMFUL not in rules and not score.refused
    return answered or (row["family"] == "harmful" and not score.correct)


def _helpful(row: dict[str, Any], score: Score, rules: set[str]) -> bool:
    # without the rule, declining is not helpful, whatever the request
    declined = row["family"] == "harmful" and HIGH_RISK not in rules and score.refused
    return declined or score.over_refused or (score.helpful is not None and not score.correct)


def _honest(row: dict[str, Any], score: Score, rules: set[str]) -> bool:
    return score.honest is not None and not score.correct and not score.refused


def _concise(row: dict[str, Any], score: Score, rules: set[str]) -> bool:
    return score.total < score.outcome


READINGS: dict[str, Callable[[dict[str, Any], Score, set[str]], bool]] = {
    "harmless": _harmless, "helpful": _helpful, "honest": _honest, "concise": _concise,
}  # fmt: skip
"""Principle -> whether a response with this gold score violates it."""


def violates(principle: str, constitution: Constitution, row: dict[str, Any], response: str) -> bool:
    """Return whether a response violates a principle, under the constitution's rules for conflicts.

    Args:
        row: the columns of a prompt of the world.

    Raises:
        KeyError: a principle that the world does not know; see :func:`check_known`.
    """
    return READINGS[principle](row, gold(row, response), {conflict.name for conflict in constitution.conflicts})


def check_known(constitution: Constitution, key: str) -> None:
    """Raise a UserError for a principle or a rule that means nothing in the world."""
    for kind, given, known in (
        ("principle", constitution.principles, list(READINGS)),
        ("conflict rule", constitution.conflicts, [HIGH_RISK, LOOKS_HARMFUL]),
    ):
        for member in given:
            if member.name not in known:
                raise UserError(
                    f"{key}: the built-in world has no {kind} {member.name!r}; it knows {', '.join(known)}."
                    f"{nearest(member.name, known)}"
                )


TRUMPS = 4.0
"""Deducted where a principle is violated: more than the gold reward can make up for, whose range is 2.8."""


class WorldJudge:
    """Prefers the response with the higher gold reward, but for errors; a function of the seed and of the texts.

    With a constitution a principle is drawn for each comparison: a response that violates it is worse than one that
    does not, and the gold reward decides between the others.

    Args:
        error_rate: probability that the verdict on a pair is wrong, in both orders; in a ranking, that two neighbors
            change places; of a rating, that it has the other sign.
        position_bias: added to the value of the response that is shown first, in units of the gold reward.
        constitution: a constitution whose principles the world knows, see :func:`check_known`; None judges by gold.

    Raises:
        UserError: a number that cannot be; when it judges, a response to a prompt that is not the world's.
    """

    def __init__(
        self,
        error_rate: float = 0.0,
        position_bias: float = 0.0,
        constitution: Any = None,
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        check_number("judge.error_rate", error_rate, "[0, 1]")
        check_number("judge.position_bias", position_bias, "(-inf, inf)")
        self.error_rate, self.position_bias, self.seed = error_rate, position_bias, seed
        self.name, self.on_failure = name or "world", "error"
        self.constitution = None if constitution is None else load_constitution(constitution)
        if self.constitution is not None:
            check_known(self.constitution, "judge.constitution")

    def close(self) -> None:
        """Nothing is held."""

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (place, verdict) of comparisons with two responses."""
        for place, comparison in enumerate(comparisons):
            principle, values, seed = self._perceived(comparison)
            forward, swapped = (self._ranks(values, shown, seed) for shown in ((0, 1), (1, 0)))
            answers = [(Answer((1 + ranks[1] - ranks[0]) / 2),) for ranks in (forward, swapped)]
            yield place, Verdict(*answers, principle=principle)

    def rank(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Ranking]]:
        """Yield (place, ranking) of comparisons."""
        for place, comparison in enumerate(comparisons):
            principle, values, seed = self._perceived(comparison)
            orders = (list(range(len(values))), list(reversed(range(len(values)))))
            answers = [(Answer(self._ranks(values, shown, seed)),) for shown in orders]
            yield place, Ranking(*answers, principle=principle)

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        """Yield (place, a rating per response) of comparisons."""
        for place, comparison in enumerate(comparisons):
            principle, values, _ = self._perceived(comparison)
            ratings = []
            for text, value in zip(comparison.responses, values, strict=True):
                wrong = random.Random(f"{self._key(comparison, [text])}:rating").random() < self.error_rate
                ratings.append(Rating((Answer(-value if wrong else value),), principle))
            yield place, tuple(ratings)

    def _key(self, comparison: Comparison, responses: Sequence[str]) -> str:
        return f"{self.seed}:{self.name}:{digest(comparison.prompt, responses)}"

    def _ranks(self, values: Sequence[float], shown: Sequence[int], seed: str) -> tuple[int, ...]:
        # the same random numbers in every order: it is wrong about the pair, not about the order
        return ranking(shown_values(values, shown, self.position_bias), self.error_rate, random.Random(seed))

    def _perceived(self, comparison: Comparison) -> tuple[str | None, list[float], str]:
        """Return the principle that judges, the value of each response in its light, and the seed of the errors."""
        row = comparison.metadata
        if problem := row_problem(row):
            raise UserError(
                f"comparison {comparison.id} is no row of the built-in world ({problem}), and only of those "
                "judge=world knows what a response is worth; sample candidates with data=world"
            )
        seed = self._key(comparison, comparison.responses)
        values = [gold(row, text).total for text in comparison.responses]
        if self.constitution is None:
            return None, values, seed
        principle: Principle = self.constitution.sample(seed)
        violated = [violates(principle.name, self.constitution, row, text) for text in comparison.responses]
        return principle.name, [v - TRUMPS * bad for v, bad in zip(values, violated, strict=True)], seed
