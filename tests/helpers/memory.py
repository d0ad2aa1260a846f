"""The memory that a computation needs on a CPU, seen operation by operation."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Records the bytes that are alive at a time, `peak`, and those of the largest tensor, `largest`.

    Args:
        known: tensors that are there before, which do not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[int, Any]] = {}
        self.now = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return
        self.alive[key] = size, weakref.ref(storage, lambda _: self.gone(key))
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)

    def gone(self, key: int) -> None:
        size, _ = self.alive.pop(key)
        self.now -= size
