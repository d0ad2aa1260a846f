"""Supervised fine-tuning: cross-entropy on response tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import CompletionModel
from rlhf_lightning.modules.base import StageModule
from rlhf_lightning.modules.responses import sampled_responses
from rlhf_lightning.ops.groups import GroupBatch


class SFT(StageModule):
    """Maximizes the likelihood of demonstrations: L = -1/N sum_n log pi(y_n | prompt, y_<n), N over the whole step."""

    policy: CompletionModel

    def configure_model(self) -> None:
        if not hasattr(self, "policy"):
            self.policy = self.split(CompletionModel(self.build()))

    def trained_model(self) -> Any:
        return self.policy.lm

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        logprobs = self.policy(batch).logprobs
        self.track("train", len(logprobs), loss=-logprobs.sum())
        return self.checked(-logprobs.sum() * batch.per_token, batch)

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        logprobs = self.policy(batch).logprobs
        self.track("val", len(logprobs), loss=-logprobs.sum())

    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        return sampled_responses(engine, self.policy.lm, self.data, self.shown_rows(count), max_new_tokens)
