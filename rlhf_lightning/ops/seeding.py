"""Counter-based randomness: every draw is a function of named parts, so there is no state to lose.

Draws are made on the CPU, whatever the default device is (Lightning's is the accelerator while a model is built), so
that they are the same on every device.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on all `parts` and their order, stable across processes."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by :func:`derive_seed` of `parts`."""
    return torch.Generator("cpu").manual_seed(derive_seed(*parts))


def permutation(size: int, *parts: int | str) -> torch.Tensor:
    """Return a permutation (size,) that `parts` decide."""
    return torch.randperm(size, generator=generator(*parts), device="cpu")


def uniform(size: int, *parts: int | str) -> torch.Tensor:
    """Return draws (size,) from [0, 1) that `parts` decide."""
    return torch.rand(size, generator=generator(*parts), device="cpu")


def normal(size: int, *parts: int | str) -> torch.Tensor:
    """Return draws (size,) from N(0, 1) that `parts` decide."""
    return torch.randn(size, generator=generator(*parts), device="cpu")
