"""Who gets which item: shares, overlap, check questions, leases."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.history import History
from rlhf_lightning.feedback.labeling.tasks import LEASE, Tasks
from tests.helpers.labeling import items_of, label_all, labeling_of, rows


def test_every_item_is_labeled_by_one_annotator(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(20))
    for turn in range(20):
        name = ("anna", "ben")[turn % 2]
        task = labeling.state(name)["task"]
        labeling.label(name, task["item"], f"r{turn}", {"value": 1})
    assert [labeling.state(name)["task"] for name in ("anna", "ben")] == [None, None]
    assert all(len(by) == 1 for by in labeling.history.labeled_by.values())
    assert len(labeling.history.labeled_by) == 20
    assert [labeling.state(name)["left"] for name in ("anna", "ben")] == [0, 0]


def test_the_overlap_is_labeled_by_all(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(20), ("anna", "ben", "cleo"), overlap=0.3)
    counts = {name: label_all(labeling, name) for name in ("anna", "ben", "cleo")}
    assert counts == {"anna": 20, "ben": 6, "cleo": 6}
    assert sorted(len(by) for by in labeling.history.labeled_by.values()) == [1] * 14 + [3] * 6


def test_annotators_per_item(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(10), ("anna", "ben", "cleo"), annotators_per_item=2)
    assert [label_all(labeling, name) for name in ("anna", "ben", "cleo")] == [10, 10, 0]
    with pytest.raises(UserError, match="annotators_per_item=4, but label.annotators names 3"):
        labeling_of(tmp_path / "other", rows(10), ("anna", "ben", "cleo"), annotators_per_item=4)


def test_an_item_on_another_screen_is_not_given_out_until_its_lease_ends() -> None:
    now = [0.0]
    history = History()
    tasks = Tasks(items_of(rows(1)), ["anna", "ben"], history, clock=lambda: now[0])
    item = tasks.next("anna")
    assert item is not None
    assert tasks.next("anna") is item  # a reload shows it again
    assert tasks.next("ben") is None
    assert tasks.left("ben") == 1  # so the page looks again
    now[0] = LEASE + 1
    assert tasks.next("ben") is item


def test_orders_differ_and_come_from_the_seed(tmp_path: Path) -> None:
    items = items_of(rows(30))

    def order(seed: int, name: str) -> list[str]:
        return Tasks(items, ["anna", "ben"], History(), seed=seed)._order(name)

    assert order(0, "anna") == order(0, "anna")
    assert order(0, "anna") != order(0, "ben")
    assert order(0, "anna") != order(1, "anna")
    assert sorted(order(0, "anna")) == sorted(items)


def test_check_questions_are_asked_in_between_and_once(tmp_path: Path) -> None:
    checks = items_of([{"prompt": f"{i}+{i}", "chosen": f"{2 * i}", "rejected": "no"} for i in range(5)], checks=True)
    labeling = labeling_of(tmp_path, rows(40), ("anna",), checks=checks, check_share=0.2)
    assert label_all(labeling, "anna") == 45
    order = [event.item in checks for event in labeling.store.events]
    assert sum(order) == 5
    assert order.index(True) < 30  # not all at the end: 0.8 ** 30 is 0.001
    assert labeling.tasks.labels_left() == 0


def test_no_share_no_check(tmp_path: Path) -> None:
    checks = items_of([{"prompt": "1+1", "chosen": "2", "rejected": "3"}], checks=True)
    assert label_all(labeling_of(tmp_path, rows(5), ("anna",), checks=checks, check_share=0.0), "anna") == 5


@pytest.mark.parametrize("options", [{"overlap": 1.5}, {"check_share": -0.1}, {"annotators_per_item": 0}])
def test_numbers_out_of_range(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"label.{name}="):
        Tasks(items_of(rows(1)), ["anna"], History(), **options)
