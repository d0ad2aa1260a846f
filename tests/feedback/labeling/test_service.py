"""Labels, skips, flags, undo, withdrawal and conversations, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.feedback.labeling.items import Item
from rlhf_lightning.feedback.labeling.refused import Refused
from rlhf_lightning.feedback.labeling.service import Labeling, PageSettings, is_ranking, withdraw
from rlhf_lightning.feedback.labeling.store import Store
from tests.helpers.labeling import Echo, items_of, label_all, labeling_of, rows


def again(labeling: Labeling, **options: Any) -> Labeling:
    """Return the same labeling after a new start."""
    labeling.store.close()
    folder = labeling.store.path.parent
    return labeling_of(folder, dict(labeling.tasks.items), labeling.annotators, labeling.page.mode, **options)


@pytest.mark.parametrize("value", range(-3, 4))
def test_what_is_recorded_of_a_comparison(tmp_path: Path, value: int) -> None:
    labeling = labeling_of(tmp_path, rows(1), ("anna",))
    task = labeling.state("anna")["task"]
    labeling.label("anna", task["item"], "r", {"value": value, "seconds": 3.21})
    recorded = labeling.store.events[-1].value
    (item,) = labeling.tasks.items.values()
    better = None if value == 0 else task["responses"][0 if value < 0 else 1]
    ranks = dict(zip(item.comparison.responses, recorded["ranking"], strict=True))
    assert recorded["strength"] == abs(value)
    assert recorded["seconds"] == 3.2
    assert [item.comparison.responses[i] for i in recorded["shown"]] == task["responses"]
    assert ranks == {text: int(better not in (None, text)) for text in ranks}


def test_what_is_recorded_of_a_ranking(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, items_of(rows(1, 4), "rank"), ("anna",), "rank")
    task = labeling.state("anna")["task"]
    labeling.label("anna", task["item"], "r", {"ranks": [2, 0, 0, 1]})
    (item,) = labeling.tasks.items.values()
    ranks = dict(zip(item.comparison.responses, labeling.store.events[-1].value["ranking"], strict=True))
    assert [ranks[text] for text in task["responses"]] == [2, 0, 0, 1]


def test_the_page_gets_nothing_but_texts(tmp_path: Path) -> None:
    """Names of models, scores and whether it is a check question stay here."""
    row = rows(1)[0] | {"model": "gpt-x", "scores": [1, 2]}
    labeling = labeling_of(
        tmp_path,
        [row],
        ("anna",),
        checks=items_of([{"prompt": "1+1", "chosen": "2", "rejected": "3"}], checks=True),
        check_share=1.0,
    )
    assert labeling.start("anna")["task"].keys() == {"item", "prompt", "warning", "flagged", "responses"}


@pytest.mark.parametrize(
    "given", [{}, {"value": 4}, {"value": 1.0}, {"value": True}, {"value": "1"}, {"value": None}, {"ranks": [0, 1]}]
)
def test_other_values_are_refused(tmp_path: Path, given: dict[str, Any]) -> None:
    labeling = labeling_of(tmp_path, rows(1), ("anna",))
    with pytest.raises(Refused, match="whole number from -3 to 3"):
        labeling.label("anna", labeling.state("anna")["task"]["item"], "r", given)
    assert labeling.store.events == []


def test_ranks() -> None:
    assert is_ranking([0, 1, 1, 2], 4)
    for ranks in ([0, 2], [1, 1], [0, 1, 2], [0, "1"], [0, True], [-1, 0], [0.0, 1.0]):
        assert not is_ranking(ranks, 2)


def test_a_repeated_request_and_a_second_label(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(2), ("anna", "ben"), overlap=1.0)
    item = labeling.state("anna")["task"]["item"]
    for _ in range(3):
        labeling.label("anna", item, "same", {"value": 1})
    with pytest.raises(Refused, match="has your label already"):
        labeling.label("anna", item, "another", {"value": 2})
    with pytest.raises(Refused, match="somebody else"):
        labeling.label("ben", item, "same", {"value": 2})
    assert [event.value["value"] for event in labeling.store.events] == [1]


def test_an_item_that_is_gone(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(3), ("anna",))
    item = labeling.state("anna")["task"]["item"]
    labeling.store.close()
    kept = {key: value for key, value in labeling.tasks.items.items() if key != item}
    labeling = labeling_of(tmp_path, kept, ("anna",))
    labeling.label("anna", item, "r1", {"value": 2})  # the annotator saw it: it is in the store
    with pytest.raises(Refused, match="not in the data any more"):
        labeling.label("anna", "nobody has seen it", "r2", {"value": 2})
    assert [event.kind for event in labeling.store.events] == ["label", "refused"]
    assert len(again(labeling).history.refused) == 1


def test_undo_goes_back_step_by_step_also_after_a_new_start(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(3), ("anna",))
    first = labeling.state("anna")["task"]["item"]
    labeling.label("anna", first, "r1", {"value": -2})
    second = labeling.state("anna")["task"]["item"]
    labeling.skip("anna", second, "r2", "I do not know")
    labeling = again(labeling)
    assert labeling.state("anna")["undo"] == "skip"
    assert labeling.undo("anna", "u1")["kind"] == "skip"
    assert labeling.undo("anna", "u1")["kind"] == "skip"  # the same request
    assert labeling.state("anna")["task"]["item"] == second
    given = labeling.undo("anna", "u2")
    assert (given["kind"], given["value"]) == ("label", -2)
    state = labeling.state("anna")
    assert (state["task"]["item"], state["done"], state["undo"]) == (first, 0, None)
    with pytest.raises(Refused, match="nothing to undo"):
        labeling.undo("anna", "u3")
    labeling.label("anna", first, "r3", {"value": 3})
    assert again(labeling).history.annotators["anna"].labels[first].value["value"] == 3


def test_skips_and_flags(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(1), ("anna",))
    item = labeling.state("anna")["task"]["item"]
    labeling.flag("anna", item, "f", "cut off")
    assert labeling.state("anna")["task"]["flagged"]
    labeling.skip("anna", item, "s", "cut off")
    assert labeling.state("anna")["task"] is None
    with pytest.raises(Refused, match="done already"):
        labeling.skip("anna", item, "s2", "again")


def test_groups(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(1), ("anna", "ben"), page={"groups": ["students", "teachers"]})
    assert labeling.state("anna")["ask_group"]
    with pytest.raises(Refused, match="not one of those"):
        labeling.group("anna", "g0", "others")
    labeling.group("anna", "g1", "students")
    labeling.group("ben", "g2", None)
    assert [labeling.state(name)["ask_group"] for name in ("anna", "ben")] == [False, False]
    assert [labeling.history.annotators[name].group for name in ("anna", "ben")] == ["students", None]


def test_withdrawal_ends_the_work_and_gives_the_items_to_others(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(4))
    assert label_all(labeling, "anna") == 4
    labeling.withdraw("anna", "w")
    labeling.withdraw("anna", "w2")  # once is enough
    assert labeling.state("anna")["withdrawn"]
    with pytest.raises(Refused, match="You have withdrawn"):
        labeling.label("anna", next(iter(labeling.tasks.items)), "r", {"value": 1})
    assert label_all(labeling, "ben") == 4
    assert again(labeling).state("anna")["withdrawn"]
    assert sum(event.kind == "withdraw" for event in labeling.store.events) == 1
    with pytest.raises(UserError, match="no annotator 'bem' in .*Did you mean 'ben'?"):
        withdraw(labeling.store, "bem", "the command")


@pytest.mark.parametrize("mode", ["edit", "write"])
def test_texts(tmp_path: Path, mode: str) -> None:
    labeling = labeling_of(tmp_path, items_of([{"prompt": "p", "response": "a"}], mode), ("anna",), mode)
    item = labeling.state("anna")["task"]["item"]
    for text in ("", "  \n", None, 3, "x" * 300_000, "\ud800"):
        with pytest.raises(Refused):
            labeling.label("anna", item, "r", {"text": text})
    labeling.label("anna", item, "r", {"text": "b\n\n    c"})
    assert labeling.undo("anna", "u") == {"kind": "label", "text": "b\n\n    c"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "ranks"}, "Did you mean 'rank'?"),
        ({"scale": 5}, "is not 4 or 7"),
        ({"break_minutes": -1}, "break_minutes"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PageSettings(**settings)


# ---- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversation_goes_on_with_what_was_picked(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, {}, ("anna",), "chat", num_generations=3)
    labeling.say("anna", "s1", "hello")
    task = labeling.state("anna")["task"]
    assert len(task["responses"]) == 3
    with pytest.raises(Refused, match="Choose one of the answers first"):
        labeling.say("anna", "s2", "more")
    labeling.label("anna", task["item"], "r1", {"pick": 2, "strength": 3})
    labeling = again(labeling, num_generations=3)
    after = labeling.state("anna")["task"]
    assert after["prompt"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": task["responses"][2]},
    ]
    event = labeling.history.annotators["anna"].labels[task["item"]]
    item = Item.read(labeling.store.items[task["item"]])
    assert item.comparison.responses[event.value["ranking"].index(0)] == task["responses"][2]
    assert sorted(event.value["ranking"]) == [0, 1, 1]
    labeling.say("anna", "s3", "more")
    second = Item.read(labeling.store.items[labeling.state("anna")["task"]["item"]])
    assert [m["content"] for m in second.comparison.prompt] == ["hello", task["responses"][2], "more"]


def test_about_equal_is_a_tie_and_goes_on(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, {}, ("anna",), "chat")
    labeling.say("anna", "s1", "hello")
    task = labeling.state("anna")["task"]
    labeling.label("anna", task["item"], "r1", {"pick": 1, "strength": 0})
    assert labeling.store.events[-1].value["ranking"] == [0, 0]
    assert labeling.state("anna")["task"]["prompt"][-1]["content"] == task["responses"][1]


def test_undo_in_conversations(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, {}, ("anna",), "chat")
    labeling.say("anna", "s1", "hello")
    first = labeling.state("anna")["task"]
    labeling.label("anna", first["item"], "r1", {"pick": 0, "strength": 1})
    labeling.new_conversation("anna", "n1")
    assert labeling.state("anna")["task"]["prompt"] == []
    assert labeling.undo("anna", "u1")["kind"] == "new"
    assert len(labeling.state("anna")["task"]["prompt"]) == 2
    assert labeling.undo("anna", "u2")["pick"] == 0
    assert labeling.state("anna")["task"] == first
    assert labeling.undo("anna", "u3")["say"] == "hello"
    assert labeling.state("anna")["task"]["prompt"] == []
    labeling.say("anna", "s2", "hello")
    assert labeling.state("anna")["task"]["responses"] != first["responses"]  # new samples


def test_a_model_that_cannot_answer_records_nothing(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, {}, ("anna",), "chat")
    with pytest.raises(Refused, match="The model could not answer: the server is down"):
        labeling.say("anna", "s1", "fail")
    assert labeling.store.events == []
    with pytest.raises(UserError, match="needs a model"):
        Labeling(labeling.store, {}, ["anna"], PageSettings("chat"))


def test_openings_begin_conversations(tmp_path: Path) -> None:
    openings = items_of(rows(2), "chat")
    labeling = labeling_of(tmp_path, openings, ("anna",), "chat")
    drafts = []
    for number in range(3):
        drafts.append(labeling.state("anna")["task"]["draft"])
        labeling.say("anna", f"s{number}", drafts[-1] or "free")
        labeling.new_conversation("anna", f"n{number}")
    assert sorted(drafts) == ["", "question 0", "question 1"]
    assert drafts[-1] == ""


def test_the_samples_are_the_seed_s(tmp_path: Path) -> None:
    texts = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        labeling = labeling_of(tmp_path / folder, {}, ("anna",), "chat", seed=seed)
        labeling.say("anna", "s1", "hello")
        texts.append(labeling.state("anna")["task"]["responses"])
    assert texts[0] == texts[1] != texts[2]


def test_a_store_needs_no_labeling(tmp_path: Path) -> None:
    """From Python, without a page."""
    store = Store(tmp_path / "labels.db", {"mode": "compare"})
    assert label_all(Labeling(store, items_of(rows(3)), ["anna"]), "anna") == 3
    assert Echo()([{"role": "user", "content": "x"}], 1, [0]) == ["x 0 of 0"]
