"""Preference and PPO losses against hand values and against the papers' formulas in plain Python."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_lightning.ops.losses import (
    PREFERENCE_LOSSES,
    ppo_policy_loss,
    ppo_value_loss,
    preference_loss,
    response_weights,
)

finite = st.floats(-20, 20, allow_nan=False)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    """Return log(1 + e^x), which is -log sigma(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def assert_equal(found: Tensor, expected: list[float], atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, f64(*expected), rtol=1e-12, atol=atol)


# ---- preferences --------------------------------------------------------------------------------


def test_dpo_published_values() -> None:
    """The inputs of torchtune's test_dpo_loss."""
    assert_equal(preference_loss(f64(0, 10, 20), beta=0.1), [0.693147, 0.313262, 0.126928], atol=5e-7)


def test_ipo_published_values() -> None:
    assert_equal(preference_loss(f64(0, 10, 20), beta=0.1, kind="ipo"), [25.0, 25.0, 225.0])


@settings(max_examples=60, deadline=None)
@given(finite, st.floats(0.01, 3), st.floats(0, 0.45), st.floats(0, 1), st.floats(0, 2))
def test_every_kind_equals_its_formula(h: float, beta: float, eps: float, label: float, gamma: float) -> None:
    win, lose = softplus(-beta * h), softplus(beta * h)
    mixed = label * (1 - eps) + (1 - label) * eps
    robust = ((1 - eps) * win - eps * lose) / (1 - 2 * eps)
    swapped = ((1 - eps) * lose - eps * win) / (1 - 2 * eps)
    logits, p = f64(h), f64(label)
    for found, expected in (
        (preference_loss(logits, beta, "sigmoid", p, eps), mixed * win + (1 - mixed) * lose),
        (preference_loss(logits, beta, "robust", p, eps), label * robust + (1 - label) * swapped),
        (
            preference_loss(logits, beta, "ipo", p),
            label * (h - 1 / (2 * beta)) ** 2 + (1 - label) * (h + 1 / (2 * beta)) ** 2,
        ),
        (preference_loss(logits, beta, "simpo", target_margin=gamma), softplus(gamma - beta * h)),
    ):
        torch.testing.assert_close(found, f64(expected), rtol=1e-9, atol=1e-12)


def test_dpo_gradient_is_beta_times_the_probability_of_error() -> None:
    """arXiv 2305.18290 section 4: d loss / d h = -beta sigma(-beta h)."""
    h = f64(-8, 0, 3, 40).requires_grad_()
    preference_loss(h, beta=0.5).sum().backward()
    assert h.grad is not None
    assert_equal(h.grad, [-0.5 / (1 + math.exp(0.5 * v)) for v in (-8, 0, 3, 40)])


def test_conservative_dpo_is_minimal_where_the_model_is_as_sure_as_the_labels() -> None:
    h = f64(math.log(0.9 / 0.1) / 0.2).requires_grad_()
    preference_loss(h, beta=0.2, label_smoothing=0.1).backward()
    assert h.grad is not None
    assert abs(h.grad.item()) < 1e-14


@pytest.mark.parametrize("h", [-3.0, 0.5, 7.0])
def test_robust_loss_is_unbiased_under_flipped_labels(h: float) -> None:
    """arXiv 2403.00409: over labels flipped with probability eps the mean is the loss of the clean label."""
    kept = preference_loss(f64(h), 0.3, "robust", 1.0, 0.2)
    flipped = preference_loss(f64(h), 0.3, "robust", 0.0, 0.2)
    torch.testing.assert_close(0.8 * kept + 0.2 * flipped, preference_loss(f64(h), 0.3))


def test_ipo_has_a_finite_optimum_and_dpo_does_not() -> None:
    """arXiv 2310.12036: when y1 always wins, pi(y1) = sigma(1 / (2 tau)) under IPO."""
    for tau, probability in ((0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459)):
        h = f64(1 / (2 * tau)).requires_grad_()
        preference_loss(h, tau, "ipo").backward()
        assert h.grad is not None
        assert h.grad.item() == 0.0
        assert torch.sigmoid(h).item() == pytest.approx(probability, abs=5e-7)
    h = f64(1.0, 10.0, 100.0).requires_grad_()
    preference_loss(h, 0.1).sum().backward()
    assert h.grad is not None
    assert (h.grad < 0).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(PREFERENCE_LOSSES), finite, st.floats(0.05, 2), st.floats(0, 0.4), st.floats(0, 1))
def test_swapping_the_pair_swaps_the_label(kind: str, h: float, beta: float, eps: float, label: float) -> None:
    forward = preference_loss(f64(h), beta, kind, f64(label), eps, 0.3)  # type: ignore[arg-type]
    backward = preference_loss(f64(-h), beta, kind, 1 - f64(label), eps, 0.3)  # type: ignore[arg-type]
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-12)


def test_no_pairs_and_no_overflow() -> None:
    assert preference_loss(f64(), 0.1).shape == (0,)
    assert_equal(preference_loss(f64(-1e5, 1e5), 1.0), [1e5, 0.0])


# ---- PPO ----------------------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    """Ratio e, 1/e and e^0.1 at A = 1; torchtune's test has other values for the last two (rtol 1e6)."""
    loss, clipped = ppo_policy_loss(f64(1, -1, 0.1), f64(0, 0, 0), f64(1, 1, 1))
    assert_equal(loss, [-1.2, -math.exp(-1), -math.exp(0.1)])
    assert clipped.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "slope"),
    [
        (1.5, 2.0, -2.56, True, 0.0),  # good and already likelier: held at 1 + 0.28
        (0.5, 2.0, -1.0, False, -1.0),  # good and less likely: free to grow
        (0.5, -2.0, 1.6, True, 0.0),  # bad and already less likely: held at 1 - 0.2
        (1.5, -2.0, 3.0, False, 3.0),  # bad and likelier: free to shrink
        (1.1, 2.0, -2.2, False, -2.2),
        (1.5, 0.0, 0.0, False, 0.0),
    ],
)
def test_policy_loss_in_every_quadrant(
    ratio: float, advantage: float, loss: float, clipped: bool, slope: float
) -> None:
    """With an asymmetric clip, and the gradient by log pi, which is the ratio times that by the ratio."""
    logprobs = (f64(-1.3) + math.log(ratio)).requires_grad_()
    found, active = ppo_policy_loss(logprobs, f64(-1.3), f64(advantage), clip_low=0.2, clip_high=0.28)
    found.sum().backward()
    assert logprobs.grad is not None
    assert_equal(found.detach(), [loss])
    assert_equal(logprobs.grad, [slope])
    assert active.item() is clipped


def test_first_step_has_the_policy_gradient() -> None:
    """At ratio 1 the loss is -A and its gradient by log pi is -A, unclipped."""
    advantages = f64(-2, 0.5, 3)
    logprobs = f64(-1, -2, -3).requires_grad_()
    loss, clipped = ppo_policy_loss(logprobs, logprobs.detach(), advantages)
    loss.sum().backward()
    assert logprobs.grad is not None
    assert torch.equal(loss, -advantages)
    assert torch.equal(logprobs.grad, -advantages)
    assert not clipped.any()


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped", "slope"),
    [
        (
            1.0,
            0.0,
            2.0,
            1.62,
            True,
            0.0,
        ),  # moved 1 towards the target: counted as a move of 0.2, (0.2 - 2)^2 / 2
        (1.0, 0.0, -1.0, 2.0, False, 2.0),  # moved away: the plain error is larger, the gradient stays
        (0.1, 0.0, 2.0, 1.805, False, -1.9),  # inside the clip
        (-1.0, 0.0, -3.0, 3.92, True, 0.0),
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, clipped: bool, slope: float) -> None:
    values = f64(value).requires_grad_()
    found, active = ppo_value_loss(values, f64(old), f64(target), clip=0.2)
    found.sum().backward()
    assert values.grad is not None
    assert_equal(found.detach(), [loss])
    assert_equal(values.grad, [slope])
    assert active.item() is clipped


def test_value_loss_without_clip_is_half_the_squared_error() -> None:
    loss, clipped = ppo_value_loss(f64(1, 5), f64(0, 0), f64(3, 5), clip=None)
    assert_equal(loss, [2.0, 0.0])
    assert not clipped.any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("dapo", [0.1] * 3),  # 1 / 10 tokens
        ("grpo", [1 / 6, 1 / 9, 1 / 15]),  # 1 / (3 responses x 2, 3 and 5 tokens)
        ("dr_grpo", [1 / 24] * 3),  # 1 / (3 x 8)
    ],
)
def test_weights_of_the_tokens_of_a_response(kind: Any, expected: list[float]) -> None:
    weights = response_weights(torch.tensor([2, 3, 5]), kind, tokens=10, responses=3, max_new_tokens=8)
    torch.testing.assert_close(weights, torch.tensor(expected))
