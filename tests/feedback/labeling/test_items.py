"""Rows become items: every layout, pairs drawn by the seed, warnings, check questions."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from rlhf_lightning.data.sources import read_source
from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.items import Item, read_items, warning_of
from tests.helpers.labeling import items_of, rows


def test_layouts_of_comparisons() -> None:
    items = items_of(
        [
            {"prompt": "p", "responses": ["x", "y"], "scores": [1.0, 2.0], "kind": "k", "finished": [True, False]},
            {"prompt": "q", "chosen": "good", "rejected": "bad"},
            {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
        ]
    )
    first, second, third = [item.comparison for item in items.values()]
    assert first.prompt == [{"role": "user", "content": "p"}]
    assert first.responses == ("x", "y")
    assert first.metadata == {"kind": "k", "finished": [True, False]}  # no scores: annotators are blind
    assert second.responses == ("good", "bad")
    assert third.prompt == [{"role": "user", "content": "hi"}]


def test_pairs_are_drawn_by_the_seed() -> None:
    given = rows(1, responses=4)
    drawn = [[i.comparison.responses for i in items_of(given, pairs=2, seed=seed).values()] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({str(pairs) for pairs in drawn}) > 1
    every = items_of(given, pairs=99)
    assert len(every) == 6
    assert all(item.comparison.id.startswith("row-0/") for item in every.values())


def test_equal_responses_are_no_pair() -> None:
    (item,) = (items_of([{"prompt": "p", "responses": ["x", "x ", "y"]}], pairs=9).values(),)
    assert [i.comparison.responses for i in item] == [("x", "y"), ("x ", "y")]
    with pytest.raises(UserError, match="row 1: its responses are equal"):
        items_of([{"prompt": "p", "responses": ["x", "x"]}])


@pytest.mark.parametrize(
    ("row", "original"),
    [
        ({"prompt": "p", "response": "a"}, "a"),
        ({"prompt": "p", "chosen": "good", "rejected": "bad"}, "good"),
        ({"prompt": "p", "responses": ["x", "y"], "ranking": [1, 0]}, "y"),
        ({"prompt": "p", "responses": ["x", "y"]}, "x"),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, "a"),
    ],
)
def test_the_answer_to_edit_is_the_best(row: dict[str, Any], original: str) -> None:
    (item,) = items_of([row], "edit").values()
    assert item.comparison.responses == (original,)
    assert item.comparison.prompt == [{"role": "user", "content": "p"}]


@pytest.mark.parametrize(
    ("row", "mode", "message"),
    [
        ({"prompt": "p"}, "compare", "no responses to compare: stage=candidates samples them"),
        ({"prompt": "p", "responses": [1, 2]}, "compare", r"responses\[0\] is int, not text"),
        ({"prompt": "p", "responses": "ab"}, "rank", "responses"),
        ({"prompt": "p", "responses": ["a"]}, "compare", "it has 1 response; label.mode=compare needs at least two"),
        (
            {"prompt": "p", "responses": list("abcdefghij")},
            "rank",
            "it has 10 responses; label.mode=rank needs at least two and at most 9",
        ),
        ({"text": "x"}, "edit", "a text without a prompt"),
        ({"response": "x"}, "write", "there is no prompt"),
    ],
)
def test_rows_that_cannot_be_labeled(row: dict[str, Any], mode: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        items_of([row], mode)
    assert "row 1" in str(caught.value)
    with pytest.raises(UserError, match="has no row to label; 1 were skipped"):
        items_of([row], mode, on_bad_row="skip")
    assert len(items_of([row, *rows(1)], mode, on_bad_row="skip")) == 1


def test_ids_are_those_of_the_rows_and_must_differ() -> None:
    given = rows(2)
    with pytest.raises(UserError, match="row 3: its id 'row-0' is also that of row 1"):
        items_of([*given, given[0] | {"prompt": "another"}])
    assert len(items_of([*given, given[0]])) == 2  # the same row twice is one item


def test_labels_stay_with_what_was_seen() -> None:
    (a,), (b,), (c,) = (
        items_of([row]).values()
        for row in (rows(1)[0], rows(1)[0] | {"note": 1}, rows(1)[0] | {"responses": ["x", "y"]})
    )
    assert a.key == b.key != c.key
    assert Item.read(a.value()).key == a.key


def test_sides_are_shuffled_by_seed_annotator_and_item() -> None:
    items = list(items_of(rows(200)).values())
    left = sum(item.shown(0, "anna")[0] for item in items)
    assert 70 <= left <= 130  # 4.2 standard deviations around 100
    assert [i.shown(0, "anna") for i in items] == [i.shown(0, "anna") for i in items]
    assert [i.shown(0, "anna") for i in items] != [i.shown(0, "ben") for i in items]
    assert [i.shown(0, "anna") for i in items] != [i.shown(1, "anna") for i in items]


def test_check_questions_know_the_best() -> None:
    given = [
        {"prompt": "1+1", "chosen": "2", "rejected": "3"},
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [2, 0, 1]},
    ]
    pair, ranking = items_of(given, checks=True).values()
    assert (pair.comparison.responses, pair.check) == (("2", "3"), 0)
    assert (ranking.comparison.responses, ranking.check) == (("b", "a"), 0)
    with pytest.raises(UserError, match="several responses are best"):
        items_of([{"prompt": "p", "responses": ["a", "b", "c"], "ranking": [0, 0, 1]}], checks=True)


@pytest.mark.parametrize(
    ("row", "warn", "expected"),
    [
        ({"content_warning": "insults"}, ("content_warning",), "insults"),
        ({"harmful": True}, ("content_warning", "harmful"), "harmful"),
        ({"harmful": 0}, ("harmful",), None),
        ({"harmful": "False"}, ("harmful",), None),
        ({"harmful": None}, ("harmful",), None),
        ({"kind": "harmless-base"}, ("kind:harmless-base",), "kind: harmless-base"),
        ({"kind": "helpful-base"}, ("kind:harmless-base",), None),
        ({}, ("kind:harmless-base",), None),
    ],
)
def test_content_warnings(row: dict[str, Any], warn: tuple[str, ...], expected: str | None) -> None:
    assert warning_of(row, warn) == expected


def test_a_column_for_warnings_that_no_row_has() -> None:
    with pytest.raises(UserError, match="label.warn=kund: no row of .* has the column kund. Did you mean 'kind'?"):
        items_of([rows(1)[0] | {"kind": "x"}], warn=["kund"])


def test_real_preferences(shared_data: Any) -> None:
    (file,) = sorted((shared_data / "hh_rlhf").glob("test.jsonl*"))[:1]
    items, _ = read_items(read_source(str(file), "val", 200), "compare", on_bad_row="skip")
    assert len(items) > 150
    assert all(a != b for item in items.values() for a, b in pairwise(item.comparison.responses))
