"""Critiques and revisions by a constitution, the first stage of Constitutional AI (Bai et al., arXiv 2212.08073)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf_lightning.data.comparisons import OF_OTHERS
from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.judges.constitution import Constitution, Principle

Ask = Callable[[Sequence[Sequence[Message]], Sequence[int], Sequence[int | str]], Sequence[str | None]]
"""(conversations, a number for each, seed parts) -> an answer to each, None where there is none."""
NEXT_TURN = re.compile(r"\n+(?:(?:Human|User|Assistant):|<\|im_start\|>).*", re.S)
"""A base model does not end: it goes on to write the turns that follow."""
NO_ROOM, NO_CRITIQUE, NO_REVISION = "no room for an answer", "empty critique", "empty revision"


@dataclass(frozen=True)
class Draft:
    """A response that is to be revised.

    Args:
        row: its number.
        columns: those of the prompt's row.
        conversation: up to the response.
        response: as it is now.
        principle: in whose light it is criticized.
    """

    row: int
    columns: dict[str, Any]
    conversation: list[Message]
    response: str
    principle: Principle


class Teacher(Protocol):
    """Criticizes and revises."""

    def critiques(self, drafts: Sequence[Draft], seed_parts: Sequence[int | str]) -> Sequence[str | None]:
        """Return a critique of each draft, None where there is none."""
        ...

    def revisions(
        self, drafts: Sequence[Draft], critiques: Sequence[str], seed_parts: Sequence[int | str]
    ) -> Sequence[str | None]:
        """Return a revised response for each draft, None where there is none."""
        ...


class ChatTeacher:
    """A language model that is asked for critique and revision in the conversation itself.

    Args:
        ask: answers conversations, such as :meth:`LocalChat.batch`.
        constitution: its rules for conflicts are told with every request for a critique.
        examples: how many of its examples come first, for models that follow no instructions.

    Raises:
        UserError: more examples than the constitution has.
    """

    def __init__(self, ask: Ask, constitution: Constitution, examples: int = 0) -> None:
        check_number("revise.examples", examples, "[0, inf)", whole=True)
        if examples > len(constitution.examples):
            raise UserError(f"revise.examples={examples}: the constitution has {len(constitution.examples)}")
        self.ask, self.rules, self.shown = ask, constitution.rules, list[Message]()
        for example in constitution.examples[:examples]:
            principle = constitution.with_name(example.principle)
            self.shown += [turn("user", example.prompt), turn("assistant", example.response)]
            self.shown += [turn("user", self.request(principle)), turn("assistant", example.critique)]
            self.shown += [turn("user", principle.revise), turn("assistant", example.revision)]

    def request(self, principle: Principle) -> str:
        """Return what asks for a critique."""
        return f"{principle.critique} {self.rules}".strip()

    def critiques(self, drafts: Sequence[Draft], seed_parts: Sequence[int | str]) -> list[str | None]:
        return self._answers(drafts, [self._criticized(draft) for draft in drafts], seed_parts)

    def revisions(
        self, drafts: Sequence[Draft], critiques: Sequence[str], seed_parts: Sequence[int | str]
    ) -> list[str | None]:
        asked = [
            [*self._criticized(draft), turn("assistant", critique), turn("user", draft.principle.revise)]
            for draft, critique in zip(drafts, critiques, strict=True)
        ]
        return self._answers(drafts, asked, seed_parts)

    def _criticized(self, draft: Draft) -> list[Message]:
        said = [*draft.conversation, turn("assistant", draft.response)]
        first = [message for message in said if message["role"] == "system"]
        rest = [message for message in said if message["role"] != "system"]
        return [*first, *self.shown, *rest, turn("user", self.request(draft.principle))]

    def _answers(
        self, drafts: Sequence[Draft], asked: list[list[Message]], seed_parts: Sequence[int | str]
    ) -> list[str | None]:
        answers = self.ask(asked, [draft.row for draft in drafts], seed_parts)
        return [answer if answer is None else NEXT_TURN.sub("", answer).strip() for answer in answers]


@dataclass(frozen=True)
class Step:
    """A round of critique and revision; `failure` says why there is no revision."""

    principle: str
    critique: str | None = None
    revision: str | None = None
    failure: str | None = None

    def row(self) -> dict[str, str]:
        """Return what is known of it."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Revised:
    """An answer and its revisions."""

    row: int
    columns: dict[str, Any]
    conversation: list[Message]
    first: str | None
    steps: list[Step] = field(default_factory=list)

    @property
    def response(self) -> str | None:
        """The last revision, the first answer where there is none."""
        return next((s.revision for s in reversed(self.steps) if s.revision is not None), self.first)

    @property
    def failure(self) -> str | None:
        """Why it is no demonstration: no answer, or no round that gave a revision."""
        if self.first is None:
            return NO_ROOM
        return None if any(step.revision for step in self.steps) else self.steps[-1].failure

    def as_row(self) -> dict[str, Any]:
        """Return it as a demonstration: `prompt`, `response`, `first_answer`, `revisions` and the prompt's columns."""
        kept = {name: value for name, value in self.columns.items() if name not in OF_OTHERS}
        found = {"response": self.response, "first_answer": self.first, "failure": self.failure}
        known = {name: value for name, value in found.items() if value is not None}
        return kept | {"prompt": self.conversation} | known | {"revisions": [step.row() for step in self.steps]}


def revise(
    answers: Sequence[Revised], teacher: Teacher, constitution: Constitution, rounds: int = 1, seed: int = 0
) -> list[Revised]:
    """Return answers after `rounds` rounds of critique and revision, each by a principle that is drawn for the round.

    A round without a critique or a revision leaves the response as it was.

    Args:
        answers: first answers; those without one come back as they are.
    """
    check_number("revise.rounds", rounds, "[1, inf)", whole=True)
    current = list(answers)
    for number in range(rounds):
        places = [place for place, answer in enumerate(current) if answer.first is not None]
        drafts = [_draft(current[place], constitution.sample(seed, current[place].row, number)) for place in places]
        for place, step in zip(places, _round(drafts, teacher, (seed, "revise", number)), strict=True):
            current[place] = replace(current[place], steps=[*current[place].steps, step])
    return current


def _draft(answer: Revised, principle: Principle) -> Draft:
    assert answer.response is not None
    return Draft(answer.row, answer.columns, answer.conversation, answer.response, principle)


def _round(drafts: Sequence[Draft], teacher: Teacher, seed_parts: tuple[int | str, ...]) -> list[Step]:
    """Return what a round makes of each draft."""
    critiques = teacher.critiques(drafts, (*seed_parts, "critique")) if drafts else []
    steps = [
        Step(draft.principle.name, failure=NO_ROOM if critique is None else NO_CRITIQUE)
        for draft, critique in zip(drafts, critiques, strict=True)
    ]
    given = [(place, critique) for place, critique in enumerate(critiques) if critique]
    asked = [drafts[place] for place, _ in given]
    texts = teacher.revisions(asked, [c for _, c in given], (*seed_parts, "revision")) if asked else []
    for (place, critique), text in zip(given, texts, strict=True):
        name, failure = drafts[place].principle.name, NO_ROOM if text is None else NO_REVISION
        steps[place] = Step(name, critique, text) if text else Step(name, critique, failure=failure)
    return steps
