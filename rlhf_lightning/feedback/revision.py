"""Critiques and revisions by a constitution, the first stage of Constitutional AI (Bai et al., arXiv 2212.08073)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf_lightning.data.comparisons import OF_OTHERS
from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.server import Server, answers_of, concurrently
from rlhf_lightning.judges.constitution import Constitution, Principle
from rlhf_lightning.judges.server import CONTROL
from rlhf_lightning.ops.seeding import derive_seed

Reply = str | UserError
"""An answer, or why there is none."""
Ask = Callable[[Sequence[Sequence[Message]], Sequence[int], Sequence[int | str]], Sequence[Reply]]
"""(conversations, a number for each, seed parts) -> an answer to each."""
NEXT_TURN = re.compile(r"\n+(?:(?:Human|User|Assistant):|<\|im_start\|>).*", re.S)
"""A base model does not end: it goes on to write the turns that follow."""
NO_CRITIQUE, NO_REVISION = "empty critique", "empty revision"


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

    def critiques(self, drafts: Sequence[Draft], seed_parts: Sequence[int | str]) -> Sequence[Reply]:
        """Return a critique of each draft."""
        ...

    def revisions(
        self, drafts: Sequence[Draft], critiques: Sequence[str], seed_parts: Sequence[int | str]
    ) -> Sequence[Reply]:
        """Return a revised response for each draft."""
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

    def critiques(self, drafts: Sequence[Draft], seed_parts: Sequence[int | str]) -> list[Reply]:
        return self._answers(drafts, [self._criticized(draft) for draft in drafts], seed_parts)

    def revisions(
        self, drafts: Sequence[Draft], critiques: Sequence[str], seed_parts: Sequence[int | str]
    ) -> list[Reply]:
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
    ) -> list[Reply]:
        answers = self.ask(asked, [draft.row for draft in drafts], seed_parts)
        return [answer if isinstance(answer, UserError) else NEXT_TURN.sub("", answer).strip() for answer in answers]


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
    """An answer and its revisions; where there is no answer, `problem` says why."""

    row: int
    columns: dict[str, Any]
    conversation: list[Message]
    first: str | None
    steps: list[Step] = field(default_factory=list)
    problem: str | None = None

    @property
    def response(self) -> str | None:
        """The last revision, the first answer where there is none."""
        return next((s.revision for s in reversed(self.steps) if s.revision is not None), self.first)

    @property
    def failure(self) -> str | None:
        """Why it is no demonstration: no answer, or no round that gave a revision."""
        if self.first is None:
            return self.problem
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
    given = {place: critique for place, critique in enumerate(critiques) if isinstance(critique, str) and critique}
    asked = [drafts[place] for place in given]
    revisions = teacher.revisions(asked, list(given.values()), (*seed_parts, "revision")) if asked else []
    texts = dict(zip(given, revisions, strict=True))
    steps = []
    for place, draft in enumerate(drafts):
        name, critique, text = draft.principle.name, given.get(place), texts.get(place)
        if critique is None:
            steps.append(Step(name, failure=str(critiques[place]) or NO_CRITIQUE))
        elif isinstance(text, str) and text:
            steps.append(Step(name, critique, text))
        else:
            steps.append(Step(name, critique, failure=str(text) or NO_REVISION))
    return steps


def server_ask(
    server: Server, model: str, *, concurrency: int = 4, max_new_tokens: int = 256, temperature: float = 1.0
) -> Ask:
    """Return what asks a server, several conversations at a time.

    It raises the UserError of the first request where none succeeds: then the server is gone, not an answer.
    """

    def ask(
        conversations: Sequence[Sequence[Message]], ids: Sequence[int], seed_parts: Sequence[int | str]
    ) -> list[Reply]:
        def one(place: int) -> str:
            messages = [
                {"role": m["role"], "content": CONTROL.sub(lambda found: f"{found[0]} ", m["content"])}
                for m in conversations[place]
            ]
            seed = derive_seed(*seed_parts, ids[place]) % 2**31
            body = {"max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            return next(iter(answers_of(server.chat(model=model, messages=messages, **body))), "")

        replies: list[Reply] = [""] * len(conversations)
        for place, result in concurrently(one, range(len(conversations)), concurrency):
            if isinstance(result, Exception) and not isinstance(result, UserError):
                raise result
            replies[place] = result
        if replies and all(isinstance(reply, UserError) for reply in replies):
            raise replies[0]  # type: ignore[misc]
        return replies

    return ask
