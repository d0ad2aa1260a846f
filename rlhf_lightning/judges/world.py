"""What the principles of the constitution "world" say of a response to a prompt of the built-in world."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.judges.constitution import Constitution
from rlhf_lightning.world.gold import Score, gold

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
