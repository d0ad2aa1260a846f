"""The ridge regression of a linear head."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_lightning.ops.regression import ridge_step

torch.manual_seed(0)
X, Y = 5 + torch.randn(40, 3) * torch.tensor([1.0, 30.0, 0.1]), torch.randn(40)


@pytest.mark.parametrize("prior", [1e-3, 7.0, 1e4])
def test_it_is_the_minimum_of_the_penalized_squares(prior: float) -> None:
    weight, bias = (found.double().requires_grad_() for found in ridge_step(X, Y, prior))
    x, y = X.double(), Y.double()
    scale = x.var(0, correction=0).mean()
    loss = ((x @ weight + bias - y) ** 2).sum() + prior * scale * (weight**2).sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-2  # float32 results; the gradient at 0 is above 50


def test_parts_of_many_observations_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ridge_step(X, Y, 7.0)
    monkeypatch.setattr("rlhf_lightning.ops.regression.CHUNK", 16)
    for found, expected in zip(ridge_step(X, Y, 7.0), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_without_a_prior_it_is_least_squares() -> None:
    weight, bias = ridge_step(X, Y, 1e-9)
    rows = torch.cat([X, torch.ones(40, 1)], 1).double()
    expected = torch.linalg.lstsq(rows, Y.double()[:, None]).solution[:, 0]
    torch.testing.assert_close(torch.cat([weight, bias[None]]).double(), expected, atol=1e-5, rtol=1e-4)


def test_ranks_count_together() -> None:
    """Ranks with 30, 10 and no observations find what one rank with all finds."""
    parts, sums = [slice(0, 30), slice(30, 40), slice(40, 40)], []
    whole = ridge_step(X, Y, 7.0, lambda part: sums.append(part) or part)
    for part in parts:
        each = iter(sums)
        found_here = ridge_step(X[part], Y[part], 7.0, lambda _, each=each: next(each))  # type: ignore[misc]
        for found, expected in zip(found_here, whole, strict=True):
            assert torch.equal(found, expected)
    added = [torch.zeros_like(total) for total in sums[:3]]
    for part in parts:
        own: list[Tensor] = []
        ridge_step(X[part], Y[part], 7.0, lambda partial, own=own: own.append(partial) or partial)  # type: ignore[misc]
        added = [total + value for total, value in zip(added, own, strict=False)]
    for total, value in zip(sums, added, strict=False):  # what is reduced are sums: count, states and residuals
        torch.testing.assert_close(total, value)


def test_equal_states_explain_nothing() -> None:
    weight, bias = ridge_step(torch.ones(5, 3), torch.arange(5.0), 1.0)
    assert torch.equal(weight, torch.zeros(3))
    assert bias == 2.0
