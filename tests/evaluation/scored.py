"""Rows with scores that are made up, to measure what diagnostics find in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from rlhf_lightning.evaluation.reward_model import ScoredRow

Score = Callable[[str], float]
WORDS = [f"w{number}" for number in range(60)]


def row(number: int, responses: Sequence[str], scores: Sequence[float], **options: Any) -> ScoredRow:
    """A row whose responses are listed best first."""
    ranks = options.pop("ranks", list(range(len(responses))))
    given = {"prompt": number, "question": f"q{number}", "logits": list(scores)} | options
    return ScoredRow(number=number, responses=list(responses), ranks=ranks, scores=list(scores), **given)


def texts(
    count: int, seed: int, phrase: str = "", share: float = 0.2, shortest: int = 8, longest: int = 40
) -> list[list[str]]:
    """Pairs of random texts, a share of them with a phrase at a random place."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        pair = []
        for _ in range(2):
            words = rng.choices(WORDS, k=rng.randint(shortest, longest))
            if phrase and rng.random() < share:
                words.insert(rng.randrange(len(words)), phrase)
            pair.append(" ".join(words))
        found.append(pair)
    return found


def noise(seed: int, spread: float = 1.0) -> Score:
    """A scorer that knows nothing: a number that each text decides."""
    return lambda text: random.Random(f"{seed}:{text}").gauss(0, spread)


def scored(pairs: Sequence[Sequence[str]], score: Score) -> list[ScoredRow]:
    """Rows whose first response is the better one, whatever the score."""
    return [row(number, pair, [score(text) for text in pair]) for number, pair in enumerate(pairs)]


def rescorer(score: Score) -> Callable[[Sequence[tuple[ScoredRow, Sequence[str]]], str], list[list[float]]]:
    return lambda changed, title: [[score(text) for text in texts] for _, texts in changed]
