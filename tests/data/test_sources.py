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


def test_a_part_of_the_rows(tmp_path: Path) -> None:
    """As `train[1:2]` in the package datasets: the first row is 0, the last is excluded, and rows keep their numbers."""
    path = write(tmp_path / "train.jsonl", ROWS)
    parts = {"[1:]": ROWS[1:], "[:2]": ROWS[:2], "[1:2]": ROWS[1:2], "[:]": ROWS, "[1:9]": ROWS[1:]}
    for part, rows in parts.items():
        for name in (f"{path}{part}", f"{tmp_path}{part}", f"{tmp_path}/tr*{part}", f"{tmp_path}:train{part}"):
            assert [row for _, row in read_source(name, "train").rows()] == rows
            assert read_source(name, "train").count() == len(rows)
    assert [where for where, _ in read_source(f"{path}[1:]", "train").rows()] == ["row 2", "row 3"]
    assert [row for _, row in read_source(f"{path}[1:]", "train", limit=1).rows()] == ROWS[1:2]
    assert read_source(f"{path}[:2]", "train").key == read_source(str(path), "train", limit=2).key
    assert len({read_source(f"{path}{part}", "train").key for part in parts}) == 4 + 1  # [1:9] is asked for by number
    both = read_source([f"{path}[2:]", f"{path}[0:1]"], "train")
    assert [row for _, row in both.rows()] == [ROWS[2], ROWS[0]]
    with pytest.raises(UserError, match=r"there is no row from 2 to 1; the first row is 0"):
        read_source(f"{path}[2:1]", "train")
    with pytest.raises(UserError, match=r"train\.jsonl\[9:\]"):
        tokenize(read_source(f"{path}[9:]", "train"), lambda row: Group([1], [[2]]), tmp_path, [])
    shutil.copy(path, tmp_path / "odd[1:2].jsonl")  # a part of a name is none
    assert len(list(read_source(f"{tmp_path}/odd[1:2].jsonl", "train").rows())) == 3


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


def test_a_split_of_a_saved_data_set_or_a_folder_is_chosen_behind_a_colon(tmp_path: Path) -> None:
    parts = {"train_prefs": ROWS[:2], "test_prefs": ROWS[2:]}
    saved, folder = tmp_path / "saved", tmp_path / "folder"
    datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in parts.items()}).save_to_disk(saved)
    folder.mkdir()
    for name, rows in parts.items():
        write(folder / f"{name}.jsonl", rows)
    for place in (saved, folder):
        source = read_source(f"{place}:train_prefs", "train")
        assert ([row for _, row in source.rows()], source.name) == (ROWS[:2], f"{place}:train_prefs")
        assert [row for _, row in read_source(f"{place}:test_prefs", "val").rows()] == ROWS[2:]
        assert [row for _, row in read_source(f"{place}:test_prefs", "train").rows()] == ROWS[2:]
    message = (
        r"has the splits train_prefs, test_prefs, none of them for train\. Choose one with data\.train=.*:train_prefs"
    )
    with pytest.raises(UserError, match=message):
        read_source(str(saved), "train")
    with pytest.raises(UserError, match=r"none of them for train_pref\. Did you mean 'train_prefs'\?"):
        read_source(f"{saved}:train_pref", "train")
    with pytest.raises(UserError, match=r"data\.val: the folder .* contains no .* file for dev; it contains"):
        read_source(f"{folder}:dev", "val")


def test_configurations_and_splits_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    hub = {None: {"train": 0, "train_prefs": 1}, "main": {"train": 2, "test": 3}, "socratic": {"train": 4}}

    def load_dataset(name: str, configuration: str | None = None, streaming: bool = False) -> Any:
        assert (name, streaming) == ("org/name", False)
        calls.append(configuration)
        if configuration not in hub:
            raise ValueError(f"BuilderConfig '{configuration}' not found")
        rows = {split: datasets.Dataset.from_list([{"text": str(n)}]) for split, n in hub[configuration].items()}
        return datasets.DatasetDict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def text(name: str, split: str = "train") -> str:
        ((where, row),) = read_source(name, split).rows()
        assert where == "row 1"
        return row["text"]

    assert text("org/name") == "0"
    assert text("org/name:train_prefs") == "1"
    assert text("org/name:train_prefs", "val") == "1"
    assert text("org/name:main") == "2"
    assert text("org/name:main", "val") == "3"
    assert text("org/name:main:test") == "3"
    assert text("org/name:socratic:train", "val") == "4"
    with pytest.raises(UserError, match=r"data\.val: org/name:socratic has the splits train, none of them for val"):
        text("org/name:socratic:", "val")
    with pytest.raises(
        UserError, match=r"has the splits train, train_prefs, none of them for train_pref\. Did you mean"
    ):
        text("org/name:train_pref")
    with pytest.raises(
        UserError, match=r"org/name:mian:test .* could not be loaded from the hub: BuilderConfig 'mian'"
    ):
        text("org/name:mian:test")
    with pytest.raises(UserError, match="a data set is name, name:split, or name:configuration:split"):
        text("org/name:a:b:c")
    hub.pop(None)  # only configurations
    assert text("org/name:main") == "2"


def test_patterns_take_what_matches_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 0):
        write(tmp_path / f"part-{number}.jsonl", ROWS[number : number + 1])
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "part-2.jsonl", ROWS[2:])
    (tmp_path / "part-notes.txt").write_text("no rows")
    source = read_source(str(tmp_path / "part-*"), "val")
    assert list(source.rows()) == [("part-0.jsonl, row 1", ROWS[0]), ("part-1.jsonl, row 1", ROWS[1])]
    monkeypatch.chdir(tmp_path)
    assert [row for _, row in read_source("**/part-?.jsonl", "train").rows()] == [ROWS[2], *ROWS[:2]]
    with pytest.raises(UserError, match=r"data\.train=.*: nothing matches it"):
        read_source("nothing-*.jsonl", "train")
    with pytest.raises(UserError, match=r"none of 1 matches is a \.jsonl"):
        read_source("part-n*", "train")
    write(tmp_path / "odd[1].jsonl", ROWS)  # a file of that name comes before the pattern
    assert len(list(read_source("odd[1].jsonl", "train").rows())) == 3


def test_a_list_of_sources_is_one_after_the_other(tmp_path: Path) -> None:
    files = [str(write(tmp_path / f"{name}.jsonl", ROWS[i : i + 1])) for i, name in enumerate("ab")]
    source = read_source(files, "val")
    assert list(source.rows()) == [(f"{file}, row 1", row) for file, row in zip(files, ROWS, strict=False)]
    assert (source.name, source.count()) == ("data.val", 2)
    assert source.key != read_source(files[::-1], "val").key
    assert len(read_source([*files, "world"], "train", limit=1).parts) == 3
    with pytest.raises(UserError, match=r"data\.ptx: there is no file .*c\.jsonl"):
        read_source([*files, str(tmp_path / "c.jsonl")], "train", name="ptx")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"train\.jsonl is a device, not a file"):
        read_source(str(tmp_path / "train.jsonl"), "train")
    with pytest.raises(UserError, match=r"train\.jsonl is a device, not a file"):
        read_source(str(tmp_path), "train")
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"contains no \.jsonl"):
        read_source(str(tmp_path), "train")
    write(tmp_path / "rows.jsonl", ROWS)
    assert len(list(read_source(str(tmp_path), "train").rows())) == 3
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    (saved / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.train: the data set .*saved cannot be read \("):
        read_source(str(saved), "train")


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
