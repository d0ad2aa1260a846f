"""What every stage's LightningModule shares: building, packing, the optimizer."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer

from rlhf_lightning.data.base import RowData
from rlhf_lightning.data.checks import check_rows
from rlhf_lightning.errors import UserError
from rlhf_lightning.generation.engine import Engine
from rlhf_lightning.models.adapters import export_lora, load_model
from rlhf_lightning.models.completion import choose_layout, unwrap, vocabulary_size
from rlhf_lightning.models.sharding import by_mesh, run_inside, shard, whole_state
from rlhf_lightning.modules.tracking import Tracking
from rlhf_lightning.ops.groups import Group, GroupBatch, GroupList, Layout
from rlhf_lightning.ops.transfer import pinned

log = logging.getLogger(__name__)
# packing in the module is on purpose: the layout is the model's, whoever loads the data
warnings.filterwarnings("ignore", ".*overridden `(on_before|transfer)_batch_.*` in `LightningModule`.*")

MakeOptimizer = Callable[[list[dict[str, Any]]], Optimizer]
MakeSchedule = Callable[[Optimizer, Any], Any]


class StageModule(Tracking):
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
        self.phase = ""  # what a long training step is doing now, for the progress bar

    def build(self, load: Callable[[], nn.Module] | None = None) -> Any:
        """Return a model for :meth:`split`: that of `load`, else the one to train, with LoRA where configured."""
        defer = self.device_mesh is not None
        return load_model(load, None, defer) if load else load_model(self.load, self.lora, defer)

    def run_precision(self) -> Any:
        """Return the context in which the Trainer computes, autocast for mixed precision."""
        try:
            return self.trainer.precision_plugin.forward_context()
        except RuntimeError:  # not attached to a Trainer
            return nullcontext()

    def on_fit_start(self) -> None:
        """Check the rows before the first step: a wrong mask or tokenizer would otherwise show only in the result."""
        self.prepared = True
        self._losses.clear()  # of a step that an earlier fit did not finish
        if isinstance(self.data, RowData):
            check_rows(self.data, self.vocabulary)

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
        if isinstance(batch, GroupList) and batch.packed is not None:
            return batch.packed
        return self.group_list(batch).pack(self.layout)

    def pack_ahead(self, batch: GroupList) -> GroupList:
        """Return the groups of a batch with their packed batch, ready to be copied to the device."""
        batch.packed = pinned(self.pack(batch), self.device)
        return batch

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

    def split(self, model: Any, frozen: bool = False) -> Any:
        """Return `model`, a CompletionModel or ScalarModel, sharded across devices where the strategy asks for it.

        Models that are trained choose the layout of the batches: one that all of them compute correctly.

        Args:
            frozen: it is not trained.
        """
        with self.run_precision():
            if self.device_mesh is not None:
                if not frozen:  # Lightning does it after the model's first pass, which is too late
                    self.trainer.precision_plugin.convert_module(model)
                shard(model, self.device_mesh, frozen)
            layout, reason = (self.layout, None) if frozen else run_inside(model, choose_layout, model.decoder)
        if layout == "padded" != self.layout:
            self.layout = "padded"
            log.warning("prompts are not shared and rows are padded for this model: %s", reason)
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
        whole = self.build()
        whole.load_state_dict(weights, assign=True)
        unwrap(whole).tie_weights()
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


def decay_groups(module: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Return parameter groups of the trainable parameters: matrices with weight decay, the rest without."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trainable if p.ndim >= 2], **options}
    others = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0, **options}
    return [group for group in (matrices, others) if group["params"]]
