"""Answers that were made before, read from files and compared without generating them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.comparisons import digest
from rlhf_lightning.data.layouts import Canonical, Columns, Row
from rlhf_lightning.data.messages import Message, RowError
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Evaluation, scored
from rlhf_lightning.evaluation.win_rates import prompt_key
from rlhf_lightning.rewards.scoring import Reward

BLANK = ("response", "completion", "output")
"""Columns of an answer that may be empty: a model may end at once."""
SEVERAL = ("chosen", "rejected", "responses")


@dataclass(frozen=True)
class Answer:
    """An answer to a conversation, and the other columns of its row."""

    prompt: list[Message]
    response: str
    metadata: dict[str, Any]

    @property
    def key(self) -> str:
        """Of the conversation."""
        return digest(self.prompt, ())


@dataclass(frozen=True)
class Slot:
    """A place among the answers, and the row of data it is about; None where only files of answers are compared."""

    place: tuple[int, int]
    metadata: dict[str, Any] | None = None


Slots = dict[str, list[Slot]]
"""Key of a conversation -> the places of the answers to it, in order."""


def read_answers(source: Source, columns: Columns | None = None, on_bad_row: str = "error") -> tuple[list[Answer], int]:
    """Return the answers of a file, rows with `prompt` and `response` or another layout, and the rows left out.

    Raises:
        UserError: naming file and row, or where there is no answer.
    """
    columns, answers, skipped = columns or Columns(), [], 0
    for where, row in source.rows():
        try:
            answers.append(read_answer(row, columns))
        except RowError as error:
            if on_bad_row == "error":
                raise UserError(f"{source.name}, {where}: {error}") from None
            skipped += 1
    if not answers:
        raise UserError(f"{source.name} has no answers, rows with prompt and response ({skipped} rows skipped)")
    return answers, skipped


def read_answer(row: Row, columns: Columns) -> Answer:
    """Return the answer of a row, which may be empty."""
    view = Canonical(columns.view(row))
    if several := [name for name in SEVERAL if name in view]:
        raise RowError(f"{several[0]} is a column of rows with several responses; an answer is prompt and response")
    blank = [name for name in BLANK if isinstance(view.get(name), str) and not view[name].strip()]
    asked = Canonical((name, value) for name, value in view.items() if name not in blank)
    if blank:
        prompt, response = records.prompt(asked, columns).content, ""
    else:
        conversation = records.demonstration(view, columns).content
        prompt, response = (conversation, "") if isinstance(conversation, str) else (
            conversation[:-1], conversation[-1]["content"]
        )  # fmt: skip
    if isinstance(prompt, str):
        raise RowError("there is a text and no prompt; an answer is prompt and response")
    return Answer(prompt, response, dict(row) | {"messages": prompt})


def slots_of(evaluation: Evaluation) -> Slots:
    """Return the places of a model's answers, which those of files are put beside."""
    slots: Slots = {}
    for number, place in enumerate(evaluation.places):
        metadata = evaluation.metadata[number] if evaluation.metadata else None
        slots.setdefault(prompt_key(evaluation, number), []).append(Slot(place, metadata))
    return slots


def slots_of_files(files: Sequence[Sequence[Answer]], rows: int) -> Slots:
    """Return places for the answers of files alone, of the first `rows` prompts."""
    counts: dict[str, int] = {}
    for answers in files:
        mine: dict[str, int] = {}
        for one in answers:
            mine[one.key] = mine.get(one.key, 0) + 1
        counts |= {key: max(number, counts.get(key, 0)) for key, number in mine.items()}
    return {key: [Slot((row, k)) for k in range(counts[key])] for row, key in enumerate(list(counts)[:rows])}


def evaluate_answers(
    answers: Sequence[Answer], slots: Slots, rewards: Mapping[str, Reward] | None = None
) -> tuple[Evaluation, int]:
    """Return the answers of a file as those of a model, and the number that no slot was left for.

    Rewards get the columns of the row of data that an answer is about, else those of its own row. The length is in
    characters, `characters`: there is no tokenizer.
    """
    used: dict[str, int] = {}
    kept: list[tuple[Answer, Slot]] = []
    for one in answers:
        place = used.get(one.key, 0)
        if place < len(slots.get(one.key, ())):
            kept.append((one, slots[one.key][place]))
            used[one.key] = place + 1
    prompts = [next(m["content"] for m in reversed(one.prompt) if m["role"] == "user") for one, _ in kept]
    metadata = [(one.metadata if slot.metadata is None else slot.metadata) | {"finished": True} for one, slot in kept]
    result = scored(
        {"characters": [float(len(one.response)) for one, _ in kept]},
        [slot.place for _, slot in kept],
        [one.key for one, _ in kept],
        prompts,
        [one.response for one, _ in kept],
        metadata,
        rewards or {} if kept else {},
    )
    return result, len(answers) - len(kept)
