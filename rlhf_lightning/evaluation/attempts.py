"""Verifiable answers by several attempts: pass@k and majority@k."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.ops.statistics import Interval, share_interval

ReadAnswer = Callable[[str], Hashable | None]
"""Returns the answer that a response gives, None where it gives none; equal answers are one vote."""


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the chance that one of k of n attempts is right, 1 - C(n - c, k) / C(n, k) with c right attempts.

    It is the unbiased estimate of the chance that one of k new attempts is (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        ValueError: k is not from 1 to n, or c not from 0 to n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"{k} of {n} attempts, {correct} right")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[Hashable | None], right: Sequence[bool], k: int) -> float:
    """Return the chance that the most frequent answer of k of the n attempts is right, the mean over all subsets.

    Attempts without an answer have no vote (Wang et al. 2022, arXiv 2203.11171); of answers with as many votes one is
    drawn. It is an unbiased estimate for k new attempts, and exact: the subsets are counted, not sampled.

    Args:
        answers: (n,) the answer of each attempt, None for none.
        right: (n,) whether it is right; equal answers are equally right.

    Raises:
        ValueError: k is not from 1 to n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"{k} of {n} attempts")
    votes = Counter(answer for answer in answers if answer is not None)
    good = {answer for answer, is_right in zip(answers, right, strict=True) if is_right and answer is not None}
    silent = n - votes.total()
    won = 0.0
    for answer in good:
        others = [count for other, count in votes.items() if other != answer]
        for top in range(1, min(votes[answer], k) + 1):
            for (voters, ties), ways in _subsets(others, top, k - top).items():
                without = math.comb(silent, k - top - voters)
                won += math.comb(votes[answer], top) * ways * without / (ties + 1)
    return won / math.comb(n, k)


def _subsets(counts: Sequence[int], top: int, size: int) -> dict[tuple[int, int], int]:
    """Return (voters, ties) -> in how many ways at most `size` votes fall on answers given `counts` times each.

    None of them may get more than `top` votes; those that get as many are ties.
    """
    ways = Counter({(0, 0): 1})
    for count in counts:
        following: Counter[tuple[int, int]] = Counter()
        for (voters, ties), number in ways.items():
            for votes in range(min(count, top, size - voters) + 1):
                following[voters + votes, ties + (votes == top)] += number * math.comb(count, votes)
        ways = following
    return ways


def attempts(
    evaluation: Evaluation,
    by: str,
    pass_at: Sequence[int] = (),
    majority_at: Sequence[int] = (),
    read_answer: ReadAnswer | None = None,
) -> dict[str, Interval]:
    """Return `pass_at_<k>` and `majority_at_<k>` of one model, the means over prompts with their 95% intervals.

    An interval is Wilson's with prompts as clusters; for shares between 0 and 1 of a prompt it is too wide, never too
    narrow.

    Args:
        by: the column of verifiable rewards, 1 or 0.
        read_answer: what the majority is taken of; only `majority_at` needs it.

    Raises:
        UserError: a reward that is neither 0 nor 1, or a prompt with fewer than k attempts.
    """
    if not pass_at and not majority_at:
        return {}
    rows: dict[int, list[int]] = {}
    for place, (row, _) in enumerate(evaluation.places):
        rows.setdefault(row, []).append(place)
    rewards, fewest = evaluation.columns[by], min(map(len, rows.values()))
    if (most := max(*pass_at, *majority_at, 1)) > fewest:
        raise UserError(f"evaluate.pass_at and evaluate.majority_at: of {most} attempts a prompt has only {fewest}")
    if (wrong := next((value for value in rewards if value not in (0.0, 1.0)), None)) is not None:
        raise UserError(f"evaluate.pass_at and evaluate.majority_at count rewards of 0 and 1; one of {by} is {wrong:g}")
    prompts = [evaluation.prompts[places[0]] for places in rows.values()]
    table: dict[str, Interval] = {}
    for k in pass_at:
        right = [[bool(rewards[i]) for i in places] for places in rows.values()]
        if k == 1:  # every attempt is one: the interval knows how much those at one prompt agree
            table["pass_at_1"] = share_interval([float(r or 0) for r in rewards], evaluation.prompts)
        else:
            table[f"pass_at_{k}"] = share_interval([pass_at_k(len(r), sum(r), k) for r in right], prompts)
    for k in majority_at:
        assert read_answer is not None
        values = []
        for places in rows.values():
            given = [read_answer(str(evaluation.samples[i]["response"])) for i in places]
            values.append(majority_at_k(given, [bool(rewards[i]) for i in places], k))
        table[f"majority_at_{k}"] = share_interval(values, prompts)
    return table


def check_attempts(
    rewards: Mapping[str, Any], pass_at: Sequence[int], majority_at: Sequence[int]
) -> tuple[str, ReadAnswer | None]:
    """Return which reward is verifiable, gold before reward, and what reads answers for it, before any work.

    Raises:
        UserError: there is no such reward.
    """
    by = next((name for name in ("gold", "reward") if name in rewards), "")
    for key in [*["pass_at"] * bool(pass_at), *["majority_at"] * bool(majority_at)]:
        if not hasattr(rewards.get(by), "__code__"):
            raise UserError(
                f"evaluate.{key} needs a verifiable reward, a function that returns 1 or 0: "
                "gold_from=rlhf_lightning.rewards.checkers:exact_answer"
            )
        if key == "majority_at" and not hasattr(rewards[by], "read_answer"):
            raise UserError(
                f"evaluate.majority_at: {rewards[by].__name__} has no attribute read_answer, a function that returns "
                "the answer of a response; exact_answer has one"
            )
    return by, getattr(rewards.get(by), "read_answer", None)
