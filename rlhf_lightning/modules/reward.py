"""Reward models from preferences: Bradley-Terry over pairs, or Plackett-Luce over rankings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.errors import UserError, check_number
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import ScalarModel, unwrap
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, StageModule
from rlhf_lightning.ops.groups import GroupBatch, pack
from rlhf_lightning.ops.ranking import centering, pairwise_ranking, plackett_luce, ranked_pairs


class RewardModel(StageModule):
    """A scalar r(x, y) read at the last token of prompt and response.

    L = mean over prompts of the mean over pairs of -log sigma(r_w - r_l - margin), plus
    `center` * (2 x mean of a prompt's scores)^2, which is (r_w + r_l)^2 for a pair.

    Args:
        loss: "pairwise" for all pairs of a ranking, "plackett_luce" for the ranking as a whole.
        center: weight of the term that keeps scores around 0 (0.01 is usual, 0 is off).
        normalize: store mean and standard deviation of the held-out scores (of the training scores when there are no
            held-out ones) with the model, so that rewards have mean 0 and standard deviation 1.
        Others: see :class:`StageModule`; `load` returns a sequence classifier with one output.
    """

    scorer: ScalarModel
    min_responses = 2

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
        *,
        loss: Literal["pairwise", "plackett_luce"] = "pairwise",
        center: float = 0.01,
        normalize: bool = True,
    ) -> None:
        super().__init__(load, optimizer, schedule, lora)
        if loss not in ("pairwise", "plackett_luce"):
            raise UserError(f"reward.loss={loss!r} is not one of: pairwise, plackett_luce")
        check_number("reward.center", center, "[0, inf)")
        self.loss, self.center, self.normalize = loss, center, normalize
        # count, sum and sum of squares of the scores of all training steps, and of the last validation
        self.moments = {"train": [0.0, 0.0, 0.0], "val": [0.0, 0.0, 0.0]}
        self.calibration = BinaryCalibrationError(n_bins=10, validate_args=False)

    def configure_model(self) -> None:
        if not hasattr(self, "scorer"):
            self.scorer = ScalarModel(self.build())
            config = unwrap(self.scorer.model).config
            config.reward_mean, config.reward_std = 0.0, 1.0
            self.split(self.scorer)

    def trained_model(self) -> Any:
        return self.scorer.model

    def losses(self, batch: GroupBatch, split: str) -> Tensor:
        """Return the loss of each group (G,) and track accuracy and scores."""
        scores = self.scorer(batch)
        pairwise, gaps = pairwise_ranking(scores, batch.ranks, batch.group_of, batch.margins, batch.labels)
        losses = pairwise
        if self.loss == "plackett_luce":
            if batch.margins.any() or (batch.labels != 1).any():
                raise UserError("reward.loss=plackett_luce uses neither margin nor label; use reward.loss=pairwise")
            losses = plackett_luce(scores, batch.ranks, batch.group_of, batch.groups)
        self.track(split, batch.groups, loss=losses.sum())
        better, _ = ranked_pairs(batch.ranks, batch.group_of)
        self.track_pairs(split, batch, better, gaps)
        best = batch.ranks == 0
        self.track(split, best.sum(), chosen_score=scores[best].sum())
        self.track(split, (~best).sum(), rejected_score=scores[~best].sum())
        exact = scores.double()  # exported as mean and deviation, whose difference of squares needs the digits
        self.track(split, len(scores), score_mean=exact.sum(), score_squared=(exact**2).sum())
        if split == "val":
            chance = torch.sigmoid(gaps)  # that the better response wins; both orders of a pair are counted
            ones = torch.ones_like(gaps, dtype=torch.long)
            forecasts, outcomes = torch.cat([chance, 1 - chance]), torch.cat([ones, 1 - ones])
            counted = 0 if self.repeated else len(forecasts)
            self.calibration.update(forecasts[:counted], outcomes[:counted])
        if self.center:
            losses = losses + self.center * centering(scores, batch.group_of, batch.groups)
        return losses

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        return self.checked(self.losses(batch, "train").sum() * batch.per_group, batch)

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.losses(batch, "val")

    def on_validation_epoch_start(self) -> None:
        self.calibration.reset()

    def reduced(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        means, counts = super().reduced(split)
        if means:
            n, mean, square = counts["score_mean"], means["score_mean"], means.pop("score_squared")
            means["score_std"] = math.sqrt(max(square - mean**2, 0.0))
            sums = [n, n * mean, n * square]
            previous = self.moments["train"] if split == "train" else [0.0, 0.0, 0.0]
            self.moments[split] = [old + new for old, new in zip(previous, sums, strict=True)]
        if means and split == "val":
            means["calibration_error"] = self.calibration.compute().item()
        return means, counts

    @torch.no_grad()
    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        """Return every response to the first `count` prompts with its rank, 0 the preferred one, and its score."""
        rows = self.shown_rows(count)
        if not rows:
            return []
        training = self.training
        batch = pack(rows, layout=self.layout).to(self.device)
        scores = self.eval().scorer(batch).tolist()
        self.train(training)
        texts = [
            {"prompt": self.data.tokenizer.decode(row.prompt), "response": self.data.template.decode(response)}
            for row in rows
            for response in row.responses
        ]
        ranks = batch.ranks.tolist()
        return [text | {"rank": r, "score": s} for text, r, s in zip(texts, ranks, scores, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["score_moments"] = self.moments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.moments = checkpoint["score_moments"]

    def export_model(self) -> Any:
        """Return the classifier with the normalization of its scores in `config.reward_mean` and `reward_std`."""
        model = super().export_model()
        count, total, squares = self.moments["val" if self.moments["val"][0] > 1 else "train"]
        if model is not None and self.normalize and count > 1:
            mean = total / count
            model.config.reward_mean = mean
            model.config.reward_std = max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-6)
        return model
