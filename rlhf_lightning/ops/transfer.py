"""Copies between the CPU and a device that wait for it as rarely as possible.

A copy from a GPU waits until it has computed everything that was asked of it, and meanwhile nothing is queued. A copy
to it waits as well, unless it is from pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def numbers(**values: Tensor | Sequence[Tensor]) -> dict[str, list[float]]:
    """Return the elements of named tensors, or of all tensors of a list, all copied from their device at once."""
    parts = {name: [value] if isinstance(value, Tensor) else value for name, value in values.items()}
    flat = [tensor.detach().flatten().double() for tensors in parts.values() for tensor in tensors]
    elements = iter(torch.cat(flat).tolist() if flat else [])
    return {name: list(islice(elements, sum(t.numel() for t in tensors))) for name, tensors in parts.items()}


def pinned(value: Any, device: torch.device | str) -> Any:
    """Return a tensor or batch in pinned memory where `device` is a GPU, which copies from it without a wait."""
    return value.pin_memory() if torch.device(device).type == "cuda" else value


def send(value: Any, device: torch.device | str) -> Any:
    """Return a tensor or batch that is on the CPU on `device`; the CPU goes on while a GPU copies it."""
    return pinned(value, device).to(device, non_blocking=torch.device(device).type == "cuda")
