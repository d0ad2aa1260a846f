"""A judge that is a language model: questions from comparisons, verdicts from replies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.judges import prompts
from rlhf_lightning.judges.constitution import Constitution, load_constitution
from rlhf_lightning.judges.judge import UNREADABLE, Answer, Ranking, Rating, Value, Verdict
from rlhf_lightning.judges.questions import Model, Question, Reply
from rlhf_lightning.judges.verdicts import TextVerdict, read_pair, read_ranking, read_rating

METHODS = ("logprobs", "generate")
FAILURES = ("skip", "error")
Result = TypeVar("Result")
Probabilities = Sequence[float]


@dataclass(frozen=True)
class Asked:
    """A question, and how its reply is read: from probabilities of the options, or from text."""

    question: Question
    from_options: Callable[[Probabilities], Value]
    from_text: Callable[[str], TextVerdict]
    seen: Callable[[Value], Value] = lambda value: value
    """From the order in which responses were shown to that of the comparison."""


class LanguageJudge:
    """Judges by asking a language model.

    Args:
        model: answers the questions.
        name: the annotator that it is in labels; None is the model's name.
        method: "logprobs": the verdict is the probabilities of its tokens; "generate": the model writes reasons and a
            verdict.
        rubric: what a rating is about.
        scale: the highest rating, 2 to 9; the lowest is 1.
        constitution: of whose principles one is drawn for each comparison by the seed: the name of one of ours, a YAML
            file, a list of principles as texts, or a :class:`Constitution`.
        samples: times that each question is asked; several need an answer that is sampled.
        temperature: of the model's answers, to check `samples`.
        on_failure: "skip" records an answer without a verdict, "error" raises a UserError.
        price_per_million: of tokens, `input` and `output`.

    Raises:
        UserError: an option out of its range.
    """

    def __init__(
        self,
        model: Model,
        *,
        name: str | None = None,
        method: str = "logprobs",
        rubric: str | None = None,
        scale: int = 5,
        constitution: str | Sequence[str] | Constitution | None = None,
        samples: int = 1,
        temperature: float = 0.0,
        on_failure: str = "skip",
        price_per_million: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        for key, value, options in (("method", method, METHODS), ("on_failure", on_failure, FAILURES)):
            if value not in options:
                raise UserError(
                    f"judge.{key}={value} is not one of {', '.join(options)}.{nearest(str(value), options)}"
                )
        check_number("judge.scale", scale, "[2, 9]", whole=True)
        check_number("judge.samples", samples, "[1, inf)", whole=True)
        check_number("judge.temperature", temperature, "[0, inf)")
        if samples > 1 and (method == "logprobs" or not temperature):
            raise UserError(
                f"judge.samples={samples} would be {samples} times the same answer; with judge.method=generate and "
                "judge.temperature=1.0 they differ"
            )
        price = dict(price_per_million or {})
        for key, value in price.items():
            if key not in ("input", "output"):
                raise UserError(f"judge.price_per_million has input and output, no {key}")
            check_number(f"judge.price_per_million.{key}", value, "[0, inf)")
        self.model, self.name, self.on_failure = model, str(name or model.name), on_failure
        self.written, self.rubric, self.scale, self.samples = method == "generate", rubric, scale, samples
        loaded = constitution if isinstance(constitution, Constitution | None) else load_constitution(constitution)
        self.constitution = loaded
        self.price = (price.get("input", 0.0) / 1e6, price.get("output", 0.0) / 1e6)
        self.seed = seed

    def to(self, device: Any) -> LanguageJudge:
        """Move a model of this process and return self."""
        if hasattr(self.model, "to"):
            self.model.to(device)  # type: ignore[attr-defined]
        return self

    def close(self) -> None:
        """Free the model."""
        self.model.close()

    # ---- what is asked ---------------------------------------------------------------------------------------------

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield (place, verdict) of pairs; two equal responses are a tie, and nothing is asked."""
        return self._each(comparisons, self._pair, self._verdict)

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        """Yield (place, a rating per response)."""
        return self._each(comparisons, self._ratings, self._rated)

    def rank(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Ranking]]:
        """Yield (place, ranking) of 2 to 26 responses."""
        return self._each(comparisons, self._list, self._ranking)

    def principle(self, comparison: Comparison) -> tuple[str, str] | tuple[None, None]:
        """Return name and text of the principle by which a comparison is judged, decided by the seed and its id."""
        if self.constitution is None:
            return None, None
        principle = self.constitution.sample(self.seed, comparison.id)
        return principle.name, f"{principle.judge} {self.constitution.rules}".strip()

    def _pair(self, comparison: Comparison) -> list[Asked]:
        if len(comparison.responses) != 2:
            raise UserError(f"a pair has two responses, and {comparison.id} has {len(comparison.responses)}")
        first, second = comparison.responses
        if first.strip() == second.strip():
            return []
        _, principle = self.principle(comparison)
        orders: list[tuple[tuple[str, str], Callable[[Any], Value]]] = [
            ((first, second), lambda value: value),
            ((second, first), lambda value: 1.0 - value),
        ]
        return [
            Asked(question, _share_of_first, read_pair, seen)
            for shown, seen in orders
            for question in self._questions(
                prompts.pairwise(comparison.prompt, shown, principle, self.written), prompts.LETTERS[:2]
            )
        ]

    def _ratings(self, comparison: Comparison) -> list[Asked]:
        _, principle = self.principle(comparison)
        numbers = "".join(map(str, range(1, self.scale + 1)))
        return [
            Asked(question, _expected_rating, partial(read_rating, scale=self.scale))
            for text in comparison.responses
            for question in self._questions(
                prompts.pointwise(comparison.prompt, text, self.rubric, principle, self.scale, self.written), numbers
            )
        ]

    def _list(self, comparison: Comparison) -> list[Asked]:
        responses, size = comparison.responses, len(comparison.responses)
        if not 2 <= size <= len(prompts.LETTERS):
            raise UserError(f"a ranking is of 2 to {len(prompts.LETTERS)} responses, and {comparison.id} has {size}")
        _, principle = self.principle(comparison)
        letters = prompts.LETTERS[:size]
        return [
            Asked(question, _by_share, partial(read_ranking, letters=letters), partial(_reordered, step=step))
            for step in (1, -1)
            for question in self._questions(
                prompts.listwise(comparison.prompt, responses[::step], principle, self.written), letters
            )
        ]

    def _questions(self, text: str, options: str) -> list[Question]:
        return [Question(text, () if self.written else tuple(options), sample) for sample in range(self.samples)]

    # ---- what is made of the replies -------------------------------------------------------------------------------

    def _verdict(self, comparison: Comparison, answers: list[Answer]) -> Verdict:
        half = len(answers) // 2
        if not half:
            return Verdict((Answer(0.5),), (Answer(0.5),), self.principle(comparison)[0])
        return Verdict(tuple(answers[:half]), tuple(answers[half:]), self.principle(comparison)[0])

    def _rated(self, comparison: Comparison, answers: list[Answer]) -> tuple[Rating, ...]:
        name, n = self.principle(comparison)[0], self.samples
        return tuple(Rating(tuple(answers[i : i + n]), name) for i in range(0, len(answers), n))

    def _ranking(self, comparison: Comparison, answers: list[Answer]) -> Ranking:
        half = len(answers) // 2
        return Ranking(tuple(answers[:half]), tuple(answers[half:]), self.principle(comparison)[0])

    def _each(
        self,
        comparisons: Sequence[Comparison],
        ask: Callable[[Comparison], list[Asked]],
        build: Callable[[Comparison, list[Answer]], Result],
    ) -> Iterator[tuple[int, Result]]:
        """Yield (place, result) of each comparison when all its questions are answered."""
        asked = [ask(comparison) for comparison in comparisons]
        owners = [(number, k) for number, questions in enumerate(asked) for k in range(len(questions))]
        answers: list[dict[int, Answer]] = [{} for _ in asked]
        for number, questions in enumerate(asked):
            if not questions:
                yield number, build(comparisons[number], [])
        for place, reply in self.model.ask([asked[number][k].question for number, k in owners]):
            number, k = owners[place]
            answers[number][k] = self._answer(asked[number][k], reply, comparisons[number])
            if len(answers[number]) == len(asked[number]):
                yield number, build(comparisons[number], [answers[number][i] for i in range(len(asked[number]))])
                answers[number] = {}

    def _answer(self, asked: Asked, reply: Reply, comparison: Comparison) -> Answer:
        value, failure, mass = None, reply.failure, None
        if failure is None and reply.probabilities is not None:
            mass = sum(reply.probabilities)
            value, failure = (asked.from_options(reply.probabilities), None) if mass > 0 else (None, UNREADABLE)
        elif failure is None:
            value, failure = asked.from_text(reply.text or "")
        if failure is not None and self.on_failure == "error":
            said = f": {reply.text[:200]!r}" if reply.text else ""
            raise UserError(
                f"the judge {self.name} gave no verdict on {comparison.id} ({failure}{said}); judge.on_failure=skip "
                "records it and goes on"
            )
        cost = self.price[0] * reply.prompt_tokens + self.price[1] * reply.completion_tokens
        return Answer(
            None if value is None else asked.seen(value), failure, reply.text, reply.prompt_tokens,
            reply.completion_tokens, reply.seconds, 0.0 if reply.cached else cost, mass, reply.cached,
        )  # fmt: skip


def _reordered(ranks: Any, step: int) -> tuple[int, ...]:
    return tuple(ranks[::step])


def _share_of_first(probabilities: Probabilities) -> float:
    """Return the probability of the first option among all."""
    return probabilities[0] / sum(probabilities)


def _expected_rating(probabilities: Probabilities) -> float:
    """Return the mean rating under the probabilities of 1, 2, ... (G-Eval, Liu et al. 2023)."""
    return sum(number * p for number, p in enumerate(probabilities, 1)) / sum(probabilities)


def _by_share(probabilities: Probabilities) -> tuple[int, ...]:
    """Return the rank of each option by its probability of being the best (FIRST, Reddy et al. 2024)."""
    levels = sorted(set(probabilities), reverse=True)
    return tuple(levels.index(p) for p in probabilities)
