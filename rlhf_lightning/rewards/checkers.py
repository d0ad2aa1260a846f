"""Rewards that check an answer against a column of the row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.rewards.numbers import last_number


def exact_answer(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Return 1 where the last number of a response equals the last number of the row's `answer`, else 0.

    What is a number, and which are equal: :mod:`rlhf_lightning.rewards.numbers`.

    Raises:
        UserError: a row without a number in its column `answer`.
    """
    scores = []
    for prompt, response, extra in zip(prompts, responses, metadata, strict=True):
        expected = last_number(str(extra.get("answer", "")))
        if expected is None:
            raise UserError(f"exact_answer needs a number in the column answer of every row; {prompt[:80]!r} has none")
        answer = last_number(response)
        scores.append(float(answer is not None and expected.matches(answer)))
    return scores


exact_answer.read_answer = last_number  # pyright: ignore[reportFunctionMemberAccess]  # what majority@k counts
