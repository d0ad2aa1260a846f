"""Rows before a judge: what is read of them, the labels, and the figures against known judges."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.comparisons import Comparison
from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.records import preference
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.judge_figures import counts, figures, soft_rows, temperature_of, warnings
from rlhf_lightning.feedback.judging import ToJudge, judge_comparisons, read_comparisons
from rlhf_lightning.feedback.reading import read_labels
from rlhf_lightning.judges.judge import Answer, Ranking, Rating, Verdict
from rlhf_lightning.judges.language import LanguageJudge
from tests.judges.models import Fake, by_length, pair, says

HI = [{"role": "user", "content": "Hi"}]


def read(*rows: Any, on_bad_row: str = "error") -> list[ToJudge]:
    return read_comparisons(read_source(list(rows), "train"), Columns(), on_bad_row)[0]


def test_every_layout_is_read() -> None:
    """The order of the responses does not tell which was preferred."""
    (candidate,) = read({"prompt": "Hi", "responses": ["a", "b", "c"], "family": "x"})
    assert (candidate.comparison.responses, candidate.known) == (("a", "b", "c"), [])
    assert candidate.comparison.metadata == {"family": "x"}
    one, other = (read({"prompt": "Hi", "chosen": a, "rejected": b})[0] for a, b in (("a", "b"), ("b", "a")))
    assert one.comparison == other.comparison
    assert [one.known, other.known] == [[(0, 1)], [(1, 0)]] or [one.known, other.known] == [[(1, 0)], [(0, 1)]]
    (ranking,) = read({"prompt": "Hi", "responses": ["a", "b"], "ranking": [1, 0]})
    assert ranking.known == [(1, 0)]
    annotations = [{"annotator": "x", "label": "a"}, {"annotator": "y", "label": "tie"}]
    (annotated,) = read(
        {"item_id": "i", "prompt": "Hi", "response_a": "a", "response_b": "b", "annotations": annotations}
    )
    assert annotated.known == [(0, 1), (0, 0)]
    labels = [
        {"id": "i", "prompt": "Hi", "responses": r, "ranking": [0, 1], "annotator": n}
        for r, n in ((["a", "b"], "x"), (["b", "a"], "y"))
    ]
    (merged,) = read(*labels)
    assert merged.known == [(0, 1), (1, 0)]


def test_equal_ids_of_other_responses() -> None:
    found = read(*({"id": "p", "prompt": "Hi", "responses": ["a", text]} for text in "bcd"))
    names = [to_judge.comparison.id for to_judge in found]
    assert names[0] == "p"
    assert len(set(names)) == 3


def test_rows_that_are_none() -> None:
    for row, message in (
        ({"prompt": "Hi", "responses": ["a"]}, "row 1: responses has one text"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "a"}, "row 1: chosen and rejected are identical"),
        ({"responses": ["a", "b"]}, "row 1:"),
        (
            {"item_id": "i", "prompt": "Hi", "response": "a", "annotations": [{"annotator": "x", "label": "b"}]},
            "labels single responses",
        ),
    ):
        with pytest.raises(UserError, match=message):
            read(row)
        with pytest.raises(UserError, match="has no comparison to judge"):
            read(row, on_bad_row="skip")


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_every_two_responses_are_compared() -> None:
    three = Comparison("c", HI, ("bbb", "a", "bb"))
    model = Fake(by_length)
    (result,) = judge_comparisons(LanguageJudge(model, constitution=["Be long."]), [three])
    assert len(model.asked) == 6
    assert result.label is not None
    assert result.label.ranking == (0, 2, 1)
    assert result.label.annotator == "fake"
    assert {pair: orders[0] for pair, orders in result.pairs.items()} == pytest.approx(
        {(0, 1): 3 / 4, (0, 2): 3 / 5, (1, 2): 1 / 3}
    )
    row = result.label.row()
    assert row["principle"] == "principle-1"
    (label,) = read_labels([json.loads(json.dumps(row))]).comparisons
    assert label.ranking == (0, 2, 1)
    assert preference(row).responses == ["bbb", "bb", "a"]


def test_probability_and_ties() -> None:
    (result,) = judge_comparisons(LanguageJudge(Fake(by_length)), [pair("aaaaa", "aaaa")])
    assert result.label.row()["probability"] == pytest.approx(5 / 9)
    (result,) = judge_comparisons(LanguageJudge(Fake(by_length)), [pair("aaaaa", "aaaa")], tie_margin=0.1)
    assert result.label.ranking == (0, 0)
    (result,) = judge_comparisons(LanguageJudge(Fake(says("[[A]]")), method="generate"), [pair("x", "y")])
    assert result.label.ranking == (0, 0)


def test_the_other_modes() -> None:
    def rates(question: Any, responses: list[str]) -> Any:
        return says(f"[[{min(len(responses[0]), 5)}]]")(question, responses)

    three = Comparison("c", HI, ("bbb", "a", "bb"))
    (result,) = judge_comparisons(LanguageJudge(Fake(rates), method="generate"), [three], "pointwise")
    assert (result.label.ranking, result.ratings) == ((0, 2, 1), (3.0, 1.0, 2.0))
    assert result.label.row()["ratings"] == [3.0, 1.0, 2.0]
    (result,) = judge_comparisons(LanguageJudge(Fake(by_length)), [three], "listwise")
    assert result.label.ranking == (0, 2, 1)
    assert result.pairs == {(0, 1): (1.0, 1.0), (0, 2): (1.0, 1.0), (1, 2): (0.0, 0.0)}
    with pytest.raises(UserError, match=r"judge\.mode=pairs is not one of .*Did you mean 'pairwise'"):
        list(judge_comparisons(LanguageJudge(Fake(rates)), [three], "pairs"))


def test_a_missing_verdict_is_no_label() -> None:
    for mode in ("pairwise", "pointwise", "listwise"):
        (result,) = judge_comparisons(LanguageJudge(Fake(says("blah"))), [pair("x", "y")], mode)
        assert (result.label, result.failure) == (None, "no verdict")


# ---- figures ---------------------------------------------------------------------------------------------------------


class Known:
    """A judge of known accuracy, preference for the first response, and ties."""

    name, on_failure = "known", "skip"

    def __init__(self, accuracy: float, first: float = 0.0, ties: float = 0.0) -> None:
        self.accuracy, self.first, self.ties = accuracy, first, ties

    def compare(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        for place, comparison in enumerate(comparisons):
            rng = random.Random(comparison.id)
            good = comparison.responses[0] == "good"
            right = 1.0 if (rng.random() < self.accuracy) == good else 0.0
            forward, swapped = (1.0, 0.0) if rng.random() < self.first else (right, right)
            if rng.random() < self.ties:
                forward = swapped = 0.5
            yield place, Verdict((Answer(forward, prompt_tokens=5),), (Answer(swapped, prompt_tokens=5),))

    def rate(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, tuple[Rating, ...]]]:
        raise NotImplementedError

    def rank(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Ranking]]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def measured(judge: Known, n: int = 400) -> tuple[list[dict[str, Any]], dict[str, list[tuple[int, ...]]]]:
    """Return rows of labels, and what the rows said: "good" is better, and stands first or second."""
    asked = [pair(*(("good", "worse")[:: 1 if i % 2 else -1]), str(i), f"question {i}") for i in range(n)]
    rows = [result.label.row() for result in judge_comparisons(judge, asked) if result.label is not None]
    return rows, {c.id: [(0, 1) if c.responses[0] == "good" else (1, 0)] for c in asked}


def test_the_figures_of_a_judge_that_errs() -> None:
    rows, known = measured(Known(0.8))
    table = figures(rows, known)
    assert table["accuracy"][0] == pytest.approx(0.8, abs=0.06)  # three standard errors
    assert table["accuracy"][1] < 0.8 < table["accuracy"][2]
    assert table["accuracy_single_order"][0] == table["accuracy"][0]
    assert table["first_shown"][0] == 0.5
    assert table["flips"][0] == table["ties"][0] == 0
    assert table["longer"][0] == pytest.approx(1 - table["accuracy"][0])
    assert table["longer_in_rows"][0] == 0.0
    assert "self_consistency" not in table
    assert warnings(table, counts([row["judge"] for row in rows])) == []
    wrong = {name: [tuple(1 - rank for rank in rankings[0])] for name, rankings in known.items()}
    assert figures(rows, wrong)["accuracy"][0] == pytest.approx(1 - table["accuracy"][0])


def test_the_figures_of_a_judge_that_always_says_a() -> None:
    rows, known = measured(Known(0.8, first=1.0), 60)
    table = figures(rows, known)
    assert [table[name][0] for name in ("first_shown", "flips", "ties", "accuracy", "accuracy_single_order")] == [
        1,
        1,
        1,
        0.5,
        0.5,
    ]
    assert table["accuracy"][1] < 0.45
    lines = warnings(table, counts([row["judge"] for row in rows]))
    assert any("position bias: the response shown first is preferred in 100% of verdicts" in line for line in lines)
    assert any("100% of the pairs get another verdict" in line for line in lines)
    assert any("no better than chance" in line for line in lines)


def test_position_bias_of_a_part() -> None:
    rows, known = measured(Known(1.0, first=0.4))
    table = figures(rows, known)
    assert table["flips"][0] == pytest.approx(0.4, abs=0.08)
    assert table["first_shown"][0] == pytest.approx(0.5 + 0.4 / 2, abs=0.04)
    assert table["accuracy"][0] == pytest.approx(0.6 + 0.4 / 2, abs=0.04)  # a tie is half right


def test_ties_are_half_and_labels_that_tie_are_left_out() -> None:
    rows, known = measured(Known(1.0, ties=0.5))
    table = figures(rows, known)
    assert table["ties"][0] == pytest.approx(0.5, abs=0.08)
    assert table["accuracy"][0] == pytest.approx(1 - table["ties"][0] / 2)
    tied = known | {name: [(0, 1), (1, 0)] for name in list(known)[:399]}
    assert figures(rows, tied)["accuracy"][0] in (0.5, 1.0)
    assert "accuracy" not in figures(rows, {})


def test_self_consistency_is_of_samples_of_one_question() -> None:
    def wavering(question: Any, responses: list[str]) -> Any:
        return says("[[A]]" if question.sample < 2 else "[[B]]")(question, responses)

    judge = LanguageJudge(Fake(wavering), method="generate", samples=3, temperature=1.0)
    rows = [r.label.row() for r in judge_comparisons(judge, [pair("x", "y", str(i), str(i)) for i in range(4)])]
    assert figures(rows, {})["self_consistency"][0] == pytest.approx(1 / 3)  # of three pairs of samples one agrees


def test_failures_are_counted_and_warned_of() -> None:
    results = [*judge_comparisons(LanguageJudge(Fake(says("blah"))), [pair("x", "y")]),
               *judge_comparisons(LanguageJudge(Fake(says("I cannot."))), [pair("x", "y")]),
               *judge_comparisons(LanguageJudge(Fake(says("A"))), [pair("x", "y")])]  # fmt: skip
    from rlhf_lightning.feedback.judging import details

    total = counts([details(result) for result in results])
    assert [total[name] for name in ("questions", "unreadable", "refusals", "errors")] == [6, 2, 2, 0]
    assert any("4 of 6 questions got no verdict" in line for line in warnings({}, total))
    assert any("verdicts have 20.0% of the probability" in line for line in warnings({}, total | {"verdict_mass": 0.2}))


# ---- soft labels -----------------------------------------------------------------------------------------------------


def test_soft_labels_are_of_the_chosen_response() -> None:
    results = judge_comparisons(
        LanguageJudge(Fake(by_length)), [pair("a", "bbb"), Comparison("k", HI, ("aa", "b", "aa"))]
    )
    rows = sorted(soft_rows([result.label.row() for result in results]), key=lambda row: -row["label"])
    assert [(row["chosen"], row["rejected"], row["label"]) for row in rows] == [
        ("bbb", "a", pytest.approx(0.75)), ("aa", "b", pytest.approx(2 / 3)),
    ]  # fmt: skip
    record = preference(rows[0])
    assert (record.responses, record.label) == (["bbb", "a"], pytest.approx(0.75))
    assert not {"ranking", "responses", "annotator"} & rows[0].keys()


def test_calibrated_soft_labels() -> None:
    rows, known = measured(Known(0.8))
    temperature, figures_before_after = temperature_of(rows, known, "temperature")
    assert figures_before_after["calibration_error"] == pytest.approx(0.2, abs=0.06)
    assert figures_before_after["calibration_error_after"] < 0.06
    assert {round(row["label"], 2) for row in soft_rows(rows, temperature)} == {
        round(figures(rows, known)["accuracy"][0], 2)
    }
    assert temperature_of(rows, {}, "none") == (1.0, {})
    with pytest.raises(UserError, match=r"judge\.calibrate=temperature needs rows with labels"):
        temperature_of(rows, {}, "temperature")
    with pytest.raises(UserError, match=r"judge\.calibrate=platt is not one of none, temperature"):
        temperature_of(rows, known, "platt")


def test_a_judge_at_chance_gives_labels_without_confidence() -> None:
    rows, known = measured(Known(0.8, first=1.0), 60)
    temperature, _ = temperature_of(rows, known, "temperature")
    assert {row["label"] for row in soft_rows(rows, temperature)} == {0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["rm_eval/llmbar.jsonl.gz", "alpaca_eval_prefs/test.jsonl.gz", "multi_annotator/pandalm_pairwise.jsonl.gz"]
)
def test_real_pairs_are_read(file: str, shared_data: Path) -> None:
    found, _ = read_comparisons(read_source(str(shared_data / file), "train"), Columns(), "skip")
    assert len(found) > 400
    firsts = [to_judge.known[0][0] for to_judge in found if len(set(to_judge.known[0])) == 2]
    assert 0.4 < sum(firsts) / len(firsts) < 0.6  # the chosen one is not always the first
