"""The strategy of FSDP2 and tensor parallelism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict

from rlhf_lightning.callbacks.checkpoints import AtomicCheckpointIO
from rlhf_lightning.errors import UserError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices, or with `tensor_parallel_size` above 1 every layer split over that many.

    Weights, gradients, optimizer states and frozen models are sharded; checkpoints hold full tensors, so a run can
    continue on another number of devices.

    Args:
        tensor_parallel_size: devices that share every layer and read the same rows; it divides the number of devices.
        Others: see Lightning's ModelParallelStrategy.
    """

    def __init__(self, tensor_parallel_size: int = 1, **kwargs: Any) -> None:
        super().__init__("auto", tensor_parallel_size, save_distributed_checkpoint=False, **kwargs)
        self.tensor_parallel_size = tensor_parallel_size

    def set_world_ranks(self) -> None:
        super().set_world_ranks()
        groups, rest = divmod(self.world_size, self.tensor_parallel_size)
        if rest:
            raise UserError(
                f"strategy.tensor_parallel_size={self.tensor_parallel_size} does not divide {self.world_size} devices"
            )
        self._data_parallel_size = groups

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Give every rank its part of a checkpoint that any strategy wrote, and return the rest of it.

        Lightning takes the numbers of an optimizer's state for places among the model's parameters; they are places
        among the optimizer's groups, which are the same under every strategy.
        """
        checkpoint = AtomicCheckpointIO().load_checkpoint(Path(self.broadcast(checkpoint_path)))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        assert self.model is not None
        set_model_state_dict(self.model, checkpoint.pop("state_dict"), options=options)
        if self.lightning_module is None or self.lightning_module.trainer.state.fn != TrainerFn.FITTING:
            return checkpoint  # only the weights are validated
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            places = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            renamed = dict(zip(numbers, places, strict=True))
            if saved["state"]:
                named = {
                    "state": {renamed[number]: state for number, state in saved["state"].items()},
                    "param_groups": [
                        group | kernels(now) | {"params": [renamed[number] for number in group["params"]]}
                        for group, now in zip(saved["param_groups"], optimizer.param_groups, strict=True)
                    ],
                }
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return checkpoint


def kernels(group: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an optimizer's group that belong to the strategy, not to the run."""
    return {name: group[name] for name in ("fused", "foreach") if name in group}
