"""What one update of PPO computes: the loss of a token, its gradient, and which prompts a minibatch holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lightning.ops.seeding import permutation
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Prompts, attached, build, fit, two_responses


@quiet_lightning
def test_whitened_rewards_keep_their_mean() -> None:
    module = attached(kl_beta=0.5, lam=1.0, whiten_rewards=True, whiten_advantages=False, missing_eos_penalty=3.0)
    rollout = two_responses(module)
    rollout.tokens["values"] = torch.zeros(2, 3)
    module.rewards(rollout)
    module.advantages(rollout)
    # -0.5 kl, and the score (less 3 for the second, which did not end) with the last token of each response
    rewards = torch.tensor([-0.5, 1.25, 0.0, -1.0, -5.0])  # lambda 1 and no values make the returns their sums
    a, b, c, d, e = ((rewards - rewards.mean()) / rewards.std(correction=0) + rewards.mean()).tolist()
    expected = torch.tensor([[a + b, b, 0.0], [c + d + e, d + e, e]])
    torch.testing.assert_close(rollout.tokens["returns"], expected)


@quiet_lightning
def test_loss_of_a_token_by_hand() -> None:
    """At ratio 1 the policy's part is -A; the new values are 0 and may leave the rollout's by `value_clip` only."""
    module = attached(vf_coef=0.5, entropy_coef=0.25, kl_beta=0.1, kl_in="loss", kl_estimator="k2")
    rollout = two_responses(module)
    ((cells, batch, _),) = rollout.microbatches([0])
    with torch.no_grad():
        output = module.policy(batch, entropy=True)
    rollout.tokens["old_logprobs"][rollout.mask] = output.logprobs
    rollout.tokens["ref_logprobs"] = rollout.tokens["old_logprobs"] - 2.0
    rollout.tokens["advantages"] = torch.tensor([[1.0, -2.0, 0.0], [3.0, 0.5, 0.0]])
    rollout.tokens["returns"] = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0]])
    rollout.value_clip = 0.2
    terms, logprobs, old = module.token_losses(rollout, cells, batch)
    # values 0.5, 0.25 and 0, 1, -1: clipped they are 0.3, 0.05 and 0, 0.8, -0.8
    value = torch.tensor([1.0, 0.05**2, 1.0, 1.0, 0.8**2]) / 2
    assert torch.equal(logprobs, old)
    torch.testing.assert_close(terms["value/loss"], value)
    expected = -torch.tensor([1.0, -2.0, 3.0, 0.5, 0.0]) + 0.5 * value - 0.25 * output.entropy + 0.1 * 2.0
    torch.testing.assert_close(terms["loss"], expected)


@quiet_lightning
def test_every_update_starts_without_a_gradient() -> None:
    """Weights that do not move give every update of the same rollout the same gradient."""
    options = {"lr": 0.0, "critic_lr": 0.0, "max_grad_norm": 1e9}
    once, thrice = (fit(build(ppo_epochs=n, **options), Prompts(1)).rows[0] for n in (1, 3))
    assert thrice["optim/grad_norm"] == pytest.approx(once["optim/grad_norm"], rel=1e-4)


@quiet_lightning
def test_a_pass_sees_every_prompt_once() -> None:
    module, seen = build(ppo_epochs=2, num_minibatches=3), []
    update = module.minibatch

    def watched(rollout: Any, chosen: list[int], *rest: Any, **options: Any) -> Any:
        seen.append(chosen)
        return update(rollout, chosen, *rest, **options)

    module.minibatch = watched
    fit(module, Prompts(1))
    first, second = ([prompt for part in half for prompt in part] for half in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(16))
    assert first != second


@quiet_lightning
@pytest.mark.parametrize("ranks", [[[0, 1, 2, 3, 4, 5, 6]], [[5, 0, 3], [1, 6, 4, 2]], [[6], [2, 0], [1, 3, 4, 5]]])
def test_minibatches_are_those_of_one_device(ranks: list[list[int]]) -> None:
    """Whichever rank has a prompt: together they have the minibatches of one device, in its order."""
    module, seen = attached(num_generations=1), []
    for places in ranks:
        module.gather = lambda _: [torch.tensor(others) for others in ranks]
        rollout: Any = SimpleNamespace(places=places)
        parts = module.minibatches(rollout, 3, "ppo", 0, 0)
        seen.append([[places[own] for own in part] for part in parts])
    expected = permutation(7, module.seed, "ppo", 0, 0).tolist()
    for part in range(3):
        assert sorted(place for parts in seen for place in parts[part]) == sorted(expected[part::3])
        for parts in seen:
            assert parts[part] == [place for place in expected[part::3] if place in parts[part]]


@quiet_lightning
def test_grpo_compares_within_a_prompt_only() -> None:
    """Whitening over the batch would weigh a prompt by the lengths of its responses: 2 and 3 tokens here."""
    module = attached(estimator="grpo", num_generations=2, kl_beta=0.0, missing_eos_penalty=0.0)
    rollout = two_responses(module)
    module.rewards(rollout)
    module.advantages(rollout)
    expected = torch.tensor([0.5**0.5, -(0.5**0.5)])[:, None] * rollout.mask  # deviation of 1 and -2 is 3 / sqrt 2
    torch.testing.assert_close(rollout.tokens["advantages"], expected, atol=1e-4, rtol=0)
