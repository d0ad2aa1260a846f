"""Proximal policy optimization from a reward, and the critic-free RLOO and GRPO on the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, decay_groups
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.modules.online import Online
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.advantages import explained_variance, gae, grpo, rloo, whiten
from rlhf_lightning.ops.groups import GroupBatch, GroupList
from rlhf_lightning.ops.kl import KLController, KLEstimator, kl_estimate, token_rewards
from rlhf_lightning.ops.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lightning.ops.seeding import permutation
from rlhf_lightning.rewards.scoring import Reward

Estimator = Literal["gae", "rloo", "grpo"]
KLIn = Literal["reward", "loss"]


class PPO(Online):
    """One batch of prompts in, one PPO iteration out: rollout, log-probs and values, rewards, advantages, update.

    The reward of a response is score - beta sum_t kl_t, given per token: -beta kl_t everywhere, the score at the last
    token. The policy loss is -min(r A, clip(r) A) (arXiv 1707.06347), the mean over the tokens of a minibatch.

    Args:
        estimator: "gae" (PPO with a critic), "rloo" or "grpo" (`num_generations` responses per prompt, no critic).
        load_critic: returns a sequence classifier as critic (usually the reward model); None is a value head on the
            policy's trunk. Used by estimator "gae" only.
        critic_lr: learning rate of the critic; None is the policy's.
        ppo_epochs, num_minibatches: passes over the rollout and updates per pass.
        clip_low, clip_high: the ratio's range; value_clip: the value's, None is off.
        vf_coef, entropy_coef, ptx_coef: weights of value loss, entropy bonus, and pretraining-mix loss (`data.ptx`).
        gamma, lam: discount and GAE's lambda.
        kl_beta, kl_target, kl_horizon: KL weight, and the target (nats per response) that makes it adaptive.
        kl_estimator: k1, k2 or k3; kl_in: "reward" or "loss" (GRPO).
        whiten_advantages, whiten_rewards: normalize over all response tokens of all ranks.
        target_kl: stop the PPO epochs when the policy has moved this far from the policy that generated.
        max_grad_norm: gradient clipping.
        Others: see :class:`Online`.
    """

    critic: ScalarModel | None

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        reward: Reward,
        gold: Reward | None = None,
        load_critic: Callable[[], nn.Module] | None = None,
        estimator: Estimator = "gae",
        engine: Engine | None = None,
        template: Template | None = None,
        num_generations: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        microbatch_tokens: int = 4096,
        missing_eos_penalty: float = 1.0,
        reward_clip: float | None = None,
        reward_scale: bool = False,
        kl_beta: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLIn = "reward",
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_rewards: bool = False,
        whiten_advantages: bool = True,
        ppo_epochs: int = 4,
        num_minibatches: int = 1,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        value_clip: float | None = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        ptx_coef: float = 0.0,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        critic_lr: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            load, optimizer, schedule, lora, reward=reward, gold=gold, engine=engine, template=template,
            num_generations=num_generations, max_new_tokens=max_new_tokens, temperature=temperature,
            microbatch_tokens=microbatch_tokens, missing_eos_penalty=missing_eos_penalty, reward_clip=reward_clip,
            reward_scale=reward_scale, seed=seed,
        )  # fmt: skip
        for key, value, options in (
            ("estimator", estimator, get_args(Estimator)),
            ("kl_estimator", kl_estimator, get_args(KLEstimator)),
            ("kl_in", kl_in, get_args(KLIn)),
        ):
            if value not in options:
                raise UserError(f"ppo.{key}={value!r} is not one of {', '.join(options)}.{nearest(value, options)}")
        if estimator != "gae" and num_generations < 2:
            raise UserError(
                f"{estimator} compares responses to one prompt: num_generations={num_generations} must be at least 2"
            )
        if kl_in == "loss" and kl_estimator == "k1":
            raise UserError("kl_in=loss with kl_estimator=k1 has no gradient in expectation; use k2 or k3")
        if temperature <= 0 or min(ppo_epochs, num_minibatches, num_generations) < 1:
            raise UserError(
                "temperature must be above 0; num_generations, ppo_epochs and num_minibatches must be at least 1"
            )
        self.automatic_optimization = False
        self.estimator, self.load_critic, self.critic_lr = estimator, load_critic, critic_lr
        self.kl = KLController(kl_beta, kl_target, kl_horizon)
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in, self.gamma, self.lam = kl_in, gamma, lam
        self.whiten_rewards, self.whiten_advantages = whiten_rewards, whiten_advantages
        self.ppo_epochs, self.num_minibatches = ppo_epochs, num_minibatches
        self.clip_low, self.clip_high, self.value_clip = clip_low, clip_high, value_clip
        self.vf_coef, self.entropy_coef, self.ptx_coef = vf_coef, entropy_coef, ptx_coef
        self.target_kl, self.max_grad_norm = target_kl, max_grad_norm

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        super().configure_model()
        self.critic = None
        if self.estimator == "gae" and self.load_critic is not None:
            critic: Any = self.load_critic()
            if choose_layout(critic)[0] != self.layout:
                raise UserError("the critic and the policy need the same token layout; use ppo.critic=value_head")
            self.critic = self.split(ScalarModel(critic))

    def build_policy(self) -> CompletionModel:
        """Return the policy, with a value head where the critic is not a separate model."""
        return CompletionModel(self.build(), value_head=self.estimator == "gae" and self.load_critic is None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        rate = {} if self.critic_lr is None else {"lr": self.critic_lr}
        critics = [part for part in (self.policy.value_head, self.critic) if part is not None]
        return decay_groups(self.policy.lm) + [group for part in critics for group in decay_groups(part, **rate)]

    def updates_per_batch(self) -> int:
        return self.ppo_epochs * self.num_minibatches

    def training_step(self, batch: GroupList, batch_idx: int) -> None:
        rollout = self.rollout(batch)  # 1. responses and their scores
        self.logprobs(rollout)  # 2. log-probs of policy and reference, and values
        metrics = self.rewards(rollout)  # 3. KL and reward per token
        self.advantages(rollout)  # 4. advantages and returns
        metrics |= self.update(rollout, batch.ptx)  # type: ignore[arg-type]  # 5. PPO epochs over the rollout
        responses = self.reduce(torch.tensor([float(len(rollout.mask))])).item()
        self.kl.update(metrics["kl/reference"], int(responses))
        self.iteration += 1
        self.log_dict(metrics)

    # ---- log-probs and values --------------------------------------------------------------------------------------

    def forward_logprobs(self, batch: GroupBatch) -> dict[str, Tensor]:
        output = self.policy(batch, self.temperature, values=self.policy.value_head is not None)
        columns = {"old_logprobs": output.logprobs}
        if output.values is not None:
            columns["values"] = output.values
        if self.critic is not None:
            columns["values"] = self.critic(batch, at="source")
        return columns | {"ref_logprobs": self.forward_reference(batch)}

    # ---- rewards and advantages ------------------------------------------------------------------------------------

    @torch.no_grad()
    def rewards(self, rollout: Rollout) -> dict[str, float]:
        """Fill in KL and reward of every token, and return the iteration's outcome metrics."""
        mask, tokens = rollout.mask, rollout.tokens
        scores = self.shaped_scores(rollout).to(self.device)
        tokens["kl"] = kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], self.kl_estimator) * mask
        beta = self.kl.beta if self.kl_in == "reward" else 0.0
        tokens["rewards"] = token_rewards(scores, tokens["kl"], mask, beta)
        if self.estimator == "gae" and self.whiten_rewards:
            tokens["rewards"] = whiten(tokens["rewards"], mask, shift_mean=False, reduce=self.reduce)
        outcome = {
            "reward/proxy": rollout.scores,
            "reward/total": tokens["rewards"].sum(1),
            "kl/reference": tokens["kl"].sum(1),
            "rollout/length": mask.sum(1),
            "rollout/ended_with_eos": rollout.finished,
        }
        if rollout.gold is not None:
            outcome["reward/gold"] = rollout.gold
        means = {name: self.mean(values.to(self.device).float()) for name, values in outcome.items()}
        spread = self.mean((rollout.scores.to(self.device) - means["reward/proxy"]) ** 2)
        self.episodes += int(self.reduce(torch.tensor([float(len(mask))])).item())
        return means | {
            "reward/proxy_std": math.sqrt(spread),
            "kl/beta": self.kl.beta,
            "rollout/episodes": float(self.episodes),
        }

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> None:
        """Fill in advantages, and returns where there is a critic."""
        mask, tokens = rollout.mask, rollout.tokens
        if self.estimator == "gae":
            tokens["advantages"], tokens["returns"] = gae(
                tokens["rewards"], tokens["values"], mask, self.gamma, self.lam
            )
        else:
            totals = tokens["rewards"].sum(1).view(-1, rollout.num_generations)
            per_response = (rloo if self.estimator == "rloo" else grpo)(totals).flatten()
            tokens["advantages"] = per_response[:, None] * mask
        if self.whiten_advantages and self.estimator != "grpo":
            tokens["advantages"] = whiten(tokens["advantages"], mask, reduce=self.reduce)

    # ---- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, ptx: GroupBatch | None) -> dict[str, float]:
        """Make the updates of the PPO epochs and return their mean metrics."""
        self.phase = "updating the policy"
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        sums: dict[str, float] = {}
        ratio_min, ratio_max = 1.0, 1.0
        updates = epochs = 0
        # as many as the rank with the fewest prompts can fill: the ranks update together
        parts = min(self.num_minibatches, int(self.reduce(torch.tensor([float(len(rollout.groups))]), "min").item()))
        for epoch in range(self.ppo_epochs):
            order = permutation(len(rollout.groups), self.seed, "ppo", self.iteration, epoch).tolist()
            epoch_kl = 0.0
            for part in range(parts):
                metrics, ratios = self.minibatch(rollout, order[part::parts], ptx, optimizer, first=updates == 0)
                if schedule is not None:
                    schedule.step()
                updates += 1
                epoch_kl += metrics["kl/old"] / parts
                ratio_min, ratio_max = min(ratio_min, ratios[0]), max(ratio_max, ratios[1])
                sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
            epochs += 1
            if self.target_kl is not None and epoch_kl > self.target_kl:
                break
        metrics = {name: value / updates for name, value in sums.items()}
        if self.estimator == "gae":
            values, returns = rollout.tokens["values"], rollout.tokens["returns"]
            explained = explained_variance(values, returns, rollout.mask, reduce=self.reduce)
            metrics["value/explained_variance"] = explained.item()
        return metrics | {
            "policy/ratio_min": self.reduce(torch.tensor(ratio_min), "min").item(),
            "policy/ratio_max": self.reduce(torch.tensor(ratio_max), "max").item(),
            "ppo/epochs": float(epochs),
            "ppo/updates": float(self.global_step),
            "optim/lr": optimizer.param_groups[0]["lr"],
        }

    def minibatch(
        self, rollout: Rollout, places: list[int], ptx: GroupBatch | None, optimizer: Any, first: bool
    ) -> tuple[dict[str, float], tuple[float, float]]:
        """Make one update from the groups at `places`; return its metrics and the range of pi / pi_old."""
        count = self.reduce(rollout.mask[rollout.rows(places)].sum().float()[None]).item()
        share = self.data_ranks / count  # the strategy averages gradients over ranks
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        ratio_min, ratio_max = 1.0, 1.0
        microbatches = list(rollout.microbatches(places))
        mix = ptx is not None and self.ptx_coef > 0
        for number, (rows, batch, is_real) in enumerate(microbatches, start=1):
            terms, ratio = self.token_losses(rollout, rows, batch, first)
            if not is_real:  # a dummy forward and backward pass to match collectives
                self.backward_part(terms["loss"].sum() * 0.0, last=number == len(microbatches) and not mix)
                continue
            ratio_min, ratio_max = min(ratio_min, ratio.min().item()), max(ratio_max, ratio.max().item())
            loss = terms.pop("loss").sum() * share
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} in iteration {self.iteration}; lower optimizer.lr")
            self.backward_part(loss, last=number == len(microbatches) and not mix)
            for name, values in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + values.detach().sum()
        if ptx is not None and mix:
            logprobs = self.policy(ptx).logprobs
            self.backward_part(-self.ptx_coef * logprobs.mean(), last=True)
            totals["policy/ptx_loss"] = -logprobs.detach().mean() * (count / self.data_ranks)
        norm = self.clip(self.max_grad_norm)
        optimizer.step()
        sums = self.reduce(torch.stack(list(totals.values())).float()) / count
        metrics = dict(zip(totals, sums.tolist(), strict=True)) | {"optim/grad_norm": norm.item()}
        return metrics, (ratio_min, ratio_max)

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a part of the loss; ranks reduce with the last one, as their numbers of parts differ."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            self.manual_backward(loss)
        else:
            with strategy.block_backward_sync():
                self.manual_backward(loss)

    def token_losses(
        self, rollout: Rollout, rows: Tensor, batch: GroupBatch, first: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss and the metrics of each response token (N,), and the ratio pi / pi_old."""
        has_head = self.policy.value_head is not None
        learn_entropy = bool(self.entropy_coef)  # else it is only logged
        output = self.policy(batch, self.temperature, entropy=True, values=has_head, entropy_gradient=learn_entropy)
        old = rollout.flat("old_logprobs", rows)
        assert output.entropy is not None
        if first:
            self.check_first_ratio(output.logprobs, old)
        loss, clipped = ppo_policy_loss(
            output.logprobs, old, rollout.flat("advantages", rows), self.clip_low, self.clip_high
        )
        terms = {
            "policy/loss": loss,
            "policy/clip_fraction": clipped.float(),
            "policy/entropy": output.entropy,
            "kl/old": kl_estimate(old, output.logprobs.detach(), "k3"),
        }
        if self.entropy_coef:
            loss = loss - self.entropy_coef * output.entropy
        if self.kl_in == "loss":
            estimate = kl_estimate(output.logprobs, rollout.flat("ref_logprobs", rows), self.kl_estimator)
            loss = loss + self.kl.beta * estimate
        if self.estimator == "gae":
            values = output.values if has_head else self.critic(batch, at="source")  # type: ignore[misc]
            value_loss, value_clipped = ppo_value_loss(
                values,  # type: ignore[arg-type]
                rollout.flat("values", rows),
                rollout.flat("returns", rows),
                self.value_clip,
            )
            terms |= {"value/loss": value_loss, "value/clip_fraction": value_clipped.float()}
            loss = loss + self.vf_coef * value_loss
        return terms | {"loss": loss}, (output.logprobs - old).detach().exp()

    def check_first_ratio(self, logprobs: Tensor, old: Tensor) -> None:
        """Raise a UserError when the policy that learns is not the one that generated: dropout, mask, temperature."""
        worst, broken = apart(logprobs, old, is_exact(self.policy.lm, self.trainer.precision))
        if broken:
            raise UserError(
                f"pi / pi_old differs from 1 by {worst:.2g} before the first update of iteration {self.iteration}; "
                "switch off dropout (also LoRA's)"
            )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["online"]["kl_beta"] = self.kl.beta

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.kl.beta = checkpoint["online"]["kl_beta"]
