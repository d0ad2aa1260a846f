"""Files: what cannot be read says file, row and reason; nothing in them is dropped."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlhf_lightning.data import formats
from rlhf_lightning.data.formats import count_rows, read_file
from rlhf_lightning.data.messages import RowError
from rlhf_lightning.data.records import prompt
from rlhf_lightning.data.sources import read_source
from rlhf_lightning.data.tokenize import tokenize
from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group

ROWS = [{"prompt": "a", "response": "x"}, {"prompt": "b\r\nc", "response": "y, z"}, {"prompt": "d", "response": "ü"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = 'prompt,response\na,x\n"b\r\nc","y, z"\nd,ü\n'.encode()


def zst(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", LINES),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("d.jsonl.zst", zst(LINES)),
        ("d.jsonl.zst", zst(LINES[:40]) + zst(LINES[40:])),
        ("d.json", LINES),
        ("d.json.zst", zst(LINES)),
        ("d.json", json.dumps(ROWS).encode()),
        ("d.json", json.dumps(ROWS, indent=1).encode()),
        ("d.json", b"\xef\xbb\xbf" + json.dumps({"data": ROWS}, indent=1).encode()),
        ("d.json", b"\n \n" + LINES),
        ("d.csv", CSV),
        ("d.csv.zst", zst(b"\xef\xbb\xbf" + CSV)),
    ],
)
def test_a_file_gives_its_rows(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert list(read_file(tmp_path / name)) == ROWS
    assert count_rows(tmp_path / name) in (3, 4, 5)


def test_one_object_is_one_row(tmp_path: Path) -> None:
    for text in (json.dumps(ROWS[0]), json.dumps(ROWS[0], indent=1)):
        (tmp_path / "d.json").write_text(text)
        assert list(read_file(tmp_path / "d.json")) == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "bad", "reason"),
    [
        ("d.jsonl", b'{"prompt": \n', "not JSON (Expecting value at column 12)"),
        ("d.jsonl", b"[" * 100_000 + b"\n", "the row has lists or objects nested more than 200 deep"),
        ("d.jsonl", b'{"x":' + b"[" * 300 + b"]" * 300 + b"}\n", "nested more than 200 deep"),
        ("d.jsonl", b'{"x":' + b"9" * 6000 + b"}\n", "not JSON (Exceeds the limit (4300 digits)"),
        ("d.jsonl", b'{"x": "\xff"}\n', "not UTF-8 (byte 8 is 0xff)"),
        ("d.jsonl", b'{"x": "' + b"a" * 5000 + b'"}\n', "the line is longer than 0 MiB"),
        ("d.jsonl", b"[1, 2]\n", "the row is list, not an object"),
        ("d.jsonl", b'{"prompt": "a", "prompt": "b"}\n', "row 2: prompt is there twice"),
        ("d.jsonl", b"null\n", "the row is NoneType, not an object"),
        ("d.jsonl", b'{"prompt": "a\\ud800"}\n', "prompt contains a lone surrogate"),
        ("d.jsonl", b'{"\\ud800\\n": "a"}\n', "there is no prompt or messages or text; the row has \\ud800 ."),
        ("d.csv", b"a,b, and c\n", "3 fields, and the header has 2"),
        ("d.csv", b"alone\n", "1 fields, and the header has 2"),
    ],
)
def test_a_line_that_is_no_row_is_a_bad_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, bad: bytes, reason: str
) -> None:
    if b"a" * 5000 in bad:
        monkeypatch.setattr(formats, "LONGEST", 4096)
    good = {"d.jsonl": b'{"prompt": "a"}\n', "d.csv": b"a,x\n"}[name]
    header = b"prompt,response\n" if name == "d.csv" else b""
    (tmp_path / name).write_bytes(header + good + bad + good)
    source = read_source(str(tmp_path / name), "train")

    def to_group(row: Any) -> Group:
        return Group([1], [[len(prompt(row).text)]])

    with pytest.raises(UserError) as caught:
        tokenize(source, to_group, tmp_path, [])
    assert f"{name}, row 2: " in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed
    rows = tokenize(source, to_group, tmp_path, [], on_bad_row="skip")
    assert (len(rows), sum(rows.skipped.values())) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("d.csv", b'prompt,response\na,x\n"b,y\nc,z\n', "row 2: not CSV (unexpected end of data)"),
        ("d.csv", b'prompt,response\na,x\n"b"b,y\n', "row 2: not CSV ("),
        ("d.csv", b"prompt,response\na,x\n\xff,y\n", "row 2: cannot be read ('utf-8' codec"),
        ("d.csv", b"prompt,response,response\na,x,y\n", "row 1: the header names response twice"),
        ("d.jsonl.gz", gzip.compress(LINES * 500, mtime=0)[:200], ": cannot be read (Compressed file ended"),
        ("d.jsonl.gz", gzip.compress(LINES, mtime=0)[:12] + b"\xff" * 400, ": cannot be read ("),
        ("d.jsonl.zst", b"no zstd", ": cannot be read ("),
        ("d.json", b'{"prompt": "a"', "row 1: not JSON ("),
        ("d.json", b'{"data": 3}', "row 1: the file holds int, not a list of rows"),
        ("d.json", b"[" * 100_000, "row 1: the row has lists or objects nested more than 200 deep"),
        ("d.parquet", b"PAR1 no parquet PAR1", ": cannot be read ("),
    ],
)
def test_the_rest_of_a_damaged_file_is_lost_with_its_place(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        list(read_file(tmp_path / name))
    assert str(caught.value).startswith((f"{tmp_path / name}, row ", f"{tmp_path / name}: cannot be read ("))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [8, 200, 2000, -30, -200])
def test_damaged_parquet_says_so(tmp_path: Path, place: int) -> None:
    table = pa.Table.from_pylist([{"prompt": f"say {i}", "number": i} for i in range(3000)])
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=1000)
    content = bytearray((tmp_path / "d.parquet").read_bytes())
    content[place : place + 8] = b"\xff" * 8
    (tmp_path / "d.parquet").write_bytes(content)
    found = read_or_reason(tmp_path / "d.parquet")
    if isinstance(found, str):
        assert "d.parquet: cannot be read (" in found or ": cannot be read (" in found.partition("d.parquet, row ")[2]
        assert "\n" not in found
    else:
        assert len(found) == 3000  # bytes that nothing depends on


def read_or_reason(path: Path) -> list[Any] | str:
    try:
        return list(read_file(path))
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST", 1 << 16)
    packer = zlib.compressobj(wbits=31)
    block = b"a" * (1 << 20)
    parts = [packer.compress(b'{"prompt": "a"}\n{"prompt": "')] + [packer.compress(block) for _ in range(256)]
    (tmp_path / "d.jsonl.gz").write_bytes(b"".join(parts) + packer.compress(b'"}\n' + LINES) + packer.flush())
    first, second, *others = read_file(tmp_path / "d.jsonl.gz")
    assert first == {"prompt": "a"}
    assert isinstance(second, RowError)
    assert others == ROWS
