"""KL estimators as averages and as losses, the reward with its penalty, the controller, and best-of-n."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.ops.kl import KLController, KLEstimator, best_of_n_kl, kl_estimate, token_rewards

Q, P = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "mean", "variance"),
    [("k1", 0.193794, 0.310154), ("k2", 0.173855, 0.015558), ("k3", 0.193794, 0.038289)],
)
def test_means_and_variances_over_all_outcomes(kind: KLEstimator, mean: float, variance: float) -> None:
    estimates = kl_estimate(Q.log(), P.log(), kind)
    found = (Q * estimates).sum()
    assert found.item() == pytest.approx(mean, abs=5e-7)
    assert (Q * (estimates - found) ** 2).sum().item() == pytest.approx(variance, abs=5e-7)


@pytest.mark.parametrize(
    ("mu", "kind", "bias", "spread"),
    [
        (0.1, "k1", 0.0, 20.0), (0.1, "k2", 0.0025, 1.4177), (0.1, "k3", 0.0, 1.4166),
        (1.0, "k1", 0.0, 2.0), (1.0, "k2", 0.25, 1.7321), (1.0, "k3", 0.0, 1.695),
    ],
)  # fmt: skip
def test_schulmans_table(mu: float, kind: KLEstimator, bias: float, spread: float) -> None:
    """q = N(0, 1), p = N(mu, 1), on a grid: bias and standard deviation over the true KL mu^2 / 2."""
    x = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    estimates = kl_estimate(-(x**2) / 2, -((x - mu) ** 2) / 2, kind)
    true, mean = mu**2 / 2, (density * estimates).sum().item()
    std = math.sqrt((density * (estimates - mean) ** 2).sum().item())
    assert mean / true - 1 == pytest.approx(bias, abs=1e-8)
    assert std / true == pytest.approx(spread, abs=6e-5)


@pytest.mark.parametrize(("kind", "direction"), [("k1", "none"), ("k2", "forward"), ("k3", "backward")])
def test_gradient_of_each_estimator_as_a_loss(kind: KLEstimator, direction: str) -> None:
    """On samples of pi: k1 gives nothing, k2 the gradient of KL(pi : ref), k3 that of KL(ref : pi)."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([-0.2, 0.5, 0.0, 1.0, -1.5], dtype=torch.float64), 0)
    logprobs = torch.log_softmax(logits, 0)
    targets: dict[str, Tensor] = {
        "none": 0 * logits.sum(),
        "forward": (logprobs.exp() * (logprobs - ref)).sum(),
        "backward": (ref.exp() * (ref - logprobs)).sum(),
    }
    loss = (logprobs.detach().exp() * kl_estimate(logprobs, ref, kind)).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(targets[direction], logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@given(st.floats(-30, 30), st.floats(-30, 30))
def test_k2_and_k3_are_never_negative(a: float, b: float) -> None:
    logprobs, ref = torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64)
    assert kl_estimate(logprobs, ref, "k2").item() >= 0
    assert kl_estimate(logprobs, ref, "k3").item() >= 0
    assert kl_estimate(logprobs, ref, "k1").item() == a - b
    assert kl_estimate(logprobs, logprobs, "k3").item() == 0


def test_k3_keeps_its_digits_near_zero() -> None:
    """exp(-x) - 1 + x is x^2 / 2 for small x, below what float32 holds when 1 is subtracted last."""
    x = torch.tensor([1e-3])
    torch.testing.assert_close(kl_estimate(x, torch.zeros(1), "k3"), torch.tensor([4.998e-7]), rtol=1e-3, atol=0)


def test_unknown_estimator() -> None:
    with pytest.raises(ValueError, match="'k4' is not one of: k1, k2, k3"):
        kl_estimate(Q, P, "k4")  # type: ignore[arg-type]


def test_reward_is_the_penalty_everywhere_and_the_score_at_the_end() -> None:
    kl = torch.tensor([[1.0, 2.0, 4.0], [8.0, -2.0, 99.0], [3.0, 99.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])
    rewards = token_rewards(torch.tensor([10.0, 20.0, -1.0]), kl, mask, 0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.0], [-4.0, 21.0, 0.0], [-2.5, 0.0, 0.0]]
    # what the sum over a response estimates: score - beta KL
    assert rewards.sum(1).tolist() == [10 - 0.5 * 7, 20 - 0.5 * 6, -1 - 0.5 * 3]


def test_reward_does_not_change_its_arguments() -> None:
    kl, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    token_rewards(torch.ones(1), kl, mask, 1.0)
    assert kl.tolist() == [[1.0, 1.0]]


def test_fixed_weight_stays() -> None:
    controller = KLController(0.05)
    controller.update(100.0, 512)
    assert controller.beta == 0.05


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(6.0, 1.0), (6.6, 1.00512), (5.4, 0.99488), (60.0, 1.01024), (0.0, 0.98976), (-3.0, 0.98976)],
)
def test_adaptive_weight_moves_by_the_clipped_relative_error(kl: float, factor: float) -> None:
    """Ziegler's settings: target 6, horizon 10,000; 512 responses move beta by at most 0.2 * 512 / 10,000."""
    controller = KLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl, 512)
    assert controller.beta == pytest.approx(0.15 * factor, rel=1e-12)


@pytest.mark.parametrize("responses", [8, 512])
@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (60.0, 1.02), (0.0, 0.98)])
def test_without_a_horizon_the_weight_moves_at_any_batch_size(kl: float, factor: float, responses: int) -> None:
    """The paper's K = 0.1: eight responses of ten thousand would move beta by 0.016% an iteration, which is nothing."""
    controller = KLController(0.15, target=6.0)
    controller.update(kl, responses)
    assert controller.beta == pytest.approx(0.15 * factor, rel=1e-12)


def test_adaptive_weight_stays_positive_when_an_iteration_is_longer_than_the_horizon() -> None:
    controller = KLController(1.0, target=6.0, horizon=10)
    controller.update(0.0, 512)
    assert controller.beta == pytest.approx(0.8)


def test_adaptive_weight_ignores_a_kl_that_is_not_a_number() -> None:
    controller = KLController(0.15, target=6.0)
    controller.update(math.nan, 512)
    controller.update(math.inf, 512)
    assert controller.beta == 0.15


def test_adaptive_weight_settles_at_the_target() -> None:
    """With KL = 1 / beta the weight must find beta = 1 / target from both sides."""
    for start in (0.02, 5.0):
        controller = KLController(start, target=4.0)
        for _ in range(3000):
            controller.update(1 / controller.beta, 256)
        assert controller.beta == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize(
    ("n", "bound"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (64, 3.174508), (128, 3.859843)]
)
def test_best_of_n_bound(n: int, bound: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(bound, abs=5e-7)


@pytest.mark.parametrize(
    ("outcomes", "n", "exact"),
    [(10, 2, 0.189318), (10, 4, 0.628825), (10, 16, 1.733063), (10, 64, 2.293451), (1000, 64, 3.174337)],
)
def test_best_of_n_bound_lies_above_the_exact_kl(outcomes: int, n: int, exact: float) -> None:
    """Uniform reference, distinct rewards: outcome i is best with probability (i / K)^n - ((i - 1) / K)^n."""
    chances = [(i / outcomes) ** n - ((i - 1) / outcomes) ** n for i in range(1, outcomes + 1)]
    found = math.fsum(p * math.log(p * outcomes) for p in chances if p > 0)
    assert found == pytest.approx(exact, abs=5e-7)
    assert found < best_of_n_kl(n)
