"""Rules of aggregation on labels whose result is known by hand, and what is written."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.data.records import demonstration, preference
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.aggregation import aggregate, demonstrations
from rlhf_lightning.feedback.exports import data_card, export
from rlhf_lightning.feedback.reading import read_labels

RANKS = {"a": [0, 1], "b": [1, 0], "t": [0, 0]}


def votes(text: str, item: str = "1", **more: Any) -> list[dict[str, Any]]:
    """Return rows of annotators 0, 1, ... who say a, b or t (tie)."""
    prompt = [{"role": "user", "content": f"Question {item}"}]
    row = {"id": item, "prompt": prompt, "responses": ["good", "bad"]}
    return [row | {"ranking": RANKS[vote], "annotator": f"w{i}"} | more for i, vote in enumerate(text)]


@pytest.mark.parametrize(
    ("said", "chosen", "share"),
    [("a", "good", 1.0), ("aab", "good", 2 / 3), ("abb", "bad", 2 / 3), ("at", "good", 0.75), ("ttb", "bad", 2 / 3), ("att", "good", 2 / 3)],
)  # fmt: skip
def test_majority_and_shares(said: str, chosen: str, share: float) -> None:
    (row,) = aggregate(votes(said)).rows
    assert (row["chosen"], row["votes"]) == (chosen, len(said))
    assert "label" not in row
    (row,) = aggregate(votes(said), "soft").rows
    assert row["chosen"] == chosen
    assert row["label"] == pytest.approx(share)
    assert preference(row).label == pytest.approx(share)


@pytest.mark.parametrize("said", ["ab", "t", "abt", "tt"])
def test_even_votes_are_dropped_by_majority_and_half_by_shares(said: str) -> None:
    result = aggregate([*votes(said), *votes("a", "2")])
    assert [row["id"] for row in result.rows] == ["2"]
    assert result.dropped == {"as many votes for one response as for the other": 1}
    assert aggregate(votes(said), "soft").rows[0]["label"] == 0.5


def test_more_than_two_responses() -> None:
    """A beats B and C, B and C are even; every pair is a soft row."""
    base = votes("a")[0] | {"responses": ["A", "B", "C"]}
    rows = [
        base | {"annotator": str(i), "ranking": ranks}
        for i, ranks in enumerate([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0]])
    ]
    (row,) = aggregate([*rows[:2]]).rows
    assert (row["responses"], row["ranking"]) == (["A", "B", "C"], [0, 1, 1])
    assert preference(row).ranks == [0, 1, 1]
    soft = {(row["chosen"], row["rejected"]): row["label"] for row in aggregate(rows, "soft").rows}
    assert soft == {("A", "B"): 0.75, ("A", "C"): 0.75, ("B", "C"): 0.5}


def test_a_cycle_of_majorities_gives_no_row() -> None:
    """The Condorcet paradox: A beats B, B beats C, C beats A."""
    base = votes("a")[0] | {"responses": ["A", "B", "C"]}
    rows = [base | {"annotator": str(i), "ranking": ranks} for i, ranks in enumerate([[0, 1, 2], [2, 0, 1], [1, 2, 0]])]
    with pytest.raises(UserError, match=r"no comparison gives a row \(1: as many votes"):
        aggregate(rows)
    assert len(aggregate(rows, "soft").rows) == 3


def test_groups_are_aggregated_alone() -> None:
    """The majority of 80% overrules a minority that agrees; by group it keeps its row."""
    rows = votes("aaaa", group="x") + [row | {"annotator": "m"} for row in votes("b", group="y")]
    assert [row["chosen"] for row in aggregate(rows).rows] == ["good"]
    result = aggregate([*rows, *(row | {"annotator": "n"} for row in votes("b"))], by_group=True)
    assert [(row["group"], row["chosen"], row["votes"]) for row in result.rows] == [("x", "good", 4), ("y", "bad", 1)]
    assert result.dropped == {"labels of annotators without a group": 1}
    with pytest.raises(UserError, match="no label has a group"):
        aggregate(votes("ab"), by_group=True)


def test_what_gives_no_row_is_counted() -> None:
    empty = [row | {"responses": ["good", " "]} for row in votes("a", "2")]
    same = [row | {"responses": ["good", "good "]} for row in votes("t", "3")]
    check = votes("a", "4", check=0)
    result = aggregate([*votes("aa"), *empty, *same, *check, *votes("a", "5")], min_labels=2)
    assert [row["id"] for row in result.rows] == ["1"]
    assert result.dropped == {
        "a response is empty, or both are the same": 2,
        "check questions": 1,
        "fewer than 2 labels": 1,
    }


def test_no_aggregation_keeps_every_label() -> None:
    rows = [*votes("at", group="x"), *votes("b", "2", seconds=3.0)]
    result = aggregate(rows, "none")
    assert result.rows == rows
    assert read_labels(result.rows).comparisons == result.labels.comparisons


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "aggregate.method=mean is not one of majority, soft, reliability, none"),
        ({"method": "group"}, "aggregate.by_group=true"),
        ({"method": "reliability", "reliability": "dawid"}, "Did you mean 'dawid_skene'"),
        ({"min_labels": 0}, "aggregate.min_labels=0 is not a whole number"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        aggregate(votes("ab"), **options)


def test_labels_of_single_responses_are_no_preferences() -> None:
    with pytest.raises(UserError, match="labels of single responses"):
        aggregate([{"task": "1", "worker": "w", "label": "yes"}])


def test_the_best_response_is_a_demonstration_unless_it_is_called_bad() -> None:
    rows = [
        *votes("aab"), *votes("ab", "2"), *votes("a", "3", acceptable=[False, False]),
        *(row | {"acceptable": [i < 1, False]} for i, row in enumerate(votes("aa", "4"))),
    ]  # fmt: skip
    found = demonstrations(read_labels(rows))
    assert [(row["id"], row["response"]) for row in found] == [("1", "good"), ("4", "good")]
    assert demonstration(found[0]).content[-1] == {"role": "assistant", "content": "good"}


def test_further_formats(tmp_path: Path) -> None:
    import datasets

    rows = [*votes("aab", shown=[1, 0]), *votes("ta", "2")]
    result = aggregate(rows, "soft")
    lines = export(result, tmp_path, ["demonstrations", "datasets", "crowdkit"])
    assert "1 ties left out" in lines[2]
    assert datasets.load_from_disk(str(tmp_path / "dataset"))[0]["label"] == pytest.approx(2 / 3)
    assert len((tmp_path / "demonstrations.jsonl").read_text().splitlines()) == 2
    with (tmp_path / "crowdkit.csv").open(newline="") as file:
        frame = list(csv.DictReader(file))
    assert frame[0] == {"task": "1", "worker": "w0", "left": "bad", "right": "good", "label": "good"}
    again = read_labels(tmp_path / "crowdkit.csv").comparisons
    assert [(x.annotator, x.shown, x.ranking[x.comparison.responses.index("good")]) for x in again] == [
        ("w0", (0, 1), 0), ("w1", (0, 1), 0), ("w2", (0, 1), 1), ("w1", (0, 1), 0),
    ]  # fmt: skip


def test_the_data_card_holds_counts_and_no_markup_of_others() -> None:
    rows = [
        row | {"annotator": f"![x](http://e){i} | <b>\x1b[31m"}
        for i, row in enumerate(votes("aab", group="g|1", seconds=4))
    ]
    card = data_card(aggregate(rows), "labels.jsonl")
    assert "* Labels: 3 by 3 annotators, of 1 comparisons" in card
    assert "* Labels per comparison: 3: 1" in card
    assert "median 4 seconds" in card
    assert "![" not in card
    assert "<b>" not in card
    assert "\x1b" not in card
    assert "| g\\|1 | 3 |" in card


def test_real_labels(shared_data: Path) -> None:
    """Tulu's 16 annotators: 996 comparisons, 121 of them labeled by several."""
    result = aggregate(shared_data / "multi_annotator" / "tulu_human_pairwise.jsonl.gz")
    assert len(result.labels.comparisons) == 1141
    assert len(result.rows) + sum(result.dropped.values()) == 996
    assert result.dropped["a response is empty, or both are the same"] == 35
