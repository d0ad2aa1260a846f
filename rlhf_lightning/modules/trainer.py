"""How the modules meet Lightning's Trainer: what it does beside `fit`, and what of it is refused, with the reason."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from rlhf_lightning.data.base import RowData
from rlhf_lightning.errors import UserError
from rlhf_lightning.models.shards import in_one_file
from rlhf_lightning.ops.groups import GroupBatch
from rlhf_lightning.ops.transfer import send

# a sharded model is refused below
warnings.filterwarnings("ignore", ".*WeightAveraging doesn't support sharding model layers.*")

HALF = ("16", "16-true", "16-mixed")
REPLACED = {FSDPStrategy: "strategy=fsdp", DeepSpeedStrategy: "strategy=deepspeed"}
REFUSED = {
    GradientAccumulationScheduler: "changes the microbatches of a step while steps are planned for the whole run; use "
    "trainer.accumulate_grad_batches",
    ModelPruning: "renames weights, and a model folder holds those of its architecture; prune the exported model",
}
MANUAL = {  # callbacks that read the loss or change the steps of automatic optimization, which PPO does not use
    LearningRateFinder: "set optimizer.lr, or sweep over it",
    SpikeDetection: "look at policy/ratio_max and kl/reference",
    StochasticWeightAveraging: "use EMAWeightAveraging",
}


def check_precision(precision: str | int) -> None:
    """Raise a UserError for half precision; on a CPU Lightning turns it into bfloat16."""
    if str(precision) in HALF:
        raise UserError(f"trainer.precision={precision} overflows in RLHF losses; use bf16-mixed")


def check_trainer(trainer: Trainer, module: LightningModule) -> None:
    """Raise a UserError for a setting of the Trainer that would give another result than it says."""
    name = type(module).__name__
    for strategy, spelled in REPLACED.items():
        if isinstance(trainer.strategy, strategy):
            raise UserError(
                f"{spelled} is not supported: strategy=fsdp2 (ShardedStrategy) shards weights, gradients and optimizer "
                "states, and its checkpoints continue on any number of devices"
            )
    if getattr(trainer.strategy, "gather_sampling", False) and not getattr(module, "samples", False):
        raise UserError(f"strategy.gather_sampling=true is for stages that sample in this process; {name} does not")
    check_precision(trainer.precision)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind = type(callback).__name__
        for refused, reason in REFUSED.items():
            if isinstance(callback, refused):
                raise UserError(f"{kind} {reason}")
        if isinstance(callback, BatchSizeFinder) and isinstance(trainer.datamodule, RowData):  # type: ignore[attr-defined]
            raise UserError(
                f"{kind} would change data.batch_size, the rows of a step, after the schedule is planned; "
                "trainer.accumulate_grad_batches splits a step, and plan=true prints the memory it needs"
            )
        if isinstance(callback, WeightAveraging) and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(f"{kind} copies the whole model, which a sharded strategy does not have; use strategy=ddp")
        if isinstance(callback, WeightAveraging) and (getattr(module, "lora", None) or {}).get("quantization"):
            raise UserError(f"{kind} averages every weight, and those of 4 bits are codes; use adapter=lora")
        if not module.automatic_optimization:
            for other, instead in MANUAL.items():
                if isinstance(callback, other):
                    raise UserError(f"{kind} needs automatic optimization, and {name} makes its own steps; {instead}")


class TrainerHooks(LightningModule):
    """Lightning's methods beside training: test, predict, `load_from_checkpoint`, and the rate that `lr_find` sets."""

    make_optimizer: Any
    flops_per_batch: int | None = None  # unknown; ThroughputMonitor warns where there is no such attribute
    prepared = False  # whether `on_fit_start` has run, which validation alone needs as well

    def configure_callbacks(self) -> list[Callback]:
        """Check the Trainer: this is the first hook, before the callbacks copy or change the model."""
        check_trainer(self.trainer, self)
        return []

    def setup(self, stage: str) -> None:
        check_trainer(self.trainer, self)  # of a subclass with callbacks of its own
        if stage == "predict" and type(self).predict_step is TrainerHooks.predict_step:
            self.predict_step(None)  # before the loader is asked for

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch on `device`; a GPU copies it while the CPU goes on."""
        if isinstance(batch, GroupBatch):
            return send(batch, device)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        """Log as Lightning does, but keep a plain number on the CPU: Lightning copies it to the device and back."""
        if isinstance(value, int | float) and not options.get("sync_dist"):
            value = torch.tensor(value, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        super().log(name, value, *args, **options)

    @property
    def lr(self) -> float:
        """The learning rate of `optimizer`, a partial call; `Tuner.lr_find` sets it."""
        if not isinstance(self.make_optimizer, partial) or "lr" not in self.make_optimizer.keywords:
            raise AttributeError("lr: optimizer is no partial call with lr=...")
        return self.make_optimizer.keywords["lr"]

    @lr.setter
    def lr(self, rate: float) -> None:
        self.make_optimizer = partial(self.make_optimizer, lr=rate)
        for config in self.trainer.lr_scheduler_configs:  # of a run that goes on, as under LearningRateFinder
            config.scheduler.base_lrs = [rate] * len(config.scheduler.base_lrs)

    def on_validation_start(self) -> None:
        if not self.prepared:
            self.on_fit_start()

    on_test_start = on_validation_start

    # ---- test: the metrics of validation as test/... ---------------------------------------------------------------

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def on_test_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.on_validation_batch_start(batch, batch_idx, dataloader_idx)

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.on_validation_batch_end(outputs, batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        raise UserError(
            f"Trainer.predict: {type(self).__name__} trains a model; prompts are answered by "
            "rlhf_lightning.generation.answers.answer, evaluate_policy and stage=candidates"
        )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Return the module with the weights of a checkpoint, as Lightning does; only tensors and primitives are read.

        Raises:
            UserError: an argument of the constructor is missing; a checkpoint holds no functions.
        """
        try:
            return super().load_from_checkpoint(in_one_file(checkpoint_path), *args, **kwargs | {"weights_only": True})
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise UserError(
                f"{cls.__name__}.load_from_checkpoint(path, load=..., optimizer=..., ...) takes the arguments of "
                f"{cls.__name__}, which a checkpoint does not hold: {error}"
            ) from error
