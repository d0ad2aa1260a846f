"""Rows from files, folders and lists; mistakes name the file and the row."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.data.tokenize import tokenize
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group

ROWS = [{"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}, {"prompt": "c", "response": "z"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".jsonl":
        path.write_text(text)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        path.write_text("prompt,response\n" + "".join(f"{r['prompt']},{r['response']}\n" for r in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.csv", "d.parquet"])
def test_formats(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, ROWS)
    source = read_source(str(path), "train")
    assert [row for _, row in source.rows()] == ROWS
    assert [where for where, _ in source.rows()] == ["row 1", "row 2", "row 3"]
    assert [row for _, row in read_source(str(path), "train", limit=2).rows()] == ROWS[:2]
    assert read_source(str(path), "train", limit=2).key != source.key


def test_files_from_windows(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes(b"\xef\xbb\xbfprompt,response\r\na,x\r\n")
    (tmp_path / "d.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "response": "x"}\r\n')
    for name in ("d.csv", "d.jsonl"):
        assert [row for _, row in read_source(str(tmp_path / name), "train").rows()] == ROWS[:1]


def test_folders_choose_by_split(tmp_path: Path) -> None:
    write(tmp_path / "train-0.jsonl", ROWS[:1])
    write(tmp_path / "train-1.jsonl", ROWS[1:2])
    write(tmp_path / "test.jsonl", ROWS[2:])
    assert [row for _, row in read_source(str(tmp_path), "train").rows()] == ROWS[:2]
    assert [row for _, row in read_source(str(tmp_path), "val").rows()] == ROWS[2:]


def test_a_folder_never_gives_a_split_the_rows_of_another(tmp_path: Path) -> None:
    write(tmp_path / "prefs.jsonl", ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS[1:])
    assert [row for _, row in read_source(str(tmp_path), "train").rows()] == ROWS[:1]
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.val: the folder .* contains no .* for val; it contains prefs\.jsonl"):
        read_source(str(tmp_path), "val")


def test_saved_data_sets_are_known_by_their_content(tmp_path: Path) -> None:
    def save(rows: list[dict[str, Any]]) -> None:
        split = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": split, "test": datasets.Dataset.from_list(rows[::-1])}).save_to_disk(tmp_path)

    save(ROWS)
    keys = {read_source(str(tmp_path), split).key for split in ("train", "val")}
    assert [row for _, row in read_source(str(tmp_path), "val").rows()] == ROWS[::-1]
    shutil.rmtree(tmp_path)
    save([{**row, "response": "other"} for row in ROWS])  # as many rows as before
    keys |= {read_source(str(tmp_path), split).key for split in ("train", "val")}
    assert len(keys) == 4


def test_mistakes_name_the_place(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", ROWS)
    with pytest.raises(UserError, match=r"no file .*pares\.jsonl\. Did you mean 'pairs\.jsonl'"):
        read_source(str(tmp_path / "pares.jsonl"), "train")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match=r"bad\.jsonl, row 2: not JSON"):
        tokenize(read_source(str(tmp_path / "bad.jsonl"), "train"), lambda row: Group([1], [[2]]), tmp_path, [])
    (tmp_path / "bad.json.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot be read"):
        list(read_source(str(tmp_path / "bad.json.gz"), "train").rows())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"contains no \.jsonl"):
        read_source(str(tmp_path / "empty"), "train")
    with pytest.raises(UserError, match="could not be loaded from the hub"):
        read_source("nobody/nothing-at-all", "train")


def to_group(row: dict[str, Any]) -> Group:
    if row["response"] == "y":
        raise RowError("y is not allowed; it is 25")
    return Group([1, 2], [[ord(row["response"])]], margin=0.5)


def test_tokenized_once_and_read_back(tmp_path: Path) -> None:
    calls = []
    source = read_source(ROWS[::2], "train")

    def count(row: dict[str, Any]) -> Group:
        calls.append(row)
        return to_group(row)

    for _ in range(2):
        rows = tokenize(source, count, tmp_path, ["key"], keep_raw=True)
    assert len(calls) == 2
    assert list(rows[1].responses) == [[ord("z")]]
    assert (rows[1].index, rows[1].margin, rows.raw(1)) == (1, 0.5, ROWS[2])
    assert rows.tokens.tolist() == [3, 3]
    assert not list((tmp_path / "tokens").glob("*.tmp*"))
    tokenize(source, count, tmp_path, ["another key"])
    assert len(calls) == 4


def test_bad_rows_stop_or_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROWS)
    with pytest.raises(UserError, match=r"d\.jsonl, row 2: y is not allowed"):
        tokenize(read_source(str(path), "train"), to_group, tmp_path, [])
    rows = tokenize(read_source(str(path), "train"), to_group, tmp_path, [], on_bad_row="skip")
    assert len(rows) == 2
    assert rows.skipped == {"y is not allowed": 1}
    with pytest.raises(UserError, match="no usable row \\(1 rows: y is not allowed\\)"):
        tokenize(read_source(ROWS[1:2], "train"), to_group, tmp_path, [], on_bad_row="skip")
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match="it is empty"):
        tokenize(read_source(str(tmp_path / "none.jsonl"), "train"), to_group, tmp_path, [])


def test_many_rows_are_encoded_in_order_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_lightning.data.tokenize.PARALLEL_ROWS", 100)
    many = [{"prompt": "a", "response": chr(97 + i % 20)} for i in range(3000)]
    rows = tokenize(read_source(many, "train"), to_group, tmp_path, [])
    assert [rows[i].responses[0][0] for i in range(0, 3000, 271)] == [97 + i % 20 for i in range(0, 3000, 271)]
    assert len(rows) == 3000
