"""A CPU that counts what would wait for a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

WAITING = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "bincount"}
WAITING |= {"masked_select", "unique", "unique_consecutive", "argwhere", "repeat_interleave"}
"""Functions whose result or its size is known only when the device has computed it."""


class OnDevice(Tensor):
    """A tensor on a pretended device, as is all that is computed from it; `reads` has what would wait for a GPU."""

    reads: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        index = args[1] if name in ("__getitem__", "__setitem__") else None
        if name in WAITING or (isinstance(index, Tensor) and index.dtype == torch.bool):
            OnDevice.reads.append(name)
        return super().__torch_function__(func, types, args, kwargs or {})


def pretend(value: Any, device: Any = None) -> Any:
    """Return a tensor, or a batch with every tensor, on the pretended device."""
    if isinstance(value, Tensor):
        return value.as_subclass(OnDevice)
    return dataclasses.replace(
        value, **{k: pretend(v) for k, v in vars(value).items() if isinstance(v, Tensor) or dataclasses.is_dataclass(v)}
    )


def reads() -> list[str]:
    """Return what was read from the pretended device since the last call."""
    OnDevice.reads, found = [], OnDevice.reads
    return found
