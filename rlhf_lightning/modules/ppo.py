"""Proximal policy optimization from a reward, and the critic-free RLOO and GRPO on the same rollouts."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from rlhf_lightning.data.datamodules import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.modules.experience import Estimator, Experience
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.advantages import explained_variance, gae, grpo, rloo, whiten
from rlhf_lightning.ops.groups import GroupBatch
from rlhf_lightning.ops.kl import KLEstimator, kl_estimate, token_rewards
from rlhf_lightning.ops.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lightning.ops.seeding import generator


class PPO(Experience):
    """One batch of prompts in, one PPO iteration out: sample, score, advantages, inner epochs, one log call.

    The reward of a response is score - beta sum_t kl_t, given per token: -beta kl_t everywhere, the score at the last
    token. The policy loss is -min(r A, clip(r) A) (arXiv 1707.06347), the mean over the tokens of a minibatch.

    Args:
        estimator: "gae" (PPO with a critic), "rloo" or "grpo" (`samples` responses a prompt, no critic).
        inner_epochs, minibatches: passes over the rollout and updates per pass.
        clip_low, clip_high: the ratio's range; value_clip: the value's, None is off.
        vf_coef, entropy_coef, ptx_coef: weights of value loss, entropy bonus, and pretraining-mix loss (`data.ptx`).
        gamma, lam: discount and GAE's lambda.
        kl_estimator: k1, k2 or k3; kl_in: "reward" or "loss" (GRPO).
        whiten_advantages, whiten_rewards: normalize over all counted tokens of all ranks.
        target_kl: stop the inner epochs when the policy has moved this far from the sampling policy.
        max_grad_norm: gradient clipping.
        Others: see :class:`Experience`.
    """

    def __init__(
        self,
        *args: Any,
        estimator: Estimator = "gae",
        inner_epochs: int = 4,
        minibatches: int = 1,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        value_clip: float | None = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        ptx_coef: float = 0.0,
        gamma: float = 1.0,
        lam: float = 0.95,
        kl_estimator: KLEstimator = "k1",
        kl_in: Literal["reward", "loss"] = "reward",
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, estimator=estimator, **kwargs)
        _check(estimator, self.samples, self.temperature, kl_estimator, kl_in, inner_epochs, minibatches)
        self.inner_epochs, self.minibatches = inner_epochs, minibatches
        self.clip_low, self.clip_high, self.value_clip = clip_low, clip_high, value_clip
        self.vf_coef, self.entropy_coef, self.ptx_coef = vf_coef, entropy_coef, ptx_coef
        self.gamma, self.lam = gamma, lam
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in = kl_in
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.target_kl, self.max_grad_norm = target_kl, max_grad_norm

    def updates_per_batch(self) -> int:
        return self.inner_epochs * self.minibatches

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        self.phase = "sampling responses"
        rollout = self.rollout(batch)
        self.phase = "computing log-probabilities"
        self.score_tokens(rollout)
        metrics = self.advantages(rollout)
        self.phase = "updating the policy"
        metrics |= self.learn(rollout, batch.ptx)
        self.kl.update(metrics["kl/reference"], int(self.reduce(torch.tensor([float(len(rollout.mask))])).item()))
        self.iteration += 1
        self.log_dict(metrics)

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> dict[str, float]:
        """Fill in rewards, advantages and returns, and return the iteration's outcome metrics."""
        mask, tokens = rollout.mask, rollout.tokens
        scores = self.shaped_scores(rollout).to(self.device)
        tokens["kl"] = kl_estimate(tokens["old_logprobs"], tokens["ref_logprobs"], self.kl_estimator) * mask
        beta = self.kl.beta if self.kl_in == "reward" else 0.0
        rewards = token_rewards(scores, tokens["kl"], mask, beta)
        if self.estimator == "gae":
            if self.whiten_rewards:
                rewards = whiten(rewards, mask, shift_mean=False, reduce=self.reduce)
            tokens["advantages"], tokens["returns"] = gae(rewards, tokens["values"], mask, self.gamma, self.lam)
        else:
            totals = rewards.sum(1).view(-1, rollout.samples)
            per_response = (rloo if self.estimator == "rloo" else grpo)(totals).flatten()
            tokens["advantages"] = per_response[:, None] * mask
        if self.whiten_advantages and self.estimator != "grpo":
            tokens["advantages"] = whiten(tokens["advantages"], mask, reduce=self.reduce)
        response_kl = (tokens["kl"]).sum(1)
        outcome = {
            "reward/proxy": rollout.scores,
            "reward/total": rewards.sum(1),
            "kl/reference": response_kl,
            "rollout/length": mask.sum(1),
            "rollout/ended_with_eos": rollout.finished,
        }
        if self.gold is not None:
            outcome["reward/gold"] = torch.tensor([sample["gold"] for sample in self.samples_seen])
        means = {name: self.mean(values.to(self.device).float()) for name, values in outcome.items()}
        spread = self.mean((rollout.scores.to(self.device) - means["reward/proxy"]) ** 2)
        self.episodes += int(self.reduce(torch.tensor([float(len(mask))])).item())
        return means | {
            "reward/proxy_std": math.sqrt(spread),
            "kl/beta": self.kl.beta,
            "rollout/episodes": float(self.episodes),
        }

    def learn(self, rollout: Rollout, ptx: GroupBatch | None) -> dict[str, float]:
        """Make the inner epochs' updates and return their mean metrics."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        sums: dict[str, float] = {}
        extremes = [1.0, 1.0]
        updates = epochs = 0
        # as many as the rank with the fewest prompts can fill: the ranks update together
        parts = min(self.minibatches, int(self.reduce(torch.tensor([float(len(rollout.groups))]), "min").item()))
        for epoch in range(self.inner_epochs):
            order = torch.randperm(
                len(rollout.groups), generator=generator(self.seed, "ppo", self.iteration, epoch)
            ).tolist()
            moved = 0.0
            for part in range(parts):
                chosen = order[part::parts]
                found = self.minibatch(rollout, chosen, ptx, optimizer, extremes, first=updates == 0)
                if schedule is not None:
                    schedule.step()
                updates += 1
                moved += found["kl/old"] / parts
                sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            epochs += 1
            if self.target_kl is not None and moved > self.target_kl:
                break
        metrics = {name: value / updates for name, value in sums.items()}
        if self.estimator == "gae":
            values, returns = rollout.tokens["values"], rollout.tokens["returns"]
            explained = explained_variance(values, returns, rollout.mask, reduce=self.reduce)
            metrics["value/explained_variance"] = explained.item()
        return metrics | {
            "policy/ratio_min": self.reduce(torch.tensor(extremes[0]), "min").item(),
            "policy/ratio_max": self.reduce(torch.tensor(extremes[1]), "max").item(),
            "ppo/inner_epochs": float(epochs),
            "ppo/updates": float(self.global_step),
            "optim/lr": optimizer.param_groups[0]["lr"],
        }

    def minibatch(
        self,
        rollout: Rollout,
        chosen: list[int],
        ptx: GroupBatch | None,
        optimizer: Any,
        extremes: list[float],
        first: bool,
    ) -> dict[str, float]:
        """Make one update from the groups `chosen` and return its metrics."""
        count = self.reduce(rollout.mask[rollout.rows(chosen)].sum().float()[None]).item()
        share = self.data_ranks / count  # the strategy averages gradients over ranks
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        microbatches = list(rollout.microbatches(chosen))
        mix = ptx is not None and self.ptx_coef > 0
        for number, (rows, batch, counts) in enumerate(microbatches, start=1):
            terms, ratio = self.token_losses(rollout, rows, batch, first)
            if not counts:  # read only because other ranks have one more
                self.backward_part(terms["loss"].sum() * 0.0, last=number == len(microbatches) and not mix)
                continue
            extremes[0], extremes[1] = (
                min(extremes[0], ratio.min().item()),
                max(extremes[1], ratio.max().item()),
            )
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
        return dict(zip(totals, sums.tolist(), strict=True)) | {"optim/grad_norm": norm.item()}

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a part of the loss; ranks reduce with the last one, for their numbers of parts differ."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            self.manual_backward(loss)
        else:
            with strategy.block_backward_sync():
                self.manual_backward(loss)

    def token_losses(
        self, rollout: Rollout, rows: Tensor, batch: GroupBatch, first: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss and the metrics of each counted token (N,), and the ratio pi / pi_old."""
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
        """Stop when the policy that learns is not the policy that sampled: dropout, another mask or temperature."""
        worst, broken = apart(logprobs, old, is_exact(self.policy.lm, self.trainer.precision))
        if broken:
            raise UserError(
                f"pi / pi_old differs from 1 by {worst:.2g} before the first update of iteration {self.iteration}; "
                "switch off dropout (also LoRA's)"
            )


def _check(estimator: str, samples: int, temperature: float, kl: str, kl_in: str, epochs: int, parts: int) -> None:
    """Refuse impossible combinations before anything is loaded."""
    for key, value, options in (
        ("estimator", estimator, ("gae", "rloo", "grpo")),
        ("kl_estimator", kl, ("k1", "k2", "k3")),
        ("kl_in", kl_in, ("reward", "loss")),
    ):
        if value not in options:
            raise UserError(f"ppo.{key}={value!r} is not one of {', '.join(options)}")
    if estimator != "gae" and samples < 2:
        raise UserError(f"{estimator} compares the responses to one prompt: samples={samples} must be at least 2")
    if kl_in == "loss" and kl == "k1":
        raise UserError("kl_in=loss with kl_estimator=k1 has no gradient in expectation; use k2 or k3")
    if temperature <= 0 or epochs < 1 or parts < 1 or samples < 1:
        raise UserError("temperature must be above 0; samples, inner_epochs and minibatches at least 1")
