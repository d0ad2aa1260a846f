"""Proximal policy optimization from a reward, and the critic-free RLOO and GRPO on the same rollouts."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import CompletionModel, ScalarModel
from rlhf_lightning.models.sharding import run_inside
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, decay_groups
from rlhf_lightning.modules.critic import learning_rate, refit_head
from rlhf_lightning.modules.invariants import difference, exceeds_rounding, is_exact
from rlhf_lightning.modules.online import Online
from rlhf_lightning.modules.options import Estimator, KLIn, check_options
from rlhf_lightning.modules.rollout import Rollout, matched_microbatches
from rlhf_lightning.ops.advantages import discounted_returns, explained_variance, gae, grpo, moments, rloo, whiten
from rlhf_lightning.ops.groups import Group, GroupBatch, GroupList
from rlhf_lightning.ops.kl import KLController, KLEstimator, kl_estimate, token_rewards
from rlhf_lightning.ops.losses import LossType, ppo_policy_loss, ppo_value_loss, response_weights
from rlhf_lightning.ops.transfer import send
from rlhf_lightning.rewards.scoring import Reward


class PPO(Online):
    """One batch of prompts in, one PPO iteration out: rollout, log-probs and values, rewards, advantages, update.

    The reward of a response is score - beta sum_t kl_t, given per token: -beta kl_t everywhere, the score at the last
    token. The policy loss is -min(r A, clip(r) A) (arXiv 1707.06347), the mean over the tokens of a minibatch.

    Args:
        estimator: "gae" (PPO with a critic), "rloo" or "grpo" (`num_generations` responses per prompt, no critic).
        load_critic: returns a sequence classifier as critic (usually the reward model); None is a value head on the
            policy's trunk. Used by estimator "gae" only.
        critic_refit: responses that the critic's linear head counts as in the ridge regression that moves it to the
            returns of each rollout; it then starts at zero, also that of a critic model. None is off: gradients only.
        critic_lr: learning rate of the critic; None is 1e-5, for a value head that is not refitted 1e-3.
        critic_warmup: iterations in which only the critic learns (arXiv 2503.01491).
        ppo_epochs, num_minibatches: passes over the rollout and updates per pass.
        clip_low, clip_high: the ratio's range; value_clip: the value's, in standard deviations of the iteration's
            returns, None is off.
        vf_coef, entropy_coef, ptx_coef: weights of value loss, entropy bonus, and pretraining-mix loss (`data.ptx`).
        gamma, lam: discount and GAE's lambda of the advantages; critic_lam: lambda of the returns that the critic
            learns, 1 for those of the whole response.
        kl_beta, kl_target, kl_horizon: KL weight, and the target (nats per response) that makes it adaptive, see
            :class:`rlhf_lightning.ops.kl.KLController`.
        kl_estimator: k1, k2 or k3; kl_in: "reward" or "loss" (GRPO).
        whiten_advantages, whiten_rewards: normalize over all response tokens of all ranks; None whitens the
            advantages of GAE only. GRPO whitens neither, RLOO no rewards.
        scale_rewards: divide GRPO's advantages by the standard deviation within the prompt.
        loss_type: how the losses of tokens are averaged, see :func:`rlhf_lightning.ops.losses.response_weights`.
        target_kl: stop the PPO epochs when the policy has moved this far from the policy that generated.
        max_grad_norm: clips the gradient norm of the policy, and that of the critic; 0 is off.
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
        missing_eos_score: float | None = None,
        reward_clip: float | None = None,
        reward_scale: bool = False,
        kl_beta: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: float | None = None,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLIn = "reward",
        gamma: float = 1.0,
        lam: float = 0.95,
        critic_lam: float = 1.0,
        whiten_rewards: bool = False,
        whiten_advantages: bool | None = None,
        scale_rewards: bool = True,
        loss_type: LossType = "dapo",
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
        critic_refit: float | None = None,
        critic_warmup: int = 0,
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        check_options(locals())
        super().__init__(
            load, optimizer, schedule, lora, reward=reward, gold=gold, engine=engine, template=template,
            num_generations=num_generations, max_new_tokens=max_new_tokens, temperature=temperature,
            microbatch_tokens=microbatch_tokens, missing_eos_penalty=missing_eos_penalty,
            missing_eos_score=missing_eos_score, reward_clip=reward_clip, reward_scale=reward_scale,
            offload=offload, seed=seed,
        )  # fmt: skip
        self.automatic_optimization = False
        self.estimator, self.load_critic = estimator, load_critic
        self.critic_refit = critic_refit
        self.critic_warmup = critic_warmup
        self.critic_lr = learning_rate(load_critic is None, critic_refit) if critic_lr is None else critic_lr
        self.kl = KLController(kl_beta, kl_target, kl_horizon)
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in, self.gamma, self.lam, self.critic_lam = kl_in, gamma, lam, critic_lam
        self.whiten_rewards, self.scale_rewards = whiten_rewards, scale_rewards
        self.whiten_advantages = estimator == "gae" if whiten_advantages is None else whiten_advantages
        self.loss_type: LossType = loss_type
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
            self.critic = self.split(ScalarModel(self.build(self.load_critic), self.critic_refit is not None))

    def build_policy(self) -> CompletionModel:
        """Return the policy, with a value head where the critic is not a separate model."""
        return CompletionModel(self.build(), value_head=self.estimator == "gae" and self.load_critic is None)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return super().parameter_groups() + decay_groups(self.critics, lr=self.critic_lr)

    @property
    def critics(self) -> nn.ModuleList:
        """The critic's own layers: the value head, or the critic model; empty without a critic."""
        return nn.ModuleList([part for part in (self.policy.value_head, self.critic) if part is not None])

    @property
    def only_critic(self) -> bool:
        """Whether this iteration trains the critic and leaves the policy as it is."""
        return self.iteration < self.critic_warmup

    def updates_per_batch(self) -> int:
        return self.ppo_epochs * self.num_minibatches

    def training_step(self, batch: GroupList, batch_idx: int) -> None:
        rollout = self.rollout(batch)  # 1. responses and their scores
        self.logprobs(rollout)  # 2. log-probs of policy and reference, and values
        metrics = self.rewards(rollout)  # 3. KL and reward per token
        metrics |= self.advantages(rollout)  # 4. advantages and returns
        if self.critic_refit is not None:
            head = self.policy.value_head if self.critic is None else self.critic.value_head
            refit_head(head, rollout, self.critic_refit, self.reduce)
        ptx = batch.ptx.groups if isinstance(batch.ptx, GroupList) else []
        metrics |= self.update(rollout, ptx)  # 5. PPO epochs over the rollout
        responses = self.reduce(torch.tensor([float(len(rollout.mask))])).item()
        if not self.only_critic:
            self.kl.update(metrics["kl/reference"], int(responses))
        self.iteration += 1
        self.log_dict(metrics)

    # ---- log-probs and values --------------------------------------------------------------------------------------

    def forward_logprobs(self, batch: GroupBatch) -> dict[str, Tensor]:
        output = self.policy(batch, self.temperature, values=self.policy.value_head is not None)
        columns = {"old_logprobs": output.logprobs}
        values, states = output.values, output.states
        if self.critic is not None:
            values, states = run_inside(self.critic, self.critic.outputs, batch, "source")
        if values is not None:
            columns["values"] = values
        if states is not None and self.critic_refit is not None:
            columns["states"] = states
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
        total = self.mean(tokens["rewards"].sum(1))
        return self.outcomes(rollout) | {"reward/total": total, "kl/beta": self.kl.beta}

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> dict[str, float]:
        """Fill in advantages, and returns where there is a critic; return how well it predicted the outcomes."""
        mask, tokens = rollout.mask, rollout.tokens
        metrics: dict[str, float] = {}
        if self.estimator == "gae":
            rewards, values = tokens["rewards"], tokens["values"]
            tokens["advantages"], _ = gae(rewards, values, mask, self.gamma, self.lam)
            _, tokens["returns"] = gae(rewards, values, mask, self.gamma, self.critic_lam)
            if self.value_clip is not None and not self.only_critic:  # a policy that stays needs no cautious critic
                rollout.value_clip = self.value_clip * moments(tokens["returns"], mask, self.reduce)[1].sqrt().item()
            outcomes = discounted_returns(rewards, mask, self.gamma)
            metrics["value/explained_variance"] = explained_variance(values, outcomes, mask, self.reduce).item()
        else:
            totals = tokens["rewards"].sum(1).view(-1, rollout.num_generations)
            per_response = rloo(totals) if self.estimator == "rloo" else grpo(totals, self.scale_rewards)
            tokens["advantages"] = per_response.flatten()[:, None] * mask
        if self.whiten_advantages:
            tokens["advantages"] = whiten(tokens["advantages"], mask, reduce=self.reduce)
        return metrics

    # ---- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, ptx: list[Group]) -> dict[str, float]:
        """Make the updates of the PPO epochs, each with its part of `ptx`, and return their mean metrics."""
        self.phase = "updating the critic" if self.only_critic else "updating the policy"
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        rows: list[dict[str, float]] = []
        ratio_min, ratio_max = 1.0, 1.0
        epochs = 0
        for epoch in range(self.ppo_epochs):
            minibatches = self.minibatches(rollout, self.num_minibatches, "ppo", self.iteration, epoch)
            epoch_kl = 0.0
            for places in minibatches:
                updates = self.ppo_epochs * len(minibatches)
                mix = slice_of(len(ptx), len(rows), updates) if self.ptx_coef else range(0)
                metrics, ratios = self.minibatch(rollout, places, ptx, mix, optimizer, first=not rows)
                if schedule is not None:
                    schedule.step()
                rows.append(metrics)
                epoch_kl += metrics["kl/old"] / len(minibatches)
                ratio_min, ratio_max = min(ratio_min, ratios[0]), max(ratio_max, ratios[1])
            epochs += 1
            if self.target_kl is not None and epoch_kl > self.target_kl:
                break
        names = dict.fromkeys(name for row in rows for name in row)
        metrics = {name: mean(row[name] for row in rows if name in row) for name in names}
        if self.estimator == "gae":
            metrics["optim/critic_lr"] = optimizer.param_groups[-1]["lr"]
        return metrics | {
            "policy/ratio_min": self.reduce(torch.tensor(ratio_min), "min").item(),
            "policy/ratio_max": self.reduce(torch.tensor(ratio_max), "max").item(),
            "ppo/epochs": float(epochs),
            "ppo/updates": float(self.global_step),
            "optim/lr": optimizer.param_groups[0]["lr"],
        }

    def minibatch(
        self, rollout: Rollout, places: list[int], ptx: list[Group], mix: range, optimizer: Any, first: bool
    ) -> tuple[dict[str, float], tuple[float, float]]:
        """Make one update from the groups at `places` and the demonstrations `mix` of `ptx`.

        Returns:
            Its metrics and the range of pi / pi_old.
        """
        lengths = rollout.lengths
        mine = lengths[rollout.rows(places)]
        sizes = [mine.sum(), len(mine), 0 if self.only_critic else sum(ptx[i].loss_tokens for i in mix)]
        count, responses, demonstrated = self.reduce(torch.tensor([float(size) for size in sizes])).tolist()
        weights = response_weights(lengths, self.loss_type, count, responses, self.max_new_tokens) * self.data_ranks
        weights = send(weights[:, None].expand(rollout.mask.shape).flatten(), self.device)
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        ptx_loss = self.pretraining_mix(rollout, ptx, mix, demonstrated) if demonstrated else None
        losses: list[Tensor] = []
        gaps: list[Tensor] = []
        ratios: list[Tensor] = []
        microbatches = list(rollout.microbatches(places))
        for number, (cells, batch, is_real) in enumerate(microbatches, start=1):
            terms, logprobs, old = self.token_losses(rollout, cells, batch)
            last = number == len(microbatches)
            if not is_real:  # a dummy forward and backward pass to match collectives
                self.backward_part(terms.pop("loss").sum() * 0.0, last)
                totals = {name: torch.zeros((), device=self.device) for name in terms} | totals
                continue
            if first:
                gaps.append(difference(logprobs, old, self.is_exact))
            ratios.append(torch.stack((logprobs - old).exp().aminmax()))
            losses.append((terms.pop("loss") * weights[cells]).sum())
            self.backward_part(losses[-1], last)
            for name, values in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + values.detach().sum()
        if self.only_critic:  # without a gradient the optimizer passes over them
            for parameter in self.policy.lm.parameters():
                parameter.grad = None
        parts: dict[str, nn.Module] = {"optim/grad_norm": self.policy.lm}
        if self.estimator == "gae":
            parts["optim/critic_grad_norm"] = self.critics
        if ptx_loss is not None:
            totals["policy/ptx_loss"] = ptx_loss * count
        means = self.reduce(torch.stack(list(totals.values())).float()) / count
        norms, read = self.read_update(parts, losses, means=means, gaps=gaps, ratios=ratios)
        for gap in read["gaps"]:
            self.check_first_ratio(gap)
        for name, part in parts.items():
            self.clip(norms[name], self.max_grad_norm, part.parameters())
        optimizer.step()
        metrics = dict(zip(totals, read["means"], strict=True)) | norms
        return metrics, (min([1.0, *read["ratios"]]), max([1.0, *read["ratios"]]))

    def pretraining_mix(self, rollout: Rollout, ptx: list[Group], mix: range, tokens: float) -> Tensor:
        """Add the gradient of the loss on demonstrations, the mean over their `tokens` of all ranks.

        Returns:
            This rank's part of that loss.
        """
        total = torch.zeros((), device=self.device)
        for _, batch, is_real in matched_microbatches(ptx, mix, self.microbatch_tokens, self.layout, rollout.rounds):
            loss = -self.policy(send(batch, self.device)).logprobs.sum() / tokens * float(is_real)
            self.backward_part(self.ptx_coef * self.data_ranks * loss, last=False)
            total += loss.detach()
        return total

    def token_losses(
        self, rollout: Rollout, cells: Tensor, batch: GroupBatch
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the loss and the metrics of each response token (N,), log pi and log pi_old."""
        has_head = self.policy.value_head is not None
        learn_entropy = bool(self.entropy_coef)  # else it is only logged
        output = self.policy(batch, self.temperature, entropy=True, values=has_head, entropy_gradient=learn_entropy)
        old = rollout.flat("old_logprobs", cells)
        assert output.entropy is not None
        loss, clipped = ppo_policy_loss(
            output.logprobs, old, rollout.flat("advantages", cells), self.clip_low, self.clip_high
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
            estimate = kl_estimate(output.logprobs, rollout.flat("ref_logprobs", cells), self.kl_estimator)
            loss = loss + self.kl.beta * estimate
        if self.estimator == "gae":
            values = output.values if has_head else self.critic(batch, at="source")  # type: ignore[misc]
            value_loss, value_clipped = ppo_value_loss(
                values,  # type: ignore[arg-type]
                rollout.flat("values", cells),
                rollout.flat("returns", cells),
                rollout.value_clip,
            )
            terms |= {"value/loss": value_loss, "value/clip_fraction": value_clipped.float()}
            # times 0 keeps the policy in the graph, whose gradients ranks wait for
            loss = (0.0 * loss if self.only_critic else loss) + self.vf_coef * value_loss
        return terms | {"loss": loss}, output.logprobs.detach(), old

    @property
    def is_exact(self) -> bool:
        """Whether log-probabilities are computed in at least float32."""
        return is_exact(self.policy.lm, self.trainer.precision)

    def check_first_ratio(self, worst: float) -> None:
        """Raise a UserError when the policy that learns is not the one that generated: dropout, mask, temperature."""
        if exceeds_rounding(worst, self.is_exact):
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


def slice_of(count: int, number: int, parts: int) -> range:
    """Return part `number` of `count` items that are spread over `parts` as evenly as possible."""
    return range(count * number // parts, count * (number + 1) // parts)
