"""Direct preference optimization and its variants: the policy learns from preferences without a reward model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.adapters import adapter_off
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.models.frozen import Frozen
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, StageModule
from rlhf_lightning.modules.cached_reference import CachedReference
from rlhf_lightning.modules.invariants import apart, is_exact
from rlhf_lightning.modules.responses import sampled_responses
from rlhf_lightning.ops.groups import GroupBatch
from rlhf_lightning.ops.logprobs import sequence_sum
from rlhf_lightning.ops.losses import PREFERENCE_LOSSES, PreferenceLoss, preference_loss
from rlhf_lightning.ops.ranking import count_each

REFERENCES = ("auto", "live", "cached", "adapter_off")
BETAS: dict[PreferenceLoss, float] = {"sigmoid": 0.1, "robust": 0.1, "ipo": 0.5, "simpo": 2.0}
"""Default beta. The last two weigh log-probabilities per token, which are smaller than sums by the length. IPO's goal
is 1 / (2 beta) nats per token; SimPO's beta is 2 to 2.5 (arXiv 2405.14734)."""
SIMPO_MARGIN = 0.5
"""Default of SimPO's gamma, as a share of beta (arXiv 2405.14734)."""


class DPO(StageModule):
    """L = mean over pairs of -log sigma(beta [(log pi/pi_ref)(y_w) - (log pi/pi_ref)(y_l)]), or a variant of it.

    Args:
        beta: weight of the implicit KL to the reference; larger stays closer to it. None is that of the loss:
            0.1 (sigmoid, robust), 0.5 (ipo), 2 (simpo).
        loss: sigmoid, ipo, robust, or simpo, see :func:`rlhf_lightning.ops.losses.preference_loss`.
        label_smoothing: assumed share of wrong labels: conservative DPO with "sigmoid", unbiased with "robust".
        length_normalized: average log-probabilities over a response instead of summing them; always so for ipo, simpo.
        target_margin: SimPO's gamma; None is beta / 2 for simpo.
        sft_coef: weight of an SFT loss on the best response (RPO, arXiv 2404.19733).
        reference: "live" keeps a frozen copy of the start weights, "cached" reads its log-probabilities from disk
            (computed once, by content), "adapter_off" switches LoRA off; "auto" is adapter_off with LoRA, else live.
        Others: see :class:`StageModule`.
    """

    policy: CompletionModel
    min_responses = 2

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        beta: float | None = None,
        loss: PreferenceLoss = "sigmoid",
        label_smoothing: float = 0.0,
        length_normalized: bool = False,
        target_margin: float | None = None,
        sft_coef: float = 0.0,
        reference: Literal["auto", "live", "cached", "adapter_off"] = "auto",
    ) -> None:
        super().__init__(load, optimizer, schedule, lora)
        for key, value, options in (("loss", loss, PREFERENCE_LOSSES), ("reference", reference, REFERENCES)):
            if value not in options:
                raise UserError(f"dpo.{key}={value!r} is not one of {', '.join(options)}.{nearest(value, options)}")
        beta = BETAS[loss] if beta is None else beta
        check_number("dpo.beta", beta, "(0, inf)")
        if target_margin is None:
            target_margin = SIMPO_MARGIN * beta if loss == "simpo" else 0.0
        check_number("dpo.target_margin", target_margin, "[0, inf)")
        check_number("dpo.label_smoothing", label_smoothing, "[0, 0.5)")
        check_number("dpo.sft_coef", sft_coef, "[0, inf)")
        if label_smoothing and loss in ("ipo", "simpo"):
            raise UserError(f"dpo.label_smoothing is for dpo.loss=sigmoid and robust; {loss} does not use it")
        if target_margin and loss != "simpo":
            raise UserError(f"dpo.target_margin is SimPO's; dpo.loss={loss} does not use it")
        if reference == "auto":
            reference = "adapter_off" if self.lora is not None else "live"
        if reference == "adapter_off" and self.lora is None:
            raise UserError("dpo.reference=adapter_off needs a LoRA adapter; add adapter=lora")
        if reference in ("live", "cached") and (self.lora or {}).get("quantization") and loss != "simpo":
            raise UserError(
                f"dpo.reference={reference} is the model before its weights were put into 4 bits, which is not what "
                "training starts from; with adapter=qlora use adapter_off"
            )
        self.loss: PreferenceLoss = loss
        self.beta, self.label_smoothing, self.target_margin = beta, label_smoothing, target_margin
        self.averaged = length_normalized or loss in ("ipo", "simpo")
        self.sft_coef = sft_coef
        self.reference_kind = "none" if loss == "simpo" else reference
        self.reference: Frozen[CompletionModel] | None = None
        self.cached: CachedReference | None = None
        self.precision: Any = None  # the Trainer's, once it trains

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = self.split(CompletionModel(self.build()))
            if self.reference_kind == "live":
                self.reference = Frozen(self.split(CompletionModel(self.build(self.load)), frozen=True))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.precision = self.trainer.precision
        if self.reference is not None:
            self.reference.to(self.device)
        if self.reference_kind == "cached":
            reference = Frozen(CompletionModel(self.load())).to(self.device)
            self.cached = CachedReference(reference, self.data, self.layout)

    def trained_model(self) -> Any:
        return self.policy.lm

    @torch.no_grad()
    def reference_logprobs(self, batch: GroupBatch, split: str) -> Tensor:
        """Return log pi_ref of each response (S,), summed over its tokens in the loss mask."""
        if self.reference_kind == "none":
            return torch.zeros(batch.sequences, device=batch.last.device)
        if self.cached is not None:
            return self.cached(batch, split)
        if self.reference is not None:
            logprobs = self.reference(batch).logprobs
        else:
            training = self.policy.training
            self.policy.eval()
            with adapter_off(self.policy.lm):
                logprobs = self.policy(batch).logprobs
            self.policy.train(training)
        return sequence_sum(logprobs, batch.sequence_ids, batch.sequences)

    def check_reference(self, logprobs: Tensor, expected: Tensor) -> None:
        """Raise a UserError when the policy does not start as its reference: dropout, or another reference."""
        worst, broken = apart(logprobs, expected, is_exact(self.policy.lm, self.precision))
        if broken and self.reference_kind != "none":
            raise UserError(
                f"log pi and log pi_ref differ by {worst:.2g} per token before the first update: the reference is not "
                "the model that training starts from; switch off dropout (model.load.dropout)"
            )

    def losses(self, batch: GroupBatch, split: str) -> Tensor:
        """Return the loss of each group (G,) and track rewards, accuracy and log-probabilities."""
        summed = sequence_sum(self.policy(batch).logprobs, batch.sequence_ids, batch.sequences)
        reference = self.reference_logprobs(batch, split).to(summed.dtype)
        if split == "train" and self.precision is not None and self.global_step == 0:
            self.check_reference(summed / batch.lengths, reference / batch.lengths)
        scale = batch.lengths.to(summed.dtype) if self.averaged else 1.0
        ratios = (summed - reference) / scale
        better, worse = batch.better, batch.worse
        group = batch.group_of[better]
        pairs = count_each(group, batch.groups).clamp_min(1)
        losses = preference_loss(
            ratios[better] - ratios[worse],
            self.beta,
            self.loss,
            batch.labels[group],
            self.label_smoothing,
            self.target_margin,
        )
        losses = losses.new_zeros(batch.groups).index_add(0, group, losses) / pairs
        best = batch.ranks == 0
        rewards = self.beta * ratios.detach()
        gaps = rewards[better] - rewards[worse]
        self.track(split, batch.groups, loss=losses.sum())
        self.track_pairs(split, batch, better, gaps)
        for name, kept in (("chosen", best), ("rejected", ~best)):
            sums = {f"{name}_reward": rewards, f"{name}_logprob": summed}
            self.track(split, kept.sum(), **{key: values.where(kept, 0.0).sum() for key, values in sums.items()})
        if self.sft_coef:
            mean = (summed / batch.lengths).where(best, 0.0)
            firsts = torch.zeros_like(losses).index_add(0, batch.group_of, best.to(losses.dtype))
            nll = -losses.new_zeros(batch.groups).index_add(0, batch.group_of, mean) / firsts
            losses = losses + self.sft_coef * nll
        return losses

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        return self.checked(self.losses(batch, "train").sum() * batch.per_group, batch)

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.losses(batch, "val")

    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        return sampled_responses(engine, self.policy.lm, self.data, self.shown_rows(count), max_new_tokens)
