"""What online methods share: a policy that generates, a frozen reference, and a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine, truncation
from rlhf_lightning.models.adapters import adapter_off
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.models.sharding import max_over_ranks
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, decay_groups
from rlhf_lightning.modules.generating import Generating
from rlhf_lightning.modules.invariants import apart, engine_difference, is_exact
from rlhf_lightning.modules.rollout import Rollout
from rlhf_lightning.ops.advantages import moments
from rlhf_lightning.ops.groups import GroupBatch, GroupList
from rlhf_lightning.ops.seeding import permutation
from rlhf_lightning.ops.statistics import RunningMoments
from rlhf_lightning.ops.transfer import numbers
from rlhf_lightning.rewards.scoring import Reward, to_device


class Online(Generating):
    """A stage that learns from rewards of its own responses.

    Args:
        reward: callable, see :mod:`rlhf_lightning.rewards.scoring`.
        gold: the true reward where it is known; only logged.
        microbatch_tokens: tokens per forward pass; changes memory, not results.
        missing_eos_penalty: subtracted from the score of a response that did not end with EOS.
        missing_eos_score: the score of such a response, in place of the reward's opinion of a cut text less the
            penalty (-1 in arXiv 2403.17031); None is off.
        reward_clip: clip scores to +- this; reward_scale: divide scores by their running standard deviation.
        offload: keep reference and reward model on the CPU but for the phase of an iteration that needs them.
        Others: see :class:`Generating`.
    """

    policy: CompletionModel

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        reward: Reward,
        gold: Reward | None = None,
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
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            load, optimizer, schedule, lora, engine=engine, template=template, num_generations=num_generations,
            max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
        )  # fmt: skip
        self.reward, self.gold, self.microbatch_tokens = reward, gold, microbatch_tokens
        if part := truncation(self.engine):
            raise UserError(
                f"sampler.{part}: the log-probabilities in KL and ratio are those of the whole distribution, so online "
                "methods sample from the whole one; leave sampler.top_k at 0 and sampler.top_p at 1"
            )
        self.missing_eos_penalty, self.missing_eos_score = missing_eos_penalty, missing_eos_score
        self.reward_clip, self.reward_scale = reward_clip, reward_scale
        if offload and lora is not None and not hasattr(reward, "to"):
            raise UserError(
                "offload=true has nothing to move: with an adapter the reference is the policy with it switched off, "
                "and the reward is no model"
            )
        self.offload = offload
        self.iteration, self.episodes = 0, 0
        self.reward_moments = RunningMoments()
        self.samples_seen: list[dict[str, Any]] = []  # the last rollout as text
        self.last_rollout: Rollout | None = None  # of training, for the histograms callback
        self.rollout_size = (0, 0)  # responses and tokens of the last rollout, for the throughput callback
        self.reference: Frozen[CompletionModel] | None = None

    def configure_model(self) -> None:
        if hasattr(self, "policy"):
            return
        self.policy = self.split(self.build_policy())
        if self.lora is None:
            self.reference = Frozen(self.split(CompletionModel(self.build(self.load)), frozen=True))

    def build_policy(self) -> CompletionModel:
        """Return the policy, not yet sharded."""
        return CompletionModel(self.build())

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.offload and self.device_mesh is not None:
            raise UserError(
                "offload=true keeps whole models on the CPU, and this strategy shards them; use strategy=ddp"
            )
        for part in (self.reference, self.reward):
            to_device(part, "cpu" if self.offload else self.device)

    @contextmanager
    def needed(self, part: Any) -> Iterator[None]:
        """Have a frozen model on the device of the module for a while, where `offload` keeps it on the CPU."""
        try:
            if self.offload:
                to_device(part, self.device)
            yield
        finally:
            if self.offload:
                to_device(part, "cpu")

    def scores(self, reward: Reward, *texts: Any) -> dict[str, Tensor]:
        with self.needed(None if reward is self.gold else self.reward):
            return super().scores(reward, *texts)

    def trained_model(self) -> Any:
        return self.policy.lm

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.policy.lm)

    def scorer(self, n: int) -> Reward:
        """Return what scores n responses to each of some prompts, in their order."""
        return self.reward

    @torch.no_grad()
    def rollout(self, prompts: GroupList, split: str = "train") -> Rollout:
        """Generate `num_generations` responses to every prompt (one in validation) and score them."""
        self.phase = "generating responses"
        self.zero_grad()  # those of the last update: memory that sampling can use
        n = self.num_generations if split == "train" else 1
        parts = (split, self.iteration if split == "train" else 0)
        answers = self.generate(prompts, n, parts, reward=self.scorer(n), gold=self.gold)
        if split == "train":
            self.engine.sleep()
        rollout = Rollout(
            answers.groups(prompts.groups),
            n,
            torch.tensor(answers.finished),
            answers.scores["reward"],
            self.layout,
            self.device,
            self.microbatch_tokens,
            rounds=partial(max_over_ranks, self.policy.lm),
            gold=answers.scores.get("gold"),
            texts=answers.texts,
            parts={name: values for name, values in answers.scores.items() if name not in ("reward", "gold")},
            places=prompts.places if prompts.places is not None else self.strided(len(prompts)),
        )
        if answers.logprobs is not None:
            rollout.keep("engine_logprobs", answers.logprobs)
        if split == "train":
            self.last_rollout = rollout
        self.rollout_size = (len(answers.texts), sum(group.tokens for group in rollout.groups))
        columns = {"prompt": answers.prompts, "response": answers.texts, "reward": rollout.scores.tolist()}
        columns |= {"finished": answers.finished}
        columns |= {} if rollout.gold is None else {"gold": rollout.gold.tolist()}
        columns |= {name: values.tolist() for name, values in rollout.parts.items()}
        self.samples_seen = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return rollout

    @torch.no_grad()
    def logprobs(self, rollout: Rollout) -> None:
        """Fill in log-probabilities under the policy and the reference."""
        self.phase = "computing log-probabilities"
        training = self.training
        self.eval()
        with self.needed(self.reference):
            rollout.fill(self.forward_logprobs)
        self.train(training)
        if self.iteration == 0:
            self.check_reference(rollout)

    def forward_logprobs(self, batch: GroupBatch) -> dict[str, Tensor]:
        """Return old_logprobs and ref_logprobs (N,) of a microbatch."""
        logprobs = {"old_logprobs": self.policy(batch, self.temperature).logprobs}
        return logprobs | {"ref_logprobs": self.forward_reference(batch)}

    def forward_reference(self, batch: GroupBatch) -> Tensor:
        """Return the reference's log-probabilities (N,) of a microbatch; with LoRA it is the adapter switched off."""
        if self.reference is not None:
            return self.reference(batch, self.temperature).logprobs
        with adapter_off(self.policy.lm):
            return self.policy(batch, self.temperature).logprobs

    def check_reference(self, rollout: Rollout) -> None:
        """Raise a UserError when the policy does not start as its reference: every KL would be to another model."""
        logprobs, expected = (rollout.tokens[name][rollout.mask] for name in ("old_logprobs", "ref_logprobs"))
        worst, broken = apart(logprobs, expected, is_exact(self.policy.lm, self.trainer.precision))
        if broken:
            raise UserError(
                f"log pi and log pi_ref differ by {worst:.2g} before the first update: the reference is not the model "
                "that training starts from"
            )

    def shaped_scores(self, rollout: Rollout) -> Tensor:
        """Return the scores (S,) after scaling, clipping, and the penalty or the fixed score of a missing EOS."""
        scores, finished = rollout.scores, rollout.finished
        if self.reward_scale:
            judged = finished if self.missing_eos_score is not None else torch.ones_like(finished)
            count = self.reduce(judged.sum().double()[None]).item()
            mean, variance = moments(scores.double(), judged, self.reduce)
            self.reward_moments.add(count, mean.item(), variance.item())
            # scores that are all equal have no scale
            scores = scores / (self.reward_moments.std if self.reward_moments.std > 1e-4 else 1.0)
        if self.reward_clip is not None:
            scores = scores.clamp(-self.reward_clip, self.reward_clip)
        if self.missing_eos_score is not None:
            return torch.where(finished, scores, self.missing_eos_score)
        return scores - self.missing_eos_penalty * (~finished)

    def outcomes(self, rollout: Rollout) -> dict[str, float]:
        """Return means over the responses of all ranks: rewards, KL and lengths; count the responses."""
        tokens = rollout.tokens
        outcome = {
            "reward/proxy": rollout.scores,
            "kl/reference": tokens["kl"].sum(1),
            "rollout/length": rollout.mask.sum(1),
            "rollout/ended_with_eos": rollout.finished,
        }
        if rollout.gold is not None:
            outcome["reward/gold"] = rollout.gold
        for name, values in rollout.parts.items():  # reward_<group> is the proxy's
            outcome[f"reward/{name.replace('reward_', 'proxy_', 1)}"] = values
        means = {name: self.mean(values.to(self.device).float()) for name, values in outcome.items()}
        spread = self.mean((rollout.scores.to(self.device) - means["reward/proxy"]) ** 2)
        means |= engine_difference(rollout, self.reduce)
        self.episodes += int(self.reduce(torch.tensor([float(len(rollout.mask))])).item())
        return means | {"reward/proxy_std": math.sqrt(spread), "rollout/episodes": float(self.episodes)}

    def minibatches(self, rollout: Rollout, count: int, *seed_parts: int | str) -> list[list[int]]:
        """Return which of this rank's prompts are in each of `count` minibatches, the same on any number of ranks.

        Those of all ranks are permuted together; with fewer prompts than `count` there is a minibatch for each.
        """
        everywhere = torch.cat(self.gather(torch.tensor(rollout.places, device=self.device))).sort().values.tolist()
        mine = {place: own for own, place in enumerate(rollout.places)}
        order = [everywhere[number] for number in permutation(len(everywhere), self.seed, *seed_parts).tolist()]
        parts = min(count, len(order))
        return [[mine[place] for place in order[part::parts] if place in mine] for part in range(parts)]

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a part of the loss; ranks reduce with the last one, as their numbers of parts differ."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            self.manual_backward(loss)
        else:
            with strategy.block_backward_sync():
                self.manual_backward(loss)

    def read_update(
        self, parts: dict[str, nn.Module], losses: list[Tensor], **measured: Tensor | list[Tensor]
    ) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Read what an update measured from the device, all at once, before the weights change.

        Args:
            parts: name of a metric -> the module of whose gradients it is the norm.
            losses: of the microbatches.

        Returns:
            The norms, and the numbers of `measured`.

        Raises:
            UserError: a loss is not finite.
        """
        norms = [self.gradient_norm(part.parameters()) for part in parts.values()]
        read = numbers(norms=norms, losses=losses, **measured)
        for loss in read["losses"]:
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} in iteration {self.iteration}; lower optimizer.lr")
        return dict(zip(parts, read["norms"], strict=True)), read

    @torch.no_grad()
    def validation_step(self, batch: GroupList, batch_idx: int) -> None:
        rollout = self.rollout(batch, split="val")
        self.logprobs(rollout)
        kl = ((rollout.tokens["old_logprobs"] - rollout.tokens["ref_logprobs"]) * rollout.mask).sum()
        sums = {"reward": rollout.scores.sum(), "kl": kl.cpu(), "length": rollout.mask.sum().float().cpu()}
        if rollout.gold is not None:
            sums["gold"] = rollout.gold.sum()
        sums |= {name: values.sum() for name, values in rollout.parts.items()}
        sums["ended_with_eos"] = rollout.finished.float().sum()
        self.track("val", len(rollout.scores), **sums)

    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        """Return the first responses of the last rollout with their rewards; none before the first rollout."""
        return self.samples_seen[:count]

    def mean(self, values: Tensor) -> float:
        """Return the mean of a vector over ranks."""
        total, count = self.reduce(torch.stack([values.sum(), values.new_tensor(float(len(values)))])).tolist()
        return total / max(count, 1.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["online"] = {
            "iteration": self.iteration,
            "episodes": self.episodes,
            "reward_moments": asdict(self.reward_moments),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["online"]
        self.iteration, self.episodes = state["iteration"], state["episodes"]
        self.reward_moments = RunningMoments(**state["reward_moments"])
