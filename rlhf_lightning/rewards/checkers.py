"""Rewards that check an answer against a column of the row."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf_lightning.errors import UserError

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_answer(prompts: Sequence[str], responses: Sequence[str], metadata: Sequence[dict[str, Any]]) -> list[float]:
    """Return 1 where the last number of a response equals the last number of the row's `answer`, else 0.

    Raises:
        UserError: a row without a number in its column `answer`.
    """
    scores = []
    for prompt, response, extra in zip(prompts, responses, metadata, strict=True):
        expected = _last_number(str(extra.get("answer", "")))
        if expected is None:
            raise UserError(f"exact_answer needs a number in the column answer of every row; {prompt[:80]!r} has none")
        scores.append(float(_last_number(response) == expected))
    return scores


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
