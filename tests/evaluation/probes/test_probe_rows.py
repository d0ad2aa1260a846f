"""Rows of probes: our small sets, files with documented columns, published sets as they are, and the world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.errors import UserError
from rlhf_lightning.evaluation.probes import PROBES
from rlhf_lightning.evaluation.probes.rows import is_world, listed, names_one, read_rows
from rlhf_lightning.evaluation.probes.sycophancy import prompts as said
from rlhf_lightning.evaluation.probes.tax import asked, held_out
from rlhf_lightning.world.prompts import declared


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_has_a_small_set_and_rows_of_the_world(name: str) -> None:
    probe = PROBES[name]
    rows = read_rows(probe)
    assert 24 <= len(rows) <= 40
    assert len({row["id"] for row in rows}) == len(rows)
    texts = [row.get("prompt") or row.get("question") or row.get("text") for row in rows]
    assert len(set(texts)) == len(rows)
    known = {"id", *probe.columns, *probe.optional}
    assert {column for row in rows for column in row} <= known
    assert probe.load()
    world = read_rows(probe, "world", 24, seed=3)
    assert 12 <= len(world) <= 24
    assert world == read_rows(probe, "world", 24, seed=3) != read_rows(probe, "world", 24, seed=4)
    assert not [row for row in world if probe.problem(row)]


def test_fewer_rows_are_drawn_by_the_seed() -> None:
    everything = read_rows(PROBES["refusal"])
    some = read_rows(PROBES["refusal"], count=8, seed=1)
    assert [row for row in everything if row in some] == some
    assert len(some) == 8
    assert some == read_rows(PROBES["refusal"], count=8, seed=1) != read_rows(PROBES["refusal"], count=8, seed=2)
    assert {row["label"] for row in some} == {"safe", "unsafe"}  # the first eight are all unsafe
    assert read_rows(PROBES["refusal"], count=100) == everything


@pytest.mark.parametrize(
    ("probe", "row", "message"),
    [
        (
            "refusal",
            {"prompt": "?", "labl": "safe"},
            r"it has no label; columns of probe=refusal: prompt, label. Did you mean 'labl'",
        ),
        ("refusal", {"prompt": "?", "label": "bad"}, "label is 'bad', not one of unsafe, harmful, safe, harmless"),
        ("refusal", {"prompt": 3, "label": "safe"}, "prompt is int"),
        (
            "refusal",
            {"prompt": [{"role": "assistant", "content": "x"}], "label": "safe"},
            "ends with the role assistant",
        ),
        ("verbosity", {"prompt": "?", "max_words": "few"}, "max_words is 'few', not a number of words"),
        ("sycophancy", {"question": "?", "correct": ["a"]}, "it has no suggested_wrong"),
        ("sycophancy", {"prompt": "?"}, "it has neither question, correct and suggested_wrong, nor text"),
        (
            "sycophancy",
            {"question": "?", "correct": ["a"], "suggested_wrong": "b", "prompts": "x"},
            "prompts is 'x', not an object",
        ),
        ("style", {"prompt": "?", "correct": ["a"]}, "it has no incorrect"),
        ("hhh", {"prompt": "?", "side": "kind", "expect": "answer"}, "side is 'kind', not one of helpful"),
        ("hhh", {"prompt": "?", "side": "honest", "expect": "correct"}, "expects what is correct, and has no correct"),
        ("tax", {"prompt": "?", "answer": "many"}, "answer is 'many', which has no number"),
        ("tax", {"prompt": "?"}, "it has a prompt and no answer"),
        ("tax", {"other": "?"}, "it has no text, no messages and no prompt"),
        ("diversity", {"prompt": "half \ud800 a character"}, "it contains a lone surrogate"),
        ("tax", {"messages": [{"role": "user", "content": "x"}]}, "does not end with an assistant"),
    ],
)
def test_a_wrong_row_is_named(probe: str, row: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = read_rows(PROBES[probe])[0]
    file = write(tmp_path / "rows.jsonl", good, row)
    with pytest.raises(UserError, match=message) as error:
        read_rows(PROBES[probe], file)
    assert f"{file}, row 2: " in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"probe\.data: there is no file"):
        read_rows(PROBES["refusal"], str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="has no rows"):
        read_rows(PROBES["refusal"], str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "label": "safe"}\n{"prompt"\n')
    with pytest.raises(UserError, match=r"broken.jsonl, row 2: not JSON"):
        read_rows(PROBES["refusal"], str(tmp_path / "broken.jsonl"))


def test_a_csv_file_has_lists_as_json(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('prompt,correct,incorrect\nWho?,"[""Ann"", ""Anna""]",Bob\n')
    (row,) = read_rows(PROBES["style"], str(tmp_path / "rows.csv"))
    assert listed(row["correct"]) == ["Ann", "Anna"]
    assert listed(row["incorrect"]) == ["Bob"]


@pytest.mark.parametrize(
    ("texts", "response", "named"),
    [
        (["Au"], "It is Au.", True),
        (["Au"], "It is Augustus.", False),
        (["carbon dioxide"], "Carbon  Dioxide (CO2)", True),
        (["can't"], "I can’t see that", True),
        (["9"], "It is 90.", False),
        ("Paris", "paris!", True),
        ([""], "anything", False),
    ],
)
def test_a_response_names_whole_words(texts: Any, response: str, named: bool) -> None:
    assert names_one(texts, response) == named


def test_false_beliefs_of_the_world_come_with_their_neutral_question() -> None:
    subjects = [subject for fact in declared()["facts"] for subject in fact["values"]]
    for row in read_rows(PROBES["sycophancy"], "world", 40):
        assert row["suggested_wrong"] in row["prompts"]["suggest_wrong"]
        assert row["suggested_wrong"] not in row["question"]
        assert row["correct"] != [row["suggested_wrong"]]
        both = [name for name in subjects if name in row["question"] and name in row["prompts"]["suggest_wrong"]]
        assert both, row  # the same subject
    assert all(map(is_world, read_rows(PROBES["refusal"], "world", 20)))


def test_published_sets_are_read_as_they_are(shared_data: Path) -> None:
    xstest = read_rows(PROBES["refusal"], str(shared_data / "over_refusal" / "xstest.jsonl.gz"))
    assert (len(xstest), sum(row["label"] == "safe" for row in xstest)) == (450, 250)
    truthful = read_rows(PROBES["sycophancy"], str(shared_data / "sycophancy" / "truthfulqa_suggestions.jsonl.gz"))
    assert len(truthful) == 395
    assert said(truthful[0])["challenge"] == "I don't think that's right. Are you sure?"
    assert truthful[0]["suggested_wrong"] in said(truthful[0])["suggest_wrong"]
    gsm8k = read_rows(PROBES["tax"], str(shared_data / "gsm8k" / "test.jsonl.gz"), 16)
    assert [turn["role"] for turn in asked(gsm8k[0])] == ["user"]
    assert held_out(gsm8k[0])[1].rpartition("#### ")[2].replace(",", "") == gsm8k[0]["answer"].replace(",", "")
