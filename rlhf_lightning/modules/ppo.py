"""Proximal policy optimization from a reward, and the critic-free RLOO and GRPO on the same rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.data.datamodules import PromptBatch
from rlhf_lightning.data.groups import Group, GroupBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.adapters import adapter_off
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.models.reference import Frozen
from rlhf_lightning.models.sampling import Sampler
from rlhf_lightning.modules.base import StageModule, decay_groups
from rlhf_lightning.modules.rewards import FolderReward, Reward, score
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.advantages import explained_variance, gae, grpo, rloo, whiten
from rlhf_lightning.ops.kl import KLController, KLEstimator, kl_estimate, token_rewards
from rlhf_lightning.ops.losses import ppo_policy_loss, ppo_value_loss
from rlhf_lightning.ops.seeding import generator


class PPO(StageModule):
    """One batch of prompts in, one PPO iteration out: sample, score, advantages, inner epochs, one log call.

    The reward of a response is score - beta sum_t kl_t, given per token: -beta kl_t everywhere, the score at the last
    token. The policy loss is -min(r A, clip(r) A) (arXiv 1707.06347), the mean over the tokens of a minibatch.

    Args:
        reward: callable, see :mod:`rlhf_lightning.modules.rewards`.
        gold: the true reward where it is known; only logged.
        load_critic: returns a sequence classifier as critic (usually the reward model); None is a value head on the
            policy's trunk. Used by estimator "gae" only.
        estimator: "gae" (PPO with a critic), "rloo" or "grpo" (`samples` responses a prompt, no critic).
        samples: responses a prompt.
        max_new_tokens, temperature: of sampling; log-probabilities in training use the same temperature.
        inner_epochs, minibatches: passes over the rollout and updates per pass.
        microbatch_tokens: tokens of one forward pass; changes memory, not results.
        clip_low, clip_high: the ratio's range; value_clip: the value's, None is off.
        vf_coef, entropy_coef, ptx_coef: weights of value loss, entropy bonus, and pretraining-mix loss (`data.ptx`).
        gamma, lam: discount and GAE's lambda.
        kl_beta, kl_target, kl_horizon: KL weight, and the target that makes it adaptive.
        kl_estimator: k1, k2 or k3; kl_in: "reward" or "loss" (GRPO).
        whiten_advantages, whiten_rewards: normalize over all counted tokens of all ranks.
        missing_eos_penalty: subtracted from the score of a response that did not end.
        reward_clip: clip scores to +- this; reward_scale: divide scores by their running standard deviation.
        target_kl: stop the inner epochs when the policy has moved this far from the sampling policy.
        max_grad_norm: gradient clipping.
        critic_lr: learning rate of the critic; None is the policy's.
        Others: see :class:`StageModule`.
    """

    policy: CompletionModel
    critic: ScalarModel | None

    def __init__(
        self,
        *args: Any,
        reward: Reward,
        gold: Reward | None = None,
        load_critic: Callable[[], nn.Module] | None = None,
        estimator: Literal["gae", "rloo", "grpo"] = "gae",
        samples: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        inner_epochs: int = 4,
        minibatches: int = 1,
        microbatch_tokens: int = 4096,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        value_clip: float | None = 0.2,
        vf_coef: float = 0.1,
        entropy_coef: float = 0.0,
        ptx_coef: float = 0.0,
        gamma: float = 1.0,
        lam: float = 0.95,
        kl_beta: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        kl_estimator: KLEstimator = "k1",
        kl_in: Literal["reward", "loss"] = "reward",
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        missing_eos_penalty: float = 1.0,
        reward_clip: float | None = None,
        reward_scale: bool = False,
        target_kl: float | None = None,
        max_grad_norm: float = 1.0,
        critic_lr: float | None = None,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        _check(estimator, samples, temperature, kl_estimator, kl_in, inner_epochs, minibatches)
        self.reward, self.gold, self.load_critic = reward, gold, load_critic
        self.estimator, self.samples = estimator, samples
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.inner_epochs, self.minibatches, self.microbatch_tokens = inner_epochs, minibatches, microbatch_tokens
        self.clip_low, self.clip_high, self.value_clip = clip_low, clip_high, value_clip
        self.vf_coef, self.entropy_coef, self.ptx_coef = vf_coef, entropy_coef, ptx_coef
        self.gamma, self.lam = gamma, lam
        self.kl = KLController(kl_beta, kl_target, kl_horizon)
        self.kl_estimator: KLEstimator = kl_estimator
        self.kl_in = kl_in
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.missing_eos_penalty, self.reward_clip, self.reward_scale = missing_eos_penalty, reward_clip, reward_scale
        self.target_kl, self.max_grad_norm, self.critic_lr, self.seed = target_kl, max_grad_norm, critic_lr, seed
        self.iteration, self.episodes = 0, 0
        self.reward_moments = [0.0, 0.0, 0.0]  # count, sum, squares of all scores seen
        self.samples_seen: list[dict[str, Any]] = []  # the last rollout as text, for the samples callback
        self.reference: Frozen[CompletionModel] | None = None

    # ---- building --------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        with_head = self.estimator == "gae" and self.load_critic is None
        self.policy = CompletionModel(self.build(), value_head=with_head)
        self.critic = None
        if self.estimator == "gae" and self.load_critic is not None:
            critic: Any = self.load_critic()
            if choose_layout(critic)[0] != self.layout:
                raise UserError("the critic and the policy need the same token layout; use ppo.critic=value_head")
            self.critic = ScalarModel(critic)
        if self.lora is None:
            self.reference = Frozen(CompletionModel(self.load()))

    def on_fit_start(self) -> None:
        for part in (self.reference, self.reward):
            if isinstance(part, Frozen | FolderReward):
                part.to(self.device)

    def trained_model(self) -> Any:
        return self.policy.lm

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = self.policy.value_head
        policy = decay_groups(self.policy.lm)
        rate = {} if self.critic_lr is None else {"lr": self.critic_lr}
        return [*policy, *(group for part in (head, self.critic) if part is not None for group in decay_groups(part, **rate))]

    def updates_per_batch(self) -> int:
        return self.inner_epochs * self.minibatches

    # ---- one iteration ---------------------------------------------------------------------------------------------

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = self.rollout(batch)
        self.score_tokens(rollout)
        metrics = self.advantages(rollout)
        metrics |= self.update(rollout, batch.ptx)
        self.kl.update(metrics["kl/reference"], rollout.mask.shape[0] * self.trainer.world_size)
        self.iteration += 1
        self.log_dict(metrics)

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, split: str = "train") -> Rollout:
        """Sample `samples` responses to every prompt (one in validation) and score them."""
        n = self.samples if split == "train" else 1
        template = self.data.template
        sampler = Sampler(self.policy.lm, template.eos_ids, self.max_new_tokens, self.temperature)
        parts = (self.seed, split, self.iteration if split == "train" else 0)
        drawn = sampler(batch.prompt_ids, n, parts, batch.index)
        responses = [template.decode(ids) for ids in drawn.responses]
        prompts = [text for text in batch.prompts for _ in range(n)]
        metadata = [extra for extra in batch.metadata for _ in range(n)]
        metadata = [extra | {"finished": done} for extra, done in zip(metadata, drawn.finished, strict=True)]
        scores = score(self.reward, prompts, responses, metadata)
        gold = score(self.gold, prompts, responses, metadata) if self.gold else None
        groups = [Group(p, drawn.responses[i * n : (i + 1) * n]) for i, p in enumerate(batch.prompt_ids)]
        rollout = Rollout(
            groups, n, torch.tensor(drawn.finished), scores, self.layout, self.device, self.microbatch_tokens
        )
        rows = zip(prompts, responses, scores.tolist(), drawn.finished, strict=True)
        self.samples_seen = [
            {"prompt": p, "response": r, "reward": s, "finished": f} | ({"gold": gold[i].item()} if gold is not None else {})
            for i, (p, r, s, f) in enumerate(rows)
        ]
        return rollout

    @torch.no_grad()
    def score_tokens(self, rollout: Rollout) -> None:
        """Fill in log-probabilities under policy and reference, and values."""
        training = self.training
        self.eval()

        def current(batch: GroupBatch) -> dict[str, Tensor]:
            output = self.policy(batch, self.temperature, values=self.policy.value_head is not None)
            found = {"old_logprobs": output.logprobs}
            if output.values is not None:
                found["values"] = output.values
            if self.critic is not None:
                found["values"] = self.critic(batch, at="source")
            if self.reference is not None:
                found["ref_logprobs"] = self.reference(batch, self.temperature).logprobs
            else:
                with adapter_off(self.policy.lm):
                    found["ref_logprobs"] = self.policy(batch, self.temperature).logprobs
            return found

        rollout.fill(current)
        self.train(training)

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
                rewards = whiten(rewards, mask, shift_mean=False, reduce=self.summed)
            tokens["advantages"], tokens["returns"] = gae(rewards, tokens["values"], mask, self.gamma, self.lam)
        else:
            totals = rewards.sum(1).view(-1, rollout.samples)
            per_response = (rloo if self.estimator == "rloo" else grpo)(totals).flatten()
            tokens["advantages"] = per_response[:, None] * mask
        if self.whiten_advantages and self.estimator != "grpo":
            tokens["advantages"] = whiten(tokens["advantages"], mask, reduce=self.summed)
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
        self.episodes += len(mask) * self.trainer.world_size
        return means | {
            "reward/proxy_std": math.sqrt(spread),
            "kl/beta": self.kl.beta,
            "rollout/episodes": float(self.episodes),
        }

    def shaped_scores(self, rollout: Rollout) -> Tensor:
        """Return the scores (S,) after scaling, clipping and the penalty for a missing EOS."""
        scores = rollout.scores
        if self.reward_scale:
            sums = self.summed(torch.stack([torch.tensor(float(len(scores))), scores.sum(), (scores**2).sum()]))
            self.reward_moments = [held + new for held, new in zip(self.reward_moments, sums.tolist(), strict=True)]
            count, total, squares = self.reward_moments
            scores = scores / max(math.sqrt(max(squares / count - (total / count) ** 2, 0.0)), 1e-4)
        if self.reward_clip is not None:
            scores = scores.clamp(-self.reward_clip, self.reward_clip)
        return scores - self.missing_eos_penalty * (~rollout.finished)

    def update(self, rollout: Rollout, ptx: GroupBatch | None) -> dict[str, float]:
        """Make the inner epochs' updates and return their mean metrics."""
        optimizer = self.optimizers()
        schedule = self.lr_schedulers()
        sums: dict[str, float] = {}
        extremes = [1.0, 1.0]
        updates = epochs = 0
        for epoch in range(self.inner_epochs):
            order = torch.randperm(
                len(rollout.groups), generator=generator(self.seed, "ppo", self.iteration, epoch)
            ).tolist()
            moved = 0.0
            for part in range(self.minibatches):
                chosen = order[part :: self.minibatches]
                if not chosen:
                    continue
                found = self.minibatch(rollout, chosen, ptx, optimizer, extremes, first=updates == 0)
                if isinstance(schedule, torch.optim.lr_scheduler.LRScheduler):
                    schedule.step()
                updates += 1
                moved += found["kl/old"] / self.minibatches
                sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
            epochs += 1
            if self.target_kl is not None and moved > self.target_kl:
                break
        metrics = {name: value / updates for name, value in sums.items()}
        if self.estimator == "gae":
            values, returns = rollout.tokens["values"], rollout.tokens["returns"]
            metrics["value/explained_variance"] = explained_variance(values, returns, rollout.mask).item()
        return metrics | {
            "policy/ratio_min": extremes[0],
            "policy/ratio_max": extremes[1],
            "ppo/inner_epochs": float(epochs),
            "ppo/updates": float(self.global_step),
            "optim/lr": optimizer.param_groups[0]["lr"],  # type: ignore[union-attr]
        }

    def minibatch(
        self, rollout: Rollout, chosen: list[int], ptx: GroupBatch | None, optimizer: Any, extremes: list[float], first: bool
    ) -> dict[str, float]:
        """Make one update from the groups `chosen` and return its metrics."""
        count = self.summed(rollout.mask[rollout.rows(chosen)].sum().float()[None]).item()
        share = self.trainer.world_size / count  # the strategy averages gradients over ranks
        optimizer.zero_grad()
        totals: dict[str, Tensor] = {}
        for rows, batch in rollout.microbatches(chosen):
            terms, ratio = self.token_losses(rollout, rows, batch)
            if first:
                self.check_first_ratio(ratio)
            extremes[0], extremes[1] = min(extremes[0], ratio.min().item()), max(extremes[1], ratio.max().item())
            loss = terms.pop("loss").sum() * share
            if not torch.isfinite(loss):
                raise UserError(f"the loss is {loss.item()} in iteration {self.iteration}; lower optimizer.lr")
            self.manual_backward(loss)
            for name, values in terms.items():
                totals[name] = totals.get(name, torch.zeros((), device=self.device)) + values.detach().sum()
        if ptx is not None and self.ptx_coef:
            logprobs = self.policy(ptx).logprobs
            self.manual_backward(-self.ptx_coef * logprobs.mean())
            totals["policy/ptx_loss"] = -logprobs.detach().mean() * count
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        self.clip_gradients(optimizer, gradient_clip_val=self.max_grad_norm, gradient_clip_algorithm="norm")
        optimizer.step()
        sums = self.summed(torch.stack(list(totals.values())).float()) / count
        return dict(zip(totals, sums.tolist(), strict=True)) | {"optim/grad_norm": norm.item()}

    def token_losses(self, rollout: Rollout, rows: Tensor, batch: GroupBatch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss and the metrics of each counted token (N,), and the ratio pi / pi_old."""
        has_head = self.policy.value_head is not None
        output = self.policy(batch, self.temperature, entropy=True, values=has_head)
        old = rollout.flat("old_logprobs", rows)
        assert output.entropy is not None
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

    def check_first_ratio(self, ratio: Tensor) -> None:
        """Stop when the policy that learns is not the policy that sampled: dropout, another mask, another temperature."""
        worst = (ratio - 1).abs().max().item()
        # half precision rounds each log-probability to about 1e-2, float32 to about 1e-5
        if worst > (1e-3 if ratio.dtype == torch.float32 and self.trainer.precision == "32-true" else 0.2):
            raise UserError(
                f"pi / pi_old differs from 1 by {worst:.2g} before the first update of iteration {self.iteration}; "
                "switch off dropout (also LoRA's)"
            )

    # ---- validation, sums over ranks, state ------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = self.rollout(batch, split="val")
        self.score_tokens(rollout)
        kl = ((rollout.tokens["old_logprobs"] - rollout.tokens["ref_logprobs"]) * rollout.mask).sum()
        sums = {"reward": rollout.scores.sum(), "kl": kl.cpu(), "length": rollout.mask.sum().float().cpu()}
        if self.gold is not None:
            sums["gold"] = torch.tensor([sample["gold"] for sample in self.samples_seen]).sum()
        sums["ended_with_eos"] = rollout.finished.float().sum()
        self.track("val", len(rollout.scores), **sums)

    def summed(self, values: Tensor) -> Tensor:
        """Return the sum of a small tensor over ranks."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum").to(values.device)

    def mean(self, values: Tensor) -> float:
        """Return the mean of a vector over ranks."""
        total, count = self.summed(torch.stack([values.sum(), values.new_tensor(float(len(values)))])).tolist()
        return total / max(count, 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ppo"] = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "kl_beta": self.kl.beta,
            "reward_moments": self.reward_moments,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ppo"]
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.kl.beta, self.reward_moments = state["kl_beta"], state["reward_moments"]


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
