"""pass@k and majority@k against the enumeration of all subsets."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction
from typing import Any

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.attempts import attempts, check_attempts, majority_at_k, pass_at_k
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.ops.statistics import share_interval
from rlhf_lightning.rewards.checkers import exact_answer
from rlhf_lightning.rewards.scoring import Ensemble
from rlhf_lightning.world import gold_reward


def test_pass_at_k_is_the_mean_over_subsets() -> None:
    for n in range(1, 8):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
                assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    assert pass_at_k(200, 10, 1) == pytest.approx(0.05)
    assert pass_at_k(10, 3, 5) == pytest.approx(1 - math.comb(7, 5) / math.comb(10, 5))
    for wrong in ((3, 1, 4), (3, 1, 0), (3, 4, 1)):
        with pytest.raises(ValueError, match="attempts"):
            pass_at_k(*wrong)


def test_pass_at_k_is_unbiased() -> None:
    """Over all outcomes of n attempts with a chance p, its mean is the chance that one of k is right."""
    n, p = 6, 0.3
    for k in (1, 2, 5):
        mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
        assert mean == pytest.approx(1 - (1 - p) ** k)


def enumerated(answers: list[Any], right: list[bool], k: int) -> float:
    """The same by every subset: the share of the most frequent answers that is right."""
    total, good = Fraction(0), dict(zip(answers, right, strict=True))
    for chosen in itertools.combinations(answers, k):
        votes = Counter(answer for answer in chosen if answer is not None)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        total += Fraction(sum(good[answer] for answer in winners), max(len(winners), 1))
    return float(total / math.comb(len(answers), k))


def test_majority_at_k_is_the_mean_over_subsets() -> None:
    rng = random.Random(0)
    for _ in range(60):
        n = rng.randint(1, 8)
        answers = rng.choices([1, 2, 3, None], k=n)
        good = {answer: answer is not None and rng.random() < 0.5 for answer in (1, 2, 3, None)}
        for k in range(1, n + 1):
            right = [good[answer] for answer in answers]
            assert majority_at_k(answers, right, k) == pytest.approx(enumerated(answers, right, k)), (answers, right, k)


def test_majorities_by_hand() -> None:
    assert majority_at_k([5, 5, 7], [True, True, False], 3) == 1.0
    assert majority_at_k([5, 5, 7], [True, True, False], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at_k([7, 7, 5], [False, False, True], 3) == 0.0
    assert majority_at_k([None, None, 5], [False, False, True], 3) == 1.0  # no answer has no vote
    assert majority_at_k([None, None], [False, False], 2) == 0.0
    assert majority_at_k([1, 2, 2, 3], [True, False, False, False], 1) == 0.25  # as pass@1
    many = [1] * 40 + [2] * 30 + list(range(3, 33))
    assert 0.5 < majority_at_k(many, [answer == 1 for answer in many], 50) < 1.0
    with pytest.raises(ValueError, match="4 of 3 attempts"):
        majority_at_k([1, 2, 3], [True] * 3, 4)


def evaluation(responses: list[list[str]], answer: str = "12") -> Evaluation:
    """Return the responses to two prompts with their rewards by exact_answer."""
    places = [(row, k) for row, texts in enumerate(responses) for k in range(len(texts))]
    texts = [text for row in responses for text in row]
    gold = exact_answer(["?"] * len(texts), texts, [{"answer": answer}] * len(texts))
    samples = [{"prompt": "?", "response": text} for text in texts]
    return Evaluation({"gold": gold}, places, [(row,) for row, _ in places], samples)


def test_of_a_model_they_are_means_over_prompts() -> None:
    texts = [["so 12", "it is 12.0", "13", "no"], ["7", "7", "12", "seven"]]
    found = attempts(evaluation(texts), "gold", [1, 2, 4], [1, 4], exact_answer.read_answer)
    assert list(found) == ["pass_at_1", "pass_at_2", "pass_at_4", "majority_at_1", "majority_at_4"]
    rewards = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert found["pass_at_1"] == share_interval(rewards, [0] * 4 + [1] * 4)
    assert found["pass_at_2"] == share_interval([pass_at_k(4, 2, 2), pass_at_k(4, 1, 2)], [0, 1])
    assert found["pass_at_4"][0] == 1.0
    assert found["majority_at_4"] == share_interval([1.0, 0.0], [0, 1])  # 12 and 12.0 are one answer
    assert attempts(evaluation(texts), "gold") == {}


def test_what_cannot_be_counted_is_refused() -> None:
    texts = [["12", "13"], ["12"]]
    with pytest.raises(UserError, match="of 2 attempts a prompt has only 1"):
        attempts(evaluation(texts), "gold", [2])
    half = evaluation([["12"]])
    with pytest.raises(UserError, match=r"rewards of 0 and 1; one of gold is 0\.5"):
        attempts(Evaluation({"gold": [0.5]}, half.places, half.prompts, half.samples), "gold", [1])
    for rewards in ({}, {"reward": Ensemble([exact_answer])}):
        with pytest.raises(UserError, match=r"evaluate\.pass_at needs a verifiable reward, .*exact_answer"):
            check_attempts(rewards, [1], [])
    with pytest.raises(UserError, match=r"evaluate\.majority_at: gold_reward has no attribute read_answer"):
        check_attempts({"gold": gold_reward}, [], [1])
    assert check_attempts({"gold": exact_answer, "reward": gold_reward}, [1], [1])[0] == "gold"
    assert check_attempts({}, [], []) == ("", None)
