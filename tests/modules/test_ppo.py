"""PPO, RLOO and GRPO: their arithmetic by hand, their invariants in a real Trainer, and that they learn."""

from __future__ import annotations

import inspect
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.local import LocalEngine
from rlhf_lightning.modules.options import COUNTS, RANGES
from rlhf_lightning.modules.ppo import PPO
from rlhf_lightning.modules.schedules import schedule
from rlhf_lightning.ops.groups import Group, GroupList
from tests.helpers.lightning import quiet_lightning
from tests.modules.bandit import (
    GOOD,
    KeepWeights,
    Prompts,
    Split,
    attached,
    build,
    fit,
    load,
    load_critic,
    two_responses,
    weights,
)

# ---- learning ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "gae"},
        {"estimator": "gae", "load_critic": load_critic, "critic_lr": 1e-2, "num_minibatches": 2},
        {"estimator": "rloo", "num_generations": 4, "ppo_epochs": 2},
        {"estimator": "grpo", "num_generations": 4, "ppo_epochs": 2, "kl_in": "loss", "kl_estimator": "k3"},
    ],
    ids=["value head", "critic", "rloo", "grpo"],
)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.nightly)])
@quiet_lightning
def test_a_rewarded_token_becomes_likely(options: dict[str, Any], seed: int) -> None:
    module = build(max_new_tokens=1, kl_beta=0.01, seed=seed, **options)
    rows = fit(module, Prompts(8)).rows
    assert rows[0]["reward/proxy"] < 0.3
    with torch.no_grad():
        likely = module.policy.lm(torch.tensor([[1, 3, 5]])).logits[0, -1].softmax(-1)[GOOD].item()
    assert likely > 0.9
    assert rows[-1]["kl/reference"] > 0.5  # and it is far from where it started


@pytest.mark.slow
@pytest.mark.parametrize("place", ["reward", "loss"])
@quiet_lightning
def test_kl_penalty_holds_the_policy_back(place: str) -> None:
    options = {"kl_in": place, "kl_estimator": "k3"}
    free, held = (fit(build(kl_beta=beta, **options), Prompts(8)).rows[-1] for beta in (0.0, 1.0))
    assert held["kl/reference"] < 0.5 * free["kl/reference"]
    assert held["reward/total"] <= held["reward/proxy"]


@pytest.mark.slow
@quiet_lightning
def test_entropy_bonus_keeps_the_policy_open() -> None:
    closed, opened = (fit(build(entropy_coef=coef), Prompts(8)).rows[-1] for coef in (0.0, 1.0))
    assert opened["policy/entropy"] > closed["policy/entropy"] + 0.3


# ---- invariants of the first update --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 1.0])
@quiet_lightning
def test_first_update_starts_from_the_sampling_policy(temperature: float) -> None:
    rows = fit(build(ppo_epochs=1, temperature=temperature, kl_estimator="k3"), Prompts(3)).rows
    assert rows[0]["kl/reference"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["kl/reference"] > 1e-3
    for row in rows:
        assert row["policy/ratio_min"] == pytest.approx(1, abs=1e-4)
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-4)
        assert row["policy/clip_fraction"] == 0
        assert row["kl/old"] == pytest.approx(0, abs=1e-5)


@quiet_lightning
def test_dropout_is_found_by_the_ratio() -> None:
    with pytest.raises(UserError, match=r"differs from 1 by .* of iteration 0; switch off dropout"):
        fit(build(partial(load, attention_dropout=0.5)), Prompts(1))


@pytest.mark.slow
@quiet_lightning
def test_bfloat16_weights_are_no_reason_to_stop() -> None:
    rows = fit(
        build(lambda: load(hidden_size=64, initializer_range=0.5).bfloat16(), microbatch_tokens=20), Prompts(2)
    ).rows
    assert math.isfinite(rows[-1]["policy/loss"])


@pytest.mark.slow
@quiet_lightning
def test_microbatches_change_memory_not_results() -> None:
    options = {"kl_beta": 0.1, "entropy_coef": 0.01, "num_minibatches": 2, "ppo_epochs": 2}
    small, large = build(microbatch_tokens=12, **options), build(microbatch_tokens=4096, **options)
    rows = [fit(module, Prompts(2)).rows for module in (small, large)]
    for name, tensor in weights(small).items():
        torch.testing.assert_close(tensor, weights(large)[name], atol=2e-4, rtol=0, msg=name)
    for name in ("policy/loss", "value/loss", "policy/entropy", "optim/grad_norm"):
        assert rows[0][0][name] == pytest.approx(rows[1][0][name], abs=1e-4), name


# ---- arithmetic by hand --------------------------------------------------------------------------------------------


@quiet_lightning
def test_gae_is_wired_to_scores_kl_and_values() -> None:
    module = attached(kl_beta=0.5, gamma=1.0, lam=0.5, whiten_advantages=False, missing_eos_penalty=3.0)
    rollout = two_responses(module)
    metrics = module.rewards(rollout)
    explained = module.advantages(rollout)["value/explained_variance"]
    # kl = old - ref: [1, -0.5] and [0, 2, 0]; the score, less 3 where there is no end, comes with the last token
    rewards = [[-0.5, 0.25 + 1.0], [0.0, -1.0, -2.0 - 3.0]]
    last = [rewards[0][1] - 0.25, rewards[1][2] + 1.0]  # delta at the last token
    first = rewards[0][0] + 0.25 - 0.5 + 0.5 * last[0]
    middle = rewards[1][1] - 1.0 - 1.0 + 0.5 * last[1]
    start = rewards[1][0] + 1.0 - 0.0 + 0.5 * middle
    expected = torch.tensor([[first, last[0], 0.0], [start, middle, last[1]]])
    torch.testing.assert_close(rollout.tokens["advantages"], expected)
    # the critic learns the sums of the rewards to come, which are what it is judged by
    returns = torch.tensor([[0.75, 1.25, 0.0], [-6.0, -6.0, -5.0]])
    torch.testing.assert_close(rollout.tokens["returns"], returns)
    sums, values = returns[rollout.mask], torch.tensor([0.5, 0.25, 0.0, 1.0, -1.0])
    assert explained == pytest.approx((1 - (sums - values).var() / sums.var()).item(), abs=1e-6)
    assert rollout.value_clip == pytest.approx(0.2 * sums.std(correction=0).item())
    assert metrics["reward/proxy"] == pytest.approx(-0.5)
    assert metrics["reward/proxy_std"] == pytest.approx(1.5)
    assert metrics["reward/total"] == pytest.approx((0.75 - 6.0) / 2)
    assert metrics["kl/reference"] == pytest.approx((0.5 + 2.0) / 2)
    assert metrics["rollout/length"] == 2.5
    assert metrics["rollout/ended_with_eos"] == 0.5
    assert metrics["rollout/episodes"] == 2


@pytest.mark.parametrize(("estimator", "expected"), [("rloo", [5.75, -5.75]), ("grpo", [0.5**0.5, -(0.5**0.5)])])
@quiet_lightning
def test_critic_free_advantages_compare_the_samples(estimator: str, expected: list[float]) -> None:
    module = attached(
        estimator=estimator, num_generations=2, kl_beta=0.5, whiten_advantages=False, missing_eos_penalty=3.0
    )
    rollout = two_responses(module)
    module.rewards(rollout)
    module.advantages(rollout)  # totals: 1 - 0.5 * 0.5 = 0.75 and -5 - 0.5 * 2 = -6, without values
    scale = 6.75 / 5.75 if estimator == "rloo" else 1.0
    wanted = torch.tensor(expected)[:, None] * scale * rollout.mask
    torch.testing.assert_close(rollout.tokens["advantages"], wanted, atol=1e-4, rtol=0)


@quiet_lightning
def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens() -> None:
    module = attached()
    rollout = two_responses(module)
    module.rewards(rollout)
    module.advantages(rollout)
    counted = rollout.tokens["advantages"][rollout.mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-6)
    assert counted.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not rollout.tokens["advantages"][~rollout.mask].any()


@quiet_lightning
def test_kl_in_the_loss_leaves_the_reward_alone() -> None:
    module = attached(kl_beta=0.5, kl_in="loss", kl_estimator="k2")
    metrics = module.rewards(two_responses(module))
    assert metrics["reward/total"] == metrics["reward/proxy"]
    assert metrics["kl/reference"] == pytest.approx((0.5 + 0.125 + 2.0) / 2)


# ---- inner epochs, schedule, state ---------------------------------------------------------------------------------


@pytest.mark.slow
@quiet_lightning
def test_target_kl_ends_the_ppo_epochs() -> None:
    stopped = fit(build(ppo_epochs=5, target_kl=1e-6), Prompts(1)).rows[0]
    whole = fit(build(ppo_epochs=5, target_kl=1e6), Prompts(1)).rows[0]
    assert stopped["ppo/epochs"] == 2  # the first update is measured by the second epoch
    assert whole["ppo/epochs"] == 5
    assert (stopped["ppo/updates"], whole["ppo/updates"]) == (2, 5)


@pytest.mark.slow
@quiet_lightning
def test_target_kl_is_compared_with_the_mean_over_the_minibatches_of_an_epoch() -> None:
    """The first minibatch has no KL to the sampling policy yet, so the mean of two is half of the last one's."""
    options: dict[str, Any] = {"num_minibatches": 2}
    mean = fit(build(ppo_epochs=1, **options), Prompts(1)).rows[0]["kl/old"]
    for share, updates in ((0.9, 2), (1.5, 4)):
        row = fit(build(ppo_epochs=2, target_kl=share * mean, **options), Prompts(1)).rows[0]
        assert row["ppo/updates"] == updates


@quiet_lightning
def test_rate_is_annealed_by_update() -> None:
    module = build(lr=1.0e-3, ppo_epochs=2, num_minibatches=2)
    module.make_schedule = partial(schedule, shape="linear", final=0.0)
    rows = fit(module, Prompts(2)).rows
    assert [row["ppo/updates"] for row in rows] == [4, 8]
    assert [row["optim/lr"] for row in rows] == pytest.approx([0.5e-3, 0.0])
    assert module.trainer.global_step == 8


@pytest.mark.slow
@quiet_lightning
def test_adaptive_beta_follows_the_kl() -> None:
    low = fit(build(kl_target=1e-4, kl_horizon=32), Prompts(4)).rows
    high = fit(build(kl_target=1e4, kl_horizon=32), Prompts(4)).rows
    assert low[-1]["kl/beta"] > low[0]["kl/beta"]
    assert [row["kl/beta"] for row in high] == pytest.approx([0.05 * 0.9**i for i in range(4)])


@pytest.mark.slow
@quiet_lightning
def test_pretraining_mix_keeps_its_text_likely() -> None:
    ptx = GroupList([Group([1], [[9, 10, 11, 2]])] * 4)
    rows = fit(build(ptx_coef=1.0), Prompts(12, ptx=ptx)).rows
    assert rows[-1]["policy/ptx_loss"] < 0.5 * rows[0]["policy/ptx_loss"]
    with pytest.raises(KeyError):
        fit(build(), Prompts(1, ptx=ptx)).rows[0]["policy/ptx_loss"]
    with pytest.raises(UserError, match="give them as groups, not packed"):
        fit(build(), Prompts(1, ptx=ptx.pack()))  # type: ignore[arg-type]


@pytest.mark.slow
@quiet_lightning
def test_a_demonstration_of_the_mix_is_read_once_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten over four updates, in microbatches within the token budget."""
    demonstrations = [Group([1, 3], [[8, 9 + i % 4, 2]], index=100 + i) for i in range(10)]
    module, read = build(ptx_coef=1.0, ppo_epochs=2, num_minibatches=2, microbatch_tokens=11), []
    module.configure_model()
    forward = module.policy.forward

    def watched(batch: Any, *rest: Any, **options: Any) -> Any:
        if batch.index[0] >= 100:
            read.append(batch.index.tolist())
        return forward(batch, *rest, **options)

    monkeypatch.setattr(module.policy, "forward", watched)
    fit(module, Prompts(1, ptx=GroupList(demonstrations)))
    assert sorted(i for part in read for i in part) == list(range(100, 110))
    assert max(map(len, read)) == 2  # 5 tokens each


@quiet_lightning
def test_gradients_are_clipped() -> None:
    module = build(max_grad_norm=1e-3, ppo_epochs=1)
    module.make_optimizer = partial(torch.optim.SGD, lr=1.0)
    module.configure_model()
    before = [p.detach().clone() for p in module.parameters()]
    row = fit(module, Prompts(1)).rows[0]
    moved = math.sqrt(sum(((p - old) ** 2).sum().item() for p, old in zip(module.parameters(), before, strict=True)))
    assert min(row["optim/grad_norm"], row["optim/critic_grad_norm"]) > 1e-2
    assert moved == pytest.approx(1e-3 * math.hypot(1, module.critic_lr), rel=1e-2)  # each is clipped alone


@pytest.mark.nightly
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("refit", [None, 2.0])
@pytest.mark.parametrize("critic", [load_critic, None])
@quiet_lightning
def test_two_ranks_learn_what_one_does(tmp_path: Path, critic: Any, refit: float | None) -> None:
    """Ranks with different numbers of tokens and microbatches neither wait for each other nor change the result."""
    kept, ptx = [], GroupList([Group([1, 3], [[8 + i, *range(3, 4 + i), 2]]) for i in range(5)])
    for ranks in (1, 2):
        module = build(
            microbatch_tokens=12, ppo_epochs=2, whiten_rewards=True, reward_scale=True, load_critic=critic,
            critic_lr=0.05, critic_warmup=1, critic_refit=refit, ptx_coef=0.5,
            value_clip=None if refit else 0.2,  # returns of the second iteration are equal: their deviation is rounding
        )  # fmt: skip
        module.make_optimizer = partial(torch.optim.SGD, lr=0.1)
        path = tmp_path / f"{ranks}.pt"
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", devices=ranks, strategy="ddp_spawn" if ranks > 1 else "auto",
            callbacks=[KeepWeights(path)], logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module, Split(3, ptx=ptx))
        kept.append(torch.load(path, weights_only=True))
    for name, tensor in kept[0].items():
        torch.testing.assert_close(kept[1][name], tensor, atol=1e-6, rtol=0, msg=name)


# ---- what users see ------------------------------------------------------------------------------------------------


@quiet_lightning
def test_diverged_policy_stops_with_the_iteration() -> None:
    with pytest.raises(UserError, match=r"the (loss|gradient) is .* in iteration [01]; lower optimizer.lr"):
        fit(build(lr=math.inf, ppo_epochs=1), Prompts(2))


@quiet_lightning
def test_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    module = build(ppo_epochs=1)
    module.configure_model()
    before = weights(module)
    module.policy.lm.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match=r"the gradient is not finite at step 0; lower optimizer\.lr"):
        fit(module, Prompts(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(module).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "ppo"}, "gae, rloo, grpo"),
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"kl_in": "score"}, "reward, loss"),
        ({"estimator": "rloo"}, "num_generations=1 must be at least 2"),
        ({"estimator": "grpo", "num_generations": 1}, "num_generations=1 must be at least 2"),
        ({"kl_in": "loss"}, "no gradient in expectation"),
        ({"loss_type": "bnpo"}, "dapo, grpo, dr_grpo"),
        ({"estimator": "rloo", "num_generations": 2, "critic_warmup": 1}, "rloo has no critic"),
        ({"estimator": "grpo", "num_generations": 2, "critic_refit": 64}, "critic_refit=64 is of PPO; grpo has no"),
        ({"critic_refit": 0}, r"^ppo\.critic_refit=0 is not a finite number in \(0, inf\)$"),
        (
            {"estimator": "grpo", "num_generations": 2, "whiten_advantages": True},
            "whiten_advantages=True is not of grpo",
        ),
        ({"estimator": "rloo", "num_generations": 2, "whiten_rewards": True}, "whiten_rewards=True is not of rloo"),
        ({"temperature": 0.0}, r"^ppo\.temperature=0.0 is not a finite number in \(0, inf\)$"),
        ({"ppo_epochs": 0}, r"^ppo\.ppo_epochs=0 is not a whole number in \[1, inf\)$"),
        ({"num_minibatches": 1.5}, r"^ppo\.num_minibatches=1.5 is not a whole number in"),
        ({"max_new_tokens": 0}, r"^ppo\.max_new_tokens=0 is not a whole number in"),
        ({"clip_low": 1.0}, r"^ppo\.clip_low=1.0 is not a finite number in \[0, 1\)$"),
        ({"clip_low": -0.1}, r"^ppo\.clip_low=-0.1 "),
        ({"clip_high": math.inf}, r"^ppo\.clip_high=inf "),
        ({"kl_target": 0.0}, r"^ppo\.kl_target=0.0 is not a finite number in \(0, inf\)$"),
        ({"kl_target": math.nan}, r"^ppo\.kl_target=nan "),
        ({"kl_horizon": -1}, r"^ppo\.kl_horizon=-1 "),
        ({"estimator": "grpo", "num_generations": 2, "kl_beta": -0.1}, r"^grpo\.kl_beta=-0.1 "),
        ({"gamma": 1.1}, r"^ppo\.gamma=1.1 is not a finite number in \[0, 1\]$"),
        ({"critic_lam": "high"}, r"^ppo\.critic_lam=high "),
        ({"value_clip": 0}, r"^ppo\.value_clip=0 "),
        ({"max_grad_norm": True}, r"^ppo\.max_grad_norm=True "),
        ({"engine": LocalEngine(top_p=0.9)}, r"^sampler\.top_p=0.9: "),
        ({"engine": LocalEngine(top_k=5), "estimator": "grpo", "num_generations": 2}, r"^sampler\.top_k=5: "),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**options)


def test_every_option_that_is_a_number_has_a_range() -> None:
    numbers = {
        name for name, p in inspect.signature(PPO).parameters.items()
        if isinstance(p.default, int | float) and not isinstance(p.default, bool)
    }  # fmt: skip
    assert numbers - {"seed"} <= RANGES.keys() | COUNTS.keys()
