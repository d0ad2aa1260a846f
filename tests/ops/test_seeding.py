"""Seeds depend on every part and its place, and never change between versions."""

from __future__ import annotations

import torch

from rlhf_lightning.ops.seeding import derive_seed, generator, normal, permutation, uniform


def test_seed_is_stable() -> None:
    """sha256 of 'int:0 US str:ppo US int:3', first eight bytes halved: a change breaks every resumed run."""
    assert derive_seed(0, "ppo", 3) == 7_954_665_639_949_636_428
    assert 0 <= derive_seed() < 2**63


def test_seed_tells_parts_apart() -> None:
    parts = [(1, 2), (2, 1), (12,), ("1", 2), ("12",), (1, 2, 0), ("a", "b"), ("ab",), ("b", "a")]
    assert len({derive_seed(*p) for p in parts}) == len(parts)


def test_generator_draws_the_same_whatever_the_global_state() -> None:
    first = torch.rand(3, generator=generator(0, "x"))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(3, generator=generator(0, "x")), first)
    assert not torch.equal(torch.rand(3, generator=generator(1, "x")), first)


def test_draws_are_made_on_the_cpu_whatever_the_default_device_is() -> None:
    """Lightning builds a model with the accelerator as default device, which no CPU generator fills."""
    for draw in (normal, uniform, permutation):
        expected = draw(5, 0, "x")
        with torch.device("meta"):
            assert torch.equal(draw(5, 0, "x"), expected)
