"""Which rows make up which optimizer step, planned ahead so that it does not depend on ranks or accumulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from rlhf_lightning.data.prefetch import prefetched
from rlhf_lightning.ops.seeding import generator, permutation


@dataclass(frozen=True)
class MicroBatch:
    """The rows one rank reads in one forward pass, with the weights that make the step's loss a mean.

    `places` are the places of the rows among all rows of the step; `step` counts the steps of all epochs.
    """

    rows: tuple[int, ...]
    per_token: float | None
    per_group: float | None
    step: int
    places: tuple[int, ...] | None = None


class StepPlan(Sampler[MicroBatch]):
    """Yields the microbatches of one rank, epoch by epoch, from a permutation that only `seed` and epoch decide.

    A step takes `batch_size` rows of the permutation and splits them over `world_size * accumulate` microbatches of
    about equal token counts. Rank and accumulation change who computes a row, never which rows a step learns from,
    and every rank has the same number of microbatches. The rows left over at the end of an epoch form a smaller last
    step; they are dropped only when they are fewer than the microbatches to fill.

    Args:
        tokens: (rows,) token count of each row, for balance.
        loss_tokens: (rows,) tokens in the loss mask of each row, for the weights.
        batch_size: rows per step, over all ranks.
        accumulate: microbatches per step on each rank (Lightning's `accumulate_grad_batches`).
        rank, world_size: this rank and the number of ranks.
        shuffle: permute the rows every epoch.
        order: epoch -> the rows of that epoch in order, instead of a permutation.
        limit: Lightning's `limit_train_batches`; a last step that it cuts short is a mean over the rows that are read.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        loss_tokens: np.ndarray,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        order: Callable[[int], np.ndarray] | None = None,
        limit: int | float = 1.0,
    ) -> None:
        self.order = order
        self.tokens, self.loss_tokens = tokens, loss_tokens
        self.parts = accumulate * world_size
        self.accumulate, self.rank, self.shuffle, self.seed = accumulate, rank, shuffle, seed
        self.batch_size = max(min(batch_size, len(tokens)), 1)
        full, rest = divmod(len(tokens), self.batch_size)
        self.whole = full + (rest >= self.parts)
        self.batches = limited(len(self), limit)
        self.steps = math.ceil(self.batches / accumulate)
        self.epoch = 0
        self.start = 0  # microbatches of this epoch already consumed before a resume

    def __len__(self) -> int:
        """Microbatches of a whole epoch on one rank; Lightning reads `batches` of them."""
        return self.whole * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        rows = len(self.tokens)
        order = np.arange(rows)
        if self.shuffle:
            order = permutation(rows, self.seed, "epoch", self.epoch).numpy()
        if self.order is not None:
            order = self.order(self.epoch)
        for step in range(self.start // self.accumulate, self.steps):
            step_rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            split, read = self._split(step_rows), min(self.accumulate, self.batches - step * self.accumulate)
            kept = [place for number, part in enumerate(split) if number % self.accumulate < read for place in part]
            weights = self.parts / max(float(self.loss_tokens[step_rows[kept]].sum()), 1.0), self.parts / len(kept)
            for number, part in enumerate(split[self.rank * self.accumulate :][:read]):
                if step * self.accumulate + number >= self.start:
                    numbered = self.epoch * self.steps + step
                    yield MicroBatch(tuple(step_rows[part].tolist()), *weights, step=numbered, places=tuple(part))

    def _split(self, rows: np.ndarray) -> list[list[int]]:
        """Return the places of a step's rows in parts of about equal tokens, longest first into the lightest.

        None is empty.
        """
        if self.parts == 1:
            return [list(range(len(rows)))]
        parts: list[list[int]] = [[] for _ in range(self.parts)]
        load = np.zeros(self.parts)
        for place in sorted(range(len(rows)), key=lambda place: (-self.tokens[rows[place]], rows[place])):
            lightest = min(range(self.parts), key=lambda p: (bool(parts[p]) and load[p] > 0, load[p], p))
            parts[lightest].append(place)
            load[lightest] += max(self.tokens[rows[place]], 1)
        return parts


def limited(batches: int, limit: int | float) -> int:
    """Return how many of an epoch's batches Lightning reads under `limit_train_batches`: a number, or a fraction."""
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


class Loader:
    """A DataLoader that Lightning iterates as it is.

    To a DataLoader it would give a sampler of its own (use_distributed_sampler, overfit_batches, prediction), which
    knows nothing of planned steps and of the parts that the ranks have already.
    """

    def __init__(self, dataset: Dataset[Any], sampler: Sampler[Any] | None = None, workers: int = 0) -> None:
        # its own generator: a loader draws a seed at every start, which must not change the random state of training
        self.loader: DataLoader[Any] = DataLoader(
            dataset, sampler=sampler, batch_size=None, num_workers=workers, generator=generator("loader")
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)


class PlannedLoader(Loader):
    """A loader over a :class:`StepPlan` that knows how many batches the training loop has taken.

    Each pass over it is one epoch further. Lightning saves and restores it through `state_dict`, which makes a
    resume continue with the next row. It counts epochs itself, because Lightning's counter lags by one when a
    checkpoint was written after the last batch of an epoch.

    Args:
        prepare: called on each batch in a thread while the one before it is trained on, see :func:`prefetched`; a batch
            counts as taken when the training loop has it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        plan: StepPlan,
        workers: int = 0,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(dataset, plan, workers)
        self.plan, self.prepare = plan, prepare
        self.taken = 0
        self.began = False

    def __iter__(self) -> Iterator[Any]:
        if self.began:
            self.plan.epoch, self.plan.start = self.plan.epoch + 1, 0
        self.began = True
        self.taken = self.plan.start
        batches = super().__iter__()
        for batch in batches if self.prepare is None else prefetched(batches, self.prepare):
            self.taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the microbatches taken from it."""
        return {"epoch": self.plan.epoch, "taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the microbatches that were taken before the checkpoint."""
        finished = state["taken"] >= self.plan.batches
        self.plan.epoch = state["epoch"] + finished
        self.plan.start = 0 if finished else state["taken"]
        self.began = False
