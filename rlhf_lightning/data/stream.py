"""Rows read window by window, for data that is larger than the disk or should not be kept on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from rlhf_lightning.data.planning import MicroBatch, StepPlan
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.tokenize import ToGroup, TokenizedRows, encode, reasons
from rlhf_lightning.errors import UserError


class Windows:
    """Endless windows of tokenized rows from a source; when it ends, it is read again.

    Args:
        source: where the rows come from.
        to_group: turns a row into a group, or raises `RowError`.
        size: rows read for a window.
        on_bad_row: "error" raises at the first bad row, "skip" leaves it out.
        keep_raw: keep each row as JSON beside its tokens.
    """

    def __init__(self, source: Source, to_group: ToGroup, size: int, on_bad_row: str, keep_raw: bool) -> None:
        self.source, self.to_group, self.size = source, to_group, size
        self.on_bad_row, self.keep_raw = on_bad_row, keep_raw

    def after(self, row: int) -> Iterator[tuple[int, TokenizedRows]]:
        """Yield, from the window that begins after `row` rows of a pass, where each window begins and its rows.

        Raises:
            UserError: naming the file and the row, or when a pass has no usable row.
        """
        while True:
            rows = islice(self.source.rows(), row, None)
            usable = row > 0
            while chunk := list(islice(rows, self.size)):
                window = self.tokenized(chunk)
                usable = usable or len(window) > 0
                if len(window):
                    yield row, window
                row += len(chunk)
            if not usable:
                raise UserError(f"{self.source.name} has no usable row")
            row = 0

    def tokenized(self, chunk: list[tuple[str, dict[str, Any]]]) -> TokenizedRows:
        _, bad, columns = encode(self.to_group, self.keep_raw, chunk)
        skipped = Counter(reasons(bad, self.on_bad_row, self.source.name))
        return TokenizedRows(columns, dict(skipped), self.source.key)


class WindowLoader:
    """A resumable loader over :class:`Windows`: each window is shuffled and planned as a whole data set is.

    Every rank reads every window and takes its part of each step, so all have equally many. The number of batches is
    that of the whole run: a stream has no epochs.

    Args:
        windows: where the rows come from.
        plan: makes the plan of a window's rows.
        collate: makes a batch of a window's rows.
        batches: of the whole run.
    """

    def __init__(
        self,
        windows: Windows,
        plan: Callable[[TokenizedRows], StepPlan],
        collate: Callable[[TokenizedRows, MicroBatch], Any],
        batches: int,
    ) -> None:
        self.windows, self.plan, self.collate, self.batches = windows, plan, collate, batches
        self.number = self.steps = 0  # windows before this one, and their steps
        self.row = self.taken = 0  # rows of the pass before this window, batches of it

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Any]:
        for row, rows in self.windows.after(self.row):
            self.row = row
            plan = self.plan(rows)
            plan.epoch, plan.start = self.number, self.taken
            for micro in plan:
                self.taken += 1
                yield self.collate(rows, replace(micro, step=self.steps + micro.step - self.number * plan.steps))
            self.number, self.steps, self.taken = self.number + 1, self.steps + plan.steps, 0

    def state_dict(self) -> dict[str, int]:
        """Return the window and the batches taken from it."""
        return {"window": self.number, "steps": self.steps, "row": self.row, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that were taken before the checkpoint."""
        self.number, self.steps = state["window"], state["steps"]
        self.row, self.taken = state["row"], state["taken"]
