"""Online DPO: the policy learns from preferences between its own responses (Guo et al. 2024, arXiv 2402.04792)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean as mean
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from rlhf_lightning.data.template import Template
from rlhf_lightning.errors import UserError, nearest
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule
from rlhf_lightning.modules.dpo import BETAS
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.modules.online import Online
from rlhf_lightning.modules.options import check_ranges
from rlhf_lightning.modules.rollout import Rollout, matched_microbatches
from rlhf_lightning.ops.groups import Group, GroupBatch, GroupList
from rlhf_lightning.ops.logprobs import sequence_sum
from rlhf_lightning.ops.losses import preference_loss
from rlhf_lightning.ops.ranking import count_each, pairs_in_order, text_ranks
from rlhf_lightning.ops.transfer import send
from rlhf_lightning.rewards.pairwise import WinRate, compares
from rlhf_lightning.rewards.scoring import Reward

Loss = Literal["sigmoid", "ipo"]
Pairs = Literal["extremes", "all"]
Labels = Literal["hard", "soft"]
CHOICES = {"loss": get_args(Loss), "pairs": get_args(Pairs), "labels": get_args(Labels)}


@dataclass
class Preferences:
    """The prompts of a rollout, each with the responses that are compared and their ranks.

    Args:
        groups: the best and the worst response of each prompt, or all; equal ranks where there is no preference.
        reference: log pi_ref (K,) of the responses of each group, summed over their tokens.
        scores: (K,) of the responses of each group, with the penalty of a missing EOS.
        metrics: what the choice looked like, means over the prompts with a preference, of all ranks.
    """

    groups: list[Group]
    reference: list[Tensor]
    scores: list[Tensor]
    metrics: dict[str, float]

    def exists(self, place: int) -> bool:
        """Return whether the responses to a prompt are not all of equal rank."""
        return max(self.groups[place].ranks or (0,)) > 0


class OnlineDPO(Online):
    """One batch of prompts in: responses of the policy, a preference between them, and a step of DPO on it.

    L = mean over prompts of -log sigma(beta [(log pi/pi_ref)(y_w) - (log pi/pi_ref)(y_l)]), where y_w is the best and
    y_l the worst of `num_generations` responses of the policy itself (arXiv 2402.04792 algorithm 1). Responses of equal
    score or text are no preference: such a prompt has loss 0.

    Args:
        reward: scores responses; or compares them, see :mod:`rlhf_lightning.rewards.pairwise`.
        num_generations: responses per prompt, at least 2.
        pairs: "extremes" compares the best with the worst response, "all" is the mean over all pairs of a prompt.
        labels: "hard" is certain that the response of the higher score is better, "soft" with the probability that the
            scores say: sigma of their difference (Bradley-Terry), of a judge its own. With soft labels the optimum is
            that of PPO, pi_ref exp(r / beta) / Z; with hard ones the margins of pairs grow without bound.
        beta: weight of the implicit KL to the reference; larger stays closer to it. None is that of the loss: 0.1
            (sigmoid), 0.5 (ipo).
        loss: sigmoid, or ipo of log-probabilities averaged over a response, see
            :func:`rlhf_lightning.ops.losses.preference_loss`.
        num_minibatches: updates per rollout; with more than one the later ones learn from responses that the policy
            before them sampled (studied in arXiv 2410.18252).
        max_grad_norm: clips the gradient norm; 0 is off.
        Others: see :class:`Online`.
    """

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
        num_generations: int = 2,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        microbatch_tokens: int = 4096,
        missing_eos_penalty: float = 1.0,
        missing_eos_score: float | None = None,
        pairs: Pairs = "extremes",
        labels: Labels = "hard",
        beta: float | None = None,
        loss: Loss = "sigmoid",
        num_minibatches: int = 1,
        max_grad_norm: float = 1.0,
        offload: bool = False,
        seed: int = 0,
    ) -> None:
        for key, value in (("loss", loss), ("pairs", pairs), ("labels", labels)):
            if value not in CHOICES[key]:
                hint = nearest(value, CHOICES[key])
                raise UserError(f"online_dpo.{key}={value!r} is not one of {', '.join(CHOICES[key])}.{hint}")
        beta = BETAS[loss] if beta is None else beta
        check_ranges("online_dpo", locals())
        if num_generations < 2:
            raise UserError(
                f"online_dpo compares responses to one prompt: num_generations={num_generations} must be at least 2"
            )
        super().__init__(
            load, optimizer, schedule, lora, reward=reward, gold=gold, engine=engine, template=template,
            num_generations=num_generations, max_new_tokens=max_new_tokens, temperature=temperature,
            microbatch_tokens=microbatch_tokens, missing_eos_penalty=missing_eos_penalty,
            missing_eos_score=missing_eos_score, offload=offload, seed=seed,
        )  # fmt: skip
        self.automatic_optimization = False
        self.pairs: Pairs = pairs
        self.labels: Labels = labels
        self.loss: Loss = loss
        self.beta, self.num_minibatches, self.max_grad_norm = beta, num_minibatches, max_grad_norm

    def updates_per_batch(self) -> int:
        return self.num_minibatches

    def scorer(self, n: int) -> Reward:
        """Return the reward, or how often it prefers a response to the other n - 1 where it compares them."""
        return WinRate(self.reward, n) if n > 1 and compares(self.reward) else self.reward

    def training_step(self, batch: GroupList, batch_idx: int) -> None:
        rollout = self.rollout(batch)  # 1. responses and their scores
        self.logprobs(rollout)  # 2. log-probs of policy and reference
        rollout.tokens["kl"] = (rollout.tokens["old_logprobs"] - rollout.tokens["ref_logprobs"]) * rollout.mask
        preferences = self.preferences(rollout)  # 3. which response to a prompt is the better one
        metrics = self.outcomes(rollout) | preferences.metrics | self.update(rollout, preferences)  # 4. DPO
        self.iteration += 1
        self.log_dict(metrics)

    # ---- preferences -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def preferences(self, rollout: Rollout) -> Preferences:
        """Rank the responses to every prompt by their scores, less the penalty of a missing EOS."""
        shaped, n = self.shaped_scores(rollout), rollout.num_generations
        reference = (rollout.tokens["ref_logprobs"] * rollout.mask).sum(1)
        groups: list[Group] = []
        summed: list[Tensor] = []
        scores: list[Tensor] = []
        chosen: list[int] = []
        rejected: list[int] = []
        for place, group in enumerate(rollout.groups):
            rows = slice(place * n, (place + 1) * n)
            ranks = text_ranks(rollout.texts[rows], shaped[rows].tolist())
            best, worst = ranks.index(0), ranks.index(max(ranks))
            if best != worst:
                chosen.append(rows.start + best)
                rejected.append(rows.start + worst)
            kept = list(range(n)) if self.pairs == "all" else [best, worst] if best != worst else [0, 1]
            responses = [group.responses[k] for k in kept]
            groups.append(Group(group.prompt, responses, ranks=[ranks[k] for k in kept], index=group.index))
            summed.append(reference[rows][kept])
            scores.append(shaped[rows][kept].to(self.device))
        lengths = rollout.mask.sum(1).float()
        metrics = {"online_dpo/ties": 1 - self.mean(torch.tensor([float(max(g.ranks or ()) > 0) for g in groups]))}
        for name, members in (("chosen", chosen), ("rejected", rejected)):
            metrics[f"reward/{name}"] = self.mean(rollout.scores[members])
            metrics[f"rollout/{name}_length"] = self.mean(lengths[members])
        return Preferences(groups, summed, scores, metrics)

    # ---- update ----------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, preferences: Preferences) -> dict[str, float]:
        """Make an update from each minibatch of prompts, and return the means over the iteration's pairs."""
        self.phase = "updating the policy"
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        norms: list[float] = []
        for places in self.minibatches(rollout, self.num_minibatches, "online_dpo", self.iteration):
            norms.append(self.minibatch(rollout, preferences, places, optimizer, first=not norms))
            if schedule is not None:
                schedule.step()
        means, _ = self.reduced("update")
        return {f"policy/{name}": value for name, value in means.items()} | {
            "online_dpo/updates": float(self.global_step),
            "optim/grad_norm": mean(norms),
            "optim/lr": optimizer.param_groups[0]["lr"],
        }

    def minibatch(
        self, rollout: Rollout, preferences: Preferences, places: list[int], optimizer: Any, first: bool
    ) -> float:
        """Make one update from the prompts at `places`; return its gradient norm before clipping."""
        prompts = self.reduce(torch.tensor([float(len(places))])).item()
        compared = [place for place in places if preferences.exists(place)]
        optimizer.zero_grad()
        # ranks reduce gradients together, so one without a preference makes a dummy pass
        microbatches = list(
            matched_microbatches(
                preferences.groups, compared, self.microbatch_tokens, self.layout, lambda n: max(rollout.rounds(n), 1)
            )
        )
        losses: list[Tensor] = []
        for number, (members, batch, is_real) in enumerate(microbatches, start=1):
            reference, scores = (
                torch.cat([of[m] for m in members]) for of in (preferences.reference, preferences.scores)
            )
            of_groups = self.losses(send(batch, self.device), reference, scores, is_real, first)
            losses.append(of_groups.sum() * (self.data_ranks / prompts * float(is_real)))
            self.backward_part(losses[-1], last=number == len(microbatches))
        norms, _ = self.read_update({"optim/grad_norm": self.policy.lm}, losses)
        self.clip(norms["optim/grad_norm"], self.max_grad_norm, self.policy.lm.parameters())
        optimizer.step()
        return norms["optim/grad_norm"]

    def losses(
        self, batch: GroupBatch, reference: Tensor, scores: Tensor, is_real: bool = True, first: bool = False
    ) -> Tensor:
        """Return the loss of each group (G,), a mean over its pairs, and track rewards and accuracy.

        Args:
            reference: log pi_ref (S,) of the responses.
            scores: (S,) of the responses.
            is_real: whether its preferences count.
            first: the policy is still the one that sampled.
        """
        logprobs = sequence_sum(self.policy(batch, self.temperature).logprobs, batch.sequence_ids, batch.sequences)
        reference = reference.to(logprobs.dtype)
        if first and self.iteration == 0:
            self.check_start(logprobs / batch.lengths, reference / batch.lengths)
        ratios = (logprobs - reference) / (batch.lengths if self.loss == "ipo" else 1.0)
        better, worse = batch.better, batch.worse
        group = batch.group_of[better]
        pairs = count_each(group, batch.groups).clamp_min(1)
        label = self.probability(scores[better] - scores[worse]) if self.labels == "soft" else 1.0
        each = preference_loss(ratios[better] - ratios[worse], self.beta, self.loss, label)
        losses = logprobs.new_zeros(batch.groups).index_add(0, group, each) / pairs
        self.track_update(losses, self.beta * ratios.detach(), better, worse, float(is_real))
        return losses

    def probability(self, gaps: Tensor) -> Tensor:
        """Return the probability (P,) that the better response is better, from the difference of the scores."""
        return (0.5 + gaps / 2).clamp(max=1.0) if compares(self.reward) else gaps.sigmoid()

    def track_update(self, losses: Tensor, rewards: Tensor, better: Tensor, worse: Tensor, real: float) -> None:
        """Track means over prompts (G,) and pairs (P,); a dummy pass tracks the same names, as ranks do."""
        chosen, rejected = rewards[better], rewards[worse]
        accuracy = pairs_in_order(chosen - rejected)
        self.track("update", len(losses) * real, loss=losses.sum() * real)
        sums = {"accuracy": accuracy, "margin": chosen - rejected, "chosen_reward": chosen, "rejected_reward": rejected}
        self.track("update", len(chosen) * real, **{name: values.sum() * real for name, values in sums.items()})

    def check_start(self, logprobs: Tensor, expected: Tensor) -> None:
        """Raise a UserError when the policy that learns is not its reference before the first update: dropout."""
        worst, broken = apart(logprobs, expected, is_exact(self.policy.lm, self.trainer.precision))
        if broken:
            raise UserError(
                f"log pi and log pi_ref differ by {worst:.2g} per token before the first update; switch off dropout "
                "(also LoRA's)"
            )
