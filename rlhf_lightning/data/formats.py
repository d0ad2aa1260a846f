"""The rows of a file, one at a time: JSON lines, JSON, CSV and Parquet, also compressed.

A line that is no row is yielded as the `RowError` that says why, so that it can be left out like another bad row; what
makes the rest of a file unreadable is a UserError with the file and the row. Memory is bounded by `LONGEST`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_lightning.data.messages import DEEPEST, RowError, shallow
from rlhf_lightning.errors import UserError

Row = dict[str, Any]
COMPRESSED = ("", ".gz", ".zst")
FORMATS = (*(f"{kind}{ending}" for kind in (".jsonl", ".json", ".csv") for ending in COMPRESSED), ".parquet")
LONGEST = 1 << 26
"""Bytes of the longest line that is read as a row."""
LARGEST = 1 << 30
"""Bytes of the largest file that is read at once: a JSON list."""
UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


def read_file(path: Path) -> Iterator[Row | RowError]:
    """Yield the rows of a file.

    Raises:
        UserError: a file that cannot be read, with the row where that was found.
    """
    number, rows, end = 0, _rows(path), object()
    while True:
        try:
            row: Any = next(rows, end)
        except UNREADABLE as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
            place = f"{path}, row {number + 1}" if number else path
            raise UserError(f"{place}: cannot be read ({reason})") from error
        except csv.Error as error:
            raise UserError(f"{path}, row {number + 1}: not CSV ({error})") from error
        except RowError as error:
            raise UserError(f"{path}, row {number + 1}: {error}") from error
        if row is end:
            return
        number += 1
        yield row


def count_rows(path: Path) -> int | None:
    """Return about the number of rows of a file, None where it is unknown."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.ParquetFile(path).metadata.num_rows
        if ".csv" not in path.name and ".jsonl" not in path.name:
            return sum(1 for _ in read_file(path))
        with _opened(path) as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except Exception:  # reading the rows will say what is wrong with the file
        return None


def _rows(path: Path) -> Iterator[Row | RowError]:
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    with _opened(path) as file:
        if ".csv" in path.name:
            yield from _csv(file)
        elif ".jsonl" in path.name:
            yield from _json_lines(file)
        else:
            yield from _json(file)


def _opened(path: Path) -> Any:
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(_Raw(pa.CompressedInputStream(str(path), "zstd")), 1 << 20)  # type: ignore[arg-type]
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


class _Raw(io.RawIOBase):
    """A stream of pyarrow as Python's own: lines of it can be read with a limit."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self.stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise OSError(f"damaged Parquet: {error}") from error


def _lines(file: Any) -> Iterator[bytes | RowError]:
    """Yield the lines of a file; of one that is too long, why it is not read."""
    begin = True
    while line := file.readline(LONGEST + 1):
        if begin and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        begin = False
        if len(line) <= LONGEST:
            yield line
            continue
        while not line.endswith(b"\n") and (line := file.readline(LONGEST)):
            pass
        yield RowError(f"the line is longer than {LONGEST >> 20} MiB")


def _json_lines(file: Any) -> Iterator[Row | RowError]:
    for line in _lines(file):
        if isinstance(line, RowError):
            yield line
        elif line.strip():
            yield parse(line.rstrip(b"\r\n"))


def parse(text: bytes) -> Any:
    """Return the value of a JSON text, or a `RowError` with the reason why it has none."""
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
        # every level has its bracket
        return shallow(value, "the row") if text.count(b"[") + text.count(b"{") > DEEPEST else value
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        return RowError(f"not JSON ({error.msg} at column {error.colno})")
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} is 0x{text[error.start]:02x})")
    except RecursionError:
        return RowError(f"the row has lists or objects nested more than {DEEPEST} deep")
    except ValueError as error:  # of a number with thousands of digits
        return RowError(f"not JSON ({str(error).split(';')[0].split(':')[0]})")


def _object(pairs: list[tuple[str, Any]]) -> Row:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found


def _json(file: Any) -> Iterator[Row | RowError]:
    """Yield the rows of a list, of an object with the list `data`, of one object, or of one object a line."""
    head = file.readline(LONGEST + 1)
    while head and not head.strip():
        head = file.readline(LONGEST + 1)
    head = head.removeprefix(b"\xef\xbb\xbf")
    if head.lstrip().startswith(b"{") and len(head) <= LONGEST and isinstance(first := parse(head), dict):
        rest = _json_lines(file)
        if (second := next(rest, None)) is not None:
            yield first
            yield second
            yield from rest
            return
        content: Any = first
    else:
        text = head + file.read(LARGEST - len(head) + 1)
        if len(text) > LARGEST:
            raise RowError(f"a JSON list is read at once, up to {LARGEST >> 30} GiB; write one object a line (.jsonl)")
        content = parse(text)
    if isinstance(content, RowError):
        raise content
    rows = content.get("data", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise RowError(f"the file holds {type(rows).__name__}, not a list of rows")
    yield from rows


def _csv(file: Any) -> Iterator[Row | RowError]:
    """Yield the rows of a CSV file; a row with more or fewer fields than the header is no row."""
    csv.field_size_limit(LONGEST)
    rows = csv.reader(_csv_lines(file), strict=True)
    header = next(rows, [])
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise RowError(f"the header names {', '.join(twice)} twice")
    for fields in rows:
        if not fields:
            continue
        if len(fields) != len(header):
            yield RowError(
                f"{len(fields)} fields, and the header has {len(header)}: a field with a comma, a quote or a line "
                "break must be in double quotes"
            )
            continue
        yield dict(zip(header, fields, strict=True))


def _csv_lines(file: Any) -> Iterator[str]:
    for line in _lines(file):
        if isinstance(line, RowError):
            raise line
        yield line.decode("utf-8")
