"""Several sources in chosen proportions: which rows an epoch draws from each, and their tokenized rows as one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlhf_lightning.errors import UserError
from rlhf_lightning.ops.groups import Group
from rlhf_lightning.ops.seeding import permutation


def check_weights(weights: Any, sources: int, key: str) -> tuple[float, ...]:
    """Return the weights of `sources` sources as floats; none for None.

    Raises:
        UserError: not one positive number for each source.
    """
    if weights is None:
        return ()
    listed = list(weights) if isinstance(weights, list | tuple) else [weights]
    numbers = [w for w in listed if isinstance(w, int | float) and not isinstance(w, bool) and 0 < w < float("inf")]
    if len(numbers) != len(listed):
        raise UserError(f"data.weights={listed}: every weight is a number above 0; a source without rows is left out")
    if len(numbers) != sources or sources == 1:
        raise UserError(
            f"data.weights has {len(numbers)} numbers, {key} has {sources} sources; one for each of several"
        )
    return tuple(map(float, numbers))


def drawn(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return how many rows an epoch draws from each source: in proportion to `weights`, together as many as there are.

    Without weights every row is drawn once. Rounding is by the largest remainder.
    """
    if not weights:
        return list(sizes)
    exact = np.asarray(weights) / sum(weights) * sum(sizes)
    counts = np.floor(exact).astype(int)
    for place in np.argsort(counts - exact, kind="stable")[: sum(sizes) - counts.sum()]:
        counts[place] += 1
    return counts.tolist()


def epoch_order(sizes: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """Return the rows of an epoch in order, numbered over all sources one after the other.

    Each source is read in passes, every pass in an order of its own, and an epoch goes on where the one before ended:
    of a source that is drawn less than once per epoch the next epoch draws other rows.
    """
    parts, offset = [], 0
    for source, (size, count) in enumerate(zip(sizes, drawn(sizes, weights), strict=True)):
        begin, end = epoch * count, (epoch + 1) * count
        if count:
            first, last = begin // size, (end - 1) // size
            passes = [permutation(size, seed, "pass", source, p) for p in range(first, last + 1)]
            parts.append(torch.cat(passes)[begin - first * size : end - first * size] + offset)
        offset += size
    rows = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
    return rows[permutation(len(rows), seed, "epoch", epoch)].numpy()


def interleaved(sources: Sequence[Callable[[], Iterator[Any]]], weights: Sequence[float]) -> Iterator[Any]:
    """Yield rows of `sources` in proportion to `weights`, until every source was read to its end once.

    The next row is from the source that lags most behind its share; a source that ends begins again.
    """
    running = [read() for read in sources]
    ended, credit, total = [False] * len(sources), [0.0] * len(sources), sum(weights)
    while True:
        credit = [have + weight for have, weight in zip(credit, weights, strict=True)]
        place = max(range(len(credit)), key=lambda i: credit[i])
        credit[place] -= total
        row = next(running[place], None)
        if row is None:
            ended[place] = True
            if all(ended):
                return
            running[place] = sources[place]()
            row = next(running[place], None)
            if row is None:
                return
        yield row


class JoinedRows:
    """The tokenized rows of several sources as one sequence, numbered over all of them.

    What it has beside is what :class:`TokenizedRows` has.
    """

    def __init__(self, parts: Sequence[Any], names: Sequence[str], weights: Sequence[float]) -> None:
        self.parts, self.names, self.weights = parts, names, tuple(weights)
        self.sizes = [len(part) for part in parts]
        self.starts = np.cumsum([0, *self.sizes])
        self.tokens = np.concatenate([part.tokens for part in parts])
        self.loss_tokens = np.concatenate([part.loss_tokens for part in parts])
        self.skipped: dict[str, int] = dict(sum((Counter(part.skipped) for part in parts), Counter()))
        differs: dict[str, list[np.ndarray]] = {}
        for part, start in zip(parts, self.starts, strict=False):
            for reason, rows in part.differs.items():
                differs.setdefault(reason, []).append(rows + start)
        self.differs = {reason: np.concatenate(rows) for reason, rows in differs.items()}
        self.key = hashlib.sha256("".join(part.key for part in parts).encode()).hexdigest()[:32]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _place(self, row: int) -> tuple[int, int]:
        row = range(len(self))[row]
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])

    def __getitem__(self, row: int) -> Group:
        part, place = self._place(row)
        return replace(self.parts[part][place], index=row)

    def highest_id(self) -> tuple[int, int]:
        """Return the highest token id of all rows and the row that has it first."""
        found = [part.highest_id() for part in self.parts]
        part = max(range(len(found)), key=lambda number: (found[number][0], -number))
        return found[part][0], found[part][1] + int(self.starts[part])

    def where(self, row: int) -> str:
        """Return where a row stands: its source, and its place there."""
        part, place = self._place(row)
        return f"{self.names[part]}, {self.parts[part].where(place)}"

    def annotators(self, row: int) -> str | None:
        """Return the group of annotators that a row speaks for, None where it names none."""
        part, place = self._place(row)
        return self.parts[part].annotators(place)

    def raw(self, row: int) -> dict[str, Any]:
        """Return the untokenized row; an empty one where rows are not kept."""
        part, place = self._place(row)
        return self.parts[part].raw(place)

    def drawn(self) -> dict[str, int]:
        """Return how many rows an epoch draws from each source."""
        return dict(zip(self.names, drawn(self.sizes, self.weights), strict=True))
