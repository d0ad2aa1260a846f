"""Preparing the next batch while the device computes this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def prefetched(batches: Iterator[Any], prepare: Callable[[Any], Any]) -> Iterator[Any]:
    """Yield `prepare(batch)` of every batch, in their order; a thread is one batch ahead.

    An error is raised in place of its batch. Closing the iterator waits for the batch in preparation.
    """
    end = object()

    def take() -> Any:
        batch = next(batches, end)
        return batch if batch is end else prepare(batch)

    with ThreadPoolExecutor(1, "prefetch") as thread:
        coming = thread.submit(take)
        while (batch := coming.result()) is not end:
            coming = thread.submit(take)
            yield batch
