"""Diagnostics of scores that are made up: planted faults are found, calibrated scores and clean ones are not accused."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from scipy.special import expit

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.diagnostics import (
    Diagnosis,
    accuracy_by,
    calibration,
    diagnose,
    fit_length,
    length_bias,
    lengths,
    margins,
    sources,
)
from rlhf_lightning.evaluation.reward_model import ScoredRow, pair_accuracies, scored_pairs
from rlhf_lightning.ops.statistics import share_interval
from tests.evaluation.scored import row, scored, texts


def test_pairs_of_a_ranking_are_untied_and_in_order() -> None:
    pairs = scored_pairs([row(0, ["a", "b", "c"], [3.0, 1.0, 2.0], ranks=[0, 1, 1]), row(1, ["d", "e"], [0.0, 0.0])])
    assert [(p.better, p.worse, p.gap) for p in pairs] == [(0, 1, 2.0), (0, 2, 1.0), (0, 1, 0.0)]
    assert pair_accuracies(pairs)["accuracy"] == share_interval([1, 1, 0.5], [0, 0, 1])


# ---- buckets -----------------------------------------------------------------------------------------------------------


def test_accuracy_by_source_by_hand() -> None:
    rows = [
        row(i, ["a", "b"], [float(i % 3 > 0), 0.5], columns={"source": "xy"[i % 2], "dataset": "d"}) for i in range(12)
    ]
    found = sources(scored_pairs(rows))
    assert [(line["by"], line["bucket"], line["count"], line["accuracy"]) for line in found] == [
        ("source", "x", 6, 4 / 6), ("source", "y", 6, 4 / 6),
    ]  # fmt: skip
    assert (found[0]["low"], found[0]["high"]) == share_interval([0, 1, 1, 0, 1, 1])[1:]
    assert [line["bucket"] for line in sources(scored_pairs(rows), "dataset")] == ["d"]
    assert sources(scored_pairs([row(0, ["a", "b"], [1, 0])])) == []
    with pytest.raises(
        UserError, match="evaluate.source_column=sauce: the rows have source, dataset. Did you mean 'source'"
    ):
        sources(scored_pairs(rows), "sauce")


def test_margins_and_lengths_are_fifths_that_hold_every_pair() -> None:
    """The gap grows with the row, and only pairs with a large gap are in the right order."""
    rows = []
    for i in range(100):
        gap = (i + 1) / 100 * (1 if i >= 60 or i % 2 else -1)
        rows.append(row(i, ["x" * (i + 1), "y" * 100], [gap, 0.0], margin=float(i % 2)))
    pairs = scored_pairs(rows)
    by_score = [line for line in margins(pairs) if line["by"] == "score"]
    assert [line["count"] for line in by_score] == [20] * 5
    assert [line["accuracy"] for line in by_score] == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert by_score[0]["bucket"] == "0.01 to 0.21"
    by_row = [line for line in margins(pairs) if line["by"] == "row"]
    assert [(line["bucket"], line["count"], line["accuracy"]) for line in by_row] == [("0", 50, 0.4), ("1", 50, 1.0)]
    differences = [line for line in lengths(pairs) if line["by"] == "difference"]
    assert sum(line["count"] for line in differences) == 100
    assert (differences[0]["bucket"], differences[-1]["bucket"]) == ("-99 to -79", "-20 to 0")
    assert [line["accuracy"] for line in differences] == [0.5, 0.5, 0.5, 1.0, 1.0]
    equal = [row(i, ["aa", "bb"], [1.0, 0.0]) for i in range(4)]
    assert [(line["bucket"], line["count"]) for line in margins(scored_pairs(equal))] == [("1.00", 4)]


def test_annotators_are_their_groups_where_rows_name_them() -> None:
    named = [row(i, ["a", "b"], [1.0, 0.0], group="uv"[i % 2], columns={"annotator": f"p{i % 3}"}) for i in range(6)]
    found = diagnose(named).tables["annotators"]
    assert [(line["by"], line["bucket"], line["count"]) for line in found] == [("group", "u", 3), ("group", "v", 3)]
    alone = [row(i, ["a", "b"], [1.0, 0.0], columns={"annotator": f"p{i % 3}"}) for i in range(6)]
    assert [line["bucket"] for line in diagnose(alone).tables["annotators"]] == ["p0", "p1", "p2"]
    assert "annotators" not in diagnose([row(0, ["a", "b"], [1, 0]), row(1, ["a", "b"], [1, 0])]).tables


def test_pairs_of_one_prompt_are_one_cluster() -> None:
    rows = [row(i, ["a", "b"], [float(i < 20), 0.5], prompt=i // 10) for i in range(40)]
    (line,) = accuracy_by(scored_pairs(rows), lambda pair: "all")
    assert line["high"] - line["low"] > 0.8  # 4 prompts, not 40


# ---- calibration -------------------------------------------------------------------------------------------------------


def forecasts(count: int, seed: int, sharpness: float = 1.0) -> list[ScoredRow]:
    """Pairs whose odds are known; the model believes them times `sharpness`."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        odds = rng.gauss(0, 1.5)
        better = odds if rng.random() < expit(odds) else -odds
        rows.append(row(number, ["a", "b"], [better, 0.0], logits=[sharpness * better, 0.0]))
    return rows


@pytest.mark.slow
def test_calibrated_scores_have_no_calibration_error() -> None:
    pairs = scored_pairs(forecasts(5000, 0))
    calm = calibration(pairs)
    assert calm.metrics["calibration_error"][0] < 0.02
    sure = calibration(scored_pairs(forecasts(5000, 0, sharpness=3.0)))
    assert sure.metrics["calibration_error"][0] > 0.1
    assert sure.metrics["brier"][0] > calm.metrics["brier"][0]
    # E (1 - p)^2 of the outcome is E p (1 - p) of calibrated probabilities
    chances = [float(expit(pair.logit)) for pair in pairs]
    assert calm.metrics["brier"][0] == pytest.approx(sum(p * (1 - p) for p in chances) / len(chances), abs=0.008)


def test_the_diagram_is_symmetric_and_counts_both_orders() -> None:
    table = calibration(scored_pairs(forecasts(500, 1))).tables["calibration"]
    assert sum(line["count"] for line in table) == 1000
    for line, mirror in zip(table, table[::-1], strict=True):
        assert line["count"] == mirror["count"]
        assert line["predicted"] + mirror["predicted"] == pytest.approx(1)
        assert line["observed"] + mirror["observed"] == pytest.approx(1)
        assert line["low"] + mirror["high"] == pytest.approx(1)
        assert line["bin_low"] <= line["predicted"] <= line["bin_high"]
    by_hand = sum(line["count"] / 1000 * abs(line["predicted"] - line["observed"]) for line in table)
    metrics = calibration(scored_pairs(forecasts(500, 1))).metrics
    assert metrics["calibration_error"][0] == pytest.approx(by_hand, abs=1e-6)


def test_a_constant_score_says_a_half() -> None:
    found = calibration(scored_pairs([row(i, ["a", "b"], [2.0, 2.0]) for i in range(10)]))
    assert found.metrics["brier"] == (0.25, 0.25, 0.25)
    assert found.metrics["calibration_error"][0] == pytest.approx(0, abs=1e-7)
    assert [line["observed"] for line in found.tables["calibration"]] == [0.5]


@pytest.mark.slow
def test_intervals_of_the_bins_cover_the_probabilities() -> None:
    """Of calibrated scores the interval of a bin contains its mean probability 95 times of 100."""
    held = total = 0
    for seed in range(60):
        for line in calibration(scored_pairs(forecasts(400, seed))).tables["calibration"][5:]:
            total += 1
            held += line["low"] <= line["predicted"] <= line["high"]
    assert total == 300
    assert 0.92 < held / total < 0.985  # 0.95 +- 2.4 standard errors of 300 bins


# ---- length ------------------------------------------------------------------------------------------------------------


def biased(per_character: float, seed: int = 0, count: int = 400) -> list[ScoredRow]:
    """Pairs whose better response is worth one more, at random lengths that have nothing to do with it."""
    rng, rows = random.Random(seed), []
    for number in range(count):
        sizes = [rng.randint(20, 400) for _ in range(2)]
        scores = [
            quality + rng.gauss(0, 0.5) + per_character * size for quality, size in zip((1.0, 0.0), sizes, strict=True)
        ]
        rows.append(row(number, ["x" * size for size in sizes], scores))
    return rows


@pytest.mark.slow
def test_a_length_biased_scorer_is_found_and_its_accuracy_restored() -> None:
    fair, long = biased(0.0), biased(0.02)
    clean = {name: value[0] for name, value in diagnose(fair).metrics.items()}
    found = diagnose(long).metrics
    accuracy = {
        name: pair_accuracies(scored_pairs(rows))["accuracy"][0] for name, rows in (("fair", fair), ("long", long))
    }
    assert accuracy["long"] < 0.65 < 0.9 < accuracy["fair"]
    assert found["length_controlled_accuracy"][0] == pytest.approx(accuracy["fair"], abs=0.01)
    assert clean["length_controlled_accuracy"] == pytest.approx(accuracy["fair"], abs=0.01)
    assert found["length_pearson"][0] > 0.9 < found["length_spearman"][0]
    assert found["length_pearson"][1] > 0.85
    low, high = diagnose(fair).metrics["length_spearman"][1:]
    assert low < 0 < high
    assert fit_length(scored_pairs(long)).linear == pytest.approx(0.02, abs=0.002)


def test_a_logarithmic_bias_is_taken_out_too() -> None:
    plain = biased(0.0)
    rows = [
        row(r.number, r.responses, [s + 2 * math.log1p(len(t)) for s, t in zip(r.scores, r.responses, strict=True)])
        for r in plain
    ]
    expected = pair_accuracies(scored_pairs(plain))["accuracy"][0]
    assert pair_accuracies(scored_pairs(rows))["accuracy"][0] < expected - 0.05
    found = length_bias(rows, scored_pairs(rows)).metrics["length_controlled_accuracy"][0]
    assert found == pytest.approx(expected, abs=0.01)


def test_responses_of_one_length_have_no_correlation_with_it() -> None:
    rows = [row(i, ["aa", "bb"], [float(i % 3), 0.5]) for i in range(12)]
    found = length_bias(rows, scored_pairs(rows)).metrics
    assert list(found) == ["length_controlled_accuracy"]
    assert found["length_controlled_accuracy"] == pair_accuracies(scored_pairs(rows))["accuracy"]


@pytest.mark.slow
def test_a_clean_scorer_is_seldom_said_to_follow_length() -> None:
    """0 is outside the interval of the correlation in at most 6 of 60 runs; 3 are expected."""
    false = 0
    for seed in range(60):
        low, high = diagnose(biased(0.0, seed, count=80)).metrics["length_spearman"][1:]
        false += not low <= 0 <= high
    assert false <= 7


def test_diagnoses_are_joined() -> None:
    one, two = Diagnosis({"a": (1, 1, 1)}, {"t": [{"x": 1}]}), Diagnosis({"b": (2, 2, 2)}, {"t": [{"x": 2}], "u": []})
    both = one | two
    assert both.metrics.keys() == {"a", "b"}
    assert both.tables == {"t": [{"x": 1}, {"x": 2}], "u": []}


@pytest.mark.slow
def test_rows_of_texts_are_diagnosed_whole() -> None:
    found: Any = diagnose(scored(texts(60, 0), len))
    assert found.tables.keys() == {"margins", "lengths", "calibration"}
    assert found.metrics.keys() == {
        "calibration_error",
        "brier",
        "length_pearson",
        "length_spearman",
        "length_controlled_accuracy",
    }
