"""What every stage's LightningModule shares: building, optimizer, weighted metrics, the NaN guard."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_
from torch.optim import Optimizer

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.checks import check_rows
from rlhf_lightning.distributed import data_ranks
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.adapters import export_lora, load_with_lora
from rlhf_lightning.models.completion import choose_layout, vocabulary_size
from rlhf_lightning.models.sharding import by_mesh, shard, total_norm, whole_state
from rlhf_lightning.modules.trainer import TrainerHooks
from rlhf_lightning.ops.groups import Group, GroupBatch, GroupList, Layout
from rlhf_lightning.ops.ranking import pairs_in_order
from rlhf_lightning.ops.statistics import share_interval

log = logging.getLogger(__name__)
# packing in the module is on purpose: the layout is the model's, whoever loads the data
warnings.filterwarnings("ignore", ".*overridden `on_before_batch_transfer` in `LightningModule`.*")

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeSchedule = Callable[[Optimizer, Any], Any]


class StageModule(TrainerHooks):
    """A stage of RLHF: loads its model in `configure_model`, steps one optimizer, logs weighted means.

    A loader may yield lists of :class:`Group`, a :class:`GroupList`, or a packed :class:`GroupBatch`.

    Args:
        load: returns the Hugging Face model to train.
        optimizer: called with parameter groups, for example `partial(torch.optim.AdamW, lr=1e-5)`.
        schedule: called with (optimizer, total_steps), None where only time ends the run; None is a constant rate.
        lora: arguments of :func:`rlhf_lightning.models.adapters.add_lora`, or None to train every weight.
    """

    min_responses = 1
    """Responses that a group must have for the stage to learn from it."""

    def __init__(
        self,
        load: Callable[[], nn.Module],
        optimizer: MakeOptimizer,
        schedule: MakeSchedule | None = None,
        lora: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.load, self.make_optimizer, self.make_schedule = load, optimizer, schedule
        self.lora = lora
        self.layout: Layout = "packed"
        self.validated_at = -1  # the update after which validation last ran
        self.phase = ""  # what a long training step is doing now, for the progress bar
        self.repeated = False  # whether this validation batch only fills up the number of batches of this rank
        self._sums: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._pairs: list[Tensor] = []  # of held-out pairs: row, batch, group in the batch, whether they are in order

    def build(self) -> Any:
        """Return the loaded model, with LoRA layers where configured, and choose the layout of its batches."""
        model = load_with_lora(self.load, self.lora)
        with self.run_precision():
            self.layout, reason = choose_layout(model)
        if reason:
            log.warning("prompts are not shared and rows are padded for this model: %s", reason)
        return model

    def run_precision(self) -> Any:
        """Return the context in which the Trainer computes, autocast for mixed precision."""
        try:
            return self.trainer.precision_plugin.forward_context()
        except RuntimeError:  # not attached to a Trainer
            return nullcontext()

    def on_fit_start(self) -> None:
        """Check the rows before the first step: a wrong mask or tokenizer would otherwise show only in the result."""
        self.prepared = True
        if isinstance(self.data, RowData):
            check_rows(self.data, self.vocabulary)

    @property
    def data(self) -> Any:
        """The Trainer's data module, or None when there is none."""
        try:
            return getattr(self.trainer, "datamodule", None)
        except RuntimeError:  # not attached to a Trainer
            return None

    @property
    def vocabulary(self) -> int:
        """Number of token ids the model has an embedding for."""
        return vocabulary_size(self.trained_model())

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.pack(batch)

    def pack(self, batch: Any) -> Any:
        """Return what a loader yielded as a packed batch in the layout that the model computes correctly."""
        if isinstance(batch, GroupBatch):
            if self.layout == "padded" and not batch.padded:
                raise UserError("this model needs padded rows: let the loader yield lists of Group (collate_fn=list)")
            return batch
        return self.group_list(batch).pack(self.layout)

    def group_list(self, batch: Any) -> GroupList:
        """Return the groups of a batch.

        Raises:
            UserError: the loader yields something else, an empty list, groups with too few responses, or ids the model
                has no embedding for; the rows of our data modules are checked at the start of the run, those of later
                windows here.
        """
        ours = isinstance(batch, GroupList)
        groups = batch.groups if ours else batch
        if not ours and not (isinstance(batch, list | tuple) and batch and all(isinstance(g, Group) for g in batch)):
            kind = type(batch).__name__
            if isinstance(batch, list | tuple):
                kind += f" of {type(batch[0]).__name__}" if batch else " without groups"
            raise UserError(
                f"the loader yields {kind}; {type(self).__name__} takes a list of Group (collate_fn=list) or a packed "
                "GroupBatch"
            )
        few = next((group for group in groups if len(group.responses) < self.min_responses), None)
        if few is not None:
            raise UserError(
                f"{type(self).__name__} needs at least {self.min_responses} response(s) per prompt; the loader yields "
                f"a group with {len(few.responses)}"
            )
        if ours and getattr(self.data, "windows", None) is None:
            return batch
        for group in groups:
            worst = max(map(max, filter(None, [group.prompt, *group.responses])))
            if worst >= self.vocabulary:
                place = f"{self.data.where('train', [group.index])} contains" if ours else "the loader yields"
                raise UserError(f"{place} the token id {worst}, but the model has {self.vocabulary} ids")
        return batch if ours else GroupList(groups)

    def split(self, model: Any) -> Any:
        """Return `model`, a CompletionModel or ScalarModel, sharded across devices where the strategy asks for it."""
        if self.device_mesh is not None:
            shard(model, self.device_mesh)
        return model

    def export_model(self) -> Any:
        """Return the plain Hugging Face model to save, or its adapter, see :func:`export_lora`.

        Of a sharded model only the first rank has it, others get None.
        """
        model = self.trained_model()
        if self.device_mesh is None:
            return export_lora(model)
        weights = whole_state(model)
        if not self.trainer.is_global_zero:
            return None
        whole = load_with_lora(self.load, self.lora)
        whole.load_state_dict(weights)
        return export_lora(whole)

    def trained_model(self) -> Any:
        """Return the Hugging Face model this stage trains."""
        raise NotImplementedError

    # ---- samples ---------------------------------------------------------------------------------------------------

    def text_samples(self, count: int, max_new_tokens: int, engine: Engine) -> list[dict[str, Any]]:
        """Return up to `count` prompts, each with a response, as {"prompt", "response", ...}; empty if there are none.

        Every rank calls it at the same time. It leaves the random states and the mode (training, evaluation) alone.
        """
        return []

    def shown_rows(self, count: int) -> list[Group]:
        """Return the first `count` held-out rows, without held-out rows the first training rows."""
        if not isinstance(self.data, RowData):
            return []
        split = "val" if "val" in self.data.rows else "train"
        return [self.data.group(split, row) for row in range(min(count, len(self.data.rows[split])))]

    # ---- optimizer -------------------------------------------------------------------------------------------------

    def total_steps(self) -> int | None:
        """Return the optimizer updates of the whole run, None where nothing says how many there will be."""
        trainer = self.trainer
        limits = [trainer.max_steps] if trainer.max_steps and trainer.max_steps > 0 else []
        if trainer.max_epochs and trainer.max_epochs > 0:
            steps = getattr(self.data, "steps_per_epoch", None) or self.loader_steps()
            limits += [trainer.max_epochs * steps * self.updates_per_batch()] if steps else []
        return min(limits, default=None)

    def loader_steps(self) -> int | None:
        """Return the steps that Lightning makes of a loader that plans none; None of one without a length."""
        trainer = self.trainer
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
            trainer.fit_loop._combined_loader = None  # made again later, at the position that a resume restores
        batches = trainer.num_training_batches
        return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else None

    def updates_per_batch(self) -> int:
        """Return the optimizer updates made from one step of the data module."""
        return 1

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters, without weight decay on norms and biases."""
        return decay_groups(self)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in self.parameters()):
            log.warning(
                "weights of half precision lose most updates of a small learning rate; use model.load.dtype=float32 "
                "with trainer.precision=bf16-mixed"
            )
        try:
            optimizer = self.make_optimizer(self.parameter_groups())
        except (ValueError, TypeError) as error:  # a value, or an argument that the class does not take
            raise UserError(f"optimizer: {error}") from error
        for group in optimizer.param_groups:
            if len(by_mesh(group["params"])) > 1:  # tensor parallelism shards only some: no operation takes both
                group |= {"fused": False, "foreach": False}
        if self.make_schedule is None:
            return optimizer
        schedule = self.make_schedule(optimizer, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

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
            added = torch.as_tensor(weight, dtype=torch.float64, device=value.device)
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

    def reduced(self, split: str) -> tuple[dict[str, float], dict[str, float]]:
        """Return the means of `split` over all ranks and the number of items of each, and reset them."""
        sums = self._sums.pop(split, {})
        if not sums:
            return {}, {}
        table = self.reduce(torch.stack([torch.stack(pair) for pair in sums.values()]).to(self.device))
        totals, counts = table.T.tolist()
        means = {name: total / max(count, 1) for name, total, count in zip(sums, totals, counts, strict=True)}
        return means, dict(zip(sums, counts, strict=True))

    def flush(self, split: str) -> dict[str, float]:
        """Log and return the means of `split`; a held-out accuracy comes with its 95% interval.

        Under `Trainer.test` those of "val" are logged as test/... .
        """
        if split == "val" and not self.trainer.testing:
            self.validated_at = self.trainer.global_step
        means, _ = self.reduced(split)
        if split == "val" and "accuracy" in means:
            low, high = self.pair_interval()
            means |= {"accuracy_low": low, "accuracy_high": high} if math.isfinite(low) else {}
        shown = "test" if self.trainer.testing else split
        means = {f"{shown}/{name}": value for name, value in means.items()}
        self.log_dict(means, sync_dist=split == "val")  # equal on all ranks already; without it Lightning warns
        return means

    def clip(self, limit: float | None, parameters: Iterable[nn.Parameter] | None = None) -> Tensor:
        """Scale the gradients to a total norm of at most `limit` (None or 0: do not clip); return the norm before.

        Lightning's own clipping refuses fused optimizers under mixed precision, and the norm is logged anyway.

        Args:
            parameters: those whose gradients are clipped together; None is all of the module's.
        """
        given = self.parameters() if parameters is None else parameters
        gradients = [p.grad for p in given if p.grad is not None]
        if not gradients:
            return torch.zeros(())
        norm = total_norm(gradients)
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient is not finite at step {self.global_step}; lower optimizer.lr, or look at the data and "
                "the reward"
            )
        if limit and limit > 0:
            factor = limit / (norm.item() + 1e-6)
            for tensors in by_mesh(gradients) if factor < 1 else []:
                torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        by_value = gradient_clip_algorithm == "value"
        norm = self.clip(None if by_value else gradient_clip_val)
        if by_value and gradient_clip_val:
            clip_grad_value_(self.parameters(), gradient_clip_val)
        self.log_dict({"optim/grad_norm": norm, "optim/lr": optimizer.param_groups[0]["lr"]})
        self.flush("train")

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

    def checked(self, loss: Tensor, batch: GroupBatch) -> Tensor:
        """Return `loss`, or raise a UserError with the step and the rows when it is not finite."""
        if not torch.isfinite(loss):
            rows = batch.index.tolist()
            places = self.data.where("train", rows) if isinstance(self.data, RowData) else f"rows {rows}"
            raise UserError(
                f"the loss is {loss.item()} at step {self.global_step}, in {places}; lower optimizer.lr, or look at "
                "these rows"
            )
        return loss


def decay_groups(module: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Return parameter groups of the trainable parameters: matrices with weight decay, the rest without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim >= 2], **options}
    others = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, **options}
    return [group for group in (matrices, others) if group["params"]]
