"""Models that answer a judge's questions as a test wants."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.judges.questions import Question, Reply

Answer = Callable[[Question, list[str]], Reply]


def shown(question: str) -> list[str]:
    """Return the responses of a question in the order in which it shows them."""
    return re.findall(r"\[Begin of response[^\]]*\]\n(.*?)\n\[End of response", question, re.DOTALL)


class Fake:
    """Answers by a function of the question and of the responses that it shows, the last question first."""

    def __init__(self, answer: Answer, name: str = "fake") -> None:
        self.answer, self.name, self.identity = answer, name, {"fake": name}
        self.asked: list[Question] = []
        self.closed = False

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        self.asked += questions
        for place in reversed(range(len(questions))):
            yield place, self.answer(questions[place], shown(questions[place].text))

    def close(self) -> None:
        self.closed = True


def says(text: str) -> Answer:
    """Return the answer that is always the same text."""
    return lambda question, responses: Reply(text, prompt_tokens=100, completion_tokens=2)


def by_length(question: Question, responses: list[str]) -> Reply:
    """Prefer the longer response with the probability of its share of the length, whatever the order."""
    lengths = [len(text) for text in responses]
    return Reply(probabilities=tuple(0.5 * n / sum(lengths) for n in lengths), prompt_tokens=10)


def pair(first: str, second: str, name: str = "c", prompt: str = "Hi", **metadata: Any) -> Comparison:
    """Return a comparison of two responses."""
    return Comparison(name, [{"role": "user", "content": prompt}], (first, second), metadata)
