"""Rows tokenized once, kept on disk as Arrow by content hash, read by memory map."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from rlhf_lightning.data.groups import Group
from rlhf_lightning.data.records import RowError
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import UserError

FORMAT = 2  # part of every cache key; raise it when the columns change
PARALLEL_ROWS = 20_000  # fewer rows are quicker without starting processes
SCHEMA = pa.schema(
    [
        ("prompt", pa.list_(pa.int32())),
        ("responses", pa.list_(pa.list_(pa.int32()))),
        ("counted", pa.list_(pa.list_(pa.bool_()))),
        ("ranks", pa.list_(pa.int32())),
        ("margin", pa.float64()),
        ("label", pa.float64()),
        ("tokens", pa.int64()),
        ("counted_tokens", pa.int64()),
        ("where", pa.string()),
        ("raw", pa.string()),
    ]
)
ToGroup = Callable[[dict[str, Any]], Group]


class TokenizedRows:
    """Groups of a data set on disk; `tokens` and `counted` (rows,) are in memory for the planner.

    `skipped` counts the rows left out, by reason.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.tokens: np.ndarray = self._table.column("tokens").to_numpy()
        self.counted: np.ndarray = self._table.column("counted_tokens").to_numpy()
        metadata = self._table.schema.metadata or {}
        self.skipped: dict[str, int] = json.loads(metadata.get(b"skipped", b"{}"))

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, row: int) -> Group:
        value = self._table.slice(row, 1).drop_columns(["where", "raw"]).to_pylist()[0]
        return Group(
            value["prompt"],
            value["responses"],
            value["counted"],
            value["ranks"],
            value["margin"],
            value["label"],
            row,
        )

    def where(self, row: int) -> str:
        """Return where a row stands in its source, as in "row 17": rows that were skipped count."""
        return self._table.column("where")[row].as_py()

    def raw(self, row: int) -> dict[str, Any]:
        """Return the untokenized row; only prompts keep it."""
        return json.loads(self._table.column("raw")[row].as_py() or "{}")


def report_skipped(data: Any) -> None:
    """Say how many rows were left out, and why."""
    parts = {f"data.{split}": rows for split, rows in data.rows.items()}
    if getattr(data, "ptx", None) is not None:
        parts["data.ptx"] = data.ptx.rows["train"]
    for name, rows in parts.items():
        for reason, count in rows.skipped.items():
            Console().print(f"skipped {count} rows of {name}: {reason}", style="yellow", soft_wrap=True)


def tokenize(
    source: Source,
    to_group: ToGroup,
    cache_dir: Path,
    parts: Iterable[Any],
    on_bad_row: str = "error",
    keep_raw: bool = False,
) -> TokenizedRows:
    """Tokenize the rows of `source`, or open them when they are in the cache.

    Args:
        source: where the rows come from.
        to_group: turns a row into a group, or raises `RowError`.
        cache_dir: folder of Arrow files named by content hash.
        parts: what besides the rows decides the tokens (template, lengths).
        on_bad_row: "error" raises at the first bad row, "skip" counts it.
        keep_raw: keep each row as JSON beside its tokens.

    Raises:
        UserError: naming the file and the row, or when no row is left.
    """
    text = json.dumps([FORMAT, source.key, list(parts), on_bad_row, keep_raw])
    path = Path(cache_dir) / "tokens" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.arrow"
    if not path.is_file():
        _write(path, source, to_group, on_bad_row, keep_raw)
    rows = TokenizedRows(path)
    if not len(rows):
        path.unlink()
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in rows.skipped.items())
        raise UserError(f"{source.name} has no usable row ({reasons or 'it is empty'})")
    return rows


def _write(path: Path, source: Source, to_group: ToGroup, on_bad_row: str, keep_raw: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    skipped: Counter[str] = Counter()
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        spilled = Path(temporary + ".rows")
        with pa.OSFile(str(spilled), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for found in _encoded(source, to_group, keep_raw):
                good = []
                for where, value in found:
                    if isinstance(value, dict):
                        good.append(value)
                    elif on_bad_row == "error":
                        raise UserError(f"{source.name}, {where}: {value}")
                    else:
                        skipped[value.split(";")[0]] += 1
                writer.write_batch(pa.RecordBatch.from_pylist(good, SCHEMA))
        # the schema's metadata is written first, so the counts are known only on a second pass over the file
        schema = SCHEMA.with_metadata({"skipped": json.dumps(dict(skipped))})
        with (
            pa.memory_map(str(spilled)) as stored,
            pa.OSFile(temporary, "wb") as sink,
            pa.ipc.new_file(sink, schema) as w,
        ):
            for batch in pa.ipc.open_stream(stored):
                w.write_batch(batch.replace_schema_metadata(schema.metadata))
        os.replace(temporary, path)
    finally:
        for leftover in (Path(temporary), Path(temporary + ".rows")):
            leftover.unlink(missing_ok=True)


def _encoded(source: Source, to_group: ToGroup, keep_raw: bool) -> Iterator[list[tuple[str, Any]]]:
    """Yield encoded chunks in the order of the rows, from several processes when there are many rows."""
    rows = source.rows()
    head = list(islice(rows, PARALLEL_ROWS))
    chunks = _chunks(chain(head, rows), 512)
    workers = min(os.cpu_count() or 1, 16)
    if len(head) < PARALLEL_ROWS or workers == 1:
        yield from (_encode(to_group, keep_raw, chunk) for chunk in chunks)
        return
    global _inherited
    _inherited = (to_group, keep_raw)  # forked children inherit it; a tokenizer need not be pickled
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        yield from pool.imap(_encode_inherited, chunks)


_inherited: tuple[ToGroup, bool]


def _chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, size)):
        yield chunk


def _encode_inherited(chunk: Any) -> list[tuple[str, Any]]:
    return _encode(*_inherited, chunk)


def _encode(to_group: ToGroup, keep_raw: bool, chunk: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return (where, columns) for good rows and (where, reason) for bad ones."""
    found: list[tuple[str, Any]] = []
    for where, row in chunk:
        try:
            if not isinstance(row, dict):
                raise RowError(f"the row is {type(row).__name__}, not an object")
            group = to_group(row)
        except RowError as error:
            found.append((where, str(error)))
            continue
        columns = {
            "prompt": group.prompt, "responses": group.responses, "counted": group.counted, "ranks": group.ranks,
            "margin": group.margin, "label": group.label, "tokens": group.tokens,
            "counted_tokens": group.counted_tokens, "where": where,
            "raw": json.dumps(row, default=str) if keep_raw else None,
        }  # fmt: skip
        found.append((where, columns))
    return found
