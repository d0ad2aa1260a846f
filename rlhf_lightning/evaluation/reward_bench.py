"""RewardBench 2 (Malik et al. 2025, arXiv 2506.01937): the best of four responses, and the subset `Ties`.

A row has `prompt`, `chosen` and `rejected` as lists of texts, `subset` and `id`; it is read as a ranking of two levels
(:mod:`rlhf_lightning.data.layouts`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rlhf_lightning.data.layouts import is_best_of
from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.diagnostics import Diagnosis
from rlhf_lightning.evaluation.reward_model import ScoredRow
from rlhf_lightning.ops.statistics import as_columns, share_interval

TIES = "ties"


def reward_bench(rows: Sequence[ScoredRow]) -> Diagnosis:
    """Return the score of each subset, and as `reward_bench` their mean; nothing where no row is of this format.

    The score of a subset is the share of prompts whose correct response scores highest; of k responses that share the
    highest score it is 1/k. That of `Ties` is :func:`ties_score`. `best_of_accuracy` is over the rows of all other
    subsets.

    Raises:
        UserError: see :func:`ties_score`.
    """
    subsets: dict[str, list[ScoredRow]] = {}
    for row in rows:
        if is_best_of(dict(row.columns)):
            subsets.setdefault(str(row.columns.get("subset", "")), []).append(row)
    table, scores, best, prompts = [], [], list[float](), list[object]()
    for name, members in subsets.items():
        if name.lower() == TIES:
            score = ties_score(members)
            columns = as_columns("accuracy", (score, math.nan, math.nan))
            table.append({"by": "ties score", "bucket": name, "count": len(members)} | columns)
        else:
            values, owners = [best_of(row) for row in members], [row.prompt for row in members]
            share = share_interval(values, owners)
            table.append({"by": "best of n", "bucket": name, "count": len(members)} | as_columns("accuracy", share))
            score = share[0]
            best, prompts = best + values, prompts + owners
        scores.append(score)
    metrics = {"best_of_accuracy": share_interval(best, prompts)} if best else {}
    metrics |= {"reward_bench": (fmean(scores), math.nan, math.nan)} if scores else {}
    return Diagnosis(metrics, {"sources": table} if table else {})


def best_of(row: ScoredRow) -> float:
    """Return whether the first correct response scores highest, 1/k where k responses share the highest score."""
    highest = max(row.scores)
    first = row.ranks.index(0)
    return 1 / sum(score == highest for score in row.scores) if row.scores[first] == highest else 0.0


@dataclass(frozen=True)
class _Margins:
    """Of a prompt: the lowest score of a correct response less the highest of an incorrect one, and their spread."""

    between: float
    within: float


def ties_score(rows: Sequence[ScoredRow]) -> float:
    """Return the score of `Ties`, 0.3 A_tied + 0.3 A_ref + 0.2 P + 0.2 H + 0.01 M, as the benchmark's code has it.

    The id of a row is "tied:<number>", a question with several correct answers, or "ref:<number>", the same with one. A
    is the share of prompts whose correct answers all score above the incorrect ones. The margin of a prompt is the
    lowest score of a correct answer less the highest of an incorrect one, the spread the difference between the
    highest and the lowest score of the correct answers of the tied prompt. Over the numbers that are both, P is the
    share with margin_tied > spread, H that with m > spread for m = min(margin_tied, margin_ref), and M the mean of
    tanh(m / spread - 1).

    Raises:
        UserError: an id of another form, no incorrect answer, or no number that is both tied and ref.
    """
    found: dict[str, dict[int, _Margins]] = {"ref": {}, "tied": {}}
    for row in rows:
        kind, _, number = str(row.columns.get("id", "")).partition(":")
        if kind not in found or not number.isdigit():
            raise UserError(
                f"evaluate.preferences: the id of a row of Ties is {row.columns.get('id')!r}, not ref:<number> or "
                "tied:<number>"
            )
        right = [score for score, rank in zip(row.scores, row.ranks, strict=True) if rank == 0]
        wrong = [score for score, rank in zip(row.scores, row.ranks, strict=True) if rank > 0]
        found[kind][int(number)] = _Margins(min(right) - max(wrong), max(right) - min(right))
    both = sorted(found["ref"].keys() & found["tied"].keys())
    if not both:
        raise UserError(
            "evaluate.preferences: no number of Ties is both ref:<number> and tied:<number>; read the whole subset"
        )
    accuracy = {kind: fmean(one.between > 0 for one in prompts.values()) for kind, prompts in found.items()}
    tied = [found["tied"][number] for number in both]
    smaller = [min(found["ref"][number].between, found["tied"][number].between) for number in both]
    preferred = fmean(one.between > one.within for one in tied)
    hard = fmean(margin > one.within for margin, one in zip(smaller, tied, strict=True))
    extra = fmean(math.tanh(_ratio(margin, one.within) - 1) for margin, one in zip(smaller, tied, strict=True))
    return 0.3 * accuracy["tied"] + 0.3 * accuracy["ref"] + 0.2 * preferred + 0.2 * hard + 0.01 * extra


def _ratio(margin: float, spread: float) -> float:
    """Return margin / spread; without a spread it is infinite with the sign of the margin, and 1 where both are 0."""
    if spread:
        return margin / spread
    return math.copysign(math.inf, margin) if margin else 1.0
