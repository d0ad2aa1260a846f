"""The formulas against the numbers in the tests of NeMo-RL, torchtune and verl.

Only numbers are carried over. Left out: what torchtune's loss/test_ppo_loss.py expects of a low and of an unclipped ratio
(+0.8 and +e^0.1 under rtol=1e6; the loss gives -1/e and -e^0.1), and whatever we do not have (dual clip, CISPO,
importance weights, gaps inside a response).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_lightning.ops.advantages import gae, rloo, whiten
from rlhf_lightning.ops.kl import KLEstimator, kl_estimate, token_rewards
from rlhf_lightning.ops.logprobs import token_logprobs
from rlhf_lightning.ops.losses import ppo_policy_loss, ppo_value_loss, preference_loss


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def filled(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


# ---- returns and advantages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "advantages", "returns"),
    [
        # torchtune test_rewards.py, test_estimate_returns: gamma^3 lam^2, gamma^2 lam, gamma, 1
        ((0, 0, 0, 1), (0, 0, 0, 1), 0.9, 0.95, (0.6579225, 0.7695, 0.9, 0.0), (0.6579225, 0.7695, 0.9, 1.0)),
        # NeMo-RL test_ppo.py, test_gae_gamma_lambda_zero: TD errors
        ((0, 0, 5), (1, 2, 3), 1.0, 0.0, (1, 1, 2), (2, 3, 5)),
        # NeMo-RL test_ppo.py, test_gae_basic_computation: the return minus the value
        ((0, 0, 0, 1), (0.5, 0.5, 0.5, 0.5), 1.0, 1.0, (0.5, 0.5, 0.5, 0.5), (1, 1, 1, 1)),
    ],
    ids=["torchtune", "nemo lambda 0", "nemo lambda 1"],
)
def test_gae(
    rewards: tuple[float, ...],
    values: tuple[float, ...],
    gamma: float,
    lam: float,
    advantages: tuple[float, ...],
    returns: tuple[float, ...],
) -> None:
    found = gae(row(*rewards), row(*values), filled(1, len(rewards)), gamma, lam)
    assert_close(found[0], row(*advantages))
    assert_close(found[1], row(*returns))


def test_gae_ignores_what_is_masked() -> None:
    """verl test_core_algos_on_cpu.py: rewards and values of its two turns, joined, and its padding."""
    rewards = row(0.1, 0.1, 0.1, 0.1, 1.0, 0.0, 0.0)
    mask = torch.tensor([[True] * 5 + [False] * 2])
    one, other = (gae(rewards, row(4, 5, 6, 7, 9, *padding), mask, 0.7, 0.4) for padding in ((0.0, 0.0), (-88.0, 93.0)))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    # verl draws gamma and lambda at random and publishes no result; for 1 and 1 it is the sum of rewards to come
    assert_close(gae(rewards, row(4, 5, 6, 7, 9, 0, 0), mask, 1.0, 1.0)[1], row(1.4, 1.3, 1.2, 1.1, 1.0, 0, 0))


@pytest.mark.parametrize(
    ("scores", "baselines"),
    [
        ([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[2.5, 2.0, 1.5], [5.5, 5.0, 4.5]]),
        ([[1e-8, 2e-8, 3e-8], [1e8, 2e8, 3e8]], [[2.5e-8, 2e-8, 1.5e-8], [2.5e8, 2e8, 1.5e8]]),
        ([[1.0, 2.0]], [[2.0, 1.0]]),
    ],
)
def test_leave_one_out_baselines(scores: list[list[float]], baselines: list[list[float]]) -> None:
    """NeMo-RL test_utils.py, test_calculate_baseline_and_std_per_prompt_*: the baseline is the mean of the others."""
    given = torch.tensor(scores, dtype=torch.float64)
    assert_close(given - rloo(given), torch.tensor(baselines, dtype=torch.float64))


# ---- whitening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(shift_mean: bool) -> None:
    """torchtune test_rewards.py, TestMaskedVar: mean 2 and variance 1 of the masked values."""
    values, mask = row(1, 2, 3, 4, 5), torch.tensor([[True, True, True, False, False]])
    theirs = row(-1, 0, 1, 0, 0)
    # on purpose: torchtune divides the squares by n - 1 = 2, we by n = 3 as the original RLHF code does; and what
    # torchtune calls shift_mean=True keeps the mean
    expected = theirs * math.sqrt(3 / 2) + (0 if shift_mean else row(2, 2, 2, 0, 0))
    assert_close(whiten(values, mask, shift_mean), expected, atol=1e-7, rtol=1e-7)


# ---- KL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("k1", (-1.0, 14.0, 29.0)), ("k2", (0.5, 98.0, 420.5)), ("k3", (math.e - 2, 13.0, 28.0))],
)
def test_kl_estimators(kind: KLEstimator, expected: tuple[float, ...]) -> None:
    """NeMo-RL test_loss_functions.py, test_calculate_kl, unclamped; its 0.7183 is e - 2, its 13 and 28 are rounded."""
    found = kl_estimate(row(-1, -1, -1), row(0, -15, -30), kind)
    assert_close(found, row(*expected), atol=1e-6, rtol=1e-6)


def test_kl_in_the_loss() -> None:
    """NeMo-RL test_loss_functions.py, test_clipped_pg_loss_kl_penalty: 0.368, 0, 0.718, and 0.0362 for beta 0.1."""
    kl = kl_estimate(row(0, -1, -2), row(-1, -1, -1), "k3")
    assert_close(kl, row(0.368, 0.0, 0.718), atol=5e-4, rtol=0)
    assert (0.1 * kl.mean()).item() == pytest.approx(0.0362, abs=5e-5)


def test_kl_gradient_in_the_loss() -> None:
    """NeMo-RL test_loss_functions.py, test_calculate_kl_detaches_*: k3 0.7182818 and gradient -1."""
    logprobs = row(-1.0).requires_grad_()
    kl = kl_estimate(logprobs, row(0.0), "k3")
    assert kl.item() == pytest.approx(0.7182818, abs=1e-6)
    (gradient,) = torch.autograd.grad(kl.sum(), logprobs)
    # NeMo-RL adds the score term KL = e - 2 and gets -1; without that term, as in TRL and here, it is 1 - e
    assert gradient.item() + kl.item() == pytest.approx(-1.0)


def test_kl_in_the_reward() -> None:
    """torchtune test_rewards.py, test_get_rewards_ppo."""
    logprobs = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.6, 0.7, 0.8]])
    reference = torch.tensor([[0.2, 0.3, 0.4], [0.6, 0.7, 0.8], [0.9, 1.0, 1.1]])
    kl = kl_estimate(logprobs, reference, "k1")
    assert_close(kl, torch.tensor([[-0.1] * 3, [-0.2] * 3, [-0.3] * 3]))
    expected = torch.tensor([[0.05, 0.05, 1.05], [0.1, 0.1, 2.1], [0.15, 0.15, 3.15]])
    assert_close(token_rewards(torch.tensor([1.0, 2.0, 3.0]), kl, filled(3, 3), 0.5), expected)


# ---- PPO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprobs", "old", "advantages", "losses", "mean"),
    [
        # NeMo-RL test_loss_functions.py, test_clipped_pg_loss_ppo_clipping: ratios 0.5, 1 and 1.5
        ((-1.69315, -1.0, -0.59453), (-1, -1, -1), (1, -1, 2), (-0.5, 1.0, -2.4), -0.6333),
        # the same file, test_clipped_pg_loss_dual_clip before the dual clip, which we do not have: ratios 0.5, 1 and 10
        ((-1.69315, -1.0, -0.69741), (-1, -1, -3), (1, -1, -4), (-0.5, 1.0, 40.0), 13.5),
        # torchtune loss/test_ppo_loss.py, test_policy_loss_clipped_for_high_logprobs: ratio e
        ((1.5, 1.8, 2.2), (0.5, 0.8, 1.2), (1, 1, 1), (-1.2, -1.2, -1.2), -1.2),
    ],
    ids=["nemo", "nemo without dual clip", "torchtune"],
)
def test_ppo_clipping(
    logprobs: tuple[float, ...],
    old: tuple[float, ...],
    advantages: tuple[float, ...],
    losses: tuple[float, ...],
    mean: float,
) -> None:
    found, _ = ppo_policy_loss(row(*logprobs), row(*old), row(*advantages))
    assert_close(found, row(*losses), atol=1e-4, rtol=1e-4)  # the published log-probabilities have five digits
    assert found.mean().item() == pytest.approx(mean, abs=1e-4, rel=1e-4)


LOGPROBS = row(-1.6, -0.8, -1.1, -0.7, -1.4)
OLD = row(-1.0, -1.1, -0.8, -0.9, -1.0)
ADVANTAGES = row(1.2, -0.7, 0.4, -1.1, 0.6)


@pytest.mark.parametrize(
    ("old", "expected", "gradient"),
    [
        (
            OLD,
            0.18627018364195694,
            (
                -0.13171479239913675,
                0.18898023268267997,
                -0.05926545753600652,
                0.26870860625782017,
                -0.08043840536339991,
            ),
        ),
        (
            LOGPROBS,
            -0.07999999984,
            (-0.23999999952, 0.13999999972, -0.07999999984, 0.21999999956000002, -0.11999999976),
        ),
    ],
    ids=["ppo_token", "force_on_policy"],
)
def test_ppo_loss_and_gradient(old: Tensor, expected: float, gradient: tuple[float, ...]) -> None:
    """NeMo-RL data/clipped_pg_loss_goldens.json: the five counted tokens of its two rows, in float64."""
    logprobs = LOGPROBS.clone().requires_grad_()
    losses, _ = ppo_policy_loss(logprobs, old, ADVANTAGES)
    loss = losses.sum() / (5 + 1e-8)  # NeMo-RL adds 1e-8 to the count, and its files show it in the ninth digit
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert_close(torch.autograd.grad(loss, logprobs)[0], row(*gradient), atol=1e-12, rtol=1e-12)


def test_value_loss_orderings() -> None:
    """No peer publishes a number, only orderings: torchtune loss/test_ppo_loss.py and NeMo-RL test_ppo.py."""
    returns, close, far = row(1, 1, 1), row(0.9, 1.0, 1.1), row(0.5, 1.5, 2.0)
    assert ppo_value_loss(close, close, returns)[0].mean() < ppo_value_loss(far, close, returns)[0].mean()
    assert ppo_value_loss(far, close, returns)[0].mean() >= ppo_value_loss(far, close, returns, None)[0].mean()
    assert not ppo_value_loss(returns, returns, returns)[0].any()
    assert ppo_value_loss(returns, returns, row(0, 0, 0), None)[0].mean() > 0


# ---- log-likelihood and preferences --------------------------------------------------------------------------------


@pytest.mark.parametrize(("place", "loss"), [(0, 0.0), (1, 999.0)])
def test_log_likelihood(place: int, loss: float) -> None:
    """NeMo-RL test_loss_functions.py, test_nll_loss: logits of 999 on the right and on a wrong token."""
    targets = torch.tensor([1, 2])
    logits = torch.zeros(2, 8)
    logits[torch.arange(2), targets - place] = 999.0
    assert -token_logprobs(logits, lambda x: x, targets)[0].mean().item() == loss


CHOSEN, REJECTED = row(-0.5, -10.0, -1.0), row(-0.1, -30.0, -21.0)
REF_CHOSEN, REF_REJECTED = row(-0.5, -10.1, -0.1), row(-0.1, -20.1, -0.1)


def test_dpo() -> None:
    """torchtune loss/test_dpo_loss.py, test_dpo_loss: differences of log-ratios 0, 10 and 20, beta 0.1."""
    difference = (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)
    assert_close(difference, row(0, 10, 20))
    expected = row(*(math.log1p(math.exp(-x)) for x in (0, 1, 2)))
    assert_close(preference_loss(difference, 0.1), expected)
    assert_close(expected, row(0.693147, 0.313262, 0.126928), atol=1e-6, rtol=0)


def test_simpo() -> None:
    """torchtune loss/test_dpo_loss.py, test_simpo_loss: beta 2, gamma 0.5, exponents -1.3, 39.5 and 39.5."""
    found = preference_loss(CHOSEN - REJECTED, 2.0, "simpo", target_margin=0.5)
    assert_close(found, row(*(math.log1p(math.exp(-x)) for x in (-1.3, 39.5, 39.5))))


def test_dpo_of_equal_responses_with_an_sft_term() -> None:
    """NeMo-RL test_loss_functions.py, test_dpo_loss: log 2, and 0.5 * 2 tokens * log 16 more for uniform logits."""
    logprobs, _ = token_logprobs(torch.zeros(2, 16), lambda x: x, torch.tensor([2, 3]))
    preference = preference_loss(logprobs.sum() - logprobs.sum(), 0.1)
    assert preference.item() == pytest.approx(-math.log(1 / (1 + math.exp(0))))
    assert (preference - 0.5 * logprobs.sum()).item() == pytest.approx(math.log(2) + 0.5 * 2 * math.log(16))
