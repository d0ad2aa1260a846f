"""What a language model is asked, and what it replies: the seam between what a judge asks and where a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Question:
    """One message to a model that judges.

    Args:
        text: of the message, the user's.
        options: texts of one token each whose probabilities as the first token of the answer are asked for; none asks
            for a written answer.
        sample: which of several answers to the same message.
    """

    text: str
    options: tuple[str, ...] = ()
    sample: int = 0


@dataclass(frozen=True)
class Reply:
    """What came back.

    Args:
        text: what the model wrote, None where it wrote nothing.
        probabilities: of each option among all tokens; None where the model gives none, and `text` is there instead.
        failure: why nothing came back.
        prompt_tokens, completion_tokens: that were read and written.
        seconds: that it took.
        cached: it was on disk.
    """

    text: str | None = None
    probabilities: tuple[float, ...] | None = None
    failure: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cached: bool = False


class Model(Protocol):
    """A language model that answers questions."""

    name: str
    identity: dict[str, Any]
    """What decides its replies, beside the question."""

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield (place in `questions`, reply) as they come.

        Raises:
            UserError: no question could be answered.
        """
        ...

    def close(self) -> None:
        """End calls in other threads, as far as they can be, and free what is held."""
        ...
