"""Who labels what next: a share of the items by everyone, the others by a few, and check questions in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.feedback.labeling.history import History
from rlhf_lightning.feedback.labeling.items import Item
from rlhf_lightning.ops.seeding import derive_seed, permutation

LEASE = 30 * 60.0
"""Seconds for which an item that an annotator looks at is given to nobody else."""


class Tasks:
    """Gives every annotator the next item.

    An item is needed from `annotators_per_item` annotators, or from all of them when it is in the overlap. Each
    annotator has an order of their own, which the seed decides; an item on another's screen counts as labeled until
    the lease ends.

    Args:
        items: to label, by key.
        checks: check questions, by key.
        annotators: their names.
        overlap: share of the items that every annotator labels.
        check_share: share of the tasks that are check questions, as long as there are new ones.
        clock: seconds, for leases.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        annotators: Sequence[str],
        history: History,
        *,
        checks: Mapping[str, Item] | None = None,
        overlap: float = 0.0,
        annotators_per_item: int = 1,
        check_share: float = 0.1,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_number("label.overlap", overlap, "[0, 1]")
        check_number("label.check_share", check_share, "[0, 1]")
        check_number("label.annotators_per_item", annotators_per_item, "[1, inf)", whole=True)
        if annotators_per_item > len(annotators):
            raise UserError(
                f"label.annotators_per_item={annotators_per_item}, but label.annotators names {len(annotators)}"
            )
        self.items, self.checks, self.annotators, self.history = dict(items), dict(checks or {}), annotators, history
        self.per_item, self.check_share, self.seed, self.clock = annotators_per_item, check_share, seed, clock
        self.leases: dict[str, tuple[str, float]] = {}  # annotator -> item, until
        self.orders: dict[str, list[str]] = {}
        shared = permutation(len(self.items), seed, "overlap").tolist()[: round(overlap * len(self.items))]
        self.overlap = {self._keys[place] for place in shared}

    @cached_property
    def _keys(self) -> list[str]:
        return list(self.items)

    def needed(self, key: str) -> int:
        """Return from how many annotators an item needs a label."""
        return len(self.annotators) if key in self.overlap else self.per_item

    def next(self, annotator: str) -> Item | None:
        """Return the annotator's next item and lease it; None where nothing is left, or others are at what is left."""
        now = self.clock()
        self.leases = {name: lease for name, lease in self.leases.items() if lease[1] > now}
        done = self.history.annotators[annotator].done
        held, _ = self.leases.pop(annotator, ("", 0.0))
        if held and held not in done and (held in self.items or held in self.checks):
            key = held
        else:
            others = [key for key, _ in self.leases.values()]
            free = (key for key in self._order(annotator) if self._open(key, annotator, done, others))
            key = self._check(annotator, done) or next(free, None)
        if key is None:
            return None
        self.leases[annotator] = key, now + LEASE
        return self.items.get(key) or self.checks[key]

    def hold(self, annotator: str, key: str) -> None:
        """Lease an item to an annotator who goes back to it."""
        if key in self.items or key in self.checks:
            self.leases[annotator] = key, self.clock() + LEASE

    def left(self, annotator: str) -> int:
        """Return how many items the annotator may still get, those on others' screens included."""
        done = self.history.annotators[annotator].done
        return sum(self._open(key, annotator, done, ()) for key in self.items)

    def labels_left(self) -> int:
        """Return how many labels the items still need; check questions are not counted."""
        return sum(max(0, self.needed(key) - len(self.history.labeled_by[key])) for key in self.items)

    def _open(self, key: str, annotator: str, done: set[str], others: Sequence[str]) -> bool:
        if key in done:
            return False
        labeled = len(self.history.labeled_by[key] - {annotator})
        return labeled + others.count(key) < self.needed(key)

    def _check(self, annotator: str, done: set[str]) -> str | None:
        """Return the check question that is this annotator's next task, if it is one."""
        new = [key for key in self._order(annotator, "checks") if key not in done]
        if not new:
            return None
        task = derive_seed(self.seed, "check", annotator, len(done)) / 2**63
        return new[0] if task < self.check_share else None

    def _order(self, annotator: str, what: str = "items") -> list[str]:
        """Return the keys in this annotator's order: the overlap is spread over it like everything else."""
        name = f"{what}/{annotator}"
        if name not in self.orders:
            keys = self._keys if what == "items" else list(self.checks)
            self.orders[name] = [keys[i] for i in permutation(len(keys), self.seed, what, annotator).tolist()]
        return self.orders[name]
