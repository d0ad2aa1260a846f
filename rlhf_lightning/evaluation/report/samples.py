"""Responses of several models to the same prompts, side by side, those first where the models differ most."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf_lightning.evaluation.report.store import number, visible

ORDER = ("gold", "reward", "length")
"""What the difference is measured by: the first that two models have."""
MOST, MOST_TEXT = 20, 1500
"""Prompts that are shown, and characters of a prompt or a response."""
MOST_ANSWERS, MOST_VALUES = 8, 12
"""Answers to a prompt, and values of an answer."""


@dataclass(frozen=True)
class Answer:
    """One model's response and its values, as they are shown."""

    model: str
    text: str
    values: list[tuple[str, str]]


@dataclass(frozen=True)
class SideBySide:
    """A prompt, responses to it, and by how much they differ: largest minus smallest value of `by`.

    `models` is how many models answer; `answers` are those of at most `MOST_ANSWERS`.
    """

    prompt: str
    answers: list[Answer]
    by: str
    spread: float
    models: int


def side_by_side(
    samples: Mapping[str, Sequence[Mapping[str, Any]]], most: int = MOST, apart: Collection[str] = (), least: int = 2
) -> list[SideBySide]:
    """Return prompts that `least` of `samples` (model -> rows) answer, at most `most`, largest difference first.

    The n-th response of one model to a prompt stands beside the n-th of another; of a prompt that is there more than
    once the largest difference is shown. Prompts without a value that two models share come last, in the order of the
    file.

    Args:
        apart: models that are shown, and that the difference is not of.
    """
    asked: dict[tuple[str, int], dict[str, Mapping[str, Any]]] = {}
    for model, rows in samples.items():
        seen = Counter[str]()
        for row in rows:
            prompt = row.get("prompt")
            if prompt is None or not isinstance(row.get("response"), str):
                continue
            prompt = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)  # a conversation
            asked.setdefault((prompt, seen[prompt]), {})[model] = row
            seen[prompt] += 1
    found = [compared(prompt, rows, apart) for (prompt, _), rows in asked.items() if len(rows) >= least]
    found.sort(key=lambda one: ((*ORDER, "").index(one[1]), -one[0]))  # differences of two metrics do not compare
    found = list({one[2]: one for one in reversed(found)}.values())[::-1]  # of equal prompts the first
    return [
        SideBySide(
            visible(prompt, MOST_TEXT),
            [
                Answer(visible(model), visible(row["response"], MOST_TEXT), values(row))
                for model, row in islice(rows.items(), MOST_ANSWERS)
            ],
            by,
            spread,
            len(rows),
        )
        for spread, by, prompt, rows in found[:most]
    ]


def compared(
    prompt: str, rows: Mapping[str, Mapping[str, Any]], apart: Collection[str]
) -> tuple[float, str, str, Mapping[str, Mapping[str, Any]]]:
    """Return how far the responses to a prompt differ, by what, and the responses."""
    for metric in ORDER:
        measured = {model: value for model, row in rows.items() if (value := number(row.get(metric))) is not None}
        known = [value for model, value in measured.items() if model not in apart]
        if len(known) > 1:
            return max(known) - min(known), metric, prompt, rows
    return 0.0, "", prompt, rows


def values(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers of a row as texts."""
    found = [(visible(name, 40), value) for name, value in row.items() if name not in ("prompt", "response")]
    shown = [(name, f"{value:.4g}") for name, value in found if number(value) is not None]
    return shown[:MOST_VALUES]
