"""Comparisons put before a judge: what is read from rows, what is asked, and the label that comes of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from rlhf_lightning.data import records
from rlhf_lightning.data.comparisons import Comparison, LabeledComparison, digest
from rlhf_lightning.data.layouts import Canonical, Columns, has_value, listed
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.feedback.importers import id_of, metadata
from rlhf_lightning.feedback.reading import labels_of
from rlhf_lightning.judges.judge import REFUSAL, UNREADABLE, Answer, Judge, Ranking, Rating, Verdict

MODES = ("pairwise", "pointwise", "listwise")
OF_THE_ROW = "the row"
"""The annotator of a row with a preference or ranking that names none."""
Orders = tuple[float | None, float | None]
"""Of a pair the probability that its first response is better: shown first, and shown second."""


@dataclass
class ToJudge:
    """A comparison, and the rankings of it that its rows have: of annotators, or of a reward."""

    comparison: Comparison
    known: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class Judged:
    """What a judge made of a comparison.

    Args:
        pairs: (i, j) with i < j -> what was said of the two in both orders.
        answers: to all questions.
        samples: lists of answers to one and the same question.
        label: None where a verdict is missing.
        ratings: of each response, where single responses were rated.
    """

    comparison: Comparison
    pairs: dict[tuple[int, int], Orders]
    answers: tuple[Answer, ...]
    samples: tuple[tuple[Answer, ...], ...]
    label: LabeledComparison | None = None
    ratings: tuple[float, ...] | None = None

    @property
    def failure(self) -> str | None:
        """Why there is no label."""
        return next((answer.failure for answer in self.answers if answer.failure), None) if self.label is None else None


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_comparisons(source: Source, columns: Columns, on_bad_row: str = "error") -> tuple[list[ToJudge], int]:
    """Return the comparisons of a source, each once, and the number of rows that were left out.

    A row is a candidate (`responses`), a preference, a ranking, or a label in any layout of stage=aggregate. Responses
    are listed in an order that says nothing of which was preferred.

    Raises:
        UserError: naming file and row, or when there is nothing to judge.
    """
    found: dict[str, ToJudge] = {}
    skipped = 0
    for where, row in source.rows():
        try:
            members = comparisons_of(row, columns)
        except RowError as error:
            if on_bad_row == "error":
                raise UserError(f"{source.name}, {where}: {error}") from None
            skipped += 1
            continue
        for comparison, ranking in members:
            mine = found.setdefault(name_of(comparison, found), ToJudge(comparison))
            if ranking is not None:
                label = LabeledComparison(comparison, ranking, OF_THE_ROW).aligned(mine.comparison)
                mine.known.append(label.ranking)
    if not found:
        raise UserError(f"{source.name} has no comparison to judge ({skipped} rows skipped)")
    return [replace_id(name, asked) for name, asked in found.items()], skipped


def comparisons_of(row: Any, columns: Columns) -> list[tuple[Comparison, tuple[int, ...] | None]]:
    """Return the comparisons of a row, each with a ranking where the row has one."""
    if not isinstance(row, dict):
        raise RowError("the row is no object")
    view = Canonical(columns.view(row))
    if has_value(view.get("responses")) and not has_value(view.get("ranking")):
        if not has_value(view.get("prompt")):
            raise RowError(f"there is no prompt; {listed(view)}")
        prompt, texts = records.prompt_of(view, columns), tuple(records.given_responses(view, columns))
        if len(texts) < 2:
            raise RowError("responses has one text, and nothing to compare it with")
        return [(Comparison(id_of(view, digest(prompt, texts)), prompt, texts, metadata(view)), None)]
    given = row if has_value(view.get("annotator")) or "annotations" in view else row | {"annotator": OF_THE_ROW}
    labels = [label for label in labels_of(given, columns)[1] if isinstance(label, LabeledComparison)]
    if not labels:
        raise RowError("it labels single responses; a judge compares several")
    return [(label.comparison, label.ranking) for label in labels]


def name_of(comparison: Comparison, found: dict[str, ToJudge]) -> str:
    """Return the id of a comparison, with a digest where rows with other responses have the same one."""
    other = found.get(comparison.id)
    if other is None or texts(other.comparison) == texts(comparison):
        return comparison.id
    return f"{comparison.id}-{digest(comparison.prompt, comparison.responses)[:8]}"


def texts(comparison: Comparison) -> list[str]:
    """Return the responses in an order of their own."""
    return sorted(text.strip() for text in comparison.responses)


def replace_id(name: str, asked: ToJudge) -> ToJudge:
    """Return what is judged under the name by which it was found."""
    return ToJudge(replace(asked.comparison, id=name), asked.known)


# ---- judging ---------------------------------------------------------------------------------------------------------


def judge_comparisons(
    judge: Judge, comparisons: Sequence[Comparison], mode: str = "pairwise", tie_margin: float = 0.0
) -> Iterator[Judged]:
    """Yield what a judge makes of each comparison, in the order in which they are finished.

    Args:
        mode: "pairwise": every two responses, in both orders; "pointwise": a rating of each response; "listwise": all
            of a comparison at once, in the order of the comparison and in reverse.
        tie_margin: a pair whose probability is no further from 0.5 is a tie.

    Raises:
        UserError: an unknown mode, or what the judge raises.
    """
    if mode not in MODES:
        raise UserError(f"judge.mode={mode} is not one of {', '.join(MODES)}.{nearest(str(mode), MODES)}")
    if mode == "pointwise":
        for number, ratings in judge.rate(comparisons):
            yield of_ratings(judge.name, comparisons[number], ratings)
    elif mode == "listwise":
        for number, ranking in judge.rank(comparisons):
            yield of_ranking(judge.name, comparisons[number], ranking)
    else:
        yield from in_pairs(judge, comparisons, tie_margin)


def in_pairs(judge: Judge, comparisons: Sequence[Comparison], tie_margin: float) -> Iterator[Judged]:
    """Yield the verdicts on every two responses of each comparison."""
    asked = [
        (number, pair)
        for number, comparison in enumerate(comparisons)
        for pair in itertools.combinations(range(len(comparison.responses)), 2)
    ]
    pairs = [
        replace(comparisons[number], responses=tuple(comparisons[number].responses[i] for i in pair))
        for number, pair in asked
    ]
    verdicts: list[dict[tuple[int, int], Verdict]] = [{} for _ in comparisons]
    for place, verdict in judge.compare(pairs):
        number, pair = asked[place]
        verdicts[number][pair] = verdict
        size = len(comparisons[number].responses)
        if len(verdicts[number]) == size * (size - 1) // 2:
            yield of_verdicts(judge.name, comparisons[number], verdicts[number], tie_margin)
            verdicts[number] = {}


def of_verdicts(
    name: str, comparison: Comparison, verdicts: dict[tuple[int, int], Verdict], tie_margin: float
) -> Judged:
    """Return the ranking by the sum of the probabilities of winning against each other response."""
    known = {pair: verdict.probability for pair, verdict in sorted(verdicts.items())}
    wins = [0.0] * len(comparison.responses)
    for (i, j), p in known.items():
        share = 0.5 if p is None or abs(p - 0.5) <= tie_margin else p
        wins[i] += share
        wins[j] += 1 - share
    ranking = None if None in known.values() else ranks(wins)
    made = [verdict for _, verdict in sorted(verdicts.items())]
    samples = tuple(side for verdict in made for side in (verdict.forward, verdict.swapped))
    extra: dict[str, Any] = {}
    if len(known) == 1 and ranking is not None:
        extra["probability"] = known[0, 1]
    if votes := made[0].votes if len(made) == 1 else None:
        extra["votes"] = votes
    return judged(name, comparison, ranking, {p: v.orders for p, v in sorted(verdicts.items())}, samples,
                  made[0].principle, extra)  # fmt: skip


def of_ratings(name: str, comparison: Comparison, ratings: Sequence[Rating]) -> Judged:
    """Return the ranking by ratings; each pair is what the two ratings say, whatever the order."""
    values = [rating.value for rating in ratings]
    known = [value for value in values if value is not None]
    ranking = ranks(known) if len(known) == len(values) else None
    pairs: dict[tuple[int, int], Orders] = {}
    for i, j in itertools.combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        share = None if a is None or b is None else 0.5 + ((a > b) - (a < b)) / 2
        pairs[i, j] = (share, share)
    extra = {"ratings": values}
    result = judged(name, comparison, ranking, pairs, tuple(r.answers for r in ratings), ratings[0].principle, extra)
    return replace(result, ratings=tuple(known)) if ranking is not None else result


def of_ranking(name: str, comparison: Comparison, ranking: Ranking) -> Judged:
    """Return the ranking by the mean rank in both orders."""
    sides = []
    for answers in (ranking.forward, ranking.swapped):
        found = [answer.value for answer in answers if isinstance(answer.value, tuple)]
        sides.append([sum(column) / len(found) for column in zip(*found, strict=True)] if found else None)
    pairs: dict[tuple[int, int], Orders] = {}
    for i, j in itertools.combinations(range(len(comparison.responses)), 2):
        f, s = (None if m is None else 0.5 + ((m[i] < m[j]) - (m[i] > m[j])) / 2 for m in sides)
        pairs[i, j] = (f, s)
    return judged(name, comparison, ranking.ranks, pairs, (ranking.forward, ranking.swapped), ranking.principle, {})


def judged(
    name: str,
    comparison: Comparison,
    ranking: tuple[int, ...] | None,
    pairs: dict[tuple[int, int], Orders],
    samples: tuple[tuple[Answer, ...], ...],
    principle: str | None,
    extra: dict[str, Any],
) -> Judged:
    """Return the result with its label, whose row also has `extra` and, below `judge`, what it was decided by."""
    answers = tuple(answer for side in samples for answer in side)
    result = Judged(comparison, pairs, answers, samples)
    if ranking is None:
        return result
    extra = extra | ({"principle": principle} if principle is not None else {}) | {"judge": details(result)}
    label = LabeledComparison(
        replace(comparison, metadata=comparison.metadata | extra),
        ranking,
        name,
        seconds=round(sum(answer.seconds for answer in answers), 3),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return replace(result, label=label)


def ranks(worth: Sequence[float]) -> tuple[int, ...]:
    """Return the rank of each response, 0 for the highest worth; those that differ by rounding only are ties."""
    rounded = [round(value, 9) for value in worth]
    levels = sorted(set(rounded), reverse=True)
    return tuple(levels.index(value) for value in rounded)


def details(result: Judged) -> dict[str, Any]:
    """Return what the figures of a judge are computed from, as plain numbers."""
    counted = [answer for answer in result.answers if answer.prompt_tokens or answer.text or answer.failure]
    alike = total = 0
    for side in result.samples:
        for one, other in itertools.combinations([a.value for a in side if a.value is not None], 2):
            total += 1
            alike += same_side(one, other)
    masses = [answer.mass for answer in result.answers if answer.mass is not None]
    kinds = [answer.failure for answer in result.answers if answer.failure]
    return {
        "pairs": [[i, j, forward, swapped] for (i, j), (forward, swapped) in result.pairs.items()],
        "questions": len(counted),
        "unreadable": kinds.count(UNREADABLE),
        "refusals": kinds.count(REFUSAL),
        "errors": sum(kind not in (UNREADABLE, REFUSAL) for kind in kinds),
        "samples": [alike, total],
        "prompt_tokens": sum(answer.prompt_tokens for answer in result.answers),
        "completion_tokens": sum(answer.completion_tokens for answer in result.answers),
        "cached": sum(answer.cached for answer in result.answers),
        "cost": sum(answer.cost for answer in result.answers),
        "mass": sum(masses) / len(masses) if masses else None,
    }


def same_side(one: Any, other: Any) -> bool:
    """Return whether two answers to one question say the same: the better response, the rating, or the ranking."""
    if isinstance(one, float) and isinstance(other, float) and max(one, other) <= 1:
        return (one > 0.5) - (one < 0.5) == (other > 0.5) - (other < 0.5)
    return one == other
