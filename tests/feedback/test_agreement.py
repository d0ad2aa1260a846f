"""Agreement is what the literature publishes for its examples, intervals cover, and profiles find what was planted."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from rlhf_lightning.data.comparisons import Comparison, ItemLabel, LabeledComparison
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.agreement import agreement, alpha, fleiss, kappa, percent

KRIPPENDORFF = """
1 2 3 3 2 1 4 1 2 . . .
1 2 3 3 2 2 4 1 2 5 . 3
. 3 3 3 2 3 4 2 2 5 1 .
1 2 3 3 2 4 4 1 2 5 1 .
"""
"""Four observers of twelve units (Krippendorff 1980), the data of kripp.alpha in the R package irr."""
FLEISS = [
    (0, 0, 0, 6, 0), (0, 3, 0, 0, 3), (0, 1, 4, 0, 1), (0, 0, 0, 0, 6), (0, 3, 0, 3, 0), (2, 0, 4, 0, 0), (0, 0, 4, 0, 2),
    (2, 0, 3, 1, 0), (2, 0, 0, 4, 0), (0, 0, 0, 0, 6), (1, 0, 0, 5, 0), (1, 1, 0, 4, 0), (0, 3, 3, 0, 0), (1, 0, 0, 5, 0),
    (0, 2, 0, 3, 1), (0, 0, 5, 0, 1), (3, 0, 0, 1, 2), (5, 1, 0, 0, 0), (0, 2, 0, 4, 0), (1, 0, 2, 0, 3), (0, 0, 0, 0, 6),
    (0, 1, 0, 5, 0), (0, 2, 0, 1, 3), (2, 0, 0, 4, 0), (1, 0, 0, 4, 1), (0, 5, 0, 1, 0), (4, 0, 0, 0, 2), (0, 2, 0, 4, 0),
    (1, 0, 5, 0, 0), (0, 0, 0, 0, 6),
]  # fmt: skip
"""Diagnoses of 30 patients by six psychiatrists each (Fleiss 1971, table 1)."""
WIKIPEDIA = [
    (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1), (7, 7, 0, 0, 0), (3, 2, 6, 3, 0),
    (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
]  # fmt: skip
COHEN = [[88, 14, 18], [10, 40, 10], [2, 6, 12]]
"""Two judges of 200 patients (Cohen 1960, table 1, as frequencies)."""


def pair(item: int, annotator: str, ranking: tuple[int, int], **more: Any) -> LabeledComparison:
    comparison = Comparison(str(item), [{"role": "user", "content": "Hi"}], ("short", "a longer one"))
    return LabeledComparison(comparison, ranking, annotator, **more)


def test_krippendorffs_alpha_of_the_published_matrix() -> None:
    lines = [line.split() for line in KRIPPENDORFF.strip().splitlines()]
    labels = [ItemLabel(str(i), x, f"r{k}") for k, line in enumerate(lines) for i, x in enumerate(line) if x != "."]
    figures = agreement(labels, bootstrap=0, reliability=()).figures
    expected = {"alpha_nominal": 0.743421, "alpha_ordinal": 0.815388, "alpha_interval": 0.849107}
    assert {name: figures[name][0] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("counts", "published"), [(FLEISS, 0.430), (WIKIPEDIA, 0.210)])
def test_fleiss_kappa_of_published_tables(counts: list[tuple[int, ...]], published: float) -> None:
    """Fleiss (1971) has .430; the worked example of the English Wikipedia .210."""
    assert fleiss(np.array(counts)) == pytest.approx(published, abs=5e-4)
    labels = [
        ItemLabel(str(i), f"c{c}", f"r{k}")
        for i, row in enumerate(counts)
        for k, c in enumerate(np.repeat(range(5), row))
    ]
    figures = agreement(labels, bootstrap=0, reliability=()).figures
    assert figures["fleiss_kappa"][0] == pytest.approx(published, abs=5e-4)


def test_cohens_kappa_of_the_published_table() -> None:
    """Observed .70 and by chance .41 (.60 x .50 + .30 x .30 + .10 x .20) give .29 / .59."""
    assert kappa(np.array(COHEN)) == pytest.approx(0.29 / 0.59, abs=1e-9)
    cells = [(i, j) for i, row in enumerate(COHEN) for j, count in enumerate(row) for _ in range(count)]
    labels = [
        ItemLabel(str(i), f"c{x}", name) for i, cell in enumerate(cells) for name, x in zip("AB", cell, strict=True)
    ]
    result = agreement(labels, bootstrap=0, reliability=())
    assert result.pairs["A", "B"] == (pytest.approx(0.29 / 0.59, abs=1e-9), 200)
    assert result.figures["percent"][0] == pytest.approx(0.70)
    assert cohen_kappa_score(*zip(*cells, strict=True)) == pytest.approx(result.figures["cohen_kappa"][0], abs=1e-9)


def test_percent_agreement_by_hand() -> None:
    """Of three labels a a b one pair of three agrees; a unit with one label says nothing."""
    assert percent(np.array([[2, 1], [2, 0], [1, 0]])) == pytest.approx((1 / 3 + 1) / 2)
    assert math.isnan(percent(np.array([[1, 0]])))


def test_alpha_of_equal_labels_is_not_defined() -> None:
    assert math.isnan(alpha(np.array([[2, 0], [3, 0]]), None, "nominal"))
    result = agreement([pair(i, name, (0, 1)) for i in range(30) for name in "ab"], bootstrap=20, reliability=())
    assert result.figures["percent"] == (1, 1, 1)
    assert math.isnan(result.figures["alpha_nominal"][0])
    assert "alpha_nominal is not defined: all labels are the same" in result.notes


def test_fleiss_kappa_is_of_units_with_the_same_number_of_labels() -> None:
    """Nine more units with one label more change nothing, and it is said."""
    labels = [pair(i, name, (0, 1) if (i + k) % 3 else (1, 0)) for i in range(30) for k, name in enumerate("ab")]
    more = [pair(i, name, (0, 1)) for i in range(100, 109) for name in "abc"]
    alone = agreement(labels, bootstrap=0, reliability=())
    both = agreement(labels + more, bootstrap=0, reliability=())
    assert both.figures["fleiss_kappa"] == alone.figures["fleiss_kappa"]
    assert "Fleiss' kappa is of the 30 units with 2 labels, without 9 with another number" in both.notes


def test_few_items_have_no_interval() -> None:
    labels = [pair(i, name, (i % 2, 1 - i % 2)) for i in range(19) for name in "ab"]
    result = agreement(labels, bootstrap=50, reliability=())
    assert all(math.isnan(low) and math.isnan(high) for _, low, high in result.figures.values())
    assert "no intervals: 19 items were labeled by several annotators, 20 are needed" in result.notes


def test_one_annotator_has_nobody_to_agree_with() -> None:
    result = agreement([pair(i, "a", (0, 1), shown=(0, 1)) for i in range(5)])
    assert (result.figures, result.reliability, result.shared) == ({}, {}, 0)
    assert result.annotators["a"].earlier is not None
    (note,) = result.notes
    assert note.startswith("no item was labeled by two annotators")
    assert "label.overlap" in note


def test_strength_counts_for_ordinal_and_interval_alpha_only() -> None:
    """Slightly against much better is agreement by name, and half of it by distance."""
    labels = []
    for i in range(40):
        ranking = (0, 1) if i % 2 else (1, 0)
        labels += [pair(i, "a", ranking, strength=1 + i % 3), pair(i, "b", ranking, strength=3 - i % 3)]
    figures = agreement(labels, bootstrap=0, reliability=()).figures
    assert figures["alpha_nominal"][0] == 1
    assert 0.5 < figures["alpha_interval"][0] < 0.9


def test_pairs_of_a_ranking_are_units_and_drawn_together() -> None:
    """A ranking of three has three units, here all the same or all opposed: the interval is that of 60 items."""
    comparisons = [Comparison(str(i), [{"role": "user", "content": "Hi"}], ("x", "y", "z")) for i in range(60)]
    same = np.random.default_rng(0).random(60) < 0.6
    labels = [
        LabeledComparison(comparison, (0, 1, 2) if name == "a" or equal else (2, 1, 0), name)
        for comparison, equal in zip(comparisons, same, strict=True)
        for name in "ab"
    ]
    result = agreement(labels, bootstrap=400, reliability=())
    assert result.pairs["a", "b"][1] == 180
    value, low, high = result.figures["percent"]
    assert value == pytest.approx(same.mean())
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(value * (1 - value) / 60), rel=0.15)  # of 180: 0.58 of it


def test_an_annotator_is_compared_with_the_others_only() -> None:
    """Two who never agree have a share of 0; counting the own label, there would be no majority."""
    labels = [pair(i, name, ranking) for i in range(5) for name, ranking in (("a", (0, 1)), ("b", (1, 0)))]
    found = agreement(labels, bootstrap=0, reliability=()).annotators
    assert found["a"].agreement is not None
    assert found["a"].agreement[0] == 0
    even = agreement([*labels, *(pair(i, "c", (0, 0)) for i in range(5))], bootstrap=0, reliability=()).annotators
    assert even["a"].agreement is None  # b and c say different things


def test_intervals_depend_on_the_seed_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels = [pair(i, name, (0, 1) if rng.random() < 0.7 else (1, 0)) for i in range(60) for name in "ab"]
    one, again, other = (agreement(labels, bootstrap=100, reliability=(), seed=seed).figures for seed in (1, 1, 2))
    assert one == again
    assert one["percent"] != other["percent"]
    assert one["percent"][0] == other["percent"][0]


def test_profiles_find_what_was_planted() -> None:
    """One says the truth, one the side shown first, one the longer response; the fourth is paid by the hour."""
    rng = np.random.default_rng(0)
    labels = []
    for i in range(300):
        truth = (0, 1) if rng.random() < 0.5 else (1, 0)
        shown = (0, 1) if rng.random() < 0.5 else (1, 0)
        by_side = (0, 1) if shown[0] == 0 else (1, 0)
        says = {"true": truth, "also": truth, "side": by_side, "long": (1, 0), "slow": (0, 0) if i % 4 == 0 else truth}
        check = truth.index(0) if i < 20 else None
        labels += [
            pair(i, name, ranking, shown=shown, check=check, seconds=60.0 if name == "slow" else 5.0, group="x" if name in ("true", "also") else "y")
            for name, ranking in says.items()
        ]  # fmt: skip
    found = agreement(labels, bootstrap=0, reliability=())
    side, long, slow, true = (found.annotators[name] for name in ("side", "long", "slow", "true"))
    assert side.earlier is not None
    assert side.earlier[0] == 1
    assert long.longer == (1.0, pytest.approx(0.987, abs=2e-3), 1.0)
    assert true.earlier is not None
    assert true.earlier[1] < 0.5 < true.earlier[2]
    assert slow.seconds == 60
    assert slow.ties is not None
    assert slow.ties[0] == 0.25
    assert true.checks is not None
    assert true.checks[0] == 1
    assert slow.checks is not None
    assert slow.checks[0] == 0.75
    assert side.agreement is not None
    assert true.agreement is not None
    assert side.agreement[2] < true.agreement[1]
    assert found.groups["x"].labels == 600
    within, between = found.between["x", "x"], found.between["x", "y"]
    assert within[0] == 1 > between[2]


def test_wrong_options_and_mixtures_are_refused() -> None:
    labels = [pair(1, "a", (0, 1)), pair(1, "b", (0, 1))]
    with pytest.raises(UserError, match="agreement.bootstrap=-1"):
        agreement(labels, bootstrap=-1)
    with pytest.raises(UserError, match="agreement.reliability=glad is not one of dawid_skene, bradley_terry"):
        agreement(labels, reliability=["glad"])
    with pytest.raises(UserError, match="one kind at a time"):
        agreement([*labels, ItemLabel("2", "yes", "a")])


def test_published_kappas_of_pandalm(shared_data: Path) -> None:
    """Its README has .85, .88 and .86; six of its responses are the JSON value true, and are read as text here."""
    with gzip.open(shared_data / "multi_annotator" / "pandalm_pairwise.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    rows = [row | {name: str(row[name]) for name in ("response_a", "response_b")} for row in rows]
    pairs = agreement(rows, bootstrap=0, reliability=()).pairs
    assert {pair: round(value, 2) for pair, (value, _) in pairs.items()} == {
        ("annotator1", "annotator2"): 0.85, ("annotator1", "annotator3"): 0.88, ("annotator2", "annotator3"): 0.86,
    }  # fmt: skip
