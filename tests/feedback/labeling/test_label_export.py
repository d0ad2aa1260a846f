"""What is written: only what holds, in rows that the data modules read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_lightning.data.records import demonstration, preference
from rlhf_lightning.feedback.labeling.export import export, preference_rows, stored_labels
from rlhf_lightning.feedback.labeling.security import Links
from tests.helpers.labeling import items_of, label_all, labeling_of, rows


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_comparisons(tmp_path: Path) -> None:
    given = [row | {"kind": "helpful", "group": "of the row"} for row in rows(6)]
    labeling = labeling_of(tmp_path, given, page={"groups": ["students"]}, overlap=1.0)
    labeling.group("anna", "g", "students")
    label_all(labeling, "anna", 2)
    label_all(labeling, "ben", 0)
    task = labeling.history.annotators["ben"].steps[-1].item
    labeling.undo("ben", "u")
    labeling.flag("ben", str(task), "f", "cut off")
    labeling.skip("ben", str(task), "s", "unclear")
    written = export(labeling.store, tmp_path / "out", "Be **kind**.")
    assert written == {"labels.jsonl": 11, "preferences.jsonl": 6, "notes.jsonl": 2}
    labels = read(tmp_path / "out" / "labels.jsonl")
    mine = next(row for row in labels if row["annotator"] == "anna")
    assert mine.keys() == {
        "id",
        "kind",
        "prompt",
        "responses",
        "ranking",
        "annotator",
        "group",
        "strength",
        "shown",
        "seconds",
        "time",
    }
    assert (mine["group"], mine["strength"], mine["seconds"], mine["kind"]) == ("students", 2, 2.0, "helpful")
    assert all("group" not in row for row in labels if row["annotator"] == "ben")
    for row in read(tmp_path / "out" / "preferences.jsonl"):
        found = preference(row)
        assert found.responses == [row["chosen"], row["rejected"]]
        assert (found.annotator, row["strength"], row["group"]) == ("anna", 2, "students")
        label = next(one for one in labels if one["id"] == row["id"] and one["annotator"] == "anna")
        assert label["responses"][label["ranking"].index(0)] == row["chosen"]
    assert [row["kind"] for row in read(tmp_path / "out" / "notes.jsonl")] == ["skip", "flag"]
    card = (tmp_path / "out" / "card.md").read_text()
    for text in (
        "* Labels: 11",
        "* Annotators: 2",
        "| anna | students | 6 |",
        "Be **kind**.",
        "* students: 1",
        "* All answers tied: 5 of 11",
    ):
        assert text in card


def test_texts_of_others_are_no_markup_in_the_card(tmp_path: Path) -> None:
    group = "<b>a</b> | ![x](http://example.com)"
    labeling = labeling_of(tmp_path, rows(1), ("anna",), page={"groups": [group]})
    labeling.group("anna", "g", group)
    label_all(labeling, "anna")
    export(labeling.store, tmp_path / "out", "```\ncode\n```\n<i>")
    card = (tmp_path / "out" / "card.md").read_text()
    assert "<b>" not in card
    assert "![" not in card
    assert card.endswith("````markdown\n```\ncode\n```\n<i>\n````\n")  # a block that nothing in it ends


def test_what_is_withdrawn_is_in_no_file(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, rows(4), overlap=1.0, page={"groups": ["a secret group"]})
    labeling.group("anna", "g", "a secret group")
    label_all(labeling, "anna")
    label_all(labeling, "ben")
    export(labeling.store, tmp_path / "out")
    labeling.withdraw("anna")
    assert export(labeling.store, tmp_path / "out")["labels.jsonl"] == 4
    for file in (tmp_path / "out").iterdir():
        assert "anna" not in file.read_text()
        assert "a secret group" not in file.read_text()
    assert "withdrew their labels, which are not in these files: 1" in (tmp_path / "out" / "card.md").read_text()


def test_check_questions_are_labels_and_no_preferences(tmp_path: Path) -> None:
    checks = items_of([{"prompt": "1+1", "chosen": "2", "rejected": "3"}], checks=True)
    labeling = labeling_of(tmp_path, rows(2), ("anna",), checks=checks, check_share=1.0)
    label_all(labeling, "anna")
    labels = stored_labels(labeling.store)
    assert sum(one.check == 0 for one in labels.comparisons) == 1
    assert {row["id"] for row in preference_rows(labels)} == {"row-0", "row-1"}


def test_rankings(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, items_of(rows(2, 4), "rank"), ("anna",), "rank")
    for number, ranks in enumerate(([0, 1, 1, 2], [0, 0, 0, 0])):
        labeling.label("anna", labeling.state("anna")["task"]["item"], f"r{number}", {"ranks": ranks})
    written = export(labeling.store, tmp_path / "out")
    assert written == {"labels.jsonl": 2, "rankings.jsonl": 1, "notes.jsonl": 0}
    (row,) = read(tmp_path / "out" / "rankings.jsonl")
    assert preference(row).ranks == [0, 1, 1, 2]


def test_demonstrations(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, items_of([{"id": 7, "prompt": "p", "response": "a"}], "edit"), ("anna",), "edit")
    labeling.label("anna", labeling.state("anna")["task"]["item"], "r", {"text": "b", "seconds": 1})
    export(labeling.store, tmp_path / "out")
    (row,) = read(tmp_path / "out" / "demonstrations.jsonl")
    assert (row["id"], row["original"], row["annotator"]) == ("7", "a", "anna")
    content = demonstration(row).content
    assert [message["content"] for message in content if isinstance(message, dict)] == ["p", "b"]


def test_conversations(tmp_path: Path) -> None:
    labeling = labeling_of(tmp_path, {}, ("anna",), "chat", num_generations=3)
    for number in range(2):
        labeling.say("anna", f"s{number}", f"message {number}")
        labeling.label("anna", labeling.state("anna")["task"]["item"], f"r{number}", {"pick": 1, "strength": 2})
    assert export(labeling.store, tmp_path / "out") == {"labels.jsonl": 2, "preferences.jsonl": 4, "notes.jsonl": 0}
    first, second = read(tmp_path / "out" / "labels.jsonl")
    picked = first["responses"][first["ranking"].index(0)]
    assert [m["content"] for m in second["prompt"]] == ["message 0", picked, "message 1"]
    assert (second["conversation"], second["turn"]) == (1, 2)
    assert preference(second).responses[0] == second["responses"][second["ranking"].index(0)]


def test_no_token_is_written(tmp_path: Path) -> None:
    labeling, links = labeling_of(tmp_path, rows(2)), Links(["anna"])
    label_all(labeling, "anna")
    export(labeling.store, tmp_path / "out")
    labeling.store.close()
    for file in [*tmp_path.glob("labels.db*"), *(tmp_path / "out").iterdir()]:
        assert links.token("anna").encode() not in file.read_bytes()
