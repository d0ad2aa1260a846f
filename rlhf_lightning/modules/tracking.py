"""What a step measures and when it is read: weighted means, the finite check, gradient clipping.

A number that is read from a GPU waits until everything queued there is computed, and no further kernel is queued
meanwhile. So losses, gradient norm and metrics of an optimizer step stay on the device until the update, and are then
read together, before a weight changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer

from rlhf_lightning.data.base import RowData
from rlhf_lightning.distributed import data_ranks
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.sharding import by_mesh, total_norm
from rlhf_lightning.modules.trainer import TrainerHooks
from rlhf_lightning.ops.groups import GroupBatch
from rlhf_lightning.ops.ranking import pairs_in_order
from rlhf_lightning.ops.statistics import share_interval
from rlhf_lightning.ops.transfer import numbers


class Tracking(TrainerHooks):
    """A LightningModule that logs weighted means over optimizer steps and updates only from finite gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.validated_at = -1  # the update after which validation last ran
        self.repeated = False  # whether this validation batch only fills up the number of batches of this rank
        self._sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._pairs: list[Tensor] = []  # of held-out pairs: row, batch, group in the batch, whether they are in order
        self._losses: list[tuple[Tensor, Tensor]] = []  # of the microbatches since the last update: loss, rows

    @property
    def data(self) -> Any:
        """The Trainer's data module, or None when there is none."""
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # not attached to a Trainer
            return None

    @property
    def data_ranks(self) -> int:
        """The number of ranks that read different rows."""
        return data_ranks(self.trainer)[1]

    def reduce(self, values: Tensor, op: str = "sum") -> Tensor:
        """Return the sum (or "min", "max") of a small tensor over the ranks that read different rows."""
        if self.trainer.world_size == 1:
            return values
        group = self.device_mesh["data_parallel"].get_group() if self.device_mesh is not None else None
        return self.trainer.strategy.reduce(values.to(self.device), group, reduce_op=op).to(values.device)

    # ---- metrics ---------------------------------------------------------------------------------------------------

    def track(self, split: str, weight: Tensor | float, **sums: Tensor) -> None:
        """Add sums over `weight` items to the running means of `split`; those of a repeated batch count nothing."""
        means = self._sums.setdefault(split, {})
        for name, value in sums.items():
            value = value.detach().double()
            # a number is filled in by a kernel: copying it would wait for the device
            known = isinstance(weight, Tensor)
            added = weight.to(value) if known else torch.full((), weight, dtype=torch.float64, device=value.device)
            if self.repeated:
                value, added = torch.zeros_like(value), torch.zeros_like(added)
            total, count = means.get(name, (torch.zeros_like(value), torch.zeros_like(added)))
            means[name] = (total + value, count + added)

    def track_pairs(self, split: str, batch: GroupBatch, better: Tensor, gaps: Tensor) -> None:
        """Track accuracy and margin of pairs (P,): their better responses and how far these score higher."""
        correct = pairs_in_order(gaps.detach())
        self.track(split, len(gaps), accuracy=correct.sum(), margin=gaps.sum())
        if split == "val":
            groups = batch.group_of[better]
            number = torch.full_like(groups, len(self._pairs))
            pairs = torch.stack([batch.index[groups], number, groups, correct], 1)
            self._pairs.append(pairs[:0] if self.repeated else pairs)

    def pair_interval(self) -> tuple[float, float]:
        """Return the 95% interval of the accuracy over the held-out pairs of all ranks, and forget them.

        The pairs of one prompt are not independent, whether they come from one ranking or from several rows.
        """
        pairs, self._pairs = torch.cat(self._pairs), []
        outcomes: list[float] = []
        prompts: list[Any] = []
        for rank, part in enumerate(self.gather(pairs)):
            for row, *place, correct in part.tolist():
                known = row >= 0 and isinstance(self.data, RowData)
                prompts.append(tuple(self.data.rows["val"][int(row)].prompt) if known else (rank, *place))
                outcomes.append(correct)
        _, low, high = share_interval(outcomes, prompts)
        return low, high

    def gather(self, values: Tensor) -> list[Tensor]:
        """Return `values` (N, ...) of every rank that reads different rows; N may differ between ranks."""
        if self.trainer.world_size == 1:
            return [values]
        group = self.device_mesh["data_parallel"].get_group() if self.device_mesh is not None else None

        def everywhere(mine: Tensor) -> list[Tensor]:
            parts = [torch.empty_like(mine) for _ in range(self.data_ranks)]
            torch.distributed.all_gather(parts, mine, group)
            return parts

        counts = torch.cat(everywhere(torch.tensor([len(values)], device=self.device))).tolist()
        padded = torch.zeros(max(counts), *values.shape[1:], dtype=values.dtype, device=self.device)
        padded[: len(values)] = values
        return [part[:count] for part, count in zip(everywhere(padded), counts, strict=True)]

    def summed(self, split: str) -> tuple[list[str], Tensor]:
        """Return the names tracked for `split`, and their totals and counts (M, 2) over all ranks; reset them."""
        sums = self._sums.pop(split, {})
        table = [torch.stack(pair) for pair in sums.values()]
        if not table:
            return [], torch.zeros(0, 2, device=self.device)
        return list(sums), self.reduce(torch.stack(table).to(self.device))

    def means(self, split: str, sums: dict[str, tuple[float, float]]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means of what was summed to (total, count), and the number of items of each."""
        means = {name: total / max(count, 1) for name, (total, count) in sums.items()}
        return means, {name: count for name, (_, count) in sums.items()}

    def reduced(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means of `split` over all ranks and the number of items of each, and reset them."""
        names, table = self.summed(split)
        return self.means(split, dict(zip(names, table.tolist(), strict=True)))

    def flush(self, split: str, means: dict[str, float] | None = None) -> dict[str, float]:
        """Log and return the means of `split`, given or read now; a held-out accuracy comes with its 95% interval.

        Under `Trainer.test` those of "val" are logged as test/... .
        """
        if split == "val" and not self.trainer.testing:
            self.validated_at = self.trainer.global_step
        means = self.reduced(split)[0] if means is None else means
        if split == "val" and "accuracy" in means:
            low, high = self.pair_interval()
            means |= {"accuracy_low": low, "accuracy_high": high} if math.isfinite(low) else {}
        shown = "test" if self.trainer.testing else split
        means = {f"{shown}/{name}": value for name, value in means.items()}
        self.log_dict(means, sync_dist=split == "val")  # equal on all ranks already; without it Lightning warns
        return means

    # ---- the update ------------------------------------------------------------------------------------------------

    def checked(self, loss: Tensor, batch: GroupBatch) -> Tensor:
        """Return `loss`, which :meth:`configure_gradient_clipping` checks before the update it is part of."""
        self._losses.append((loss.detach(), batch.index))
        return loss

    def check_losses(self, losses: list[float], rows: list[Tensor]) -> None:
        """Raise a UserError with the step and the rows of the first loss that is not finite."""
        for loss, index in zip(losses, rows, strict=True):
            if math.isfinite(loss):
                continue
            numbered = index.tolist()
            places = self.data.where("train", numbered) if isinstance(self.data, RowData) else f"rows {numbered}"
            raise UserError(
                f"the loss is {loss} at step {self.global_step}, in {places}; lower optimizer.lr, or look at these rows"
            )

    def gradient_norm(self, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """Return the total norm, on the device, of the gradients of `parameters`, of None all of the module's.

        Lightning's own clipping refuses fused optimizers under mixed precision, and the norm is logged anyway.
        """
        gradients = gradients_of(self.parameters() if parameters is None else parameters)
        return total_norm(gradients) if gradients else torch.zeros((), device=self.device)

    def clip(self, norm: float, limit: float | None, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Scale gradients whose norm is `norm` to at most `limit` (None or 0: do not clip).

        Raises:
            UserError: the norm is not finite.
        """
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient is not finite at step {self.global_step}; lower optimizer.lr, or look at the data and "
                "the reward"
            )
        if not limit or limit <= 0 or (factor := limit / (norm + 1e-6)) >= 1:
            return
        for tensors in by_mesh(gradients_of(self.parameters() if parameters is None else parameters)):
            torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Read what the step measured, and clip; this is the only place where a step waits for the device."""
        losses, self._losses = self._losses, []
        names, table = self.summed("train")
        read = numbers(norm=self.gradient_norm(), sums=table, losses=[loss for loss, _ in losses])
        self.check_losses(read["losses"], [rows for _, rows in losses])
        (norm,), totals, counts = read["norm"], read["sums"][::2], read["sums"][1::2]
        sums = dict(zip(names, zip(totals, counts, strict=True), strict=True))
        by_value = gradient_clip_algorithm == "value"
        self.clip(norm, None if by_value else gradient_clip_val)
        if by_value and gradient_clip_val:
            clip_grad_value_(self.parameters(), gradient_clip_val)
        self.log_dict({"optim/grad_norm": norm, "optim/lr": optimizer.param_groups[0]["lr"]})
        self.flush("train", self.means("train", sums)[0])

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.repeated = batch.per_group == 0

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.repeated = False

    def on_validation_epoch_end(self) -> None:
        if self.trainer.sanity_checking:
            self._sums.pop("val", None)
            self._pairs.clear()
            return
        self.flush("val")


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients that there are."""
    return [p.grad for p in parameters if p.grad is not None]
