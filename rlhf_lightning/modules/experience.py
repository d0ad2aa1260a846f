"""What online RL does before it learns: load the models, sample responses, score them, price their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.data.datamodules import PromptBatch
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.local import Sampler, Samples
from rlhf_lightning.models.adapters import adapter_off
from rlhf_lightning.models.completion import CompletionModel, ScalarModel, choose_layout
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.sharding import most, shared
from rlhf_lightning.modules.base import StageModule, decay_groups
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.groups import Group, GroupBatch
from rlhf_lightning.ops.kl import KLController
from rlhf_lightning.rewards.loading import FolderReward, MeanReward, Reward, score

Estimator = Literal["gae", "rloo", "grpo"]


class Experience(StageModule):
    """The half of PPO that makes a rollout: policy, critic, frozen reference and reward, and what they say.

    Args:
        reward: callable, see :mod:`rlhf_lightning.rewards.loading`.
        gold: the true reward where it is known; only logged.
        load_critic: returns a sequence classifier as critic (usually the reward model); None is a value head on the
            policy's trunk. Used by estimator "gae" only.
        estimator: "gae" (PPO with a critic), "rloo" or "grpo" (`samples` responses a prompt, no critic).
        samples: responses a prompt.
        max_new_tokens, temperature: of sampling; log-probabilities in training use the same temperature.
        microbatch_tokens: tokens of one forward pass; changes memory, not results.
        kl_beta, kl_target, kl_horizon: KL weight, and the target (nats a response) that makes it adaptive.
        missing_eos_penalty: subtracted from the score of a response that did not end.
        reward_clip: clip scores to +- this; reward_scale: divide scores by their running standard deviation.
        critic_lr: learning rate of the critic; None is the policy's.
        sampler: called with (lm, eos_ids, max_new_tokens, temperature) before every rollout; what it returns is called
            as :class:`rlhf_lightning.generation.local.Sampler` is. A generation server may stand here.
        seed: with iteration, row and sample number it decides every sampled token.
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
        estimator: Estimator = "gae",
        samples: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        microbatch_tokens: int = 4096,
        kl_beta: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        missing_eos_penalty: float = 1.0,
        reward_clip: float | None = None,
        reward_scale: bool = False,
        critic_lr: float | None = None,
        sampler: Callable[..., Callable[..., Samples]] = Sampler,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self.reward, self.gold, self.load_critic = reward, gold, load_critic
        self.estimator, self.samples = estimator, samples
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.microbatch_tokens = microbatch_tokens
        self.kl = KLController(kl_beta, kl_target, kl_horizon)
        self.missing_eos_penalty, self.reward_clip, self.reward_scale = (
            missing_eos_penalty,
            reward_clip,
            reward_scale,
        )
        self.critic_lr, self.make_sampler, self.seed = critic_lr, sampler, seed
        self.iteration, self.episodes = 0, 0
        self.reward_moments = [0.0, 0.0, 0.0]  # count, sum, squares of all scores seen
        self.samples_seen: list[dict[str, Any]] = []  # the last rollout as text
        self.rollout_size = (0, 0)  # responses and tokens of the last rollout, for the throughput callback
        self.reference: Frozen[CompletionModel] | None = None

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        with_head = self.estimator == "gae" and self.load_critic is None
        self.policy = self.split(CompletionModel(self.build(), value_head=with_head))
        self.critic = None
        if self.estimator == "gae" and self.load_critic is not None:
            critic: Any = self.load_critic()
            if choose_layout(critic)[0] != self.layout:
                raise UserError("the critic and the policy need the same token layout; use ppo.critic=value_head")
            self.critic = self.split(ScalarModel(critic))
        if self.lora is None:
            self.reference = Frozen(self.split(CompletionModel(self.load())))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        for part in (self.reference, self.reward):
            if isinstance(part, Frozen | FolderReward | MeanReward):
                part.to(self.device)

    def trained_model(self) -> Any:
        return self.policy.lm

    def parameter_groups(self) -> list[dict[str, Any]]:
        head = self.policy.value_head
        policy = decay_groups(self.policy.lm)
        rate = {} if self.critic_lr is None else {"lr": self.critic_lr}
        return [
            *policy,
            *(group for part in (head, self.critic) if part is not None for group in decay_groups(part, **rate)),
        ]

    @torch.no_grad()
    def rollout(self, batch: PromptBatch, split: str = "train") -> Rollout:
        """Sample `samples` responses to every prompt (one in validation) and score them."""
        n = self.samples if split == "train" else 1
        template = self.data.template
        sampler = self.make_sampler(self.policy.lm, template.eos_ids, self.max_new_tokens, self.temperature)
        parts = (self.seed, split, self.iteration if split == "train" else 0)
        drawn = shared(self.device_mesh, sampler(batch.prompt_ids, n, parts, batch.index))
        responses = [template.decode(ids) for ids in drawn.responses]
        prompts = [text for text in batch.prompts for _ in range(n)]
        metadata = [extra for extra in batch.metadata for _ in range(n)]
        metadata = [extra | {"finished": done} for extra, done in zip(metadata, drawn.finished, strict=True)]
        scores = shared(self.device_mesh, score(self.reward, prompts, responses, metadata))
        gold = score(self.gold, prompts, responses, metadata) if self.gold else None
        groups = [Group(p, drawn.responses[i * n : (i + 1) * n]) for i, p in enumerate(batch.prompt_ids)]
        rollout = Rollout(
            groups,
            n,
            torch.tensor(drawn.finished),
            scores,
            self.layout,
            self.device,
            self.microbatch_tokens,
            rounds=partial(most, self.policy.lm),
        )
        self.rollout_size = (len(groups) * n, sum(g.tokens for g in groups))
        rows = zip(prompts, responses, scores.tolist(), drawn.finished, strict=True)
        self.samples_seen = [
            {"prompt": p, "response": r, "reward": s, "finished": f}
            | ({"gold": gold[i].item()} if gold is not None else {})
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
        if self.iteration == 0:
            self.check_reference(rollout)

    def check_reference(self, rollout: Rollout) -> None:
        """Stop when the policy does not start as its reference: then every KL would be measured to something else."""
        found, expected = (rollout.tokens[name][rollout.mask] for name in ("old_logprobs", "ref_logprobs"))
        worst, broken = apart(found, expected, is_exact(self.policy.lm, self.trainer.precision))
        if broken:
            raise UserError(
                f"log pi and log pi_ref differ by {worst:.2g} before the first update: the reference is not the model "
                "that training starts from"
            )

    def shaped_scores(self, rollout: Rollout) -> Tensor:
        """Return the scores (S,) after scaling, clipping and the penalty for a missing EOS."""
        scores = rollout.scores
        if self.reward_scale:
            sums = self.reduce(torch.stack([torch.tensor(float(len(scores))), scores.sum(), (scores**2).sum()]))
            self.reward_moments = [held + new for held, new in zip(self.reward_moments, sums.tolist(), strict=True)]
            count, total, squares = self.reward_moments
            scores = scores / max(math.sqrt(max(squares / count - (total / count) ** 2, 0.0)), 1e-4)
        if self.reward_clip is not None:
            scores = scores.clamp(-self.reward_clip, self.reward_clip)
        return scores - self.missing_eos_penalty * (~rollout.finished)

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

    def text_samples(self, count: int, max_new_tokens: int) -> list[dict[str, Any]]:
        """Return the first responses of the last rollout with their rewards; none before the first rollout."""
        return self.samples_seen[:count]

    def mean(self, values: Tensor) -> float:
        """Return the mean of a vector over ranks."""
        total, count = self.reduce(torch.stack([values.sum(), values.new_tensor(float(len(values)))])).tolist()
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
