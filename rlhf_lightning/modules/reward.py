"""Reward models from preferences: Bradley-Terry over pairs, or Plackett-Luce over rankings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError

from rlhf_lightning.data.base import RowData
from rlhf_lightning.errors import UserError, check_number, nearest
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.completion import ScalarModel, unwrap
from rlhf_lightning.models.heads import check_names, with_heads
from rlhf_lightning.modules.base import MakeOptimizer, MakeSchedule, StageModule
from rlhf_lightning.ops.groups import GroupBatch, pack
from rlhf_lightning.ops.ranking import centering, pairs_in_order, pairwise_ranking, plackett_luce
from rlhf_lightning.ops.transfer import send


class RewardModel(StageModule):
    """A scalar r(x, y) read at the last token of prompt and response.

    L = mean over prompts of the mean over pairs of -log sigma(r_w - r_l - margin), plus
    `center` * (2 x mean of a prompt's scores)^2, which is (r_w + r_l)^2 for a pair.

    With `groups` it has a head for each group of annotators on the same trunk. A prompt that a group ranked trains that
    group's head; one that names no group trains every head, with the mean of their losses: whose judgment it is, is
    not known, and so it is taken for everybody's.

    Args:
        loss: "pairwise" for all pairs of a ranking, "plackett_luce" for the ranking as a whole.
        center: weight of the term that keeps scores around 0 (0.01 is usual, 0 is off).
        normalize: store mean and standard deviation of the held-out scores (of the training scores when there are no
            held-out ones) with the model, so that rewards have mean 0 and standard deviation 1.
        groups: names of the groups; None is one head, whose judgment a row is does not matter then.
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
        groups: Sequence[str] | None = None,
    ) -> None:
        self.groups = None if groups is None else check_names(groups)
        super().__init__(partial(with_heads, load, self.groups), optimizer, schedule, lora)
        if loss not in ("pairwise", "plackett_luce"):
            raise UserError(f"reward.loss={loss!r} is not one of: pairwise, plackett_luce")
        check_number("reward.center", center, "[0, inf)")
        self.loss, self.center, self.normalize = loss, center, normalize
        # of each head count, sum and sum of squares of the scores of all training steps, and of the last validation
        self.moments = {split: [[0.0, 0.0, 0.0] for _ in self.groups or [""]] for split in ("train", "val")}
        self.calibration = BinaryCalibrationError(n_bins=10, validate_args=False)

    def configure_model(self) -> None:
        if not hasattr(self, "scorer"):
            self.scorer = ScalarModel(self.build())
            config, count = unwrap(self.scorer.model).config, len(self.groups or ())
            config.reward_mean, config.reward_std = ([0.0] * count, [1.0] * count) if count else (0.0, 1.0)
            self.split(self.scorer)

    def trained_model(self) -> Any:
        return self.scorer.model

    def losses(self, batch: GroupBatch, split: str) -> Tensor:
        """Return the loss of each group (G,) and track accuracy and scores."""
        heads = self.scorer(batch).view(batch.sequences, -1)
        owners = self.owners(batch, split)
        weights = self.head_weights(owners).to(heads)
        parts = [self.head_losses(scores, batch) for scores in heads.unbind(1)]
        losses, centers = ((torch.stack(part, 1) * weights).sum(1) for part in zip(*parts, strict=True))
        scores = (heads * weights[batch.group_of]).sum(1)  # by the head of the group that ranked them
        self.track(split, batch.groups, loss=losses.sum())
        gaps = scores[batch.better] - scores[batch.worse]
        self.track_pairs(split, batch, batch.better, gaps)
        self.track_heads(split, heads.double(), owners[batch.group_of[batch.better]], gaps)
        best = batch.ranks == 0
        self.track(split, best.sum(), chosen_score=scores.where(best, 0.0).sum())
        self.track(split, (~best).sum(), rejected_score=scores.where(~best, 0.0).sum())
        exact = scores.double()  # exported as mean and deviation, whose difference of squares needs the digits
        self.track(split, len(scores), score_mean=exact.sum(), score_squared=(exact**2).sum())
        if split == "val":
            chance = torch.sigmoid(gaps)  # that the better response wins; both orders of a pair are counted
            ones = torch.ones_like(gaps, dtype=torch.long)
            forecasts, outcomes = torch.cat([chance, 1 - chance]), torch.cat([ones, 1 - ones])
            counted = 0 if self.repeated else len(forecasts)
            self.calibration.update(forecasts[:counted], outcomes[:counted])
        return losses + self.center * centers if self.center else losses

    def head_losses(self, scores: Tensor, batch: GroupBatch) -> tuple[Tensor, Tensor]:
        """Return of the scores (S,) of one head the loss and the centering term of each group (G,)."""
        if self.loss == "plackett_luce":
            losses = plackett_luce(scores, batch.ranks, batch.group_of, batch.groups)
        else:
            pairs = (batch.better, batch.worse)
            losses, _ = pairwise_ranking(scores, batch.ranks, batch.group_of, batch.margins, batch.labels, pairs)
        return losses, centering(scores, batch.group_of, batch.groups) if self.center else losses

    def owners(self, batch: GroupBatch, split: str) -> Tensor:
        """Return the number of the head of each group's annotators (G,), -1 where they are not named.

        Raises:
            UserError: annotators of a group that has no head.
        """
        names = self.groups or []
        heads = [-1] * batch.groups
        for place, name in enumerate(batch.annotators if names else ()):
            if name is not None and name not in names:
                raise self.no_head(name, int(batch.index[place]), split)
            heads[place] = -1 if name is None else names.index(name)
        return send(torch.tensor(heads), batch.last.device)

    def head_weights(self, owners: Tensor) -> Tensor:
        """Return how much each head learns from each group (G, H): the head of its annotators all, or all heads alike.

        `owners` are those of :meth:`owners`.
        """
        heads = torch.arange(len(self.groups or [""]), device=owners.device)
        return torch.where(owners[:, None] < 0, 1.0 / len(heads), (owners[:, None] == heads).float())

    def no_head(self, name: str, row: int, split: str) -> UserError:
        """Return the error that the group `name` of a row has no head."""
        names = self.groups or []
        where = self.data.where(split, [row]) if row >= 0 and isinstance(self.data, RowData) else f"row {row}"
        return UserError(
            f"{where}: the group {name!r} has no head; reward.groups is {', '.join(names)}.{nearest(name, names)}"
        )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.groups and isinstance(self.data, RowData):
            for split, rows in self.data.rows.items():
                for row in range(len(rows)):
                    if (name := rows.annotators(row)) is not None and name not in self.groups:
                        raise self.no_head(name, row, split)

    def track_heads(self, split: str, heads: Tensor, owners: Tensor, gaps: Tensor) -> None:
        """Track the accuracy on the pairs (P,) of each group of annotators, and the scores (S, H) of each head.

        `owners` (P,) is the head of the group that ranked a pair.
        """
        correct = pairs_in_order(gaps.detach())
        for number, name in enumerate(self.groups or ()):
            mine, scores = owners == number, heads[:, number]
            self.track(split, mine.sum(), **{f"accuracy_{name}": (correct * mine).sum()})
            self.track(split, len(heads), **{f"mean {name}": scores.sum(), f"squared {name}": (scores**2).sum()})

    def pack(self, batch: Any) -> GroupBatch:
        """Return the packed batch; the Plackett-Luce loss takes no margins and labels."""
        packed = super().pack(batch)
        if self.loss == "plackett_luce" and (packed.margins.any() or (packed.labels != 1).any()):
            raise UserError("reward.loss=plackett_luce uses neither margin nor label; use reward.loss=pairwise")
        return packed

    def training_step(self, batch: GroupBatch, batch_idx: int) -> Tensor:
        return self.checked(self.losses(batch, "train").sum() * batch.per_group, batch)

    def validation_step(self, batch: GroupBatch, batch_idx: int) -> None:
        self.losses(batch, "val")

    def on_validation_epoch_start(self) -> None:
        self.calibration.reset()

    def means(self, split: str, sums: dict[str, tuple[float, float]]) -> tuple[dict[str, float], dict[str, float]]:
        means, counts = super().means(split, sums)
        if means:
            n, mean, square = counts["score_mean"], means["score_mean"], means.pop("score_squared")
            means["score_std"] = math.sqrt(max(square - mean**2, 0.0))
            found = [(mean, square)]
            if self.groups:
                found = [(means.pop(f"mean {name}"), means.pop(f"squared {name}")) for name in self.groups]
                for name in [name for name in self.groups if not counts[f"accuracy_{name}"]]:  # without a pair
                    del means[f"accuracy_{name}"]
                accuracies = [means[f"accuracy_{name}"] for name in self.groups if f"accuracy_{name}" in means]
                if accuracies:
                    means |= {"accuracy_mean": fmean(accuracies), "accuracy_worst": min(accuracies)}
            totals = [[n, n * mean, n * square] for mean, square in found]
            previous = self.moments["train"] if split == "train" else [[0.0] * 3 for _ in found]
            self.moments[split] = [
                [a + b for a, b in zip(*pair, strict=True)] for pair in zip(previous, totals, strict=True)
            ]
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
        heads = self.eval().scorer(batch).view(batch.sequences, -1)
        weights = self.head_weights(self.owners(batch, "val")).to(heads)
        scores = (heads * weights[batch.group_of]).sum(1).tolist()
        self.train(training)
        texts = [
            {"prompt": self.data.tokenizer.decode(row.prompt), "response": self.data.template.decode(response)}
            for row in rows
            for response in row.responses
        ]
        ranks = batch.ranks.tolist()
        of_groups = [dict(zip([f"score_{n}" for n in self.groups or ()], row, strict=False)) for row in heads.tolist()]
        return [
            text | {"rank": rank, "score": score} | by_group
            for text, rank, score, by_group in zip(texts, ranks, scores, of_groups, strict=True)
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["score_moments"] = self.moments

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.moments = checkpoint["score_moments"]

    def export_model(self) -> Any:
        """Return the classifier with the normalization of its scores in `config.reward_mean` and `reward_std`.

        Those of a head are over the responses of all rows, whoever ranked them: so all heads have the same scale on
        the same texts, and their combination does not follow the one that happens to have learned the largest gaps.
        """
        model = super().export_model()
        moments = self.moments["val" if self.moments["val"][0][0] > 1 else "train"]
        if model is not None and self.normalize and moments[0][0] > 1:
            means = [total / count for count, total, _ in moments]
            spreads = [squares / count - m**2 for (count, _, squares), m in zip(moments, means, strict=True)]
            stds = [max(math.sqrt(max(spread, 0.0)), 1e-6) for spread in spreads]
            model.config.reward_mean, model.config.reward_std = (means, stds) if self.groups else (means[0], stds[0])
        return model
