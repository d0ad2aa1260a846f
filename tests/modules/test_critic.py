"""PPO's critic: what it starts as, what it learns, and that the policy waits for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch

from rlhf_lightning.modules.schedules import schedule
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import Prompts, build, config, fit, load_critic


@pytest.mark.slow
@quiet_lightning
def test_critic_learns_the_returns() -> None:
    def by_prompt(prompts: Any, responses: Any, metadata: Sequence[dict[str, Any]]) -> list[float]:
        return [float(extra["row"] % 4 == 0) for extra in metadata]  # the second prompt token tells

    module = build(lr=0.0, reward=by_prompt, load_critic=load_critic, critic_lr=1e-2, value_clip=None, kl_beta=0.0)
    rows = fit(module, Prompts(20)).rows
    assert rows[-1]["value/loss"] < 0.1 * rows[0]["value/loss"]
    assert rows[0]["value/explained_variance"] < 0.5 < 0.9 < rows[-1]["value/explained_variance"]
    assert rows[-1]["kl/reference"] == pytest.approx(0, abs=1e-5)  # the critic has a trunk of its own


@pytest.mark.parametrize("critic", [load_critic, None])
@quiet_lightning
def test_a_refitted_critic_explains_returns_after_one_iteration(critic: Any) -> None:
    def by_prompt(prompts: Any, responses: Any, metadata: Sequence[dict[str, Any]]) -> list[float]:
        return [3.0 + (extra["row"] % 4 == 0) for extra in metadata]

    options = {"lr": 0.0, "critic_lr": 0.0, "reward": by_prompt, "load_critic": critic, "kl_beta": 0.0}
    weak, strong = (
        fit(build(critic_refit=prior, missing_eos_penalty=0.0, **options), Prompts(2, 64)).rows for prior in (1.0, 1e6)
    )
    assert weak[0]["value/explained_variance"] == 0
    assert weak[1]["value/explained_variance"] > 0.1
    assert abs(strong[1]["value/explained_variance"]) < 0.01  # a strong prior keeps the weights,
    assert strong[0]["value/loss"] < 0.1  # never the bias: returns are 3.25 at the mean


@quiet_lightning
def test_advantages_are_of_values_that_have_not_seen_the_returns() -> None:
    """Else a head with as many weights as tokens would explain every return and leave nothing to learn."""
    module = build(critic_refit=1e-6, whiten_advantages=False, lam=1.0, kl_beta=0.0)
    fit(module, Prompts(1))
    assert module.last_rollout is not None
    tokens, mask = module.last_rollout.tokens, module.last_rollout.mask
    assert torch.equal(tokens["advantages"], tokens["returns"])  # the values were 0
    assert "states" not in tokens
    left = ((tokens["returns"] - tokens["values"])[mask] ** 2).mean()
    assert left < 0.9 * (tokens["returns"][mask] ** 2).mean()


@pytest.mark.slow
@quiet_lightning
def test_a_policy_stays_while_its_critic_begins() -> None:
    for options in ({}, {"load_critic": load_critic}):
        module = build(critic_warmup=2, critic_lr=1e-2, kl_target=1e-4, **options)
        module.make_optimizer = partial(torch.optim.AdamW, lr=3e-2, weight_decay=0.1)
        module.configure_model()
        policy, critic = (
            {k: v.clone() for k, v in part.state_dict().items()} for part in (module.policy.lm, module.critics)
        )
        rows = fit(module, Prompts(2)).rows
        assert all(torch.equal(v, policy[k]) for k, v in module.policy.lm.state_dict().items())
        assert not all(torch.equal(v, critic[k]) for k, v in module.critics.state_dict().items())
        assert [row["kl/beta"] for row in rows] == pytest.approx([0.05, 0.05])
        assert rows[-1]["optim/grad_norm"] == 0
        moved = fit(build(critic_warmup=1, critic_lr=1e-2, **options), Prompts(3)).rows[-1]
        assert moved["kl/reference"] > 1e-3


@quiet_lightning
def test_both_rates_follow_the_schedule() -> None:
    module = build(lr=1.0e-3, critic_lr=4.0e-2, ppo_epochs=2)
    module.make_schedule = partial(schedule, shape="linear", final=0.0)
    rows = fit(module, Prompts(2)).rows
    assert [row["optim/lr"] for row in rows] == pytest.approx([0.5e-3, 0.0])
    assert [row["optim/critic_lr"] for row in rows] == pytest.approx([2.0e-2, 0.0])


def test_a_critic_has_a_rate_of_its_kind() -> None:
    assert build().critic_lr == 1e-3
    assert build(load_critic=load_critic).critic_lr == build(critic_refit=9).critic_lr == 1e-5
    assert build(load_critic=load_critic, critic_lr=0.5).critic_lr == 0.5


@quiet_lightning
def test_a_padded_critic_makes_the_rollout_padded() -> None:
    from transformers import MistralConfig, MistralForSequenceClassification

    def windowed() -> Any:
        torch.manual_seed(4)
        options = config(num_labels=1).to_dict() | {"sliding_window": 2, "model_type": "mistral"}
        return MistralForSequenceClassification(MistralConfig(**options))

    module = build(load_critic=windowed)
    assert math.isfinite(fit(module, Prompts(1)).rows[0]["value/loss"])
    assert module.layout == "padded"
