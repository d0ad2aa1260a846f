"""Duels by a judge: both orders, ties of flips, failures left out, position bias shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.evaluation.comparing import compare
from rlhf_lightning.evaluation.judging import by_judge
from rlhf_lightning.evaluation.policy import Evaluation
from rlhf_lightning.judges.judge import UNREADABLE, Answer, Verdict
from rlhf_lightning.judges.world import WorldJudge
from rlhf_lightning.ops.statistics import mean_interval, share_interval
from rlhf_lightning.world import gold, rows


class Scripted:
    """A judge whose answers in both orders are in the first response, such as "0.9 0.2"; "-" is a failure."""

    name, on_failure = "scripted", "skip"

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        for place, comparison in reversed(list(enumerate(comparisons))):  # they come in any order
            self.asked.append(comparison.responses)
            sides = comparison.responses[0].split()
            yield place, Verdict(*((Answer(None, UNREADABLE) if x == "-" else Answer(float(x)),) for x in sides))


def answered(texts: list[str], places: list[tuple[int, int]] | None = None) -> Evaluation:
    places = places or [(i, 0) for i in range(len(texts))]
    samples = [{"prompt": f"p{row}", "response": text} for (row, _), text in zip(places, texts, strict=True)]
    metadata = [{"messages": [{"role": "user", "content": f"p{row}"}]} for row, _ in places]
    return Evaluation({}, places, [(row,) for row, _ in places], samples, metadata=metadata)


@pytest.mark.parametrize(
    ("orders", "outcome"),
    [
        ((0.9, 0.6), 1.0), ((0.1, 0.4), 0.0), ((0.9, 0.2), 0.5), ((0.2, 0.9), 0.5), ((0.9, 0.5), 0.5), ((0.5, 0.1), 0.5),
        ((0.5, 0.5), 0.5), ((None, 0.9), None), ((0.9, None), None),
    ],
)  # fmt: skip
def test_a_win_is_one_in_both_orders(orders: tuple[Any, Any], outcome: float | None) -> None:
    assert Verdict(*((Answer(value),) for value in orders)).outcome == outcome


def test_wins_ties_losses_and_what_fails() -> None:
    judge = Scripted()
    texts = ["0.9 0.7", "0.2 0.4", "0.9 0.2", "- 0.9", "same", "0.8 0.9"]
    models = {"b": answered(texts), "a": answered(["x", "y", "z", "w", "same ", "v"])}
    judged = by_judge(judge, models, [("b", "a")])
    (duel,) = judged.duels
    assert len(judge.asked) == 5  # equal responses are a tie, and nothing is asked
    assert duel.outcomes == [1.0, 0.0, 0.5, 0.5, 1.0]
    assert duel.beside["failed"][0] == 1
    prompts = list(duel.prompts)
    assert duel.beside["preference"] == mean_interval([0.8, 0.3, 0.55, 0.5, 0.85], prompts)
    asked = [prompts[i] for i in (0, 1, 2, 4)]
    assert duel.beside["flips"] == share_interval([0.0, 0.0, 1.0, 0.0], asked)
    shown = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0]  # the first order, then the second, of each
    assert duel.beside["first_shown"] == share_interval(shown, [p for p in asked for _ in range(2)])
    assert [row["outcome"] for row in judged.rows] == [1.0, 0.0, 0.5, None, 0.5, 1.0]
    assert judged.rows[3]["failure"] == UNREADABLE
    assert judged.rows[0] == {
        "model": "b", "opponent": "a", "prompt": "p0", "response": "0.9 0.7", "opponent_response": "x",
        "forward": 0.9, "swapped": 0.7, "outcome": 1.0,
    }  # fmt: skip


def test_a_judge_that_fails_always_stops_nothing() -> None:
    found = compare({"a": answered(list("xyz")), "b": answered(["- -"] * 3)}, judge=Scripted())
    (row,) = found.win_rates
    assert (row["count"], row["failed"], "win_rate" in row) == (0, 3, False)
    assert found.figures["b-a"].keys() == {"judge_failed"}
    assert found.notes == ["b-a: scripted gave no verdict on 3 of 3 pairs, which are left out"]


def test_position_bias_is_said() -> None:
    """A judge that prefers what is shown first decides nothing: all ties."""
    texts = [f"0.9 0.1 {i}" for i in range(20)]
    judge = Scripted()
    judge.compare = lambda asked: ((i, Verdict((Answer(0.9),), (Answer(0.1),))) for i in range(len(asked)))
    found = compare({"a": answered(texts), "b": answered([t + "!" for t in texts])}, judge=judge)
    (row,) = found.win_rates
    assert (row["wins"], row["ties"], row["losses"], row["win_rate"]) == (0, 20, 0, 0.5)
    assert (row["first_shown"], row["flips"]) == (1.0, 1.0)
    assert found.notes == [
        "b-a: scripted prefers the response shown first in 100% of verdicts; those that turn with the order are ties",
        "b-a: 100% of the verdicts of scripted turn with the order",
    ]


def of_the_world(texts: dict[str, str], count: int = 30) -> tuple[dict[str, Evaluation], list[dict[str, Any]]]:
    """Return models that answer everything with the same text, and the rows of their prompts."""
    data = list(rows("prompts", count))
    models = {}
    for name, text in texts.items():
        samples = [{"prompt": row["prompt"], "response": text} for row in data]
        values = [gold(row, text).total for row in data]
        places = [(i, 0) for i in range(count)]
        models[name] = Evaluation({"gold": values}, places, [(i,) for i in range(count)], samples, metadata=data)
    return models, data


def test_a_judge_without_errors_says_what_gold_says() -> None:
    texts = {"no": "No.", "yes": "Yes.", "sorry": "I am sorry, I can't help with that."}
    models, _ = of_the_world(texts)
    found = compare(models, judge=WorldJudge())
    by_gold, by_judge_ = ([row for row in found.win_rates if row["by"] == by] for by in ("gold", "judge"))
    for one, other in zip(by_gold, by_judge_, strict=True):
        assert one["count"] == other["count"] == 30
        for name in ("wins", "ties", "losses", "win_rate", "low", "high"):
            assert one[name] == other[name]
        assert other["flips"] == 0.0
    assert [(row["model"], row["opponent"]) for row in by_gold] == [("yes", "no"), ("sorry", "no"), ("sorry", "yes")]
    assert found.figures["sorry"].keys() == {"gold_rating", "judge_rating"}
    assert found.figures["sorry"]["gold_rating"] == found.figures["sorry"]["judge_rating"]
    assert math.isclose(sum(row["rating"] for row in found.ratings if row["by"] == "gold"), 3000)
    assert found.notes == []


def test_a_judge_with_position_bias_has_more_ties() -> None:
    models, _ = of_the_world({"no": "No.", "sorry": "I am sorry, I can't help with that."})
    fair = compare(models, judge=WorldJudge()).win_rates[1]
    biased = compare(models, judge=WorldJudge(position_bias=5.0)).win_rates[1]
    assert fair["ties"] < biased["ties"] == 30
    assert biased["first_shown"] == 1.0
    assert biased["win_rate"] == 0.5


def test_each_against_one() -> None:
    models, _ = of_the_world({"no": "No.", "yes": "Yes.", "sorry": "I am sorry."})
    found = compare(models, against="yes")
    assert list(found.figures)[:2] == ["no-yes", "sorry-yes"]
    assert {row["opponent"] for row in found.win_rates} == {"yes"}
    assert compare(models, first="sorry").win_rates[0]["opponent"] == "sorry"
