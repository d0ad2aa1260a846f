"""Tokenized rows come back as they were, are written while they are read, and are not read again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning import DemonstrationData, PreferenceData, PromptData
from rlhf_lightning.data import sources, tokenize
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.sources import Source, read_source
from rlhf_lightning.data.template import JOINED, SPELLED
from rlhf_lightning.data.tokenize import CHUNK, report_rows
from rlhf_lightning.data.tokenize import tokenize as tokenized
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group
from tests.helpers.chat_families import with_template

GROUPS = [
    Group([1, 5], []),
    Group([1], [[8, 9, 2]], [[True, False, True]]),
    Group([1, 10], [[11, 2], [14], [15, 16, 2]], ranks=[0, 1, 1], margin=0.25, label=0.125),
    Group([1, 10, 70_000], [[3], [4, 5]]),
]


def source_of(rows: Any, count: int) -> Source:
    return Source("rows", str(count), lambda: rows(), lambda: count)


@pytest.fixture(params=["alone", "two processes"])
def workers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(tokenize, "PARALLEL_ROWS", 1 if request.param != "alone" else 10**9)
    return request.param


@pytest.mark.parametrize("keep_raw", [False, True])
def test_groups_come_back_as_they_were(tmp_path: Path, workers: str, keep_raw: bool) -> None:
    count = 2 * CHUNK + 100  # several chunks, each counting from 0

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"train-ü.jsonl, row {n}", {"number": n, "text": "ä" * (n % 3)}) for n in range(count))

    found = tokenized(source_of(rows, count), lambda row: GROUPS[row["number"] % 4], tmp_path, [], keep_raw=keep_raw)
    assert len(found) == count
    for row in (0, 1, 2, 3, CHUNK - 1, CHUNK, count - 2, count - 1):
        given, group = GROUPS[row % 4], found[row]
        assert (group.prompt, group.responses, group.index) == (given.prompt, given.responses, row)
        assert group.loss_mask == (given.loss_mask or [[True] * len(response) for response in given.responses])
        assert group.ranks == (given.ranks or list(range(len(given.responses))))
        assert (group.margin, group.label) == (given.margin, given.label)
        assert (found.tokens[row], found.loss_tokens[row]) == (given.tokens, given.loss_tokens)
        assert found.where(row) == f"train-ü.jsonl, row {row}"
        assert found.raw(row) == ({"number": row, "text": "ä" * (row % 3)} if keep_raw else {})


@pytest.mark.slow
def test_rows_are_read_only_a_little_ahead_of_writing(tmp_path: Path, workers: str) -> None:
    """Whoever holds all rows at once needs gigabytes for a million of them."""
    count, ahead = 40 * CHUNK, [0]
    group = Group([1, 2, 3, 4], [[5] * 12])

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        for number in range(count):
            if number % CHUNK == 0:
                (ids,) = (tmp_path / "tokens").glob("*.tmp/ids")
                ahead.append(number - ids.stat().st_size // (4 * group.tokens))
            yield f"row {number}", {}

    assert len(tokenized(source_of(rows, count), lambda row: group, tmp_path, [])) == count
    assert max(ahead) <= 8 * CHUNK


def test_a_second_start_reads_no_row_and_a_changed_file_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"

    def start() -> list[int]:
        rows = tokenized(read_source(str(path), "train"), lambda row: Group([1], [[row["id"]]]), tmp_path, [])
        return [rows[row].responses[0][0] for row in range(len(rows))]

    path.write_text('{"id": 3}\n{"id": 4}\n')
    assert start() == [3, 4]
    before = path.stat()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "read_file", lambda path: pytest.fail("the rows were read again"))
        assert start() == [3, 4]
    path.write_text('{"id": 3}\n{"id": 5}\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # not even its time and size tell
    assert start() == [3, 5]


def test_a_bad_row_is_named_and_leaves_nothing(tmp_path: Path, workers: str) -> None:
    def to_group(row: dict[str, Any]) -> Group:
        if row["number"] >= CHUNK + 7:
            raise RowError("it is odd; really")
        return GROUPS[1]

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        return ((f"row {number}", {"number": number}) for number in range(2 * CHUNK))

    with pytest.raises(UserError, match=rf"^rows, row {CHUNK + 7}: it is odd; really$"):
        tokenized(source_of(rows, 2 * CHUNK), to_group, tmp_path, [])
    assert not list((tmp_path / "tokens").iterdir())
    found = tokenized(source_of(rows, 2 * CHUNK), to_group, tmp_path, [], on_bad_row="skip")
    assert (len(found), found.skipped) == (CHUNK + 7, {"it is odd": CHUNK - 7})


def test_whoever_is_second_to_write_the_same_rows_takes_those_of_the_first(tmp_path: Path) -> None:
    source = source_of(lambda: iter([("row 1", {}), ("row 2", {})]), 2)

    def slow(row: dict[str, Any]) -> Group:
        tokenized(source, lambda row: GROUPS[1], tmp_path, [])  # another process is done meanwhile
        return GROUPS[1]

    assert len(tokenized(source, slow, tmp_path, [])) == 2
    assert len(list((tmp_path / "tokens").iterdir())) == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv"])
def test_a_source_knows_about_how_many_rows_it_has(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    rows = [{"prompt": str(number)} for number in range(9)]
    text = json.dumps(rows) if name == "d.json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text if name != "d.csv" else "prompt\n" + "".join(f"{row['prompt']}\n" for row in rows))
    assert read_source(str(path), "train").count() in (9, 10)
    assert read_source(str(path), "train", limit=4).count() == 4
    assert read_source(rows, "train").count() == 9
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(b"no gzip")
    assert read_source(str(broken), "train").count() is None


def test_rows_that_differ_from_the_chat_template_are_counted_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "response": "\n\nHello"},
        {"prompt": "Hi", "response": "a<|endoftext|>b"},
        {"prompt": "Hi", "response": "\n\n<|pad|>"},
    ]
    for _ in range(2):  # the second time from the cache
        data = DemonstrationData(with_template("olmo2"), rows, cache_dir=tmp_path, batch_size=1)
        data.setup()
        found = {reason: places.tolist() for reason, places in data.rows["train"].differs.items()}
        assert found == {JOINED: [1, 3], SPELLED: [2]}
        report_rows(data)
        lines = capsys.readouterr().out.splitlines()
        text = "of 4 rows of data.train do not have the tokens of apply_chat_template"
        assert lines == [
            f"2 {text}: {JOINED} (the first is row 2)",
            f"1 {text}: {SPELLED} (the first is row 3)",
        ]
    data = DemonstrationData(with_template("llama3"), rows[:2], cache_dir=tmp_path, batch_size=1)
    data.setup()
    report_rows(data)
    assert (data.rows["train"].differs, capsys.readouterr().out) == ({}, "")


def test_pairs_and_prompts_are_compared_too(tmp_path: Path) -> None:
    answers = [("Hello", "\n\nBye"), ("a", "b")]
    pairs = [{"prompt": "Hi", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    data = PreferenceData(with_template("olmo2"), pairs, cache_dir=tmp_path, batch_size=1)
    data.setup()
    assert {reason: places.tolist() for reason, places in data.rows["train"].differs.items()} == {JOINED: [0]}
    prompts = PromptData(with_template("olmo2"), [{"prompt": "Hi"}, {"prompt": "<|pad|>"}], cache_dir=tmp_path)
    prompts.setup()
    assert {reason: places.tolist() for reason, places in prompts.rows["train"].differs.items()} == {SPELLED: [1]}
