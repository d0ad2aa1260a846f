"""What annotators label: rows of any layout as items, the order of their answers, and warnings before harmful text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from rlhf_lightning.data.comparisons import OF_OTHERS, Comparison
from rlhf_lightning.data.layouts import Columns
from rlhf_lightning.data.messages import Message, turn
from rlhf_lightning.data.records import RowError, demonstration, given_responses, preference, prompt
from rlhf_lightning.data.sources import Row, Source
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.files import fingerprint
from rlhf_lightning.ops.seeding import permutation

MODES = ("compare", "rank", "edit", "write", "chat")
MOST_RANKED = 9
WARNINGS = ("content_warning", "harmful")
"""Columns that ask for a content warning where nothing else is said."""
NO_WARNING = ("", "0", "false", "no", "none", "null")
RECORDED = {"id", "group", "strength", "shown", "seconds", "time", "check", "original"}
"""Columns of labels: a row's own of these names do not get into its labels."""
PER_RESPONSE = ("finished", "tokens")


@dataclass(frozen=True)
class Item:
    """A comparison to label, or a prompt to answer.

    Args:
        comparison: its responses are those to compare, the answer to edit, or none.
        warning: shown before the text; None is no warning.
        check: of a check question: the index of the response that is known to be best.
    """

    comparison: Comparison
    warning: str | None = None
    check: int | None = None

    @cached_property
    def key(self) -> str:
        """Names the item by its content, so that labels stay with what their annotators saw."""
        one = self.comparison
        return fingerprint([one.id, one.prompt, list(one.responses), self.check])[:24]

    def value(self) -> dict[str, Any]:
        """Return it as plain containers, for the store."""
        one = self.comparison
        return {"id": one.id, "prompt": one.prompt, "responses": list(one.responses), "metadata": one.metadata} | (
            {"check": self.check} if self.check is not None else {}
        )

    @classmethod
    def read(cls, value: dict[str, Any]) -> Item:
        """Return the item of which :meth:`value` is in a store."""
        responses = tuple(value["responses"])
        return cls(Comparison(value["id"], value["prompt"], responses, value["metadata"]), check=value.get("check"))

    def shown(self, seed: int, annotator: str) -> list[int]:
        """Return the order in which an annotator sees the responses: indices of them, decided by the seed."""
        size = len(self.comparison.responses)
        return permutation(size, seed, "shown", annotator, self.key).tolist()


def read_items(
    source: Source,
    mode: str,
    columns: Columns | None = None,
    *,
    seed: int = 0,
    pairs: int = 1,
    warn: Sequence[str] = WARNINGS,
    checks: bool = False,
    on_bad_row: str = "error",
    progress: Callable[[int], Any] | None = None,
) -> tuple[dict[str, Item], int]:
    """Return the items of a source by key, in the order of its rows, and the number of rows that were skipped.

    Args:
        mode: compare, rank, edit, write or chat, whose items are prompts that open a conversation.
        columns: the data's names of columns.
        seed: draws the pairs that are compared of a row with more than two responses.
        pairs: of a row, at most.
        warn: columns that ask for a content warning, see :func:`warning_of`.
        checks: the rows say which response is best, and become check questions.
        on_bad_row: "error" stops at a bad row, "skip" counts it.
        progress: called with 1 for every row.

    Raises:
        UserError: a row that cannot be labeled, ids that two rows share, or a column for warnings that no row has.
    """
    columns, items, skipped = columns or Columns(), dict[str, Item](), 0
    ids: dict[str, str] = {}
    seen: set[str] = set()
    for where, row in source.rows():
        if progress:
            progress(1)
        try:
            made = list(items_of(row, mode, columns, seed, pairs, checks))
        except RowError as error:
            if on_bad_row == "skip":
                skipped += 1
                continue
            raise UserError(f"{source.name}, {where}: {error}") from error
        seen.update(row)
        for comparison, check in made:
            item = Item(comparison, warning_of(row, warn), check)
            if item.key in items:
                continue
            if comparison.id in ids:
                raise UserError(
                    f"{source.name}, {where}: its id {comparison.id!r} is also that of {ids[comparison.id]}"
                )
            items[item.key], ids[comparison.id] = item, where
    if not items:
        raise UserError(f"{source.name} has no row to label{f'; {skipped} were skipped' if skipped else ''}")
    _check_warnings(source.name, warn, seen)
    return items, skipped


def items_of(
    row: Row, mode: str, columns: Columns, seed: int, pairs: int, checks: bool
) -> Iterator[tuple[Comparison, int | None]]:
    """Yield the comparisons of a row, or its prompt as one without responses, and which response is known to be best.

    Raises:
        RowError: the row is none of the kind that the mode needs.
    """
    if checks:
        known = preference(row, columns)
        if known.ranks.count(0) != 1:
            raise RowError("several responses are best, so it is no check question")
        responses, ranks = known.responses, known.ranks
        if mode == "compare":
            responses, ranks = [responses[0], responses[-1]], [0, 1]
        yield _comparison(row, columns, responses, range(len(responses))), ranks.index(0)
    elif mode == "edit":
        content, original = _to_edit(row, columns)
        yield _comparison(row, columns, [original], [0], content), None
    elif mode in ("write", "chat"):
        yield _comparison(row, columns, [], []), None
    else:
        texts = _responses(row, mode, columns)
        if len(texts) < 2 or (mode == "rank" and len(texts) > MOST_RANKED):
            most = f" and at most {MOST_RANKED}" if mode == "rank" else ""
            raise RowError(
                f"it has {len(texts)} response{'s' * (len(texts) != 1)}; label.mode={mode} needs at least two{most}"
            )
        places = [list(range(len(texts)))] if mode == "rank" else drawn_pairs(texts, pairs, seed)
        for chosen in places:
            yield _comparison(row, columns, texts, chosen), None


def _responses(row: Row, mode: str, columns: Columns) -> list[str]:
    try:
        return given_responses(row, columns)
    except RowError as error:
        if columns.view(row).keys() & {"responses", "chosen", "rejected"}:
            raise
        raise RowError(
            f"it has no responses to {mode}: stage=candidates samples them, and label.mode=write reads prompts alone"
        ) from error


def drawn_pairs(texts: Sequence[str], count: int, seed: int) -> list[list[int]]:
    """Return `count` pairs of indices of different texts, drawn by the seed and the texts; all where there are fewer.

    Raises:
        RowError: all texts are equal.
    """
    several = itertools.combinations(range(len(texts)), 2)
    different = [[i, j] for i, j in several if texts[i].strip() != texts[j].strip()]
    if not different:
        raise RowError("its responses are equal, so there is nothing to compare")
    if len(different) <= count:
        return different
    order = permutation(len(different), seed, "pairs", fingerprint(list(texts))).tolist()
    return sorted(different[place] for place in order[:count])


def _to_edit(row: Row, columns: Columns) -> tuple[list[Message], str]:
    """Return the prompt and the answer to edit: the best of several, the first where none is known to be."""
    try:
        content = demonstration(row, columns).content
    except RowError:
        return _prompt(row, columns), given_responses(row, columns)[0]
    if isinstance(content, str):
        raise RowError("it is a text without a prompt, so there is no answer to edit")
    return [{"role": m["role"], "content": m["content"]} for m in content[:-1]], content[-1]["content"]


def _prompt(row: Row, columns: Columns) -> list[Message]:
    content = prompt(row, columns).content
    return [turn("user", content)] if isinstance(content, str) else content


def _comparison(
    row: Row, columns: Columns, texts: Sequence[str], places: Sequence[int], content: list[Message] | None = None
) -> Comparison:
    """Return the responses at `places` of a row as a comparison, with the row's other columns."""
    content = _prompt(row, columns) if content is None else content
    metadata = {str(k): v for k, v in row.items() if k not in OF_OTHERS | RECORDED and k not in columns.names.values()}
    for name in PER_RESPONSE:
        if isinstance(values := metadata.get(name), list):
            metadata[name] = [values[place] for place in places if place < len(values)]
    given = row.get("id")
    name = str(given) if isinstance(given, str | int) and str(given) else fingerprint([content, list(texts)])[:12]
    if len(places) < len(texts):
        name += "/" + "-".join(str(place) for place in places)
    return Comparison(name, content, tuple(texts[place] for place in places), metadata)


# ---- content warnings --------------------------------------------------------------------------------------------


def warning_of(row: Row, warn: Sequence[str]) -> str | None:
    """Return the content warning of a row, None without one.

    Args:
        warn: `<column>`, of which a text is the warning, and true or another number than 0 asks for one; or
            `<column>:<value>`, which asks for one in the rows that have this value.
    """
    for entry in warn:
        column, is_value, wanted = entry.partition(":")
        value = row.get(column)
        text = str(value).strip()
        if is_value:
            if text == wanted:
                return f"{column}: {wanted}"
        elif value is not None and text.lower() not in NO_WARNING:
            return text if isinstance(value, str) and text.lower() not in ("1", "true", "yes") else column
    return None


def _check_warnings(name: str, warn: Sequence[str], seen: set[str]) -> None:
    if tuple(warn) == WARNINGS:
        return
    for entry in warn:
        column = entry.partition(":")[0]
        if column not in seen and column not in WARNINGS:
            raise UserError(f"label.warn={entry}: no row of {name} has the column {column}.{nearest(column, seen)}")
