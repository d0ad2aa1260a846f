"""All models of an evaluation compared: win rates by everything that decides, and ratings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_lightning.evaluation.judging import Judged, by_judge
from rlhf_lightning.evaluation.policy import REWARDS, Evaluation
from rlhf_lightning.evaluation.ratings import bradley_terry
from rlhf_lightning.evaluation.win_rates import COUNTS, Duel, by_scores, opponents, rows_of
from rlhf_lightning.judges.judge import Judge
from rlhf_lightning.ops.statistics import Interval, as_columns

DECIDERS = (*REWARDS, "judge")
WIN_RATE_COLUMNS = {
    "wins": "wins", "ties": "ties", "losses": "losses", "failed": "no verdict", "win_rate": "win rate (95%)",
    "length_controlled": "at equal length", "preference": "mean probability", "first_shown": "first shown",
    "flips": "flips",
}  # fmt: skip
RATING_COLUMNS = {f"{by}_rating": f"rating by {by}" for by in DECIDERS}
SHARE_OF_FLIPS = 0.5


@dataclass
class Compared:
    """What comes of comparing models.

    Args:
        figures: "<model>-<opponent>" and "<model>" -> metric -> interval, as in metrics.json.
        shown: "<model> vs <opponent>, by <by>" -> metric -> interval, what is printed of the win rates.
        win_rates, ratings, verdicts: rows of the tables of these names.
        notes: what a user should know before trusting them.
    """

    figures: dict[str, dict[str, Interval]] = field(default_factory=dict)
    shown: dict[str, dict[str, Interval]] = field(default_factory=dict)
    win_rates: list[dict[str, Any]] = field(default_factory=list)
    ratings: list[dict[str, Any]] = field(default_factory=list)
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    answered: Mapping[str, Evaluation],
    first: str | None = None,
    against: str | None = None,
    judge: Judge | None = None,
    seed: int = 0,
) -> Compared:
    """Return the win rates of models against each other, by gold, reward and judge, and ratings of three or more.

    Args:
        answered: name -> answers to the same prompts.
        first: the opponent in every pair that it is in; None is the first model.
        against: the opponent of all; None compares every two models.
        judge: is asked about every pair of responses in both orders; None asks none.
        seed: of the bootstrap.
    """
    pairs = opponents(list(answered), first or next(iter(answered)), against)
    judged = by_judge(judge, answered, pairs) if judge is not None else Judged()
    duels = by_scores(answered, pairs) + judged.duels
    tables = [duel.intervals(duels, seed) for duel in duels]
    result = Compared(win_rates=rows_of(duels, tables), verdicts=judged.rows)
    for duel, table in zip(duels, tables, strict=True):
        result.shown[f"{duel.model} vs {duel.opponent}, by {duel.by}"] = table
        row = result.figures.setdefault(duel.name, {})
        row |= {f"{duel.by}_{name}": value for name, value in table.items() if name not in (*COUNTS[:3], "bootstrap")}
    for by in DECIDERS:
        mine = [duel for duel in duels if duel.by == by]
        if len({name for duel in mine for name in (duel.model, duel.opponent)}) > 2:
            _rate(result, by, mine, seed)
    if judge is not None:
        result.notes += warnings(judge.name, judged.duels)
    return result


def _rate(result: Compared, by: str, duels: Sequence[Duel], seed: int) -> None:
    """Add the ratings of models by their duels, or why there are none."""
    ratings, reason = bradley_terry(duels, seed)
    for name, rating in ratings.items():
        result.figures.setdefault(name, {})[f"{by}_rating"] = rating
        result.ratings.append({"model": name, "by": by} | as_columns("rating", rating))
    if reason:
        result.notes.append(f"no ratings by {by}: {reason}")


def warnings(name: str, duels: Sequence[Duel]) -> list[str]:
    """Return what a user should know of a judge before trusting its duels."""
    lines = []
    for duel in duels:
        failed = duel.beside["failed"][0]
        total = failed + len(duel.outcomes)
        if failed:
            lines.append(f"{duel.name}: {name} gave no verdict on {failed:g} of {total:g} pairs, which are left out")
        share, low, high = duel.beside.get("first_shown", (0.5, 0.0, 1.0))
        if abs(share - 0.5) > 0.15 and not low <= 0.5 <= high:
            place = "first" if share > 0.5 else "last"
            lines.append(
                f"{duel.name}: {name} prefers the response shown {place} in {max(share, 1 - share):.0%} of verdicts; "
                "those that turn with the order are ties"
            )
        if duel.beside.get("flips", (0.0,))[0] > SHARE_OF_FLIPS:
            lines.append(f"{duel.name}: {duel.beside['flips'][0]:.0%} of the verdicts of {name} turn with the order")
    return lines
