"""PPO, RLOO, GRPO and DPO reach the known optimum of E[r] - beta KL(pi : ref) where it can be enumerated.

Responses are all 64 strings of length 3 over 4 tokens. The optimum is ref * exp(r / beta) / Z with value
beta log Z (arXiv 2305.18290 eq. 4).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf_lightning.ops.advantages import gae, grpo, rloo, whiten
from rlhf_lightning.ops.kl import kl_estimate, token_rewards
from rlhf_lightning.ops.losses import ppo_policy_loss, preference_loss

VOCABULARY, LENGTH, BETA = 4, 3, 0.5
SPACE = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=LENGTH)))  # (64, 3)
# row of the logit table that predicts each token: one row for every prefix, 1 + 4 + 16 in all
PREFIX = torch.stack([torch.zeros(len(SPACE), dtype=torch.long), 1 + SPACE[:, 0], 5 + 4 * SPACE[:, 0] + SPACE[:, 1]], 1)
ALL = torch.ones(SPACE.shape, dtype=torch.bool)


def token_table(logits: Tensor) -> Tensor:
    """Return the log-probability (64, 3) of every token of every response under a (21, 4) table."""
    return logits.log_softmax(-1)[PREFIX, SPACE]


class World:
    """A random reference and reward, and what the best policy is."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(7)
        self.start = torch.randn(21, VOCABULARY, generator=rng, dtype=torch.float64)
        self.reference = token_table(self.start)
        self.reward = torch.randn(len(SPACE), generator=rng, dtype=torch.float64)
        tilted = self.reference.sum(1) + self.reward / BETA
        self.best = tilted.softmax(0)
        self.value = BETA * tilted.logsumexp(0).item()
        tree = self.best.view(VOCABULARY, VOCABULARY, VOCABULARY)
        self.solution = torch.cat([tree.sum((1, 2))[None], tree.sum(2), tree.flatten(0, 1)]).log()

    def objective(self, logits: Tensor) -> Tensor:
        """Return E[r] - beta KL(pi : ref)."""
        logprobs = token_table(logits).sum(1)
        return (logprobs.exp() * (self.reward - BETA * (logprobs - self.reference.sum(1)))).sum()

    def distance(self, logits: Tensor) -> float:
        """Return the total variation to the optimum."""
        return 0.5 * (token_table(logits).sum(1).exp() - self.best).abs().sum().item()


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def minimize(start: Tensor, backward: Callable[[Tensor], float]) -> Tensor:
    """Run L-BFGS in float64; `backward` fills in the gradient and returns the objective."""
    logits = start.clone().requires_grad_()
    exact = {"max_iter": 500, "history_size": 50, "tolerance_grad": 1e-13, "tolerance_change": 1e-18}
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", **exact)  # type: ignore[arg-type]

    def closure() -> float:
        optimizer.zero_grad()
        return backward(logits)

    optimizer.step(closure)
    return logits.detach()


def test_optimum_by_hand() -> None:
    ref = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    reward = torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64)
    best = (ref.log() + reward).softmax(0)
    expected = torch.tensor([0.146516, 0.298703, 0.541306, 0.013475], dtype=torch.float64)
    torch.testing.assert_close(best, expected, rtol=0, atol=5e-7)
    kl = (best * kl_estimate(best.log(), ref.log(), "k1")).sum().item()
    assert kl == pytest.approx(0.363508, abs=5e-7)
    assert (best * reward).sum().item() - kl == pytest.approx(1.004332, abs=5e-7)
    for beta, value in ((0.5, 1.303189), (1.0, 1.004332), (2.0, 0.809497)):
        assert beta * (ref.log() + reward / beta).logsumexp(0).item() == pytest.approx(value, abs=5e-7)


def surrogate(world: World, logits: Tensor, kl_in: str) -> Tensor:
    """Return PPO's loss at ratio 1 over all 64 responses, weighted by their probability: a sum over tokens.

    `kl_in`: the penalty is k1 in the reward, or k2 in the loss, of the whole response or of each token alone.
    """
    logprobs = token_table(logits)
    old = logprobs.detach()
    kl = kl_estimate(old, world.reference, "k1")
    rewards = token_rewards(world.reward, kl, ALL, BETA if kl_in == "reward" else 0.0)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), ALL, 1.0, 1.0)
    loss, clipped = ppo_policy_loss(logprobs, old, advantages)
    assert not clipped.any()
    loss = loss.sum(1)
    if kl_in == "response":
        loss = loss + BETA * kl_estimate(logprobs.sum(1), world.reference.sum(1), "k2")
    elif kl_in == "token":
        loss = loss + BETA * kl_estimate(logprobs, world.reference, "k2").sum(1)
    return (old.sum(1).exp() * loss).sum()


@pytest.mark.slow
@pytest.mark.parametrize("kl_in", ["reward", "response"])
def test_ppo_with_exact_gradients(world: World, kl_in: str) -> None:
    def backward(logits: Tensor) -> float:
        surrogate(world, logits, kl_in).backward()
        return -world.objective(logits.detach()).item()

    found = minimize(world.start, backward)
    assert world.distance(found) < 1e-5
    assert world.objective(found).item() == pytest.approx(world.value, abs=1e-8)


@pytest.mark.parametrize("kl_in", ["reward", "response"])
def test_surrogate_gradient_is_that_of_the_objective(world: World, kl_in: str) -> None:
    """Everywhere, not only where both are 0."""
    logits = (world.start + torch.randn(21, VOCABULARY, dtype=torch.float64)).requires_grad_()
    (found,) = torch.autograd.grad(surrogate(world, logits, kl_in), logits)
    (expected,) = torch.autograd.grad(-world.objective(logits), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_token_level_kl_loss_does_not_stop_at_the_optimum(world: World) -> None:
    """k2 of each token alone, as GRPO has it, gives a token no credit for the KL of those that follow it."""
    logits = world.solution.clone().requires_grad_()
    for kl_in, zero in (("reward", True), ("response", True), ("token", False)):
        (gradient,) = torch.autograd.grad(surrogate(world, logits, kl_in), logits)
        norm = gradient.norm().item()
        assert norm < 1e-14 if zero else norm > 1e-2, kl_in


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_sampled_methods(world: World, method: str) -> None:
    """Two inner epochs on 1,024 samples an iteration, a tabular critic; the mean of the last iterates."""
    logits = world.start.clone().requires_grad_()
    critic = torch.zeros(21, dtype=torch.float64)
    steps, samples = 500, 1024
    optimizer = torch.optim.Adam([logits], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * steps, eta_min=1e-3)
    rng = torch.Generator().manual_seed(11)
    total, kept = torch.zeros_like(world.start), 0
    for step in range(steps):
        with torch.no_grad():
            table = token_table(logits)
            rows = torch.multinomial(table.sum(1).exp(), samples, replacement=True, generator=rng)
            old, reference, mask = table[rows], world.reference[rows], ALL[rows]
            rewards = token_rewards(world.reward[rows], kl_estimate(old, reference), mask, BETA)
            if method == "ppo":
                values = critic[PREFIX[rows]]
                advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
                advantages = whiten(advantages, mask)
                sums = torch.zeros_like(critic).index_add(0, PREFIX[rows].flatten(), returns.flatten())
                counts = torch.bincount(PREFIX[rows].flatten(), minlength=21)
                critic = torch.where(counts > 0, 0.9 * critic + 0.1 * sums / counts.clamp_min(1), critic)
            else:
                groups = rewards.sum(1).view(-1, 8 if method == "rloo" else samples)
                advantages = (rloo(groups) if method == "rloo" else grpo(groups)).flatten()[:, None].expand_as(rewards)
        for _ in range(2):
            optimizer.zero_grad()
            loss, _ = ppo_policy_loss(token_table(logits)[rows], old, advantages)
            loss.mean().backward()
            optimizer.step()
            schedule.step()
        if step >= steps * 3 // 4:
            total, kept = total + logits.detach(), kept + 1
    found = total / kept
    print(
        method,
        world.distance(found),
        world.value - world.objective(found).item(),
        world.distance(world.start),
    )
    assert world.distance(world.start) > 0.3
    # every response is worth the same at the optimum, so the noise of sampling vanishes there
    assert world.distance(found) < 2e-3


def test_dpo_on_infinite_preferences(world: World) -> None:
    """Bradley-Terry labels for all 2,016 pairs: implicit rewards beta log(pi / ref) differ as rewards do."""
    first, second = torch.combinations(torch.arange(len(SPACE))).unbind(1)
    labels = torch.sigmoid(world.reward[first] - world.reward[second])
    reference = world.reference.sum(1)

    def backward(logits: Tensor) -> float:
        ratios = token_table(logits).sum(1) - reference
        loss = preference_loss(ratios[first] - ratios[second], BETA, label=labels).mean()
        loss.backward()
        return loss.item()

    found = minimize(world.start, backward)
    implicit = BETA * (token_table(found).sum(1) - reference)
    error = (implicit - implicit[0]) - (world.reward - world.reward[0])
    assert error.abs().max().item() < 1e-6
    assert world.distance(found) < 1e-6


@pytest.mark.slow
def test_ipo_stays_finite_where_dpo_diverges() -> None:
    """The first of two responses always wins: IPO stops at sigma(1 / (2 tau)), DPO's gap keeps growing."""
    tau, gaps = 0.5, {}
    for kind in ("ipo", "sigmoid"):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=1.0 if kind == "sigmoid" else 0.1)
        gaps[kind] = []
        for step in range(1000):
            optimizer.zero_grad()
            logprobs = logits.log_softmax(0)
            preference_loss((logprobs[0] - logprobs[1])[None], tau, kind).sum().backward()  # type: ignore[arg-type]
            optimizer.step()
            if step in (249, 999):
                gaps[kind].append((logits[0] - logits[1]).item())
    assert gaps["ipo"] == pytest.approx([1 / (2 * tau)] * 2, abs=1e-12)
    assert 1 / (1 + math.exp(-gaps["ipo"][1])) == pytest.approx(0.731059, abs=5e-7)
    assert gaps["sigmoid"][1] > gaps["sigmoid"][0] + 2  # log t: no bound
