"""A scripted teacher of the built-in world: it sees what a principle sees in a response, and repairs that only."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.revision import Draft, Reply
from rlhf_lightning.judges.constitution import Constitution
from rlhf_lightning.judges.world import check_known, violates
from rlhf_lightning.world.gold import SLACK, WORD, gold, row_problem
from rlhf_lightning.world.prompts import Prompt, declared, flawed

NOTHING = "Nothing is wrong with it in this light."


class WorldTeacher:
    """Criticizes and revises responses to prompts of the world, a function of the seed and of the row.

    Args:
        constitution: of principles that the world knows.
        error_rate: probability that a critique overlooks what is wrong, and so nothing is revised.
        seed: of the errors.

    Raises:
        UserError: a principle that the world does not know; when it criticizes, a prompt that is not the world's.
    """

    def __init__(self, constitution: Constitution, error_rate: float = 0.0, seed: int = 0) -> None:
        check_number("judge.error_rate", error_rate, "[0, 1]")
        check_known(constitution, "revise.constitution")
        self.constitution, self.error_rate, self.seed = constitution, error_rate, seed

    def critiques(self, drafts: Sequence[Draft], seed_parts: Sequence[int | str]) -> list[Reply]:
        return [self._critique(draft, seed_parts) for draft in drafts]

    def _critique(self, draft: Draft, seed_parts: Sequence[int | str]) -> str:
        if problem := row_problem(draft.columns):
            raise UserError(
                f"row {draft.row + 1} is no row of the built-in world ({problem}), and only of those the scripted "
                "teacher knows what is wrong with a response; give data=world, or another teacher"
            )
        overlooked = random.Random(f"{self.seed}:{draft.row}:{seed_parts}").random() < self.error_rate
        wrong = violates(draft.principle.name, self.constitution, draft.columns, draft.response)
        return f"It violates the principle: {draft.principle.judge}" if wrong and not overlooked else NOTHING

    def revisions(
        self, drafts: Sequence[Draft], critiques: Sequence[str], seed_parts: Sequence[int | str]
    ) -> list[Reply]:
        return [
            draft.response if critique == NOTHING else REPAIRS[draft.principle.name](draft.columns, draft.response)
            for draft, critique in zip(drafts, critiques, strict=True)
        ]


def _declined(row: dict[str, Any], response: str) -> str:
    return str(declared()["refusals"][0])


def _answered(row: dict[str, Any], response: str) -> str:
    """Return what was asked for, with the padding that the response has."""
    if row["family"] == "harmful":  # only where no rule puts harmlessness first
        prompt = Prompt(row["family"], row["others"][0], row["ideal"], others=tuple(row["others"]))
        return str(flawed(prompt, "complying", random.Random(0)))
    filler = [sentence for sentence in declared()["filler"] if sentence in response]
    return " ".join([row["ideal"], *filler])


def _shortened(row: dict[str, Any], response: str) -> str:
    """Return a response without filler; one that is still too long is cut after as many words as are free."""
    for sentence in declared()["filler"]:
        response = response.replace(sentence, " ")
    text = " ".join(response.split())
    if gold(row, text).words <= (allowed := len(WORD.findall(row["ideal"])) + SLACK):
        return text
    ends = [match.end() for match in re.finditer(WORD, text)]
    return text[: ends[allowed - 1]] + "."


REPAIRS = {"harmless": _declined, "helpful": _answered, "honest": _answered, "concise": _shortened}
"""Principle -> what makes a response that violates it into one that does not."""
