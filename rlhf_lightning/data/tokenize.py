"""Rows tokenized once, kept on disk as plain arrays by content hash, read by memory map."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from itertools import accumulate, chain, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from rlhf_lightning.data.messages import LeftOut, RowError
from rlhf_lightning.data.rendering import CPU_SECONDS, become_worker
from rlhf_lightning.data.sources import Row, Source
from rlhf_lightning.data.template import DIFFERS
from rlhf_lightning.errors import UserError
from rlhf_lightning.files import build_once
from rlhf_lightning.ops.groups import Group

FORMAT = 6  # part of every cache key; raise it when the columns change
PARALLEL_ROWS = 1_000  # fewer rows are faster without worker processes
CHUNK = 512
# a row: where its tokens, responses and text begin in the other files, and their numbers
STARTS = ("ids", "responses", "text")
ROW = np.dtype(
    [(name, np.int64) for name in STARTS]
    + [(name, np.int32) for name in ("tokens", "loss_tokens", "size", "where", "annotators", "raw")]
    + [("margin", np.float64), ("label", np.float64), ("differs", np.int8)]  # a place in DIFFERS, from 1
)
COLUMNS = {
    "rows": ROW,
    "ids": np.dtype(np.int32),  # the prompt, then the responses
    "loss_mask": np.dtype(np.bool_),  # one beside every id, False in the prompt
    "responses": np.dtype([("tokens", np.int32), ("rank", np.int32)]),
    "text": np.dtype(np.uint8),  # where a row stands in its source, whose it is, then the row as JSON when it is kept
}
ToGroup = Callable[[Row], Group]
Encoded = tuple[int, list[tuple[str, RowError]], dict[str, np.ndarray]]
"""Of a chunk: how many rows it had, (where, reason) of those that are left out, the columns of the others."""


class TokenizedRows:
    """Groups of a data set, on disk or of one window; `tokens` and `loss_tokens` (rows,) are in memory for the planner.

    `skipped` counts the rows left out, by reason; `differs` has for each reason the rows with other tokens than those
    of `apply_chat_template`; `key` names the content.
    """

    def __init__(self, columns: dict[str, np.ndarray], skipped: dict[str, int], key: str) -> None:
        self.key, self.skipped = key, skipped
        self._rows, self._ids, self._flags, self._responses, self._text = (columns[name] for name in COLUMNS)
        self.tokens: np.ndarray = self._rows["tokens"].astype(np.int64)
        self.loss_tokens: np.ndarray = self._rows["loss_tokens"].astype(np.int64)
        places = {reason: np.flatnonzero(self._rows["differs"] == i) for i, reason in enumerate(DIFFERS, 1)}
        self.differs: dict[str, np.ndarray] = {reason: rows for reason, rows in places.items() if len(rows)}

    @classmethod
    def open(cls, path: Path) -> TokenizedRows:
        """Map the files of a folder of the cache."""
        columns = {name: _mapped(path / name, kind) for name, kind in COLUMNS.items()}
        return cls(columns, json.loads((path / "skipped.json").read_text()), path.stem)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> Group:
        record = self._rows[row]
        ids, flags = (column[record["ids"] :][: record["tokens"]].tolist() for column in (self._ids, self._flags))
        responses = self._responses[record["responses"] :][: record["size"]]
        lengths = responses["tokens"].tolist()
        ends = accumulate(lengths, initial=len(ids) - sum(lengths))
        spans = [slice(*span) for span in pairwise(ends)]
        return Group(
            ids[: len(ids) - sum(lengths)],
            [ids[span] for span in spans],
            [flags[span] for span in spans],
            responses["rank"].tolist(),
            float(record["margin"]),
            float(record["label"]),
            row,
            annotators=self.annotators(row),
        )

    def where(self, row: int) -> str:
        """Return where a row stands in its source, as in "row 17": rows that were skipped count."""
        record = self._rows[row]
        return self._text[record["text"] :][: record["where"]].tobytes().decode()

    def annotators(self, row: int) -> str | None:
        """Return the group of annotators that a row speaks for, None where it names none."""
        record = self._rows[row]
        start, size = record["text"] + record["where"], record["annotators"]
        return self._text[start : start + size].tobytes().decode() if size else None

    def highest_id(self) -> tuple[int, int]:
        """Return the highest token id of all rows and the row that has it first; (-1, 0) without tokens."""
        highest, place = -1, 0
        for start in range(0, len(self._ids), 1 << 22):
            block = self._ids[start : start + (1 << 22)]
            if block.max() > highest:
                highest, place = int(block.max()), start + int(block.argmax())
        return highest, max(int(np.searchsorted(self._rows["ids"], place, side="right")) - 1, 0)

    def raw(self, row: int) -> Row:
        """Return the untokenized row; an empty one where rows are not kept."""
        record = self._rows[row]
        start = record["text"] + record["where"] + record["annotators"]
        return json.loads(self._text[start : start + record["raw"]].tobytes() or b"{}")


def _mapped(path: Path, kind: np.dtype) -> np.ndarray:
    if not path.stat().st_size:
        return np.empty(0, kind)  # an empty file cannot be mapped
    return np.memmap(path, kind, "r").view(np.ndarray)


def report_rows(data: Any) -> None:
    """Print how many rows were skipped or have other tokens than the chat template gives them, and other notes."""
    parts = {f"data.{split}": rows for split, rows in data.rows.items()}
    if getattr(data, "ptx", None) is not None:
        parts["data.ptx"] = data.ptx.rows["train"]
    for name, rows in parts.items():
        for reason, count in rows.skipped.items():
            Console().print(f"skipped {count} rows of {name}: {reason}", style="yellow", soft_wrap=True)
        for reason, places in rows.differs.items():
            text = f"{len(places)} of {len(rows)} rows of {name} do not have the tokens of apply_chat_template"
            first = f"the first is {rows.where(int(places[0]))}"
            Console().print(f"{text}: {reason} ({first})", style="yellow", markup=False, soft_wrap=True)
    for line in data.notes():
        Console().print(line, style="yellow", markup=False, soft_wrap=True)


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
        cache_dir: folder whose `tokens/` holds a folder of arrays for each content hash.
        parts: what besides the rows decides the tokens (template, lengths).
        on_bad_row: "error" raises at the first bad row, "skip" counts it.
        keep_raw: keep each row as JSON beside its tokens.

    Raises:
        UserError: naming the file and the row, or when no row is left.
    """
    text = json.dumps([FORMAT, source.key, list(parts), on_bad_row, keep_raw])
    path = Path(cache_dir) / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:32]
    build_once(path, lambda folder: _write(folder, source, to_group, on_bad_row, keep_raw))
    rows = TokenizedRows.open(path)
    if not len(rows):
        shutil.rmtree(path)
        reasons = "; ".join(f"{count} rows: {reason}" for reason, count in rows.skipped.items())
        raise UserError(f"{source.name} has no usable row ({reasons or 'it is empty'})")
    return rows


def _write(folder: Path, source: Source, to_group: ToGroup, on_bad_row: str, keep_raw: bool) -> None:
    """Append chunk after chunk to the files of `folder`."""
    skipped: Counter[str] = Counter()
    begins = dict.fromkeys(STARTS, 0)
    total = source.count()
    bar = Progress(*Progress.get_default_columns(), transient=True, disable=not Console().is_terminal)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / name).open("wb")) for name in COLUMNS}
        task = stack.enter_context(bar).add_task(f"tokenizing {source.name}", total=total)
        for size, bad, columns in _encoded(source, to_group, keep_raw, total):
            skipped.update(reasons(bad, on_bad_row, source.name))
            for name in STARTS:  # the offsets of a chunk begin at 0
                columns["rows"][name] += begins[name]
                begins[name] += len(columns[name])
            for name, file in files.items():
                file.write(columns[name].tobytes())
            bar.advance(task, size)
    (folder / "skipped.json").write_text(json.dumps(skipped))


def reasons(bad: list[tuple[str, RowError]], on_bad_row: str, name: str) -> list[str]:
    """Return why rows are left out, without the details of each row.

    Raises:
        UserError: the first bad row, unless `on_bad_row` is "skip".
    """
    for where, error in bad:
        if on_bad_row == "error" and not isinstance(error, LeftOut):
            raise UserError(f"{name}, {where}: {error}") from None
    return [str(error).split(";")[0] for _, error in bad]


def _encoded(source: Source, to_group: ToGroup, keep_raw: bool, total: int | None) -> Iterator[Encoded]:
    """Yield encoded chunks in the order of the rows, from several processes when there are many rows."""
    rows = source.rows()
    chunks = iter(lambda: list(islice(rows, CHUNK)), [])
    workers = min(os.cpu_count() or 1, 16)
    if workers == 1 or (total or 0) < PARALLEL_ROWS:
        yield from (encode(to_group, keep_raw, chunk) for chunk in chunks)
        return
    global _inherited
    _inherited = (to_group, keep_raw)  # forked children inherit it; a tokenizer need not be pickled
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=become_worker) as pool:
        waiting: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_encode_inherited, chunk))
                if len(waiting) > 2 * workers:  # rows are read no faster than they are written: memory stays bounded
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a process that tokenized {source.name} was killed: its chat template takes more than "
                f"{CPU_SECONDS:.0f} s for a conversation, or memory ran out; choose another with data.template"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_inherited: tuple[ToGroup, bool]


def _encode_inherited(chunk: list[tuple[str, Row]]) -> Encoded:
    return encode(*_inherited, chunk)


def encode(to_group: ToGroup, keep_raw: bool, chunk: list[tuple[str, Row]]) -> Encoded:
    """Return the encoded rows of `chunk`, a list of (where, row)."""
    columns: dict[str, Any] = {name: bytearray() if name == "text" else [] for name in COLUMNS}
    bad: list[tuple[str, RowError]] = []
    for where, row in chunk:
        try:
            if isinstance(row, RowError):  # a line that is no row
                raise row
            if not isinstance(row, dict):
                raise RowError(f"the row is {type(row).__name__}, not an object")
            group = to_group(row)
        except RowError as error:
            bad.append((where, error))
            continue
        place, raw = where.encode(), json.dumps(row, default=str).encode() if keep_raw else b""
        whose = (group.annotators or "").encode()
        sizes = (group.tokens, group.loss_tokens, len(group.responses), len(place), len(whose), len(raw))
        differs = DIFFERS.index(group.differs) + 1 if group.differs else 0
        columns["rows"].append((*(len(columns[name]) for name in STARTS), *sizes, group.margin, group.label, differs))
        columns["ids"] += chain(group.prompt, *group.responses)
        flags = group.loss_mask if group.loss_mask is not None else [[True] * len(y) for y in group.responses]
        columns["loss_mask"] += chain([False] * len(group.prompt), *flags)
        ranks = group.ranks if group.ranks is not None else range(len(group.responses))
        columns["responses"] += zip(map(len, group.responses), ranks, strict=True)
        columns["text"] += place + whose + raw
    columns["text"] = np.frombuffer(columns["text"], np.uint8)
    return len(chunk), bad, {name: np.asarray(columns[name], kind) for name, kind in COLUMNS.items()}
